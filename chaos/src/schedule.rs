//! What is done to the cluster and when: a plan that follows from a seed alone, and what came of carrying it out.
//!
//! Kinds are dealt like cards: every kind that is asked for comes once before any comes again. Of each step every number is
//! drawn, used or not, so that what one kind needs never changes what comes after it.

mod deal;
mod kind;
mod limit;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::history::Recorder;

pub use kind::FaultKind;
pub(crate) use limit::Limit;
pub use limit::{Early, Stop};

/// A step that had no effect is carried out again, so often in all: nobody may have led just then, or a node have had nothing to
/// lose. One that has none even then is missing from the run.
const ATTEMPTS: u32 = 4;

/// How often a step of a kind is carried out at most.
fn attempts(kind: FaultKind) -> u32 {
    if kind.may_be_repeated() { ATTEMPTS } else { 1 }
}

/// The longest pause before a step where no other is asked for, in milliseconds.
pub const PAUSE_MS: u32 = 2_000;

/// A shape of a broken network of three or more nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// The leader, with as many others as make no quorum.
    LeaderInMinority,
    /// Others than the leader, as many as make no quorum.
    LeaderInMajority,
    /// Nothing of the first reaches the second: one of the two leads, and which is said.
    OneWay {
        /// The leader is the one that is not heard.
        from_leader: bool,
    },
    /// Two halves that only one node between them, which does not lead, can talk to.
    Bridge,
}

/// One fault with all that was drawn for it. `pick` chooses among those that it can hit when it comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL.
    Kill(Victims, u32),
    /// SIGSTOP for so many tenths of the longest election time-out.
    Pause {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
        /// Tenths of the longest election time-out.
        tenths: u32,
    },
    /// A network in parts.
    Partition(Shape, u32),
    /// One node alone, until the others no longer have the log that it needs.
    IsolateUntilSnapshot(u32),
    /// Weather on every way.
    Delay {
        /// One way.
        delay_ms: u32,
        /// At most, besides.
        jitter_ms: u32,
    },
    /// Lost segments and reset connections.
    Loss {
        /// Of a thousand.
        lost_permille: u32,
        /// Of a thousand.
        reset_permille: u32,
    },
    /// Slow lines.
    ByteRate {
        /// Of each connection.
        bytes_per_second: u32,
    },
    /// No space on the disk of one node.
    DiskFull {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
    },
    /// Slow synchronisation on one node.
    SlowFsync {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
        /// Each.
        ms: u32,
    },
    /// Synchronisation that fails on one node.
    FailingFsync {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
    },
    /// Power is lost: what was written and not synchronised is gone.
    LostWrites {
        /// Of all nodes at once, else of one.
        all: bool,
        /// Which one; the leader is one of them.
        pick: u32,
    },
    /// Power is lost in the middle of a write, or the end of the store is cut off while the node does not run.
    TornTail {
        /// While it does not run.
        on_stopped: bool,
        /// Which one.
        pick: u32,
        /// How much of the last write is there, or of the store is cut off, of a thousand.
        permille: u32,
    },
    /// The wall clock of the leader.
    ClockStep {
        /// By how much.
        seconds: i64,
    },
    /// Something happens to the tokens of one node, or to the module in front of them.
    Token(Trouble, u32),
    /// A new node joins and an old one is removed, while something breaks.
    JoinRemove {
        /// What breaks meanwhile, each time.
        meanwhile: Meanwhile,
        /// With the removal the transport keys that the node had are replaced, and every context that it had a key of rotates.
        rotate: bool,
        /// Which old one, and when it is interrupted.
        pick: u32,
    },
    /// A node dies at a chosen line.
    Failpoint {
        /// Of [`crate::faults::failpoint::points`], modulo their number.
        point: u32,
        /// Which node, where it does not follow from the point.
        pick: u32,
    },
    /// Leadership is handed over, and asked for once more.
    Transfer {
        /// To a certain node, else to the best.
        named: bool,
        /// Which one.
        pick: u32,
    },
    /// The transport key of a slot is replaced, twice, and each time asked for again.
    Rekey {
        /// The leader is killed meanwhile.
        kill_leader: bool,
        /// At which line, where runs have failpoints: of [`cluster_tests::failpoints::REKEY`], modulo their number.
        point: u32,
    },
    /// The replication key is replaced, over restarts of all nodes, and asked for again.
    RekeyReplication {
        /// The leader is killed meanwhile.
        kill_leader: bool,
        /// As above, of [`cluster_tests::failpoints::RESEAL`].
        point: u32,
    },
}

