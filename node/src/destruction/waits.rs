//! How much time a leader has seen pass for each wait before a destruction, and has not told the state yet. It counts
//! from when this leader first saw the wait, in small steps between two looks: what passed while it was suspended,
//! starved, or without a quorum is no time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use raft_store::command::{MAX_ADVANCE_MS, SeenWait};
use raft_store::state::ClusterState;
use raft_store::state::context::{Destruction, VersionKey};

/// The most that counts between two looks; the driver looks every second.
const MOST_BETWEEN_LOOKS: Duration = Duration::from_secs(10);
/// What is not told within this is lost: a leader that could not tell it for so long could not have been told that
/// somebody has changed his mind either.
const MOST_UNTOLD: Duration = Duration::from_millis(MAX_ADVANCE_MS);

/// One wait, as this leader has seen it.
#[derive(Clone, Copy, Debug)]
struct Wait {
    scheduled_by: u64,
    /// What the state had when this leader first saw it, in milliseconds.
    first: u64,
    /// What has passed since.
    passed: Duration,
}

impl Wait {
    /// What has passed and is not in the state. Whatever brought the state forward meanwhile counts as told, an
    /// entry of the leader before this one too.
    fn untold(&self, elapsed_ms: u64) -> Duration {
        let told = Duration::from_millis(elapsed_ms.saturating_sub(self.first));
        self.passed.saturating_sub(told)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Waits {
    term: Option<u64>,
    looked: Option<Instant>,
    waits: BTreeMap<VersionKey, Wait>,
}

impl Waits {
    /// Takes note of the state under this leader's term. `backed`: a quorum was heard of lately.
    pub fn look(&mut self, term: u64, backed: bool, state: &ClusterState, now: Instant) {
        if self.term != Some(term) {
            self.forget();
            self.term = Some(term);
        }
        let since = self.looked.replace(now);
        let step = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let step = if backed {
            step.min(MOST_BETWEEN_LOOKS)
        } else {
            Duration::ZERO
        };
        let before = std::mem::take(&mut self.waits);
        let seen = |key: &VersionKey, destruction: &Destruction| {
            let known = before.get(key);
            let Some(known) = known.filter(|known| known.scheduled_by == destruction.scheduled_by) else {
                return Wait {
                    scheduled_by: destruction.scheduled_by,
                    first: destruction.elapsed_ms,
                    passed: Duration::ZERO,
                };
            };
            let told = Duration::from_millis(destruction.elapsed_ms.saturating_sub(known.first));
            let passed = (known.passed + step).min(told + MOST_UNTOLD);
            Wait { passed, ..*known }
        };
        self.waits = state
            .destroy_scheduled()
            .filter_map(|(key, version)| Some((key.clone(), seen(key, version.destruction.as_ref()?))))
            .collect();
    }

    /// This node does not lead.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Whether there is anything to wait for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waits.is_empty()
    }

    /// What has passed for a wait beyond what the state has of it.
    #[must_use]
    pub fn untold(&self, key: &VersionKey, destruction: &Destruction) -> Duration {
        self.waits
            .get(key)
            .filter(|wait| wait.scheduled_by == destruction.scheduled_by)
            .map_or(Duration::ZERO, |wait| wait.untold(destruction.elapsed_ms))
    }
}

/// A wait as a command names it.
pub(super) fn seen(key: &VersionKey, destruction: &Destruction) -> SeenWait {
    SeenWait {
        context: key.context.clone(),
        version: key.version,
        scheduled_by: destruction.scheduled_by,
        elapsed_ms: destruction.elapsed_ms,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::names::ContextName;
    use raft_store::state::context::VersionState;

    use super::*;
    use crate::rotation::testing::World;

    const SECOND: Duration = Duration::from_secs(1);
    const DAY_MS: u64 = 24 * 3600 * 1000;

    /// Versions 1 to 3 of `c`, the last one active.
    fn world() -> World {
        let mut world = World::new(1);
        for _ in 0..3 {
            let version = world.prepare("c");
            world.activate("c", version);
        }
        world
    }

    fn untold(waits: &Waits, world: &World, version: u32) -> Duration {
        let key = VersionKey {
            context: ContextName::new("c").unwrap(),
            version,
        };
        let known = world.state.version(&key.context, version).unwrap();
        waits.untold(&key, known.destruction.as_ref().unwrap())
    }

    /// Looks every second for so many.
    fn watch(waits: &mut Waits, term: u64, world: &World, now: &mut Instant, seconds: u32) {
        for _ in 0..seconds {
            *now += SECOND;
            waits.look(term, true, &world.state, *now);
        }
    }

    #[test]
    fn time_counts_from_when_a_leader_first_saw_the_wait() {
        let (mut world, mut waits, mut now) = (world(), Waits::default(), Instant::now());
        watch(&mut waits, 1, &world, &mut now, 20);
        assert!(waits.is_empty());
        world.schedule_destroy("c", 1, DAY_MS);
        now += SECOND;
        waits.look(1, true, &world.state, now);
        assert_eq!(untold(&waits, &world, 1), Duration::ZERO);
        watch(&mut waits, 1, &world, &mut now, 20);
        world.schedule_destroy("c", 2, DAY_MS);
        watch(&mut waits, 1, &world, &mut now, 5);
        assert_eq!(untold(&waits, &world, 1), 25 * SECOND);
        assert_eq!(untold(&waits, &world, 2), 4 * SECOND);
        // What the state has is not told again.
        world.advance("c", 1, 20_000);
        assert_eq!(untold(&waits, &world, 1), 5 * SECOND);
        watch(&mut waits, 1, &world, &mut now, 2);
        assert_eq!(untold(&waits, &world, 1), 7 * SECOND);
    }

    #[test]
    fn another_term_and_another_wait_begin_anew() {
        let (mut world, mut waits, mut now) = (world(), Waits::default(), Instant::now());
        world.schedule_destroy("c", 1, DAY_MS);
        watch(&mut waits, 1, &world, &mut now, 31);
        assert_eq!(untold(&waits, &world, 1), 30 * SECOND);
        watch(&mut waits, 2, &world, &mut now, 1);
        assert_eq!(untold(&waits, &world, 1), Duration::ZERO);
        watch(&mut waits, 2, &world, &mut now, 10);
        // Undone and scheduled again between two looks.
        let key = ContextName::new("c").unwrap();
        world.ok(raft_store::command::Op::UndoDestroy(
            raft_store::command::UndoDestroy {
                context: key.clone(),
                version: 1,
            },
        ));
        assert_eq!(
            world.state.version(&key, 1).unwrap().state,
            VersionState::DecryptOnly
        );
        world.schedule_destroy("c", 1, DAY_MS);
        assert_eq!(untold(&waits, &world, 1), Duration::ZERO);
        watch(&mut waits, 2, &world, &mut now, 4);
        assert_eq!(untold(&waits, &world, 1), 3 * SECOND);
    }

    #[test]
    fn without_a_quorum_or_without_looking_no_time_passes() {
        let (mut world, mut waits, mut now) = (world(), Waits::default(), Instant::now());
        world.schedule_destroy("c", 1, DAY_MS);
        watch(&mut waits, 1, &world, &mut now, 6);
        for _ in 0..1000 {
            now += SECOND;
            waits.look(1, false, &world.state, now);
        }
        assert_eq!(untold(&waits, &world, 1), 5 * SECOND);
        // Suspended for a week.
        now += SECOND * 7 * 24 * 3600;
        waits.look(1, true, &world.state, now);
        assert_eq!(untold(&waits, &world, 1), 5 * SECOND + MOST_BETWEEN_LOOKS);
        // It leads and is backed, and nothing can be told: a full disk.
        watch(&mut waits, 1, &world, &mut now, 10_000);
        assert_eq!(untold(&waits, &world, 1), MOST_UNTOLD);
        world.advance("c", 1, 120_000);
        watch(&mut waits, 1, &world, &mut now, 1);
        assert_eq!(untold(&waits, &world, 1), SECOND);
    }
}
