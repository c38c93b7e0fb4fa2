//! Which uses of key versions the cluster has been told of. Only the state is believed: what it has of this node is
//! what was taken, exactly, whatever became of a proposal. What it has not is told again. A process that ends takes
//! what it has not told with it.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use hsm_core::names::KeyUid;
use raft_store::names::Boot;
use raft_store::state::ClusterState;
use raft_store::state::context::VersionKey;
use raft_store::state::node::{MAX_COUNT, MAX_USES, NodeReport};
use raft_store::state::usage::UseCount;

use super::convert::to_token_key;
use crate::slots::Total;

/// Between two reports that say nothing but uses.
const APART: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Default)]
pub(super) struct Ledger {
    /// The last report of this run whose uses are among `told`.
    settled: Option<u64>,
    /// What the state has taken from this run: encryptions and decryptions.
    told: BTreeMap<VersionKey, (u64, u64)>,
    /// The last version of the last report: the next one begins after it, if one does not hold them all.
    last: Option<VersionKey>,
    sent: Option<Instant>,
}

impl Ledger {
    /// Looks what the state has of this node. To be called before every report that is made: a report has the number
    /// after the one that is seen here, so that none is missed.
    pub(super) fn settle(&mut self, known: Option<&NodeReport>, boot: Boot) {
        let Some(known) = known.filter(|known| known.boot == boot && Some(known.seq) > self.settled) else {
            return;
        };
        for (key, count) in &known.uses {
            let told = self.told.entry(key.clone()).or_default();
            told.0 = told.0.saturating_add(count.encryptions);
            told.1 = told.1.saturating_add(count.decryptions);
        }
        self.settled = Some(known.seq);
    }

    /// What has not been taken yet.
    pub(super) fn untold(
        &self,
        state: &ClusterState,
        totals: impl IntoIterator<Item = (KeyUid, Total)>,
    ) -> BTreeMap<VersionKey, UseCount> {
        let totals: HashMap<KeyUid, Total> = totals.into_iter().collect();
        if totals.is_empty() {
            return BTreeMap::new();
        }
        let mut untold: Vec<(VersionKey, UseCount)> = state
            .versions()
            .iter()
            .filter_map(|(key, version)| {
                let total = totals.get(&to_token_key(version.key_uid))?;
                let told = self.told.get(key).copied().unwrap_or_default();
                let count = UseCount {
                    // A report with more is refused whole; what is left goes with the next.
                    encryptions: total.encryptions.saturating_sub(told.0).min(MAX_COUNT),
                    decryptions: total.decryptions.saturating_sub(told.1).min(MAX_COUNT),
                    last_used: total.last_used,
                };
                (count.encryptions > 0 || count.decryptions > 0).then(|| (key.clone(), count))
            })
            .collect();
        if untold.len() > MAX_USES {
            let next = untold.partition_point(|(key, _)| Some(key) <= self.last.as_ref());
            untold.rotate_left(next);
            untold.truncate(MAX_USES);
        }
        untold.into_iter().collect()
    }

