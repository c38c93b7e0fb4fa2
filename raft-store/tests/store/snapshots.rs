//! Snapshots: received, announced, damaged, and installed beside a log that does not go with them.

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use raft_store::storage::{Opened, SnapshotReceiver};
use raft_store::{Entry, LogId, Snapshot, SnapshotMeta};

use crate::common::*;

/// Entries 0 to 29 of term 1, then up to 59 of term 2: what the cluster has.
fn history() -> Vec<Entry> {
    let mut entries = vec![founding()];
    entries.extend((1..30).map(|index| entry(1, index, 100)));
    entries.extend((30..60).map(|index| entry(2, index, 100)));
    entries
}

async fn append(store: &mut Opened, entries: impl IntoIterator<Item = Entry>) {
    for entry in entries {
        store.log.blocking_append([entry]).await.unwrap();
    }
}

/// A store with the whole history applied, and its snapshot.
async fn source(dir: &std::path::Path) -> (Opened, Snapshot) {
    let mut store = open(dir);
    append(&mut store, history()).await;
    store.machine.apply(history()).await.unwrap();
    let snapshot = snapshot_of(&mut store).await;
    (store, snapshot)
}

/// A node that has received a snapshot of everything over a log that ends as `tail` says, and was killed before it
/// was installed.
fn received_over(tail: impl Fn(u64) -> Entry, upto: u64) -> tempfile::TempDir {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime().block_on(async {
        let (_source, snapshot) = source(from.path()).await;
        let mut behind = open(dir.path());
        let shared: Vec<Entry> = history().into_iter().take(30).collect();
        append(&mut behind, shared.clone()).await;
        behind.machine.apply(shared).await.unwrap();
        append(&mut behind, (30..upto).map(tail)).await;
        receive(&behind, &snapshot);
    });
    dir
}

/// Opens what was left, twice, and says where the log begins and ends.
fn settled(dir: &std::path::Path) -> (Option<LogId>, Option<LogId>, Vec<u64>) {
    let mut seen = Vec::new();
    for _ in 0..2 {
        runtime().block_on(async {
            let mut store = open(dir);
            let applied = store.machine.applied_state().await.unwrap().0;
            assert_eq!(applied, Some(log_id(2, 59)), "the snapshot is in the state");
            let revocations = store.machine.published().load().state.revocations().len();
            assert_eq!(revocations, 59);
            let found = store.log.get_log_state().await.unwrap();
            let promised = store.control.get();
            assert_eq!(promised.last_purged, found.last_purged_log_id);
            assert_eq!(promised.last_log, found.last_log_id);
            let indexes = all_entries(&mut store)
                .await
                .iter()
                .map(|e| e.log_id.index)
                .collect();
            seen.push((found.last_purged_log_id, found.last_log_id, indexes));
        });
    }
    assert!(
        seen[0] == seen[1],
        "the second start finds what the first one left"
    );
    seen.remove(0)
}

/// The log goes on where the snapshot ends.
fn goes_on(dir: &std::path::Path, index: u64) {
    runtime().block_on(async {
        let mut store = open(dir);
        append(&mut store, [entry(4, index, 10)]).await;
    });
    runtime().block_on(async {
        let mut store = open(dir);
        assert_eq!(last_log(&mut store).await, Some(log_id(4, index)));
    });
}

#[test]
fn a_tail_that_contradicts_a_snapshot_installed_at_open_is_gone_whatever_its_term() {
    // Of an old leader that nobody followed, and of one that was elected later and heard by nobody.
    for term in [1, 3] {
        let dir = received_over(|index| entry(term, index, 100), 80);
        let end = Some(log_id(2, 59));
        assert_eq!(settled(dir.path()), (end, end, vec![]), "term {term}");
        goes_on(dir.path(), 60);
    }
}

#[test]
fn a_log_that_ends_before_a_snapshot_installed_at_open_is_gone_with_what_it_covers() {
    let dir = received_over(|index| entry(1, index, 100), 40);
    let end = Some(log_id(2, 59));
    assert_eq!(settled(dir.path()), (end, end, vec![]));
    goes_on(dir.path(), 60);
}

#[test]
fn a_tail_that_goes_on_after_a_snapshot_installed_at_open_stays() {
    let dir = received_over(|index| entry(2, index, 100), 80);
    let expected = (
        Some(log_id(2, 59)),
        Some(log_id(2, 79)),
        (60..80).collect::<Vec<u64>>(),
    );
    assert_eq!(settled(dir.path()), expected);
    goes_on(dir.path(), 80);
}

