use std::sync::atomic::Ordering;

use raft_store::command::{Conflict, Existing};

use super::super::decide::Limits;
use super::super::driver::drive;
use super::super::testing::{
    FakeCluster, FakeKeys, World, asked, cluster_keys, context, replication_key, slot, still,
};
use super::*;

const LIMITS: Limits = Limits {
    fence_after: Duration::from_secs(30),
    pending: Duration::from_secs(30),
};

struct Bench {
    cluster: Arc<FakeCluster>,
    keys: Arc<FakeKeys>,
    rotator: Arc<Rotator>,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Bench {
    /// Three nodes that acknowledge at once, a driver, and version 1 of `c`.
    fn new() -> Self {
        let mut world = World::new(3);
        let first = world.prepare("c");
        world.activate("c", first);
        Self::of(world, Duration::from_secs(30))
    }

    fn of(world: World, pending: Duration) -> Self {
        let cluster = FakeCluster::new(world);
        let limits = Limits { pending, ..LIMITS };
        let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, still(), limits));
        let keys = Arc::new(FakeKeys::default());
        let rotator = Arc::new(rotator(&cluster, &keys));
        Self {
            cluster,
            keys,
            rotator,
            driver,
        }
    }

    async fn rotate(&self, key: &str) -> Result<Made, CallError> {
        rotate(&self.rotator, key, Duration::from_secs(20)).await
    }

    fn prepared(&self) -> usize {
        self.cluster.count(|op| matches!(op, Op::PrepareVersion(_)))
    }
}

fn rotator(cluster: &Arc<FakeCluster>, keys: &Arc<FakeKeys>) -> Rotator {
    Rotator::new(
        Arc::clone(cluster) as Arc<dyn Cluster>,
        Arc::clone(keys) as Arc<dyn KeyMaker>,
        cluster_keys(),
        still(),
        LIMITS,
    )
}

async fn rotate(rotator: &Rotator, key: &str, within: Duration) -> Result<Made, CallError> {
    let deadline = Instant::now() + within;
    rotator
        .make(&context("c"), &Wish::Rotate, &asked("rotate c", key), deadline)
        .await
}

fn made(result: Result<Made, CallError>) -> (u32, Option<u32>) {
    let made = result.unwrap();
    assert_eq!(made.key_id, format!("kek-c-v{}", made.version));
    (made.version, made.previous)
}

#[tokio::test]
async fn a_rotation_returns_once_its_version_is_active() {
    let bench = Bench::new();
    let result = bench.rotate("k").await;
    assert_eq!(result.as_ref().unwrap().state, VersionState::Active);
    assert_eq!(made(result), (2, Some(1)));
}