/// What breaks while an operator changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Meanwhile {
    /// Nothing.
    Nothing,
    /// SIGKILL to the leader.
    LeaderKilled,
    /// The same at a line of the change, where failpoints are among the faults of a run: of
    /// [`cluster_tests::failpoints::MEMBERSHIP`], and at a removal of [`cluster_tests::failpoints::BURY`] too, modulo their
    /// number.
    LeaderKilledAt(u32),
    /// The leader is cut off from all others, for longer than an election takes.
    LeaderCutOff,
    /// SIGSTOP to the leader, for about as long as an election takes.
    LeaderPaused,
    /// SIGKILL to the node that comes or goes. Who comes is started again; who goes stays dead.
    NodeKilled,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victims {
    /// Whoever leads then.
    Leader,
    /// Somebody who does not.
    Follower,
    /// As many as may fail at once, whoever leads.
    Minority,
    /// All.
    All,
}

/// What is wrong with tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trouble {
    /// Their folder is gone.
    Deleted {
        /// Under a running node.
        running: bool,
    },
    /// An older copy stands in its place.
    Older,
    /// It cannot be read.
    Unreadable,
    /// Every call takes longer.
    Slow {
        /// By so much.
        ms: u32,
    },
    /// No call returns.
    Hung,
    /// Every call fails.
    Errors {
        /// A `CKR_` of PKCS#11.
        code: u32,
    },
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// From 1.
    pub number: u32,
    /// Before it, after the one before.
    pub pause_ms: u64,
    /// What is done.
    pub fault: Fault,
    /// Until it is undone.
    pub lasts_ms: u64,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// It follows from this.
    pub seed: u64,
    /// Those that break nodes follow each other; those that only make things worse ([`FaultKind::is_weather`]) go on beside
    /// them, in their own order.
    pub steps: Vec<Step>,
}

/// Whether a fault had the effect for which it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// It had.
    Counted,
    /// It had not, and why.
    NotCounted(String),
}

/// In front of why a fault does not count: it is not the fault that has failed.
const CLUSTER_FAILED: &str = "the cluster has failed: ";

impl Effect {
    /// The fault was carried out, and the cluster has not done what it has to do about it: that is a finding.
    pub(crate) fn cluster_failed(what: &str) -> Self {
        Self::NotCounted(format!("{CLUSTER_FAILED}{what}"))
    }

    /// What the cluster has not done.
    pub(crate) fn failure(&self) -> Option<&str> {
        match self {
            Self::Counted => None,
            Self::NotCounted(why) => why.strip_prefix(CLUSTER_FAILED),
        }
    }
}

/// A fault that was carried out. Times are the recorder's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fired {
    /// Number of the step.
    pub step: u32,
    /// Its kind.
    pub kind: FaultKind,
    /// When it began.
    pub at_ms: u64,
    /// What it hit.
    pub target: String,
    /// What came of it.
    pub effect: Effect,
    /// When it was undone, and the nodes ran again.
    pub healed_ms: u64,
}

/// In the place of the time at which a fault was undone: the harness has failed, and nobody knows what is still broken.
const NEVER: u64 = u64::MAX;

impl Fired {
    /// Whether it was undone, as far as the harness knows.
    pub(crate) fn was_undone(&self) -> bool {
        self.healed_ms != NEVER
    }
}

/// Plans a run of so many minutes. Every kind comes at least once: of many kinds in little time, the run takes longer.
/// Where `nodes` is less than three, nothing that needs a majority without somebody is planned.
#[must_use]
pub fn plan(seed: u64, minutes: f64, kinds: &BTreeSet<FaultKind>, nodes: u32) -> Plan {
    plan_with_pauses(seed, minutes, kinds, nodes, PAUSE_MS)
}

