//! The probes' view: readiness, v1's health document, metrics.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use hsm_api::data::{HealthResponse, HealthStatus, KekStatus};
use hsm_core::SlotState;
use raft_store::state::context::VersionState;

use super::{NodeView, gauges};
use crate::clock;
use crate::config::ContextName;
use crate::consensus::Role;
use crate::health::{Check, HealthSource, Readiness, ReadyQuery};
use crate::keyring::{KeyRing, MissingWhy};
use crate::metrics;

impl HealthSource for NodeView {
    fn readiness(&self, query: &ReadyQuery) -> Readiness {
        let mut checks = self.checks(query);
        if !self.is_listening.load(Ordering::Acquire) {
            let why = "the API opens when everything else holds, or server.wait_ready_ms has passed";
            checks.push(Check::new("listening", false, why));
        }
        Readiness::of(checks)
    }

    fn v1_health(&self) -> HealthResponse {
        let published = self.parts.consensus.published();
        let is_pending = |context: &ContextName, version: u32| {
            let known = published.state.version(context, version);
            known.is_some_and(|known| known.state == VersionState::Pending)
        };
        let may_answer = ReadyQuery {
            slot: None,
            stale_ok: true,
        };
        document(
            kek_status(&self.parts.ring.load(), is_pending),
            self.parts
                .slots
                .entries()
                .all(|entry| entry.state() == SlotState::Ready),
            self.readiness(&may_answer).ready,
        )
    }

    fn render_metrics(&self) -> String {
        let published = self.parts.consensus.published();
        self.counted.consensus(
            &self.parts.consensus.view(),
            self.parts.consensus.raft_id(),
            &published,
        );
        gauges::clock(&published.state, clock::unix_millis());
        gauges::invocations(&published.state, &self.parts.leases);
        gauges::known_to_removed(&published.state);
        gauges::store(&self.parts.consensus.control().figures());
        gauges::slots(&self.parts.slots, &self.parts.sync.status(), &published.state);
        self.compared.configuration(&self.parts.seed, &published);
        let readiness = self.readiness(&ReadyQuery::default());
        let standby = is_standby(&readiness, self.parts.consensus.view().role);
        metrics::ready(readiness.ready, standby);
        self.parts.metrics.render()
    }

    #[cfg(feature = "failpoints")]
    fn state_hash(&self) -> (u64, u128) {
        let published = self.parts.consensus.published();
        (published.applied.map_or(0, |id| id.index), published.digest)
    }
}

/// Whether nothing keeps this node from being ready but that another one leads.
fn is_standby(readiness: &Readiness, role: Role) -> bool {
    let mut failing = readiness.checks.iter().filter(|check| !check.ok);
    !readiness.ready && role != Role::Leader && failing.all(|check| check.code == "leader")
}

/// Every version that clients can have met. One that is still being made would call each rotation a failure, and one
/// that version 1 made and that lies in other nodes' tokens is not this node's to have.
fn kek_status(ring: &KeyRing, is_pending: impl Fn(&ContextName, u32) -> bool) -> BTreeMap<String, KekStatus> {
    let mut status = BTreeMap::new();
    for (context, keys) in ring.iter() {
        let held = keys.readable.values().map(|key| {
            let open = key.slot.ops.state() == SlotState::Ready;
            (key.version, &key.key_id, open)
        });
        let own = keys
            .missing
            .values()
            .filter(|key| key.why != MissingWhy::NotReplicable);
        let missing = own.map(|key| (key.version, &key.key_id, false));
        for (_, key_id, usable) in held.chain(missing).filter(|key| !is_pending(context, key.0)) {
            let word = if usable {
                KekStatus::Available
            } else {
                KekStatus::Unavailable
            };
            status.insert(key_id.clone(), word);
        }
    }
    status
}