#[tokio::test]
async fn a_retried_rotate_makes_one_version() {
    let bench = Bench::new();
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    assert_eq!(made(bench.rotate("another").await), (3, Some(2)));
    // The same answer when a later version has replaced it.
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    assert_eq!(bench.keys.made.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn another_leader_finds_the_version_and_waits_for_it() {
    let bench = Bench::new();
    // The leader dies after the commit and before the answer.
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((ProposeError::Unknown, true));
    assert_eq!(
        bench.rotate("k").await.unwrap_err().code,
        ErrorCode::OutcomeUnknown
    );
    let keys = Arc::new(FakeKeys::default());
    let next = rotator(&bench.cluster, &keys);
    assert_eq!(
        made(rotate(&next, "k", Duration::from_secs(20)).await),
        (2, Some(1))
    );
    assert_eq!(keys.made.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_leader_that_dies_before_the_commit_has_made_nothing() {
    let bench = Bench::new();
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((ProposeError::Unknown, false));
    assert_eq!(
        bench.rotate("k").await.unwrap_err().code,
        ErrorCode::OutcomeUnknown
    );
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    assert_eq!(bench.prepared(), 2);
}

#[tokio::test]
async fn two_rotates_at_once_are_two_consecutive_versions() {
    let bench = Bench::new();
    let (one, two) = tokio::join!(bench.rotate("k1"), bench.rotate("k2"));
    let mut versions = [made(one).0, made(two).0];
    versions.sort_unstable();
    assert_eq!(versions, [2, 3]);
}

#[tokio::test]
async fn the_same_rotate_twice_at_once_is_one_version() {
    let bench = Bench::new();
    let (one, two) = tokio::join!(bench.rotate("k"), bench.rotate("k"));
    assert_eq!((made(one), made(two)), ((2, Some(1)), (2, Some(1))));
}

#[tokio::test]
async fn a_conflict_is_followed_by_another_attempt() {
    let bench = Bench::new();
    let (context, version) = (context("c"), 2);
    let conflict = ProposeError::Refused(Conflict::Pending { context, version }.into());
    bench.cluster.failures.lock().unwrap().push((conflict, false));
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    assert_eq!(bench.keys.made.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_label_that_another_version_got_first_is_followed_by_another_attempt_unless_it_was_asked_for() {
    let bench = Bench::new();
    let taken = || {
        let label = "kek-c-v2".to_owned();
        let refusal = ProposeError::Refused(Existing::Version { label }.into());
        bench.cluster.failures.lock().unwrap().push((refusal, false));
    };
    taken();
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    taken();
    let wish = Wish::Create {
        label: Some("mine".to_owned()),
        version: None,
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let asked = asked("create-kek c", "k");
    let refused = bench.rotator.make(&context("c"), &wish, &asked, deadline).await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::AlreadyExists);
}

#[tokio::test]
async fn a_version_that_cannot_finish_is_an_error_that_may_be_repeated() {
    let mut world = World::new(3);
    let first = world.prepare("c");
    world.activate("c", first);
    let bench = Bench::of(world, Duration::from_millis(1500));
    bench.cluster.acking.lock().unwrap().clear();
    let error = bench.rotate("k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::KeyVersionNotReady);
    assert!(
        error.code.retryable() && error.detail.contains("abandoned"),
        "{error}"
    );
    // The nodes are back: the same request succeeds, under a number of its own.
    *bench.cluster.acking.lock().unwrap() = bench.cluster.with(|world| world.voters.clone());
    assert_eq!(made(bench.rotate("k").await), (3, Some(1)));
}

#[tokio::test]
async fn a_version_that_is_pending_at_the_deadline_is_unknown_to_its_own_and_a_conflict_to_others() {
    let bench = Bench::new();
    bench.cluster.acking.lock().unwrap().clear();
    let short = Duration::from_millis(1500);
    let own = rotate(&bench.rotator, "k", short).await.unwrap_err();
    assert_eq!(own.code, ErrorCode::OutcomeUnknown);
    let other = rotate(&bench.rotator, "other", short).await.unwrap_err();
    assert_eq!(other.code, ErrorCode::Conflict);
    assert_eq!(bench.prepared(), 2);
}

#[tokio::test]
async fn a_leader_that_stops_leading_sends_its_callers_on() {
    let bench = Bench::new();
    bench.cluster.acking.lock().unwrap().clear();
    let (result, ()) = tokio::join!(bench.rotate("k"), async {
        while bench.prepared() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        *bench.cluster.leadership.lock().unwrap() = None;
    });
    // It did not end here, but it was begun: the next leader finishes it.
    assert_eq!(result.unwrap_err().code, ErrorCode::OutcomeUnknown);
}

#[tokio::test]
async fn without_a_quorum_nothing_is_appended() {
    let bench = Bench::new();
    let before = bench.cluster.count(|_| true);
    bench
        .cluster
        .failures
        .lock()
        .unwrap()
        .push((ProposeError::NoQuorum, false));
    assert_eq!(bench.rotate("k").await.unwrap_err().code, ErrorCode::NoQuorum);
    assert_eq!(bench.cluster.count(|_| true), before);
}

#[tokio::test]
async fn the_sealed_key_opens_for_exactly_this_version() {
    let bench = Bench::new();
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    let state = bench.cluster.published().state.clone();
    let version = state.version(&context("c"), 2).unwrap();
    let material = version.material.as_ref().unwrap();
    let cluster_key = replication_key().for_cluster(&state.meta().unwrap().cluster_id.0);
    let open = |version_number| {
        let sealed = SealedKeyContext {
            cluster_id: state.meta().unwrap().cluster_id.0,
            slot: "s",
            context: "c",
            version: version_number,
            key_uid: hsm_core::names::KeyUid::from_bytes(version.key_uid.0),
            transport_id: hsm_core::names::TransportId::from_bytes(material.transport_id.0),
            check_record: &material.check_record,
        };
        cluster_key.open_key(&sealed, &material.sealed_key).ok()
    };
    assert_eq!(open(2).unwrap().as_slice(), [8; 40]);
    assert!(open(3).is_none());
}

#[tokio::test]
async fn a_leader_with_another_replication_key_makes_no_version() {
    let bench = Bench::new();
    let rotator = Rotator::new(
        Arc::clone(&bench.cluster) as Arc<dyn Cluster>,
        Arc::clone(&bench.keys) as Arc<dyn KeyMaker>,
        Arc::new(|_: &ClusterMeta| Err("another key".to_owned())),
        still(),
        LIMITS,
    );
    let error = rotate(&rotator, "k", Duration::from_secs(20)).await.unwrap_err();
    assert_eq!(error, CallError::new(ErrorCode::Internal, "another key"));
    assert_eq!((bench.prepared(), bench.keys.made.load(Ordering::SeqCst)), (1, 0));
}

#[tokio::test]
async fn a_version_that_a_live_member_could_not_hold_is_not_made() {
    let bench = Bench::new();
    let sick = *bench.cluster.with(|world| world.voters.clone()).last().unwrap();
    bench.cluster.with(|world| world.report_slot(sick, "s", "failed"));
    let heard = |silent| bench.cluster.silence(sick, silent);
    heard(Duration::from_millis(100));
    let error = bench.rotate("k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::SlotFailed);
    assert!(error.detail.contains(&format!("n{sick} (failed)")), "{error}");
    assert_eq!((bench.prepared(), bench.keys.made.load(Ordering::SeqCst)), (1, 0));
    // It has other slots, and this one is not in its configuration any more.
    bench
        .cluster
        .with(|world| world.report_slot(sick, "other", "ready"));
    let error = bench.rotate("k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::SlotFailed);
    assert!(
        error.detail.contains(&format!("n{sick} (not configured)")),
        "{error}"
    );
    let highest = bench
        .cluster
        .with(|world| world.state.contexts().get(&context("c")).unwrap().highest_version);
    assert_eq!((bench.prepared(), highest), (1, 1), "no number is used up");
    bench.cluster.with(|world| world.report_slot(sick, "s", "ready"));
    assert_eq!(made(bench.rotate("k").await), (2, Some(1)));
    // Whoever has fallen silent is left out by the driver, which asks no report.
    bench.cluster.with(|world| world.report_slot(sick, "s", "failed"));
    heard(Duration::from_secs(31));
    assert_eq!(made(bench.rotate("k2").await), (3, Some(2)));
}

async fn relocate(bench: &Bench, key: &str, to: &str) -> Result<Made, CallError> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let wish = Wish::Move { to: slot(to) };
    bench
        .rotator
        .make(&context("c"), &wish, &asked("key move c", key), deadline)
        .await
}

#[tokio::test]
async fn a_move_and_its_version_are_made_once_however_often_they_are_asked_for() {
    let bench = Bench::new();
    bench.cluster.with(|world| world.second_slot("t"));
    // The leader dies after the first commit, and after the second.
    for _ in 0..2 {
        bench
            .cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::Unknown, true));
        let error = relocate(&bench, "k", "t").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::OutcomeUnknown);
    }
    for _ in 0..2 {
        assert_eq!(made(relocate(&bench, "k", "t").await), (2, Some(1)));
    }
    assert_eq!(
        bench.cluster.count(|op| matches!(op, Op::MoveContext(_))),
        1,
        "the state says what was done"
    );
    let published = bench.cluster.published();
    let slots = published.state.versions_of(&context("c"));
    let slots: Vec<_> = slots.map(|(_, version)| version.slot.to_string()).collect();
    assert_eq!(
        (slots, bench.prepared()),
        (vec!["s".to_owned(), "t".to_owned()], 2)
    );
}

#[tokio::test]
async fn nothing_is_moved_to_a_slot_that_a_live_member_could_not_use() {
    let bench = Bench::new();
    let moved = || bench.cluster.count(|op| matches!(op, Op::MoveContext(_)));
    // Nobody has it.
    let error = relocate(&bench, "k", "t").await.unwrap_err();
    assert_eq!((error.code, moved()), (ErrorCode::NotReady, 0));
    // Its transport key is there, and the others have no key of their own for it.
    bench.cluster.with(|world| world.transport("t", 1, 0));
    let error = relocate(&bench, "k", "t").await.unwrap_err();
    assert_eq!((error.code, moved()), (ErrorCode::Conflict, 1));
    assert!(error.detail.contains("has no key for slot t"), "{error}");
    // They have, and one of them lost it since, or has it closed.
    let bench = Bench::new();
    bench.cluster.with(|world| world.second_slot("t"));
    let sick = *bench.cluster.with(|world| world.voters.clone()).last().unwrap();
    bench.cluster.silence(sick, Duration::from_millis(100));
    for (slot, state, part) in [("s", "ready", "(not configured)"), ("t", "locked", "(locked)")] {
        bench.cluster.with(|world| world.report_slot(sick, slot, state));
        let error = relocate(&bench, "k", "t").await.unwrap_err();
        assert_eq!(error.code, ErrorCode::SlotFailed);
        assert!(error.detail.contains(part), "{error}");
    }
    assert_eq!(bench.cluster.count(|op| matches!(op, Op::MoveContext(_))), 0);
    bench.cluster.with(|world| world.report_slot(sick, "t", "ready"));
    assert_eq!(made(relocate(&bench, "k", "t").await), (2, Some(1)));
}
