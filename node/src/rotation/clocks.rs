//! Whether the leader's wall clock can be believed. Retirement, last uses and the age of a version are wall-clock
//! times, and a clock that is wrong must neither rotate nor clean up. Nodes say their clock in their reports, which
//! each makes anew once a leader is new; the leader takes a report's clock for the time at which it saw the report,
//! and lets its monotonic clock run on from there. So an estimate is late by what the report took, and as old as the
//! report: it does not see a node's clock step until that node reports again, but it sees its own step at once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::command::stamp_at;
use raft_store::names::{Boot, RaftId, UnixMillis};
use raft_store::storage::Published;

use super::cluster::{Cluster, wait_leading};
use crate::admin::call::CallError;
use crate::clock;

/// As far as a leader's clock may be from the median of its voters'.
pub const TOLERANCE: Duration = Duration::from_secs(30);

/// Longest wait for the voters' clocks before a version is stamped. Each reports at once when a leader is new.
const HEARD_WITHIN: Duration = Duration::from_secs(5);

type Wall = Box<dyn Fn() -> UnixMillis + Send + Sync>;

/// What one leader has heard of its voters' clocks in its term.
pub struct Clocks {
    wall: Wall,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    /// The term it was heard in. What a leader sees when it begins may be old.
    term: Option<u64>,
    /// The newest report of each node.
    reports: BTreeMap<RaftId, (Boot, u64)>,
    /// What a clock showed, and when it was seen.
    said: BTreeMap<RaftId, (UnixMillis, Instant)>,
}

/// Why a clock is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// It does not lead.
    NotLeader,
    /// Too few voters have reported in this term.
    Unheard {
        /// That have, the leader itself among them.
        heard: usize,
        /// Of so many.
        voters: usize,
    },
    /// It is elsewhere than the others'.
    Apart {
        /// By so many milliseconds; ahead if positive.
        by_ms: i64,
    },
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotLeader => f.write_str("this node does not lead"),
            Self::Unheard { heard, voters } => write!(
                f,
                "the leader knows the clocks of {heard} of {voters} voters in its term, and needs a majority's"
            ),
            Self::Apart { by_ms } => write!(
                f,
                "the leader's clock is {} ms {} the median of the voters'; set it right",
                by_ms.unsigned_abs(),
                if *by_ms > 0 { "ahead of" } else { "behind" }
            ),
        }
    }
}

impl From<Doubt> for CallError {
    fn from(doubt: Doubt) -> Self {
        match doubt {
            Doubt::NotLeader => crate::consensus::ProposeError::NotLeader { leader: None }.into(),
            doubt => CallError::new(ErrorCode::NotReady, format!("{doubt}; nothing was changed")),
        }
    }
}

impl Default for Clocks {
    fn default() -> Self {
        Self::new(Box::new(clock::unix_millis))
    }
}

impl Clocks {
    /// Believes `wall`, if the others agree.
    #[must_use]
    pub fn new(wall: Wall) -> Self {
        Self {
            wall,
            heard: Mutex::default(),
        }
    }

