use std::sync::Arc;

use super::*;
use crate::config::DAY;
use crate::rotation::testing::{FakeCluster, World, asked, context as name};

const DAY_MS: i64 = 24 * 3600 * 1000;

struct Bench {
    cluster: Arc<FakeCluster>,
    clocks: Clocks,
}

/// Versions 1 and 2 of `c` are retired, 3 is active.
fn bench(nodes: u64) -> Bench {
    let mut world = World::new(nodes);
    for _ in 0..3 {
        let version = world.prepare("c");
        world.activate("c", version);
    }
    for node in world.voters.clone() {
        world.report_clock(node, 0);
    }
    Bench {
        cluster: FakeCluster::new(world),
        clocks: Clocks::default(),
    }
}

const DESTROY: Change = Change::Destroy {
    wait_ms: None,
    override_recent_use: false,
};

fn destroy_after(wait_ms: u64) -> Change {
    Change::Destroy {
        wait_ms: Some(wait_ms),
        override_recent_use: false,
    }
}

impl Bench {
    async fn ask(&self, change: Change, version: u32, key: &str) -> Result<KeyVersionResponse, CallError> {
        let life = KeyLife {
            cluster: &*self.cluster,
            clocks: &self.clocks,
            destroy: Destroy {
                default_wait: DAY * 7,
                min_wait: DAY,
                recent_use: DAY * 7,
            },
        };
        let asked = asked(&format!("{change:?} v{version}"), key);
        life.change(&name("c"), version, change, &asked).await
    }

    async fn code(&self, change: Change, version: u32, key: &str) -> ErrorCode {
        self.ask(change, version, key).await.unwrap_err().code
    }

    fn state(&self, version: u32) -> VersionState {
        let published = self.cluster.published();
        published.state.version(&name("c"), version).unwrap().state
    }

    fn wait_ms(&self, version: u32) -> u64 {
        let published = self.cluster.published();
        let version = published.state.version(&name("c"), version).unwrap();
        version.destruction.as_ref().unwrap().wait_ms
    }

    /// Whatever was proposed.
    fn proposed(&self) -> usize {
        self.cluster.count(|_| true)
    }
}

#[tokio::test]
async fn a_retired_version_is_disabled_and_enabled_again() {
    let bench = bench(1);
    let answer = bench.ask(Change::Disable, 1, "k").await.unwrap();
    assert_eq!((answer.context.as_str(), answer.info.version), ("c", 1));
    assert_eq!(answer.info.state, hsm_api::admin::KeyState::Disabled);
    // Another request finds it so, and says so without another entry.
    let before = bench.proposed();
    bench.ask(Change::Disable, 1, "k2").await.unwrap();
    assert_eq!(bench.proposed(), before);
    bench.ask(Change::Enable, 1, "k").await.unwrap();
    assert_eq!(bench.state(1), VersionState::DecryptOnly);
    // A late repeat is answered, and undoes nothing.
    bench.ask(Change::Disable, 1, "k").await.unwrap();
    assert_eq!(bench.state(1), VersionState::DecryptOnly);
}

#[tokio::test]
async fn a_destruction_waits_as_configured_can_be_undone_and_is_scheduled_once() {
    let bench = bench(1);
    bench.ask(DESTROY, 1, "k").await.unwrap();
    assert_eq!(bench.wait_ms(1), 7 * DAY_MS as u64);
    assert_eq!(bench.code(DESTROY, 1, "k2").await, ErrorCode::Conflict);
    let answer = bench.ask(DESTROY, 1, "k").await.unwrap();
    assert_eq!(answer.info.destruction.unwrap().wait_seconds, 7 * 24 * 3600);
    bench.ask(Change::Undo, 1, "k").await.unwrap();
    assert_eq!(bench.state(1), VersionState::DecryptOnly);
    // What was undone stays undone, whatever arrives late.
    bench.ask(DESTROY, 1, "k").await.unwrap();
    assert_eq!(bench.state(1), VersionState::DecryptOnly);
    assert_eq!(bench.code(Change::Undo, 1, "k2").await, ErrorCode::Conflict);
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::ScheduleDestroy(_))), 1);
    // A disabled version is disabled again after it.
    bench.ask(Change::Disable, 2, "k").await.unwrap();
    bench.ask(DESTROY, 2, "k").await.unwrap();
    bench.ask(Change::Undo, 2, "k").await.unwrap();
    assert_eq!(bench.state(2), VersionState::Disabled);
}

