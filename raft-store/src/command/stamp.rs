//! The time that a key version, or a use of one, is stamped with. A command's time is the wall clock of the leader that proposed it, and
//! nobody has compared it with anything. Ages are counted from these stamps: one that lies a year ahead would keep a
//! version from being replaced for a year, one that lies behind would have it replaced at once. So it counts only as
//! far as the voters' reports, which hold their clocks, do not say otherwise.

use std::collections::BTreeSet;

use super::ApplyContext;
use crate::names::{RaftId, UnixMillis};
use crate::state::ClusterState;

/// A report's clock is older than now by the report's age, which is an hour at most while there is a quorum: each node
/// says its clock once an hour. As much again, because nobody waits for a report.
const REPORTED_WITHIN_MS: UnixMillis = 2 * 60 * 60 * 1000;
/// Clocks that are right differ by less.
const APART_MS: UnixMillis = 30 * 1000;

/// The command's time as [`stamp_at`] has it.
pub(super) fn stamp(state: &ClusterState, cx: &ApplyContext<'_>) -> UnixMillis {
    stamp_at(state, cx.voters, cx.leader, cx.at)
}

/// `at`, the time of the leader's clock, unless the voters' last reports contradict it.
///
/// - It is behind if more than half of the voters showed a later time before; no report can be too new. Then so late it
///   is at least as the others say. Fewer than half of the voters are wrong, and this leader is one of them: of the
///   others' clocks the first counts that is not later than one that is right. Of three voters that is the later one.
///   With two voters the other one is enough: a time that is too late keeps a key for longer, one that is too early may
///   end it.
/// - It is ahead if more than half showed an earlier time, by more than a report may be old, and no other voter
///   reported anything near it. Reports of nodes that have been away for long are old, too; one that is not tells the
///   two apart. Then it is the median of what the other voters' clocks showed and `at`, the earlier of two in the middle.
///
/// Whoever votes alone is believed. Of two nobody knows which one is ahead.
#[must_use]
pub fn stamp_at(
    state: &ClusterState,
    voters: &BTreeSet<RaftId>,
    leader: RaftId,
    at: UnixMillis,
) -> UnixMillis {
    let others = voters.iter().filter(|voter| **voter != leader);
    let mut clocks: Vec<UnixMillis> = others
        .filter_map(|voter| state.reports.get(voter).map(|report| report.clock))
        .collect();
    let (majority, wrong) = (voters.len() / 2 + 1, voters.len().saturating_sub(1) / 2);
    let latest = at.saturating_add(APART_MS);
    let earliest = at.saturating_sub(REPORTED_WITHIN_MS);
    let later = clocks.iter().filter(|clock| **clock > latest).count();
    let earlier = clocks.iter().filter(|clock| **clock < earliest).count();
    clocks.sort_unstable();
    let is_other_of_two = voters.len() == 2 && later == 1;
    if later >= majority || is_other_of_two {
        let mut latest_first = clocks.iter().rev();
        return latest_first.nth(wrong.saturating_sub(1)).copied().unwrap_or(at);
    }
    if earlier >= majority && earlier == clocks.len() {
        // All of them are earlier.
        return clocks.get(clocks.len() / 2).copied().unwrap_or(at);
    }
    at
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::command::Origin;
    use crate::names::{Boot, Incarnation};
    use crate::state::FEATURE_LEVEL;
    use crate::state::node::NodeReport;

    const NOW: UnixMillis = 1_000 * DAY;
    const DAY: UnixMillis = 24 * 60 * 60 * 1000;
    const MINUTE: UnixMillis = 60 * 1000;

    /// Of voters 1..=n, of which node 1 leads: those after it last showed these clocks.
    fn stamped(voters: u64, at: UnixMillis, clocks: &[UnixMillis]) -> UnixMillis {
        let mut state = ClusterState::default();
        // What the leader itself has reported is no other witness.
        for (id, clock) in (1..).zip(std::iter::once(&at).chain(clocks)) {
            let report = NodeReport {
                seq: 1,
                incarnation: Incarnation([1; 16]),
                boot: Boot([1; 16]),
                clock: *clock,
                durable_index: 1,
                proven_at: None,
                feature_level: FEATURE_LEVEL,
                slots: BTreeMap::new(),
                uses: BTreeMap::new(),
            };
            state.reports.put(id, report).unwrap();
        }
        let voters: BTreeSet<RaftId> = (1..=voters).collect();
        let cx = ApplyContext {
            index: 1,
            at,
            origin: &Origin::Node(1),
            leader: 1,
            voters: &voters,
        };
        stamp(&state, &cx)
    }

    #[test]
    fn a_clock_that_the_reports_do_not_contradict_is_taken() {
        let (hour_ago, ago) = (NOW - 60 * MINUTE, NOW - 400 * DAY);
        assert_eq!(stamped(3, NOW, &[hour_ago, NOW - 5]), NOW);
        assert_eq!(stamped(3, NOW, &[NOW + APART_MS, NOW + APART_MS]), NOW);
        // One of the others is wrong, or has been away.
        assert_eq!(stamped(3, NOW, &[NOW + 400 * DAY, NOW]), NOW);
        assert_eq!(stamped(3, NOW, &[ago, hour_ago]), NOW);
        // Two have, and a third is wrong: the fifth says that it is so late.
        assert_eq!(stamped(5, NOW, &[ago, ago, ago + 9, hour_ago]), NOW);
        // In a new cluster nobody has reported yet.
        assert_eq!(stamped(3, NOW, &[]), NOW);
    }

    #[test]
    fn a_leader_that_is_ahead_or_behind_stamps_what_the_others_say() {
        let (a, b) = (NOW - 60 * MINUTE, NOW - MINUTE);
        assert_eq!(stamped(3, NOW + 400 * DAY, &[a, b]), b);
        assert_eq!(stamped(3, NOW - 400 * DAY, &[a, b]), b);
        assert_eq!(stamped(3, NOW - 400 * DAY, &[b, a]), b);
        assert_eq!(stamped(4, NOW + 400 * DAY, &[a, b, NOW]), b);
        assert_eq!(stamped(5, NOW - 400 * DAY, &[a, b, b, NOW]), b);
        assert_eq!(stamped(4, NOW - 400 * DAY, &[a, b, NOW]), NOW);
        // One of the others is dead, and its report is old.
        assert_eq!(stamped(3, NOW + 400 * DAY, &[NOW - 90 * DAY, b]), b);
    }

    #[test]
    fn of_those_who_say_that_a_leader_is_behind_as_many_may_be_wrong_as_the_cluster_bears() {
        let (ago, ahead) = (NOW - 400 * DAY, NOW + 400 * DAY);
        // Of five voters the leader and one more.
        assert_eq!(stamped(5, ago, &[NOW - 5, NOW - 3, ahead, NOW - 4]), NOW - 3);
        assert_eq!(stamped(5, ago, &[NOW - 5, NOW - 3, ago, NOW - 4]), NOW - 4);
        assert_eq!(stamped(5, ago, &[ahead, NOW - 3, NOW - 4]), NOW - 3);
        assert_eq!(
            stamped(7, ago, &[ahead, ahead, NOW - 3, NOW - 4, NOW - 5, ago]),
            NOW - 3
        );
    }

    #[test]
    fn of_two_the_later_one_counts_unless_it_leads_and_one_has_nobody_to_ask() {
        let (ahead, behind) = (NOW + 400 * DAY, NOW - 400 * DAY);
        assert_eq!(stamped(2, behind, &[NOW]), NOW);
        assert_eq!(stamped(2, NOW - APART_MS, &[NOW]), NOW - APART_MS, "they agree");
        assert_eq!(stamped(2, behind, &[]), behind, "it has not reported yet");
        // The other one may have been away.
        assert_eq!(stamped(2, ahead, &[NOW]), ahead);
        for at in [ahead, behind] {
            assert_eq!(stamped(1, at, &[]), at);
        }
    }
}