    /// The wall clock, if it can be believed.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn trusted(&self, cluster: &dyn Cluster, now: Instant) -> Result<UnixMillis, Doubt> {
        self.look(cluster, now);
        let leads = cluster.leadership().is_some();
        let own = cluster.raft_id().filter(|_| leads).ok_or(Doubt::NotLeader)?;
        let wall = (self.wall)();
        let published = cluster.published();
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let voters: Vec<RaftId> = published.membership.voter_ids().collect();
        let offset = |id: &RaftId| {
            if *id == own {
                return Some(0);
            }
            let (said, at) = heard.said.get(id)?;
            let since = i64::try_from(now.saturating_duration_since(*at).as_millis()).ok()?;
            Some(said.saturating_add(since).saturating_sub(wall))
        };
        let mut offsets: Vec<i64> = voters.iter().filter_map(offset).collect();
        judge(&mut offsets, voters.len()).map(|()| wall)
    }

    /// Whether a version can be stamped now: the last reports say nothing else than the wall clock, or a majority has
    /// reported in this term. After an outage of the whole cluster the last reports are older than the stamp takes
    /// them for, and make a leader whose clock is right look as if it were ahead.
    fn can_stamp(&self, cluster: &dyn Cluster) -> bool {
        self.is_borne_out(cluster)
            || !matches!(self.trusted(cluster, Instant::now()), Err(Doubt::Unheard { .. }))
    }

    /// Whether the last reports say nothing else than the wall clock.
    fn is_borne_out(&self, cluster: &dyn Cluster) -> bool {
        let Some(own) = cluster.raft_id() else {
            return true;
        };
        let (wall, published) = ((self.wall)(), cluster.published());
        let voters = published.membership.voter_ids().collect();
        stamp_at(&published.state, &voters, own, wall) == wall
    }

    /// Whether it can be judged what has expired. As [`Self::trusted`], but a new leader does not wait for its voters: until a
    /// majority has reported in its term, it is enough that their last reports do not contradict its clock.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn uncontradicted(&self, cluster: &dyn Cluster, now: Instant) -> Result<(), Doubt> {
        match self.trusted(cluster, now) {
            Err(Doubt::Unheard { .. }) if self.is_borne_out(cluster) => Ok(()),
            believed => believed.map(|_| ()),
        }
    }

    /// Waits until a version can be stamped, for 5 s at most, and no longer than `deadline`: what nobody contradicts later
    /// stands then.
    pub async fn before_stamp(&self, cluster: &dyn Cluster, deadline: Option<tokio::time::Instant>) {
        let patience = tokio::time::Instant::now() + HEARD_WITHIN;
        let deadline = deadline.map_or(patience, |deadline| deadline.min(patience));
        let _ = wait_leading(cluster, deadline, |_| self.can_stamp(cluster).then_some(())).await;
    }

    /// Takes note of what has been reported since it was last called. To be called whenever the state has changed:
    /// a report counts from when it is seen.
    pub fn look(&self, cluster: &dyn Cluster, now: Instant) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(leadership) = cluster.leadership() else {
            *heard = Heard::default();
            return;
        };
        let published = cluster.published();
        // Until an entry of its own term is applied, a leader may still apply what was reported long ago.
        if applied_term(&published) != Some(leadership.term) {
            *heard = Heard::default();
            return;
        }
        let begins = heard.term != Some(leadership.term);
        if begins {
            *heard = Heard {
                term: Some(leadership.term),
                ..Heard::default()
            };
        }
        for (id, report) in published.state.reports().iter() {
            let seen = (report.boot, report.seq);
            if heard.reports.insert(*id, seen) != Some(seen) && !begins {
                heard.said.insert(*id, (report.clock, now));
            }
        }
    }
}

fn applied_term(published: &Published) -> Option<u64> {
    published.applied.map(|id| id.leader_id.term)
}