/// Healthy is a node that has every token and key, and answers: not one that refuses everything.
fn document(
    kek_status: BTreeMap<String, KekStatus>,
    hsm_available: bool,
    may_answer: bool,
) -> HealthResponse {
    let usable = kek_status.values().all(|status| *status == KekStatus::Available);
    HealthResponse {
        status: if hsm_available && usable && may_answer {
            HealthStatus::Healthy
        } else {
            HealthStatus::Degraded
        },
        hsm_available,
        kek_status,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use hsm_core::envelope::Binding;
    use hsm_core::names::KeyUid;

    use super::*;
    use crate::keyring::{ClosedSlot, ContextKeys, KeySlot, MissingKey, ReadableKey};

    /// Versions 1 and 2 are held, 3 is missing.
    fn ring(slot: SlotState) -> KeyRing {
        let key_id = |version: u32| format!("kek-c-v{version}");
        let uid = |version: u8| KeyUid::from_bytes([version; 16]);
        let held = |version: u32| ReadableKey {
            slot: KeySlot {
                name: "s".into(),
                ops: Arc::new(ClosedSlot(slot.clone())),
            },
            version,
            key_id: key_id(version),
        };
        let missing = MissingKey {
            version: 3,
            key_id: key_id(3),
            why: MissingWhy::NotImportedYet,
        };
        let keys = ContextKeys {
            binding: Binding::Shared,
            active: None,
            readable: HashMap::from([(uid(1), held(1)), (uid(2), held(2))]),
            by_key_id: HashMap::new(),
            highest_known: 3,
            missing: HashMap::from([(uid(3), missing)]),
            retired: HashMap::new(),
        };
        KeyRing::new(HashMap::from([(ContextName::new("c").unwrap(), keys)]))
    }

    fn words(slot: SlotState, pending: &[u32]) -> Vec<(String, KekStatus)> {
        let status = kek_status(&ring(slot), |_, version| pending.contains(&version));
        status.into_iter().collect()
    }

    #[test]
    fn a_version_that_is_still_being_made_is_not_among_the_keys() {
        let (available, unavailable) = (KekStatus::Available, KekStatus::Unavailable);
        let [v1, v2, v3] = ["kek-c-v1", "kek-c-v2", "kek-c-v3"].map(str::to_owned);
        let held = [(v1.clone(), available), (v2.clone(), available)];
        assert_eq!(words(SlotState::Ready, &[3]), held);
        // Proven already, and still to be activated.
        assert_eq!(words(SlotState::Ready, &[2, 3]), held[..1]);
        let all = [&held[..], &[(v3.clone(), unavailable)]].concat();
        assert_eq!(words(SlotState::Ready, &[]), all);
        let closed = [v1, v2, v3].map(|label| (label, unavailable));
        assert_eq!(words(SlotState::Locked, &[]), closed);
    }

    #[test]
    fn a_key_of_version_1_that_other_nodes_hold_is_not_among_the_keys() {
        let mut contexts: HashMap<ContextName, ContextKeys> = ring(SlotState::Ready)
            .iter()
            .map(|(name, keys)| (name.clone(), keys.clone()))
            .collect();
        for missing in contexts.values_mut().flat_map(|keys| keys.missing.values_mut()) {
            missing.why = MissingWhy::NotReplicable;
        }
        let status = kek_status(&KeyRing::new(contexts), |_, _| false);
        assert_eq!(status.len(), 2);
        assert_eq!(document(status, true, true).status, HealthStatus::Healthy);
    }

    #[test]
    fn a_standby_has_no_other_reason_not_to_be_ready() {
        let of = |failing: &[&'static str], role| {
            let codes = ["fresh", "leader", "slot:s"];
            let check = |code: &'static str| Check::new(code, !failing.contains(&code), "");
            is_standby(&Readiness::of(codes.map(check).to_vec()), role)
        };
        assert!(of(&["leader"], Role::Follower));
        assert!(!of(&[], Role::Follower) && !of(&["leader", "slot:s"], Role::Follower));
        assert!(!of(&["fresh"], Role::Follower));
        // It has lost its quorum.
        assert!(!of(&["leader"], Role::Leader));
    }

    #[test]
    fn a_node_that_may_not_answer_is_degraded_with_every_key_in_place() {
        let keys = || kek_status(&ring(SlotState::Ready), |_, version| version == 3);
        let status = |keys, hsm, answers| document(keys, hsm, answers).status;
        assert_eq!(status(keys(), true, true), HealthStatus::Healthy);
        assert_eq!(status(keys(), true, false), HealthStatus::Degraded);
        assert_eq!(status(keys(), false, true), HealthStatus::Degraded);
        let lacking = kek_status(&ring(SlotState::Ready), |_, _| false);
        assert_eq!(status(lacking, true, true), HealthStatus::Degraded);
    }
}
