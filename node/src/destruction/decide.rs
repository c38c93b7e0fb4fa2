//! What the leader proposes for the waits before destructions. Pure, so that a new leader goes on with what the state
//! has of each wait. Nothing is told while nothing waits, and hardly anything while something does: one entry in half a
//! minute, and one when a wait comes to its end.

use std::time::{Duration, Instant};

use raft_store::command::{MAX_ADVANCE_MS, SeenWait};
use raft_store::names::ContextName;
use raft_store::state::ClusterState;
use raft_store::state::context::{Destruction, VersionKey};

use super::waits::{Waits, seen};

/// Between two commands that advance waits of which none is over.
pub const BEAT: Duration = Duration::from_secs(30);
/// Waits named in one command, well below its 64 KiB.
const WAITS_PER_COMMAND: usize = 400;
/// Longest pause between looks while something waits: a longer one would not count whole.
const LOOK: Duration = Duration::from_secs(1);

/// What to propose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// So much time has passed for these waits.
    Advance {
        /// In milliseconds.
        elapsed_ms: u64,
        /// The waits.
        waits: Vec<SeenWait>,
    },
    /// A wait is over.
    Begin {
        /// The context.
        context: ContextName,
        /// The version.
        version: u32,
    },
}

/// A wait with what has passed and is not in the state, in milliseconds.
struct Open<'s> {
    key: &'s VersionKey,
    destruction: &'s Destruction,
    untold: u64,
}

impl Open<'_> {
    /// What is missing to its end by the state.
    fn left(&self) -> u64 {
        self.destruction
            .wait_ms
            .saturating_sub(self.destruction.elapsed_ms)
    }
}

fn open<'s>(state: &'s ClusterState, waits: &Waits) -> Vec<Open<'s>> {
    let one = |key: &'s VersionKey, destruction: &'s Destruction| Open {
        key,
        destruction,
        untold: u64::try_from(waits.untold(key, destruction).as_millis()).unwrap_or(u64::MAX),
    };
    state
        .destroy_scheduled()
        .filter_map(|(key, version)| Some(one(key, version.destruction.as_ref()?)))
        .collect()
}

/// Decides on every wait. `told`: when this leader last advanced waits that were not over.
#[must_use]
pub fn decide(state: &ClusterState, waits: &Waits, told: Option<Instant>, now: Instant) -> Vec<Action> {
    let open = open(state, waits);
    let over: Vec<Action> = open
        .iter()
        .filter(|wait| wait.destruction.is_due())
        .map(|wait| Action::Begin {
            context: wait.key.context.clone(),
            version: wait.key.version,
        })
        .collect();
    if !over.is_empty() {
        return over;
    }
    let ending: Vec<&Open<'_>> = open.iter().filter(|wait| wait.untold >= wait.left()).collect();
    if !ending.is_empty() {
        return advance(&ending);
    }
    if told.is_some_and(|told| now.saturating_duration_since(told) < BEAT) {
        return Vec::new();
    }
    let beat = u64::try_from(BEAT.as_millis()).unwrap_or(u64::MAX);
    let ripe: Vec<&Open<'_>> = open.iter().filter(|wait| wait.untold >= beat).collect();
    advance(&ripe)
}