/// Judges by how far the known clocks are ahead of the leader's, which is among them with 0. Of an even number both in
/// the middle have to be near: one voter of two that is right is not outvoted by the mean.
fn judge(offsets: &mut [i64], voters: usize) -> Result<(), Doubt> {
    let heard = offsets.len();
    if heard == 0 || heard < voters / 2 + 1 {
        return Err(Doubt::Unheard { heard, voters });
    }
    offsets.sort_unstable();
    let middle = [offsets[(heard - 1) / 2], offsets[heard / 2]];
    let farthest = middle.into_iter().max_by_key(|offset| offset.unsigned_abs());
    let offset = farthest.unwrap_or_default();
    let tolerance = u64::try_from(TOLERANCE.as_millis()).unwrap_or(u64::MAX);
    if offset.unsigned_abs() > tolerance {
        let by_ms = offset.saturating_neg();
        return Err(Doubt::Apart { by_ms });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{FakeCluster, World};

    const DAY_MS: i64 = 24 * 3600 * 1000;

    #[test]
    fn the_median_is_asked_and_a_majority_has_to_be_known() {
        let judge = |mut offsets: Vec<i64>, voters| judge(&mut offsets, voters);
        assert_eq!(judge(vec![0], 1), Ok(()));
        assert_eq!(judge(vec![0], 3), Err(Doubt::Unheard { heard: 1, voters: 3 }));
        assert_eq!(judge(vec![0, 10, 20_000], 3), Ok(()));
        // One of the others is wrong.
        assert_eq!(judge(vec![0, 100, -400 * DAY_MS], 3), Ok(()));
        // The leader is.
        let behind = judge(vec![0, 400 * DAY_MS, 400 * DAY_MS + 5], 3);
        assert_eq!(behind, Err(Doubt::Apart { by_ms: -400 * DAY_MS }));
        let ahead = judge(vec![0, -40_000, -31_000], 3);
        assert_eq!(ahead, Err(Doubt::Apart { by_ms: 31_000 }));
        // Of two nobody knows who is right.
        assert!(judge(vec![0, 31_000], 2).is_err() && judge(vec![0, -31_000], 3).is_err());
        assert_eq!(judge(vec![0, 29_000], 3), Ok(()));
    }

    #[tokio::test]
    async fn a_report_counts_from_when_it_is_seen_and_only_if_it_came_under_this_leader() {
        let cluster = FakeCluster::new(World::new(3));
        let clocks = Clocks::new(Box::new(|| 500_000));
        let begin = Instant::now();
        // They have all reported before, with a clock that shows 0.
        let trusted = |after: u64| clocks.trusted(&*cluster, begin + Duration::from_secs(after));
        assert_eq!(trusted(0), Err(Doubt::Unheard { heard: 1, voters: 3 }));
        let others: Vec<RaftId> = cluster.with(|world| world.voters.iter().copied().collect());
        cluster.with(|world| world.report_clock(others[1], 480_000));
        assert_eq!(trusted(1), Ok(500_000));
        // Nineteen seconds later its clock is not far from this one's, and a minute later it is: this one stands.
        assert_eq!(trusted(20), Ok(500_000));
        assert_eq!(trusted(80), Err(Doubt::Apart { by_ms: -59_000 }));
        // Another term, and nothing of the one before counts.
        if let Some(leadership) = &mut *cluster.leadership.lock().unwrap() {
            leadership.term = 2;
        }
        assert_eq!(trusted(81), Err(Doubt::Unheard { heard: 1, voters: 3 }));
        *cluster.leadership.lock().unwrap() = None;
        assert_eq!(trusted(82), Err(Doubt::NotLeader));
    }

    /// The whole cluster was down for three hours: the reports that it has are of before.
    #[tokio::test]
    async fn a_version_is_stamped_once_a_majority_has_said_its_clock_unless_nobody_contradicts() {
        let cluster = FakeCluster::new(World::new(3));
        let now = 3 * 3600 * 1000;
        let clocks = Clocks::new(Box::new(move || now));
        assert!(!clocks.can_stamp(&*cluster));
        let others: Vec<RaftId> = cluster.with(|world| world.voters.iter().copied().collect());
        let report = async {
            tokio::task::yield_now().await;
            cluster.with(|world| world.report_clock(others[1], now));
        };
        let begun = Instant::now();
        tokio::join!(clocks.before_stamp(&*cluster, None), report);
        assert!(begun.elapsed() < HEARD_WITHIN && clocks.can_stamp(&*cluster));
        // Nobody waits for longer than the caller does.
        let (unheard, deaf) = (
            FakeCluster::new(World::new(3)),
            Clocks::new(Box::new(move || now)),
        );
        deaf.before_stamp(&*unheard, Some(tokio::time::Instant::now()))
            .await;
        assert!(begun.elapsed() < HEARD_WITHIN && !deaf.can_stamp(&*unheard));
        // Of a clock that the last reports bear out nothing has to be heard.
        let early = Clocks::new(Box::new(|| 60_000));
        assert!(early.can_stamp(&*FakeCluster::new(World::new(3))));
        assert!(clocks.can_stamp(&*FakeCluster::new(World::new(1))));
        *cluster.leadership.lock().unwrap() = None;
        clocks.before_stamp(&*cluster, None).await;
    }

    #[tokio::test]
    async fn what_has_expired_a_new_leader_judges_unless_the_last_reports_contradict_its_clock() {
        let expires = |wall: UnixMillis| {
            let cluster = FakeCluster::new(World::new(3));
            let clocks = Clocks::new(Box::new(move || wall));
            let judged = clocks.uncontradicted(&*cluster, Instant::now());
            (cluster, clocks, judged)
        };
        let (cluster, clocks, judged) = expires(60_000);
        assert_eq!(judged, Ok(()), "nobody has reported in its term yet");
        let unheard = Err(Doubt::Unheard { heard: 1, voters: 3 });
        for wrong in [400 * DAY_MS, -400 * DAY_MS] {
            assert_eq!(expires(wrong).2, unheard, "{wrong}");
        }
        // Once a majority has reported, its word counts.
        let others: Vec<RaftId> = cluster.with(|world| world.voters.iter().copied().collect());
        cluster.with(|world| world.report_clock(others[1], 400 * DAY_MS));
        let apart = clocks.uncontradicted(&*cluster, Instant::now());
        assert!(
            matches!(apart, Err(Doubt::Apart { by_ms }) if by_ms < 0),
            "{apart:?}"
        );
        *cluster.leadership.lock().unwrap() = None;
        let follows = clocks.uncontradicted(&*cluster, Instant::now());
        assert_eq!(follows, Err(Doubt::NotLeader));
    }

    #[tokio::test]
    async fn who_votes_alone_believes_itself() {
        let cluster = FakeCluster::new(World::new(1));
        let clocks = Clocks::new(Box::new(|| 7));
        assert_eq!(clocks.trusted(&*cluster, Instant::now()), Ok(7));
    }

    #[test]
    fn a_doubt_says_what_to_do() {
        let error = CallError::from(Doubt::Apart { by_ms: 45_000 });
        assert_eq!(error.code, ErrorCode::NotReady);
        assert!(error.detail.contains("45000 ms ahead of"), "{error}");
        assert_eq!(CallError::from(Doubt::NotLeader).code, ErrorCode::NotLeader);
    }
}