    /// Whether uses alone are worth a report by now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.sent
            .is_none_or(|sent| now.saturating_duration_since(sent) >= APART)
    }

    /// A report with these uses is proposed now.
    pub(super) fn note_sent(&mut self, uses: &BTreeMap<VersionKey, UseCount>, now: Instant) {
        if uses.is_empty() {
            return;
        }
        self.sent = Some(now);
        let after = |key: &&VersionKey| Some(*key) > self.last.as_ref();
        // Beyond the end of the map it goes on at its begin.
        let wrapped = uses.keys().rfind(|key| !after(key));
        let last = wrapped.or_else(|| uses.keys().next_back());
        self.last = last.cloned();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{Op, ReportNode};
    use raft_store::names::Incarnation;

    use super::super::testing::{Cluster, ME, context, uid};
    use super::*;

    const BOOT: Boot = Boot([1; 16]);

    fn total(encryptions: u64, decryptions: u64) -> Total {
        Total {
            encryptions,
            decryptions,
            last_used: 7,
        }
    }

    fn key(version: u32) -> VersionKey {
        VersionKey {
            context: context("a"),
            version,
        }
    }

    /// `count` versions of `a`, the last one active.
    fn cluster(count: u32) -> Cluster {
        let mut cluster = Cluster::founded();
        cluster.registered(ME).transport(&[]).context("a");
        for version in 1..=count {
            cluster.active("a", version);
        }
        cluster
    }

    fn report(cluster: &Cluster, boot: Boot, uses: BTreeMap<VersionKey, UseCount>) -> NodeReport {
        NodeReport {
            seq: cluster.state.reports().get(&ME).map_or(1, |known| known.seq + 1),
            incarnation: Incarnation([1; 16]),
            boot,
            clock: 0,
            durable_index: 0,
            proven_at: None,
            feature_level: 1,
            slots: BTreeMap::new(),
            uses,
        }
    }

    fn send(cluster: &mut Cluster, report: NodeReport) {
        cluster.run(ME, Op::ReportNode(ReportNode { node: ME, report }));
    }

    fn settle(ledger: &mut Ledger, cluster: &Cluster) {
        ledger.settle(cluster.state.reports().get(&ME).map(|known| &**known), BOOT);
    }

    fn totals(all: &[(u32, Total)]) -> Vec<(KeyUid, Total)> {
        all.iter()
            .map(|(version, total)| (to_token_key(uid("a", *version)), *total))
            .collect()
    }

    fn counted(cluster: &Cluster, version: u32) -> (u64, u64) {
        let used = cluster.state.usage(&context("a"), version);
        used.map_or((0, 0), |used| (used.encryptions, used.decryptions))
    }

    #[test]
    fn what_was_taken_is_not_told_again_and_what_came_since_is() {
        let mut cluster = cluster(2);
        let mut ledger = Ledger::default();
        assert!(ledger.untold(&cluster.state, Vec::new()).is_empty());
        let first = ledger.untold(&cluster.state, totals(&[(1, total(0, 5)), (2, total(3, 0))]));
        assert_eq!((first[&key(1)].decryptions, first[&key(2)].encryptions), (5, 3));
        let sent = report(&cluster, BOOT, first);
        send(&mut cluster, sent);
        settle(&mut ledger, &cluster);
        settle(&mut ledger, &cluster);
        let next = ledger.untold(&cluster.state, totals(&[(1, total(0, 9)), (2, total(3, 0))]));
        let expected = UseCount {
            encryptions: 0,
            decryptions: 4,
            last_used: 7,
        };
        assert_eq!(next, BTreeMap::from([(key(1), expected)]));
    }

    /// The answer to the first proposal is lost, so a second one is made under the same number.
    #[test]
    fn of_two_reports_with_one_number_exactly_the_one_that_was_taken_counts() {
        for late_first in [false, true] {
            let mut cluster = cluster(1);
            let mut ledger = Ledger::default();
            let draft = |ledger: &Ledger, cluster: &Cluster, decryptions| {
                let uses = ledger.untold(&cluster.state, totals(&[(1, total(0, decryptions))]));
                report(cluster, BOOT, uses)
            };
            let first = draft(&ledger, &cluster, 5);
            settle(&mut ledger, &cluster);
            let second = draft(&ledger, &cluster, 8);
            assert_eq!(first.seq, second.seq);
            let in_order = if late_first {
                [second, first]
            } else {
                [first, second]
            };
            for report in in_order {
                send(&mut cluster, report);
            }
            settle(&mut ledger, &cluster);
            let third = draft(&ledger, &cluster, 10);
            send(&mut cluster, third);
            assert_eq!(counted(&cluster, 1), (0, 10), "late first: {late_first}");
        }
    }

    #[test]
    fn what_another_run_has_told_is_not_this_ones() {
        let mut cluster = cluster(1);
        let mut ledger = Ledger::default();
        let uses = ledger.untold(&cluster.state, totals(&[(1, total(0, 5))]));
        let before = report(&cluster, Boot([9; 16]), uses);
        send(&mut cluster, before);
        settle(&mut ledger, &cluster);
        let uses = ledger.untold(&cluster.state, totals(&[(1, total(0, 2))]));
        let own = report(&cluster, BOOT, uses);
        send(&mut cluster, own);
        settle(&mut ledger, &cluster);
        assert_eq!(counted(&cluster, 1), (0, 7));
        assert!(
            ledger
                .untold(&cluster.state, totals(&[(1, total(0, 2))]))
                .is_empty()
        );
    }

    #[test]
    fn no_version_is_left_out_for_ever_where_a_report_does_not_hold_them_all() {
        let count = u32::try_from(MAX_USES).unwrap() + 100;
        let mut world = crate::rotation::testing::World::new(1);
        for _ in 0..count {
            let version = world.prepare("c");
            world.activate("c", version);
        }
        let all = |uses: u64| -> Vec<(KeyUid, Total)> {
            let versions = world.state.versions().values();
            versions
                .map(|version| (to_token_key(version.key_uid), total(0, uses)))
                .collect()
        };
        let mut ledger = Ledger::default();
        let mut seen = std::collections::BTreeSet::new();
        for round in 1..=2 {
            let uses = ledger.untold(&world.state, all(round));
            assert_eq!(uses.len(), MAX_USES);
            ledger.note_sent(&uses, Instant::now());
            seen.extend(uses.into_keys());
        }
        assert_eq!(seen.len(), count as usize);
    }

    #[test]
    fn uses_alone_are_told_of_now_and_then_only() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        assert!(ledger.is_due(now));
        ledger.note_sent(&BTreeMap::new(), now);
        assert!(ledger.is_due(now), "a report without uses is none of them");
        ledger.note_sent(&BTreeMap::from([(key(1), UseCount::default())]), now);
        assert!(!ledger.is_due(now + APART / 2) && ledger.is_due(now + APART));
    }
}