/// Advances waits by what has passed for all of them. What has passed for some of them alone stays with them, until
/// they come to their end.
fn advance(waits: &[&Open<'_>]) -> Vec<Action> {
    let common = waits.iter().map(|wait| wait.untold).min().unwrap_or_default();
    let elapsed_ms = common.min(MAX_ADVANCE_MS);
    if elapsed_ms == 0 {
        return Vec::new();
    }
    waits
        .chunks(WAITS_PER_COMMAND)
        .map(|chunk| Action::Advance {
            elapsed_ms,
            waits: chunk
                .iter()
                .map(|wait| seen(wait.key, wait.destruction))
                .collect(),
        })
        .collect()
}

/// When to look again at the latest; `None` while nothing waits.
#[must_use]
pub fn next_look(state: &ClusterState, waits: &Waits) -> Option<Duration> {
    let to_its_end = |wait: &Open<'_>| Duration::from_millis(wait.left().saturating_sub(wait.untold));
    let soonest = open(state, waits).iter().map(to_its_end).min()?;
    // Not below a millisecond: a wait of which a fraction of one is left would be looked at without end.
    Some(soonest.clamp(Duration::from_millis(1), LOOK))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{World, context};

    const SECOND: Duration = Duration::from_secs(1);
    const DAY_MS: u64 = 24 * 3600 * 1000;

    /// Versions of `c`, the last one active, and a leader that watches them.
    struct Leader {
        world: World,
        waits: Waits,
        told: Option<Instant>,
        now: Instant,
        /// When, in seconds since the begin, by how much, and of which versions waits were advanced.
        told_all: Vec<(u64, u64, Vec<u32>)>,
        begun: Vec<(u64, u32)>,
        began: Instant,
    }

    impl Leader {
        fn new(versions: u32) -> Self {
            let mut world = World::new(1);
            for _ in 0..versions {
                let version = world.prepare("c");
                world.activate("c", version);
            }
            let now = Instant::now();
            Self {
                world,
                waits: Waits::default(),
                told: None,
                now,
                told_all: Vec::new(),
                begun: Vec::new(),
                began: now,
            }
        }

        /// Looks every second for so long, and does what is decided.
        fn lead(&mut self, seconds: u32) {
            for _ in 0..seconds {
                self.waits.look(1, true, &self.world.state, self.now);
                self.act();
                self.now += SECOND;
            }
        }

        fn act(&mut self) {
            let at = self.now.duration_since(self.began).as_secs();
            for action in decide(&self.world.state, &self.waits, self.told, self.now) {
                match action {
                    Action::Advance { elapsed_ms, waits } => {
                        let versions = waits.iter().map(|wait| wait.version).collect();
                        for wait in waits {
                            self.world.advance("c", wait.version, elapsed_ms);
                        }
                        self.told_all.push((at, elapsed_ms, versions));
                        self.told = Some(self.now);
                    }
                    Action::Begin { version, .. } => {
                        let context = context("c");
                        let op = raft_store::command::BeginDestroy { context, version };
                        self.world.ok(raft_store::command::Op::BeginDestroy(op));
                        self.begun.push((at, version));
                    }
                }
            }
        }
    }

    #[test]
    fn while_nothing_waits_nothing_is_told() {
        let mut leader = Leader::new(2);
        leader.lead(100);
        assert!(leader.told_all.is_empty() && leader.begun.is_empty());
        assert_eq!(next_look(&leader.world.state, &leader.waits), None);
    }

    #[test]
    fn a_long_wait_is_told_of_every_half_minute_and_ends_when_it_is_over() {
        let mut leader = Leader::new(2);
        leader.world.schedule_destroy("c", 1, 100_000);
        leader.lead(200);
        let at: Vec<_> = leader.told_all.iter().map(|(at, ms, _)| (*at, *ms)).collect();
        assert_eq!(at, [(30, 30_000), (60, 30_000), (90, 30_000), (100, 10_000)]);
        assert_eq!(leader.begun, [(101, 1)]);
    }

    #[test]
    fn waits_of_different_beginnings_share_their_commands_and_each_ends_in_its_time() {
        let mut leader = Leader::new(4);
        leader.world.schedule_destroy("c", 1, 100_000);
        leader.lead(20);
        leader.world.schedule_destroy("c", 2, 100_000);
        leader.lead(5);
        leader.world.schedule_destroy("c", 3, 1_000_000);
        leader.lead(275);
        assert_eq!(leader.begun, [(101, 1), (121, 2)]);
        // By beats, besides the two ends.
        assert!(leader.told_all.len() <= 300 / 30 + 2, "{:?}", leader.told_all);
        assert!(leader.told_all.iter().all(|(_, ms, _)| *ms <= 120_000));
        let known = leader.world.elapsed("c", 3);
        assert!((215_000..=275_000).contains(&known), "{known}");
    }

    #[test]
    fn a_short_wait_does_not_wait_for_the_beat() {
        let mut leader = Leader::new(2);
        leader.world.schedule_destroy("c", 1, 2_500);
        leader.waits.look(1, true, &leader.world.state, leader.now);
        let next = next_look(&leader.world.state, &leader.waits);
        assert_eq!(next, Some(SECOND));
        leader.lead(3);
        let next = next_look(&leader.world.state, &leader.waits);
        assert_eq!(next, Some(SECOND / 2));
        leader.lead(3);
        assert_eq!(leader.begun.len(), 1);
    }

    #[test]
    fn a_new_leader_goes_on_with_what_the_state_has() {
        let mut leader = Leader::new(2);
        leader.world.schedule_destroy("c", 1, 100_000);
        leader.lead(70);
        assert_eq!(leader.world.elapsed("c", 1), 60_000);
        // Another one leads: what the first had not told is lost, and none of it counts twice.
        leader.waits = Waits::default();
        leader.told = None;
        leader.lead(50);
        assert_eq!(leader.begun, [(111, 1)]);
    }

    #[test]
    fn many_waits_are_told_of_in_commands_that_fit() {
        let mut leader = Leader::new(1);
        for _ in 0..900 {
            let version = leader.world.prepare("c");
            leader.world.activate("c", version);
            leader.world.schedule_destroy("c", version - 1, DAY_MS);
        }
        leader.lead(31);
        let sizes: Vec<_> = leader.told_all.iter().map(|(_, _, of)| of.len()).collect();
        assert_eq!(sizes, [400, 400, 100]);
    }
}
