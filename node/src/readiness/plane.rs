//! The data plane's view: policy, freshness, keys, and the one question that has to ask the leader.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hsm_api::{ErrorCode, StateIndex};
use raft_store::state::node::NodeStatus;
use raft_store::storage::Published;
use tokio::sync::watch;

use super::{NodeView, Rules, judge};
use crate::consensus::{Gate, ProposeError};
use crate::http::{AboveKnown, ApiError, DataPlane, Freshness};
use crate::keyring::KeyRing;
use crate::policy::{Op, Policy};

/// How long a ciphertext of an unknown version may wait for this node to catch up.
const CATCH_UP: Duration = Duration::from_secs(1);
/// Between questions while leadership moves.
const AGAIN: Duration = Duration::from_millis(50);

impl NodeView {
    /// The leader's index, asked for once for all who arrived before the question.
    async fn leaders_index(&self) -> Option<u64> {
        let arrived = Instant::now();
        let mut last = self.last_read.lock().await;
        if let Some((asked, index)) = *last
            && asked >= arrived
        {
            return Some(index);
        }
        loop {
            let asked = Instant::now();
            match self.parts.consensus.read_index().await {
                Ok(index) => {
                    *last = Some((asked, index));
                    return Some(index);
                }
                // Another is about to lead. Callers have a limit.
                Err(ProposeError::NotLeader { .. } | ProposeError::Draining) => {
                    tokio::time::sleep(AGAIN).await
                }
                Err(_) => return None,
            }
        }
    }

    async fn above_known(&self, context: &str, version: u32) -> AboveKnown {
        let mut applied = self.parts.consensus.applied();
        let caught_up = async {
            let index = self.leaders_index().await?;
            applied
                .wait_for(|applied| *applied >= index)
                .await
                .ok()
                .map(|_| ())
        };
        match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(Some(())) => judge_version(&self.parts.consensus.published(), context, version),
            Ok(None) | Err(_) => AboveKnown::NoQuorum,
        }
    }
}

/// Whether a version exists, in a state that holds everything committed when it was asked for.
fn judge_version(published: &Published, context: &str, version: u32) -> AboveKnown {
    let highest = published
        .state
        .contexts()
        .get(context)
        .map_or(0, |context| context.highest_version);
    if version <= highest {
        AboveKnown::OnItsWay
    } else {
        AboveKnown::Unknown
    }
}

/// Whether this start of the node has said that it serves before its start gate was opened.
#[derive(Debug, Default)]
pub(super) struct Waived(AtomicBool);

impl Waived {
    /// A request is let through. The first one is told to the log and the audit: from here on answers may
    /// come from a state that the cluster has left behind.
    fn used(&self, op: Op, age: Duration) {
        if self.0.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(
            target: "audit", epoch = crate::logging::epoch(),
            action = "start_gate.waive",
            setting = "serve_after_restart_without_quorum",
            first_request = op.as_str(),
            age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            outcome = "done",
            "requests are answered although no quorum confirmed this node's state since its start"
        );
    }
}

/// What this node has heard of a quorum since its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// A contact that counts.
    Counted,
    /// One that does not count yet: the node knows that it lacks something.
    CatchingUp,
    /// Nothing. Only this is what the operator can waive.
    Nothing,
}

/// The freshness of answers: `Err` beyond the bound of the operation.
fn judge_freshness(
    rules: &Rules,
    waived: &Waived,
    op: Op,
    age: Option<Duration>,
    heard: Heard,
) -> Result<Freshness, ApiError> {
    let not_ready = |why: &str| Err(ApiError::new(ErrorCode::NotReady).detail(why));
    match heard {
        Heard::Counted => {}
        Heard::CatchingUp => return not_ready("the node is catching up with what it has missed"),
        Heard::Nothing if rules.without_quorum => {}
        Heard::Nothing => return not_ready("the node has not heard of a quorum since its start"),
    }
    let gate_open = heard == Heard::Counted;
    let bound = match op {
        // Each of them makes a ciphertext under what may not be the active version any more.
        Op::Encrypt | Op::Rewrap | Op::DataKey => rules.staleness.encrypt,
        Op::Decrypt => rules.staleness.decrypt,
    };
    match age {
        Some(age) if age <= bound => {
            if !gate_open {
                waived.used(op, age);
            }
            Ok(Freshness {
                degraded: !gate_open || age > rules.staleness.ready,
            })
        }
        _ => Err(ApiError::new(ErrorCode::Stale).detail(format!(
            "no quorum was heard of for more than {} s",
            bound.as_secs()
        ))),
    }
}