#[test]
fn two_that_are_received_at_once_of_the_same_state_do_not_mix() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime().block_on(async {
        let (source, snapshot) = source(from.path()).await;
        let mut store = open(dir.path());
        let to = store.control.snapshot_dir();
        let bytes = std::fs::read(&snapshot.snapshot.path).unwrap();
        let begin = || SnapshotReceiver::create(&to, &snapshot.meta).unwrap();
        let (mut one, mut two, mut given_up) = (begin(), begin(), begin());
        given_up.push(&bytes[..10]).unwrap();
        for chunk in bytes.chunks(1000) {
            one.push(chunk).unwrap();
            two.push(chunk).unwrap();
        }
        drop(given_up);
        let first = one.finish().unwrap();
        let second = two.finish().unwrap();
        assert_eq!(first.path, second.path);
        store
            .machine
            .install_snapshot(&snapshot.meta, Box::new(second))
            .await
            .unwrap();
        assert_eq!(
            store.machine.published().load().digest,
            source.machine.published().load().digest
        );
        let left = std::fs::read_dir(&to).unwrap().count();
        assert_eq!(left, 1, "no partial file is left");
    });
}

#[test]
fn a_snapshot_that_is_not_the_announced_one_is_refused() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime().block_on(async {
        let (_source, snapshot) = source(from.path()).await;
        let mut store = open(dir.path());
        let announced = SnapshotMeta {
            last_log_id: Some(log_id(2, 58)),
            ..snapshot.meta.clone()
        };
        let bytes = std::fs::read(&snapshot.snapshot.path).unwrap();
        let mut receiver = SnapshotReceiver::create(&store.control.snapshot_dir(), &announced).unwrap();
        receiver.push(&bytes).unwrap();
        let why = receiver.finish().unwrap_err().to_string();
        assert!(why.contains("announced"), "{why}");
        let file = receive(&store, &snapshot);
        let refused = store.machine.install_snapshot(&announced, Box::new(file)).await;
        assert!(refused.unwrap_err().to_string().contains("announced"));
        assert_eq!(store.machine.published().load().applied, None);
    });
}

/// Received whole, its log purged up to it as openraft does at once, and killed before it was installed: without
/// the file the state is lost.
fn purged_under_a_snapshot() -> (tempfile::TempDir, std::path::PathBuf) {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let name = runtime().block_on(async {
        let (_source, snapshot) = source(from.path()).await;
        let mut behind = open(dir.path());
        fill(&mut behind, 20, 100).await;
        let file = receive(&behind, &snapshot);
        behind
            .log
            .purge(snapshot.meta.last_log_id.unwrap())
            .await
            .unwrap();
        file.path.strip_prefix(dir.path()).unwrap().to_path_buf()
    });
    (dir, name)
}

#[test]
fn a_damaged_snapshot_that_is_needed_is_refused() {
    let (dir, name) = purged_under_a_snapshot();
    closed(dir.path());
    let whole = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), whole.path());
    let length = std::fs::metadata(dir.path().join(&name)).unwrap().len();
    let mut random = Random(0x5eed_0010);
    let times = rounds(60);
    for round in 0..times {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(whole.path(), copy.path());
        let file = copy.path().join(&name);
        match round % 3 {
            0 => std::fs::File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_len(random.below(length))
                .unwrap(),
            1 => flip_bit(&file, random.below(length * 8)),
            // Magic and meta too.
            _ => flip_bit(&file, random.below(80 * 8)),
        }
        let why = try_open(copy.path()).err().unwrap().to_string();
        assert!(
            why.contains("snapshot") && why.contains(REMEDY),
            "round {round}: {why}"
        );
    }
    println!("a needed snapshot: {times} damaged, all refused (seed 0x5eed0010)");
    settled(whole.path());
}

#[test]
fn a_damaged_snapshot_that_is_not_needed_is_removed() {
    let from = tempfile::tempdir().unwrap();
    let (path, digest) = runtime().block_on(async {
        let (source, snapshot) = source(from.path()).await;
        let digest = source.machine.published().load().digest;
        (snapshot.snapshot.path.clone(), digest)
    });
    flip_bit(&path, 1000);
    runtime().block_on(async {
        let mut store = open(from.path());
        assert_eq!(store.machine.published().load().digest, digest);
        assert!(!path.exists());
        let current = store.machine.get_current_snapshot().await.unwrap();
        assert!(current.is_none(), "openraft makes a new one");
    });
}

#[test]
fn an_installed_snapshot_is_the_same_state_and_stays_it() {
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let digest = runtime().block_on(async {
        let (source, snapshot) = source(from.path()).await;
        let mut store = open(dir.path());
        store
            .machine
            .install_snapshot(&snapshot.meta, snapshot.snapshot)
            .await
            .unwrap();
        store.log.purge(snapshot.meta.last_log_id.unwrap()).await.unwrap();
        let digest = source.machine.published().load().digest;
        assert_eq!(store.machine.published().load().digest, digest);
        digest
    });
    let store = open(dir.path());
    assert_eq!(store.machine.published().load().digest, digest);
}