#[tokio::test]
async fn a_wait_below_the_minimum_is_refused_with_the_minimum() {
    let bench = bench(1);
    let short = destroy_after(DAY_MS as u64 - 1);
    let error = bench.ask(short, 1, "k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.detail.contains("from 1 d"), "{error}");
    bench.ask(destroy_after(DAY_MS as u64), 1, "k").await.unwrap();
    assert_eq!(bench.wait_ms(1), DAY_MS as u64);
}

#[tokio::test]
async fn recent_use_is_an_answer_for_good_and_an_override_is_another_request() {
    let bench = bench(1);
    bench
        .cluster
        .with(|world| world.used(1, "c", 1, world.index as i64 * 1000));
    let error = bench.ask(DESTROY, 1, "k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("override"), "{error}");
    // A fortnight later the same request has the same answer.
    bench.cluster.with(|world| world.index += 14 * 24 * 3600);
    assert_eq!(bench.code(DESTROY, 1, "k").await, ErrorCode::Conflict);
    bench.ask(DESTROY, 1, "k2").await.unwrap();
    bench.cluster.with(|world| {
        let now = world.index as i64 * 1000;
        world.used(1, "c", 2, now);
    });
    let overriding = Change::Destroy {
        wait_ms: None,
        override_recent_use: true,
    };
    bench.ask(overriding, 2, "k").await.unwrap();
    assert_eq!(bench.state(2), VersionState::DestroyScheduled);
}

#[tokio::test]
async fn what_was_used_at_all_needs_a_clock_that_is_believed() {
    let bench = bench(3);
    bench.ask(DESTROY, 1, "k").await.unwrap();
    bench.cluster.with(|world| world.used(1, "c", 2, 0));
    assert_eq!(bench.code(DESTROY, 2, "k").await, ErrorCode::NotReady);
    let overriding = Change::Destroy {
        wait_ms: None,
        override_recent_use: true,
    };
    bench.ask(overriding, 2, "k").await.unwrap();
}

#[tokio::test]
async fn the_active_version_is_refused_for_good() {
    let bench = bench(1);
    for change in [Change::Disable, Change::Enable, DESTROY] {
        let error = bench.ask(change, 3, "k").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        assert!(error.detail.contains("rotate c first"), "{error}");
    }
    bench.cluster.with(|world| {
        let version = world.prepare("c");
        world.activate("c", version);
    });
    // It is retired now. A late repeat was refused before, and still is.
    assert_eq!(bench.code(DESTROY, 3, "k").await, ErrorCode::Conflict);
    bench.ask(DESTROY, 3, "k2").await.unwrap();
}

#[tokio::test]
async fn what_is_gone_or_not_there_yet_is_changed_by_nobody() {
    let bench = bench(1);
    bench.cluster.with(|world| {
        world.schedule_destroy("c", 1, 1000);
        world.begin_destroy("c", 1);
        world.prepare("c");
    });
    let before = bench.proposed();
    for change in [Change::Disable, Change::Enable, Change::Undo, DESTROY] {
        assert_eq!(bench.code(change, 1, "k").await, ErrorCode::Conflict);
        assert_eq!(bench.code(change, 4, "k").await, ErrorCode::Conflict);
        assert_eq!(bench.code(change, 9, "k").await, ErrorCode::NotFound);
    }
    assert_eq!(bench.proposed(), before);
    let error = bench.ask(Change::Undo, 1, "k").await.unwrap_err();
    assert!(error.detail.contains("no way back"), "{error}");
}

#[tokio::test]
async fn a_change_that_was_made_meanwhile_is_looked_at_again() {
    let bench = bench(1);
    let (context, state) = (name("c"), VersionState::Disabled);
    let other = raft_store::command::Conflict::VersionState {
        context,
        version: 1,
        state,
    };
    let failure = (ProposeError::Refused(other.into()), false);
    bench.cluster.failures.lock().unwrap().push(failure);
    bench.ask(Change::Disable, 1, "k").await.unwrap();
    assert_eq!(bench.state(1), VersionState::Disabled);
}

#[tokio::test]
async fn without_a_quorum_nothing_is_changed_and_said_to_be() {
    let bench = bench(1);
    let failure = (ProposeError::NoQuorum, false);
    bench.cluster.failures.lock().unwrap().push(failure);
    assert_eq!(bench.code(DESTROY, 1, "k").await, ErrorCode::NoQuorum);
    // An answer that is lost is found by the repeat.
    let lost = (ProposeError::Unknown, true);
    bench.cluster.failures.lock().unwrap().push(lost);
    assert_eq!(bench.code(DESTROY, 1, "k").await, ErrorCode::OutcomeUnknown);
    bench.ask(DESTROY, 1, "k").await.unwrap();
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::ScheduleDestroy(_))), 1);
}

/// As version 4 of `c`, which node 1 has found.
fn with_adopted(bench: &Bench) {
    bench.cluster.with(|world| {
        world.ok(Op::AdoptVersion(raft_store::command::AdoptVersion {
            context: name("c"),
            version: 4,
            key_uid: raft_store::names::KeyUid([4; 16]),
            label: "old".to_owned(),
            slot: raft_store::names::SlotName::new("s").unwrap(),
            check_record: vec![1],
            holder: 1,
            floor: 0,
            created_at: None,
        }));
    });
}

#[tokio::test]
async fn an_adopted_version_is_released_and_no_other() {
    let bench = bench(1);
    with_adopted(&bench);
    let error = bench.ask(Change::Release, 1, "k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("made here"), "{error}");
    let answer = bench.ask(Change::Release, 4, "k").await.unwrap();
    assert_eq!(answer.info.state, hsm_api::admin::KeyState::Abandoned);
    // Again, under the same key and another.
    let before = bench.proposed();
    bench.ask(Change::Release, 4, "k").await.unwrap();
    bench.ask(Change::Release, 4, "k2").await.unwrap();
    assert_eq!(bench.proposed(), before);
    assert_eq!(bench.code(Change::Enable, 4, "k3").await, ErrorCode::Conflict);
}

#[tokio::test]
async fn an_adopted_version_that_waits_for_its_end_is_not_released() {
    let bench = bench(1);
    with_adopted(&bench);
    let destroy = Change::Destroy {
        wait_ms: None,
        override_recent_use: true,
    };
    bench.ask(destroy, 4, "k").await.unwrap();
    let error = bench.ask(Change::Release, 4, "k2").await.unwrap_err();
    assert!(error.detail.contains("undo its destruction"), "{error}");
}