impl DataPlane for NodeView {
    fn policy(&self) -> Arc<Policy> {
        self.policies.of(self.parts.consensus.published())
    }

    fn freshness(&self, op: Op) -> Result<Freshness, ApiError> {
        let Some(own) = self.parts.consensus.raft_id() else {
            return Err(ApiError::new(ErrorCode::Uninitialised));
        };
        // It imports one slot after the other; a member that does so serves what it has, and had it before.
        let published = self.parts.consensus.published();
        let known = published.state.nodes().get(&own);
        if known.is_none_or(|node| node.status == NodeStatus::Joining) {
            let why = "the node joins, and has not proven every key yet";
            return Err(ApiError::new(ErrorCode::NotReady).detail(why));
        }
        let rules = &self.parts.rules;
        let contact = self.parts.consensus.staleness();
        let age = judge::staleness(rules, contact, self.started.elapsed());
        // A contact counts only from when the gate was opened first.
        let heard = match contact {
            Some(_) => Heard::Counted,
            None => match self.parts.consensus.start_gate() {
                Gate::NoLeaderSeen => Heard::Nothing,
                Gate::OlderCopy { node } => {
                    let why = ProposeError::OlderCopy { node }.to_string();
                    return Err(ApiError::new(ErrorCode::NotReady).detail(why));
                }
                Gate::EpochEnded { epoch } => {
                    let why = ProposeError::EpochEnded { epoch }.to_string();
                    return Err(ApiError::new(ErrorCode::NotReady).detail(why));
                }
                Gate::CatchingUp { .. } | Gate::Open { .. } => Heard::CatchingUp,
            },
        };
        judge_freshness(rules, &self.waived, op, age, heard)
    }

    fn keyring(&self) -> Arc<KeyRing> {
        self.parts.ring.load_full()
    }

    // The policy is made of the published state, which is there before the ring that is made of it.
    fn index(&self) -> StateIndex {
        self.parts.sync.index()
    }

    fn reached(&self) -> watch::Receiver<StateIndex> {
        self.parts.sync.reached()
    }

    fn node_id(&self) -> &str {
        &self.node_id
    }