/// As [`plan`], with another longest pause before a step, in milliseconds; the shortest is a quarter of it. The same faults
/// come in the same order, and more of them in the same time.
#[must_use]
pub fn plan_with_pauses(
    seed: u64,
    minutes: f64,
    kinds: &BTreeSet<FaultKind>,
    nodes: u32,
    pause_ms: u32,
) -> Plan {
    deal::deal(seed, minutes, kinds, nodes, pause_ms)
}

/// Carries a plan out; every step undoes itself. One that had no effect is repeated, a few times, each after its pause: every attempt
/// is among what was fired, under the number of its step.
///
/// If the cluster does not come back from a fault in time, the plan ends with that one: the cluster is left as it is, and
/// whoever waits for it next finds what is wrong.
///
/// It ends, too, with the first step that the harness could not carry out. That one is among what was fired, without an effect
/// and without an end, and why it failed is said besides. And it ends at its [`Limit`].
pub(crate) async fn carry_out(
    plan: &Plan,
    cluster: &Cluster,
    recorder: &Recorder,
    limit: &Limit<'_>,
) -> (Vec<Fired>, Vec<anyhow::Error>) {
    let (weather, breaking): (Vec<&Step>, Vec<&Step>) =
        plan.steps.iter().partition(|step| step.fault.kind().is_weather());
    let over = AtomicBool::new(false);
    let now = || recorder.elapsed_ms();
    let carry = async |step: &Step| {
        limit.step_begins(step);
        let done = crate::faults::carry_out(step, cluster, recorder).await;
        match &done {
            Ok((one, stuck)) => limit.step_ends(one, stuck.is_some()),
            Err(_) => limit.plan_breaks(),
        }
        done
    };
    let lanes = async {
        tokio::join!(
            one_after_the_other(&breaking, &over, now, &carry),
            one_after_the_other(&weather, &over, now, &carry)
        )
    };
    let ((mut fired, failed), (beside, failed_beside)) = limit.hold(&over, lanes).await;
    fired.extend(beside);
    fired.sort_by_key(|fired| (fired.at_ms, fired.step));
    (fired, failed.into_iter().chain(failed_beside).collect())
}

