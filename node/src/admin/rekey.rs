//! What administrators ask for to have transport keys and the replication key replaced, on the leader. Each call begins
//! something; the rekey driver goes on with it, on whichever node leads.

use hsm_api::ErrorCode;
use hsm_api::admin::{RekeyReplicationResponse, RekeyTransportResponse};
use raft_store::command::{Conflict, Done, Missing, Op, Refusal, RekeyReplication, RekeyTransport};
use raft_store::names::SlotName;
use raft_store::state::slot::Slot;
use raft_store::storage::Published;
use serde_json::Value;

use super::call::CallError;
use super::service::{AdminService, json};
use crate::consensus::ProposeError;
use crate::rotation::plan::{Asked, Attempt, no_transport};

/// Rounds of one call. Each but the last met another change.
const MAX_ROUNDS: usize = 16;

impl AdminService {
    /// A slot is to get its next transport key.
    ///
    /// # Errors
    /// `conflict` while one is on its way or a version is pending, `not_ready` inside a change of the membership,
    /// `slot_failed` where a member's slot does not serve: the key could not come to everybody.
    pub(super) async fn rekey_transport(
        &self,
        slot: &SlotName,
        restart: bool,
        asked: &Asked,
    ) -> Result<Value, CallError> {
        let cluster = &*self.parts.cluster;
        for _ in 0..MAX_ROUNDS {
            let published = cluster.published();
            let known = known(&published, slot)?;
            let settled = |done: Done| match done {
                Done::TransportRekey { generation } => Some(generation),
                _ => None,
            };
            let attempt = match asked.attempt(&published.state, settled)? {
                // Of the rekey that was asked for then: another one may have come of it.
                Attempt::Settled(generation) => return begun(slot, generation),
                Attempt::New(attempt) => attempt,
            };
            membership_settled(&published)?;
            self.parts.rotator.keys().check(slot)?;
            self.parts.rotator.check_holders(&published, slot)?;
            let offered = known.offered_transport().map(|offered| offered.id);
            if restart && offered.is_none() {
                let detail =
                    format!("no transport key of slot {slot} is on its way: there is nothing to begin again");
                return Err(CallError::new(ErrorCode::Conflict, detail));
            }
            let newest = known.newest_generation();
            let op = Op::RekeyTransport(RekeyTransport {
                slot: slot.clone(),
                expected_generation: newest,
                give_up: offered.filter(|_| restart),
            });
            let (id, origin) = (asked.id(attempt), asked.origin.clone());
            match cluster.propose(id, asked.body_hash, origin, op).await {
                Ok(_) => return begun(slot, newest),
                // Another one was quicker, and its key may be on its way by now.
                Err(ProposeError::Refused(Refusal::Conflict(why))) if is_passing(&why) => {
                    tracing::info!(%slot, %why, "a rekey met another change; looking again");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let detail = format!("slot {slot} changes faster than this request can follow");
        Err(CallError::new(ErrorCode::Conflict, detail))
    }

    /// The other one of this leader's replication keys becomes the cluster's.
    ///
    /// # Errors
    /// `conflict` while a node has not said that it has it too, while something is still being sealed anew, and if this
    /// leader has no other one.
    pub(super) async fn rekey_replication(&self, asked: &Asked) -> Result<Value, CallError> {
        let cluster = &*self.parts.cluster;
        let published = cluster.published();
        let meta = published.state.meta().ok_or(ProposeError::Uninitialised)?;
        let answer = |key: [u8; 8], former: [u8; 8]| {
            json(&RekeyReplicationResponse {
                key: hex::encode(key),
                former: hex::encode(former),
            })
        };
        let settled = |done: Done| match done {
            Done::ReplicationRekey { key, former } => Some((key, former)),
            _ => None,
        };
        let attempt = match asked.attempt(&published.state, settled)? {
            Attempt::Settled((key, former)) => return answer(key, former),
            Attempt::New(attempt) => attempt,
        };
        membership_settled(&published)?;
        let from = meta.trk_id;
        let Some(other) = self.parts.replication.other(meta) else {
            let detail = format!(
                "the leader has the replication key {} alone, which is the cluster's: give every node the new key too \
                 (cluster.token_replication.encryption_key_env, and the present one as previous_encryption_key_env), \
                 restart them one by one, and ask again",
                hex::encode(from)
            );
            return Err(CallError::new(ErrorCode::Conflict, detail));
        };
        let to = other.trk_id();
        let (id, origin) = (asked.id(attempt), asked.origin.clone());
        let op = Op::RekeyReplication(RekeyReplication { from, to });
        cluster.propose(id, asked.body_hash, origin, op).await?;
        answer(to, from)
    }
}

fn known<'p>(published: &'p Published, slot: &SlotName) -> Result<&'p Slot, CallError> {
    let Some(known) = published.state.slots().get(slot) else {
        return Err(Refusal::from(Missing::Slot(slot.clone())).into());
    };
    match known.current_transport() {
        Some(_) => Ok(known),
        None => Err(no_transport(slot)),
    }
}

/// Who has to hold a new key is open inside such a change.
fn membership_settled(published: &Published) -> Result<(), CallError> {
    if published.membership.membership().get_joint_config().len() <= 1 {
        return Ok(());
    }
    Err(CallError::new(
        ErrorCode::NotReady,
        "a change of the membership is in progress; try again",
    ))
}

/// Whether looking again may find it otherwise at once.
fn is_passing(why: &Conflict) -> bool {
    matches!(
        why,
        Conflict::TransportGeneration { .. } | Conflict::TransportState { .. }
    )
}

fn begun(slot: &SlotName, generation: u32) -> Result<Value, CallError> {
    json(&RekeyTransportResponse {
        slot: slot.to_string(),
        generation,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use crate::rotation::cluster::Cluster;
    use hsm_api::admin::{RekeyReplicationRequest, RekeyTransportRequest};
    use raft_store::command::{OfferTransportKey, ResealKeys};
    use raft_store::names::TransportId;
    use raft_store::state::slot::{TransportMode, TransportState};

    use super::super::call::{AdminBody, AdminCall};
    use super::super::service::tests::{Bench, bench, call};
    use super::*;
    use crate::consensus::LeaderCalls;
    use crate::rotation::testing::slot;

    fn transport(key: &str, restart: bool) -> AdminCall {
        let body = AdminBody::RekeyTransport {
            slot: slot("s"),
            restart,
        };
        let request = RekeyTransportRequest {
            slot: "s".to_owned(),
            restart,
        };
        call("Admin", key, body, &request)
    }

    fn replication(key: &str) -> AdminCall {
        call(
            "Admin",
            key,
            AdminBody::RekeyReplication,
            &RekeyReplicationRequest {},
        )
    }

    /// Every member has a key for the slot.
    fn ready() -> Bench {
        let bench = bench();
        bench.cluster.with(|world| {
            for voter in world.voters.clone() {
                world.slot_keys(voter);
            }
        });
        bench
    }

    fn offer(bench: &Bench, number: u8) {
        bench.cluster.with(|world| {
            world.ok(Op::OfferTransportKey(OfferTransportKey {
                slot: slot("s"),
                id: TransportId([number; 16]),
                expected_generation: u32::from(number) - 1,
                mode: TransportMode::Standard,
                check: vec![number; 40],
                grants: [].into(),
            }));
        });
    }

    #[tokio::test]
    async fn a_rekey_is_begun_once_however_often_it_is_asked_for() {
        let bench = ready();
        let first = bench.service.execute(transport("a", false)).await.unwrap();
        assert_eq!(first, serde_json::json!({"slot": "s", "generation": 1}));
        offer(&bench, 2);
        // A late repeat of the same request begins no second one.
        let again = bench.service.execute(transport("a", false)).await.unwrap();
        assert_eq!(again, first);
        let asked = |op: &Op| matches!(op, Op::RekeyTransport(_));
        assert_eq!(bench.cluster.count(asked), 1);
        let other = bench.service.execute(transport("b", false)).await.unwrap_err();
        assert_eq!(other.code, ErrorCode::Conflict);
        assert!(other.detail.contains("rekey status"), "{other}");
    }

    #[tokio::test]
    async fn a_late_repeat_is_answered_with_what_it_asked_for_and_not_with_what_came_after() {
        let bench = ready();
        let first = bench.service.execute(transport("a", false)).await.unwrap();
        offer(&bench, 2);
        let second = bench.service.execute(transport("b", true)).await.unwrap();
        assert_eq!(second["generation"], 2);
        let again = bench.service.execute(transport("a", false)).await.unwrap();
        assert_eq!(again, first);
    }

    #[tokio::test]
    async fn what_is_on_its_way_is_given_up_only_when_that_is_asked_for() {
        let bench = ready();
        let nothing = bench.service.execute(transport("a", true)).await.unwrap_err();
        assert_eq!(nothing.code, ErrorCode::Conflict);
        bench.service.execute(transport("b", false)).await.unwrap();
        offer(&bench, 2);
        bench.service.execute(transport("c", true)).await.unwrap();
        let state = bench.cluster.published().state.clone();
        let row = state.slots().get(&slot("s")).unwrap();
        let given_up = row.transport(TransportId([2; 16])).unwrap();
        assert_eq!(given_up.state, TransportState::Destroying);
        assert!(row.awaits_transport());
    }

    #[tokio::test]
    async fn nothing_is_begun_that_a_member_could_not_take_part_in() {
        let bench = ready();
        let voter = *bench.cluster.with(|world| world.voters.clone()).last().unwrap();
        bench.cluster.silence(voter, std::time::Duration::ZERO);
        bench
            .cluster
            .with(|world| world.report_slot(voter, "s", "failed"));
        let refused = bench.service.execute(transport("a", false)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::SlotFailed);
        let missing = AdminBody::RekeyTransport {
            slot: slot("none"),
            restart: false,
        };
        let missing = call("Admin", "b", missing, &RekeyTransportRequest::default());
        let missing = bench.service.execute(missing).await.unwrap_err();
        assert_eq!(missing.code, ErrorCode::NotFound);
    }

    #[tokio::test]
    async fn the_replication_key_is_replaced_once_every_node_has_the_new_one() {
        let bench = ready();
        let refused = bench.service.execute(replication("a")).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Conflict);
        assert!(refused.detail.contains("n1"), "{refused}");
        let (old, new) = {
            let published = bench.cluster.published();
            let meta = published.state.meta().unwrap();
            let other = bench.service.parts.replication.other(meta).unwrap();
            (meta.trk_id, other.trk_id())
        };
        bench
            .cluster
            .with(|world| world.hold_replication_keys(&[old, new]));
        let done = bench.service.execute(replication("b")).await.unwrap();
        let expected = serde_json::json!({"key": hex::encode(new), "former": hex::encode(old)});
        assert_eq!(done, expected);
        // Another one after it: a repeat of the first names its own keys.
        bench.cluster.with(|world| {
            world.ok(Op::ResealKeys(ResealKeys::default()));
            assert!(world.state.replication().unwrap().former.is_none());
            world.rekey_replication([9; 8]);
        });
        assert_eq!(bench.service.execute(replication("b")).await.unwrap(), expected);
        let again = bench.service.execute(replication("c")).await.unwrap_err();
        assert_eq!(again.code, ErrorCode::Conflict);
    }
}