    fn version_above_known<'a>(
        &'a self,
        context: &'a str,
        version: u32,
    ) -> Pin<Box<dyn Future<Output = AboveKnown> + Send + 'a>> {
        Box::pin(self.above_known(context, version))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::config::{Mode, Staleness};
    use crate::rotation::testing::World;
    use crate::test_log::Lines;

    fn rules(without_quorum: bool) -> Rules {
        Rules {
            staleness: Staleness {
                ready: Duration::from_secs(5),
                encrypt: Duration::from_secs(60),
                decrypt: Duration::from_secs(300),
            },
            mode: Mode::ActiveActive,
            election_max: Duration::from_millis(1200),
            without_quorum,
        }
    }

    fn fresh(op: Op, seconds: u64) -> Result<bool, ErrorCode> {
        let age = Some(Duration::from_secs(seconds));
        judge_freshness(&rules(false), &Waived::default(), op, age, Heard::Counted)
            .map(|freshness| freshness.degraded)
            .map_err(|error| error.code())
    }

    #[test]
    fn encryption_and_decryption_have_bounds_of_their_own() {
        for op in [Op::Encrypt, Op::Decrypt, Op::Rewrap, Op::DataKey] {
            assert_eq!(fresh(op, 0), Ok(false));
            assert_eq!(fresh(op, 5), Ok(false));
            assert_eq!(fresh(op, 6), Ok(true));
        }
        for op in [Op::Encrypt, Op::Rewrap, Op::DataKey] {
            assert_eq!(fresh(op, 61), Err(ErrorCode::Stale));
        }
        assert_eq!(fresh(Op::Decrypt, 61), Ok(true));
        assert_eq!(fresh(Op::Decrypt, 301), Err(ErrorCode::Stale));
    }

    #[test]
    fn before_the_start_gate_nothing_is_answered() {
        let age = Some(Duration::ZERO);
        let freshness = |without_quorum, age| {
            judge_freshness(
                &rules(without_quorum),
                &Waived::default(),
                Op::Decrypt,
                age,
                Heard::Nothing,
            )
        };
        let refused = freshness(false, age).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::NotReady);
        // Where the operator allows it, such an answer is marked and bounded all the same.
        assert_eq!(freshness(true, age), Ok(Freshness { degraded: true }));
        let late = Some(Duration::from_secs(301));
        assert_eq!(freshness(true, late).unwrap_err().code(), ErrorCode::Stale);
        assert_eq!(freshness(true, None).unwrap_err().code(), ErrorCode::Stale);
    }

    #[test]
    fn what_is_waived_is_that_nobody_was_heard_and_not_that_something_is_missing() {
        let judged = judge_freshness(
            &rules(true),
            &Waived::default(),
            Op::Decrypt,
            Some(Duration::ZERO),
            Heard::CatchingUp,
        );
        assert_eq!(judged.unwrap_err().code(), ErrorCode::NotReady);
    }

    #[test]
    fn the_first_request_before_the_start_gate_is_audited_once_a_start() {
        let now = Some(Duration::ZERO);
        let waived = Waived::default();
        let ask = |without_quorum, op, age, heard| {
            let _ = judge_freshness(&rules(without_quorum), &waived, op, age, heard);
        };
        // Nothing is served this way: refused, stale, or the gate is open.
        let before = Lines::of(|| {
            ask(false, Op::Encrypt, now, Heard::Nothing);
            ask(true, Op::Encrypt, Some(Duration::from_secs(61)), Heard::Nothing);
            ask(true, Op::Encrypt, None, Heard::Nothing);
            ask(true, Op::Encrypt, now, Heard::CatchingUp);
            ask(true, Op::Encrypt, now, Heard::Counted);
        })
        .all();
        assert!(before.is_empty(), "{before:?}");
        let served = Lines::of(|| {
            for op in [Op::Decrypt, Op::Encrypt, Op::Decrypt] {
                ask(true, op, now, Heard::Nothing);
            }
        })
        .all();
        assert_eq!(served.len(), 1, "{served:?}");
        for (field, value) in [
            ("level", "WARN"),
            ("target", "audit"),
            ("action", "start_gate.waive"),
            ("setting", "serve_after_restart_without_quorum"),
            ("first_request", "decrypt"),
        ] {
            assert_eq!(served[0][field], value, "{field}");
        }
    }

    #[test]
    fn a_node_that_may_serve_without_a_quorum_is_as_stale_as_its_start() {
        let uptime = Duration::from_secs(9);
        assert_eq!(judge::staleness(&rules(false), None, uptime), None);
        assert_eq!(judge::staleness(&rules(true), None, uptime), Some(uptime));
        let known = Some(Duration::from_secs(1));
        assert_eq!(judge::staleness(&rules(true), known, uptime), known);
    }

    #[test]
    fn a_version_above_the_highest_committed_one_does_not_exist() {
        let mut world = World::new(1);
        world.prepare("c");
        let published = world.published();
        assert_eq!(judge_version(&published, "c", 1), AboveKnown::OnItsWay);
        assert_eq!(judge_version(&published, "c", 2), AboveKnown::Unknown);
        assert_eq!(judge_version(&published, "nope", 1), AboveKnown::Unknown);
    }
}