/// Until `over` is set, which this sets itself where something goes wrong: what comes next would hide it. Whoever looks at the
/// cluster next finds that it is not ready.
async fn one_after_the_other(
    steps: &[&Step],
    over: &AtomicBool,
    now: impl Fn() -> u64,
    carry: impl AsyncFn(&Step) -> Result<(Fired, Option<String>)>,
) -> (Vec<Fired>, Option<anyhow::Error>) {
    let mut fired = Vec::with_capacity(steps.len());
    for step in steps {
        let kind = step.fault.kind();
        for _ in 0..attempts(kind) {
            // Before a repetition, too: what was missing may be there then.
            tokio::time::sleep(Duration::from_millis(step.pause_ms)).await;
            if over.load(Ordering::Relaxed) {
                return (fired, None);
            }
            let at_ms = now();
            match carry(step).await {
                Ok((one, stuck)) => {
                    let goes_on = stuck.is_none() && one.effect.failure().is_none();
                    let counts = one.effect == Effect::Counted;
                    fired.push(one);
                    if !goes_on {
                        over.store(true, Ordering::Relaxed);
                        return (fired, None);
                    }
                    if counts {
                        break;
                    }
                }
                Err(error) => {
                    over.store(true, Ordering::Relaxed);
                    // It may have broken something that only the end of the run heals.
                    fired.push(Fired {
                        step: step.number,
                        kind,
                        at_ms,
                        target: "unknown".to_owned(),
                        effect: Effect::NotCounted(format!("the harness has failed: {error:#}")),
                        healed_ms: NEVER,
                    });
                    return (fired, Some(error));
                }
            }
        }
    }
    (fired, None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn step(number: u32) -> Step {
        Step {
            number,
            pause_ms: 0,
            fault: Fault::Kill(Victims::Leader, 0),
            lasts_ms: 0,
        }
    }

    fn fired(step: &Step, effect: Effect) -> Fired {
        Fired {
            step: step.number,
            kind: step.fault.kind(),
            at_ms: 5,
            target: String::new(),
            effect,
            healed_ms: 6,
        }
    }

    #[tokio::test]
    async fn what_was_fired_is_kept_when_the_harness_fails() {
        let steps = [step(1), step(2), step(3)];
        let steps: Vec<&Step> = steps.iter().collect();
        let over = AtomicBool::new(false);
        let carry = async |step: &Step| match step.number {
            2 => anyhow::bail!("no such tool"),
            _ => Ok((fired(step, Effect::Counted), None::<String>)),
        };
        let (done, failed) = one_after_the_other(&steps, &over, || 7, carry).await;
        assert_eq!(failed.unwrap().to_string(), "no such tool");
        assert_eq!(done.len(), 2, "{done:?}");
        assert_eq!((done[0].step, &done[0].effect), (1, &Effect::Counted));
        // It has begun, and nobody knows whether it has ended.
        assert_eq!((done[1].step, done[1].at_ms, done[1].healed_ms), (2, 7, u64::MAX));
        assert!(matches!(&done[1].effect, Effect::NotCounted(why) if why.contains("no such tool")));
        assert!(over.load(Ordering::Relaxed), "what goes on beside it ends, too");
    }

    #[tokio::test]
    async fn a_step_without_effect_is_repeated_until_it_has_one_a_few_times() {
        let joins = Step {
            fault: Fault::JoinRemove {
                meanwhile: Meanwhile::Nothing,
                rotate: false,
                pick: 0,
            },
            ..step(3)
        };
        let steps = [step(1), step(2), joins];
        let steps: Vec<&Step> = steps.iter().collect();
        let over = AtomicBool::new(false);
        let tried = std::sync::atomic::AtomicU32::new(0);
        // The first one has its effect at the third attempt, the others never.
        let carry = async |step: &Step| {
            let counts = step.number == 1 && tried.fetch_add(1, Ordering::Relaxed) == 2;
            let effect = if counts {
                Effect::Counted
            } else {
                Effect::NotCounted("nobody led".to_owned())
            };
            anyhow::Ok((fired(step, effect), None::<String>))
        };
        let (done, failed) = one_after_the_other(&steps, &over, || 0, &carry).await;
        assert!(failed.is_none());
        let attempts = |number| done.iter().filter(|one| one.step == number).count();
        assert_eq!([1, 2, 3].map(attempts), [3, ATTEMPTS as usize, 1]);
        let counted = done.iter().filter(|one| one.effect == Effect::Counted);
        assert_eq!(counted.count(), 1);
    }

    #[tokio::test]
    async fn a_plan_ends_where_the_cluster_does_not_come_back() {
        let steps = [step(1), step(2)];
        let steps: Vec<&Step> = steps.iter().collect();
        let failed = Effect::cluster_failed("it does not join");
        assert_eq!(failed.failure(), Some("it does not join"));
        assert_eq!(Effect::NotCounted("nobody led".to_owned()).failure(), None);
        for (effect, stuck, carried) in [
            (Effect::Counted, None, 2),
            (Effect::Counted, Some("not ready"), 1),
            (failed, None, 1),
        ] {
            let over = AtomicBool::new(false);
            let carry =
                async |step: &Step| anyhow::Ok((fired(step, effect.clone()), stuck.map(str::to_owned)));
            let (done, failed) = one_after_the_other(&steps, &over, || 0, &carry).await;
            assert!(failed.is_none());
            assert_eq!(done.len(), carried, "{effect:?} {stuck:?}");
            // The other lane finds that it is over.
            let (beside, _) = one_after_the_other(&steps, &over, || 0, &carry).await;
            assert_eq!(beside.len(), if carried == 2 { 2 } else { 0 });
        }
    }
}
