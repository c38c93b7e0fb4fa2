//! What this node tells the cluster of itself: at most once a second, and only what has changed. Uses of keys go with
//! it; alone they are told every ten seconds. An idle cluster appends nothing but each node's clock, once an hour.

use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::command::{Op, ReportNode};
use raft_store::names::{Boot, RaftId, UnixMillis};
use raft_store::state::node::{NodeReport, NodeStatus, SlotReport};
use raft_store::state::{ClusterState, FEATURE_LEVEL};
use raft_store::storage::Control;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::SyncHandle;
use super::ledger::Ledger;
use super::status::SyncStatus;
use crate::clock;
use crate::consensus::Consensus;
use crate::slots::SlotManager;

/// How often it is seen whether anything has changed.
const LOOK: Duration = Duration::from_millis(200);
/// Between two reports.
const APART: Duration = Duration::from_secs(1);
/// Growth of the log by nothing but reports that is worth one more.
const DRIFT: u64 = 1000;

/// Where a node's log and state stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which run of the process this is.
    pub boot: Boot,
    /// Last index applied.
    pub applied: u64,
    /// Last index applied in this run that was more than a report; 0 = none.
    pub changed: u64,
}

/// A slot's name and state, as `SlotState::name` gives it.
pub type SlotLine = (raft_store::names::SlotName, &'static str);

/// The report this node would make now; `None` while the state does not know this filling of its data
/// directory as a member or joiner.
pub fn draft(
    state: &ClusterState,
    me: RaftId,
    control: &Control,
    progress: Progress,
    slots: &[SlotLine],
    sync: &SyncStatus,
    clock: UnixMillis,
) -> Option<NodeReport> {
    let node = state.nodes().get(&me)?;
    if matches!(node.status, NodeStatus::Removed { .. }) || node.incarnation != control.incarnation {
        return None;
    }
    let known = state.reports().get(&me);
    let lines = slots.iter().map(|(name, slot_state)| {
        let slot = sync.slots.get(name);
        let missing_keys = slot.map_or(0, |slot| slot.missing_keys);
        let compared = slot.is_some_and(|slot| slot.last_full_sync.is_some());
        let serving = *slot_state == "ready" && compared && missing_keys == 0;
        (
            name.clone(),
            SlotReport {
                serving,
                state: (*slot_state).to_owned(),
                missing_keys,
            },
        )
    });
    // What is applied is committed: the rest of the log may still be taken back, and its loss is none.
    let durable = control.last_log.map_or(0, |id| id.index).min(progress.applied);
    Some(NodeReport {
        seq: known.map_or(1, |known| known.seq.saturating_add(1)),
        incarnation: control.incarnation,
        boot: progress.boot,
        clock,
        durable_index: durable.max(known.map_or(0, |known| known.durable_index)),
        proven_at: sync.proven_at,
        feature_level: feature_level(),
        slots: lines.collect(),
        uses: Default::default(),
    })
}

/// This release's.
fn feature_level() -> u32 {
    // As the release before it would.
    fail::fail_point!("levels::report_older", |_| FEATURE_LEVEL - 1);
    FEATURE_LEVEL
}

/// Milliseconds after which a node says its clock again although nothing else is news: one entry for each node and hour
/// is what an idle cluster appends. Nothing may depend on a single wall clock (`raft-store/src/command/stamp.rs`,
/// `schedule_destroy.rs`), and what else there is to compare it with is older the longer nobody reports.
const CLOCK_AGE: UnixMillis = 3_600_000;
/// Milliseconds by which a clock has to have been set back for that to be news: what it showed before must not count
/// for as long as it was ahead.
const CLOCK_BACK: UnixMillis = 30_000;

/// Whether a report says anything that the last one did not. That anything but reports was applied is
/// news: what is not reported may be lost unnoticed with an older copy of the data directory.
pub fn is_news(known: Option<&NodeReport>, report: &NodeReport, progress: Progress) -> bool {
    let Some(known) = known else { return true };
    known.boot != report.boot
        || (progress.changed > known.durable_index && report.durable_index > known.durable_index)
        || known.incarnation != report.incarnation
        || known.proven_at != report.proven_at
        || known.feature_level != report.feature_level
        || known.slots != report.slots
        || report.durable_index >= known.durable_index.saturating_add(DRIFT)
        || report.clock >= known.clock.saturating_add(CLOCK_AGE)
        || report.clock <= known.clock.saturating_sub(CLOCK_BACK)
}

/// What this node's clock showed when it was last reported.
#[derive(Clone, Copy)]
struct Told {
    clock: UnixMillis,
    at: Instant,
}

impl Told {
    /// Whether the clock shows something else than has passed since: it was set, or the machine was suspended, while the leader goes
    /// on counting from what it was told. It would be in doubt of its own clock, or of the others', for as long as nobody reports.
    fn has_jumped(self, clock: UnixMillis, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_millis();
        let expected = self
            .clock
            .saturating_add(UnixMillis::try_from(passed).unwrap_or(UnixMillis::MAX));
        clock.abs_diff(expected) >= CLOCK_BACK.unsigned_abs()
    }
}

/// Reports until `shutdown`. A report that cannot be proposed is dropped: the next one says it all.
pub(super) async fn run(
    consensus: Consensus,
    slots: Arc<SlotManager>,
    sync: SyncHandle,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut sent: Option<Instant> = None;
    let mut told: Option<Told> = None;
    let mut ledger = Ledger::default();
    let mut trouble: Option<String> = None;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = shutdown.changed() => return,
        }
        let Some(me) = consensus.raft_id() else { continue };
        if sent.is_some_and(|at| at.elapsed() < APART) {
            continue;
        }
        let published = consensus.published();
        let lines: Vec<SlotLine> = slots
            .entries()
            .map(|entry| (entry.name().clone(), entry.state().name()))
            .collect();
        let progress = Progress {
            boot: consensus.boot(),
            applied: published.applied.map_or(0, |id| id.index),
            changed: published.changed,
        };
        let (control, status) = (consensus.control().get(), sync.status());
        let report = draft(
            &published.state,
            me,
            &control,
            progress,
            &lines,
            &status,
            clock::unix_millis(),
        );
        let known = published.state.reports().get(&me).map(|known| &**known);
        ledger.settle(known, progress.boot);
        let totals = slots.entries().flat_map(|entry| entry.uses().totals());
        let uses = ledger.untold(&published.state, totals);
        let now = Instant::now();
        let is_told = |report: &NodeReport| {
            is_news(known, report, progress)
                || (!uses.is_empty() && ledger.is_due(now))
                || told.is_some_and(|told| told.has_jumped(report.clock, now))
        };
        let Some(report) = report.filter(is_told) else {
            continue;
        };
        ledger.note_sent(&uses, now);
        sent = Some(now);
        let said = Told {
            clock: report.clock,
            at: now,
        };
        let report = NodeReport { uses, ..report };
        let proposed = consensus
            .propose_as_node(Op::ReportNode(ReportNode { node: me, report }))
            .await;
        told = proposed.is_ok().then_some(said);
        let failure = proposed.err().map(|error| error.to_string());
        if let Some(why) = failure.as_ref().filter(|_| failure != trouble) {
            tracing::info!(why, "node report not made; the next one says it all");
        }
        trouble = failure;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeMap;

    use raft_store::names::{ClusterId, Incarnation};

    use super::super::status::SlotSync;
    use super::super::testing::{Cluster, ME, slot};
    use super::*;

    const QUIET: Progress = Progress {
        boot: Boot([1; 16]),
        applied: 0,
        changed: 0,
    };

    #[test]
    fn a_clock_that_was_set_or_a_machine_that_was_suspended_is_told() {
        let at = Instant::now();
        let told = Told { clock: 1_000_000, at };
        let later = at + Duration::from_secs(600);
        assert!(!told.has_jumped(1_600_000, later));
        assert!(!told.has_jumped(1_629_999, later));
        assert!(told.has_jumped(1_630_000, later));
        assert!(told.has_jumped(1_570_000, later));
    }

    fn control() -> Control {
        Control {
            node_name: "hsm-node-1".to_owned(),
            incarnation: Incarnation([1; 16]),
            cluster_id: ClusterId([1; 16]),
            epoch: 1,
            raft_id: ME,
            vote: None,
            last_log: None,
            last_purged: None,
            poison: None,
        }
    }

    fn status(missing_keys: u32) -> SyncStatus {
        let slot_sync = SlotSync {
            missing_keys,
            last_full_sync: Some(Instant::now()),
            ..SlotSync::default()
        };
        SyncStatus {
            slots: BTreeMap::from([(slot(), slot_sync)]),
            ..SyncStatus::default()
        }
    }

    fn report(cluster: &Cluster, state: &'static str, sync: &SyncStatus) -> NodeReport {
        draft(&cluster.state, ME, &control(), QUIET, &[(slot(), state)], sync, 5).unwrap()
    }

    #[test]
    fn a_slot_serves_only_if_it_is_ready_compared_and_lacks_nothing() {
        let cluster = Cluster::founded();
        assert!(report(&cluster, "ready", &status(0)).slots[&slot()].serving);
        assert!(!report(&cluster, "failed", &status(0)).slots[&slot()].serving);
        let lacking = report(&cluster, "ready", &status(2));
        assert_eq!(
            (
                lacking.slots[&slot()].serving,
                lacking.slots[&slot()].missing_keys
            ),
            (false, 2)
        );
        assert!(!report(&cluster, "ready", &SyncStatus::default()).slots[&slot()].serving);
    }

    #[test]
    fn reports_count_on_and_the_clock_alone_is_no_news() {
        let mut cluster = Cluster::founded();
        let first = report(&cluster, "ready", &status(0));
        assert_eq!(first.seq, 1);
        assert!(is_news(None, &first, QUIET));
        cluster.run(
            ME,
            Op::ReportNode(ReportNode {
                node: ME,
                report: first.clone(),
            }),
        );
        let second = NodeReport {
            clock: 9,
            ..report(&cluster, "ready", &status(0))
        };
        assert_eq!(second.seq, 2);
        let is_news = |report: &NodeReport| is_news(Some(&first), report, QUIET);
        assert!(!is_news(&second));
        let with_clock = |clock| NodeReport {
            clock,
            ..second.clone()
        };
        assert!(!is_news(&with_clock(first.clock + CLOCK_AGE - 1)));
        assert!(is_news(&with_clock(first.clock + CLOCK_AGE)));
        assert!(!is_news(&with_clock(first.clock - CLOCK_BACK + 1)));
        assert!(is_news(&with_clock(first.clock - CLOCK_BACK)));
        let growth = |by: u64| NodeReport {
            durable_index: first.durable_index + by,
            ..second.clone()
        };
        assert!(!is_news(&growth(DRIFT - 1)) && is_news(&growth(DRIFT)));
        assert!(is_news(&NodeReport {
            proven_at: Some(4),
            ..second.clone()
        }));
        assert!(is_news(&NodeReport {
            boot: Boot([9; 16]),
            ..second.clone()
        }));
        assert!(is_news(&report(&cluster, "failed", &status(0))));
    }

    #[test]
    fn what_is_applied_is_reported_once() {
        let known = NodeReport {
            durable_index: 10,
            ..report(&Cluster::founded(), "ready", &status(0))
        };
        let after = |changed, durable_index| {
            let report = NodeReport {
                durable_index,
                ..known.clone()
            };
            is_news(Some(&known), &report, Progress { changed, ..QUIET })
        };
        assert!(after(12, 12));
        assert!(!after(10, 12), "only reports came after");
        assert!(!after(12, 10), "not durable here yet");
    }

    #[test]
    fn a_tail_that_is_not_committed_is_not_reported() {
        let cluster = Cluster::founded();
        let control = Control {
            last_log: Some(raft_store::LogId::new(openraft::CommittedLeaderId::new(1, ME), 9)),
            ..control()
        };
        let durable = |applied| {
            let progress = Progress { applied, ..QUIET };
            draft(&cluster.state, ME, &control, progress, &[], &status(0), 5)
                .unwrap()
                .durable_index
        };
        assert_eq!((durable(7), durable(9), durable(12)), (7, 9, 9));
    }

    #[test]
    fn another_filling_of_the_data_directory_does_not_report() {
        let cluster = Cluster::founded();
        let other = Control {
            incarnation: Incarnation([9; 16]),
            ..control()
        };
        assert!(draft(&cluster.state, ME, &other, QUIET, &[], &status(0), 5).is_none());
        assert!(draft(&cluster.state, 99, &control(), QUIET, &[], &status(0), 5).is_none());
    }
}
