//! A whole store as it lies on disk: every frame in sled with its key and checksum, both slots of `control`, and a
//! snapshot's file. Old ones open, whatever this build would write.

use std::path::Path;

use openraft::RaftLogReader;
use openraft::storage::RaftLogStorage;
use raft_store::names::ClusterId;
use raft_store::storage::Opened;
use raft_store::{LogId, Vote, codec};

use super::{Lines, old};
use crate::common::*;

/// Four entries of which two are purged, a vote, an identity, a snapshot.
async fn make(dir: &Path) -> Opened {
    let mut store = open(dir);
    assert!(store.control.join_cluster(ClusterId([7; 16]), 3, 1).unwrap());
    fill(&mut store, 4, 10).await;
    store.log.save_vote(&vote(2)).await.unwrap();
    snapshot_of(&mut store).await;
    store.log.purge(log_id(1, 1)).await.unwrap();
    store
}

/// Everything that a start has to find.
#[derive(Debug, PartialEq)]
struct Found {
    vote: Option<Vote>,
    purged: Option<LogId>,
    entries: Vec<u8>,
    applied: Option<LogId>,
    revoked: Vec<String>,
    cluster_id: ClusterId,
}

async fn found(store: &mut Opened) -> Found {
    let published = store.machine.published().load_full();
    let entries = store.log.try_get_log_entries(..).await.unwrap();
    let revoked = published.state.revocations().iter();
    Found {
        vote: store.log.read_vote().await.unwrap(),
        purged: store.log.get_log_state().await.unwrap().last_purged_log_id,
        entries: codec::encode(&entries).unwrap(),
        applied: published.applied,
        revoked: revoked.map(|row| format!("{row:?}")).collect(),
        cluster_id: store.control.get().cluster_id,
    }
}

/// A slot of `control`, without what lies behind it.
fn control_slot(file: &[u8], at: usize) -> &[u8] {
    let length = u32::from_be_bytes(file[at + 16..at + 20].try_into().unwrap()) as usize;
    &file[at..at + 24 + length]
}

fn snapshot_file(dir: &Path) -> std::path::PathBuf {
    let mut files = std::fs::read_dir(dir.join("snapshots")).unwrap();
    files.next().unwrap().unwrap().path()
}

pub(super) fn lines(lines: &mut Lines) {
    let dir = tempfile::tempdir().unwrap();
    drop(runtime().block_on(make(dir.path())));
    closed(dir.path());
    let control = std::fs::read(dir.path().join("control")).unwrap();
    for at in [0, 4096] {
        lines.bytes(&format!("store.control.{at}"), control_slot(&control, at));
    }
    let snapshot = std::fs::read(snapshot_file(dir.path())).unwrap();
    lines.bytes("store.snapshot", &snapshot);
    let db = open_sled(&dir.path().join("sled"));
    for tree in ["log", "meta", "state-0"] {
        for pair in db.open_tree(tree).unwrap().iter() {
            let (key, frame) = pair.unwrap();
            lines.bytes(&format!("store.sled.{tree}.{}", hex::encode(key)), &frame);
        }
    }
}

/// Puts the old store back, byte by byte.
fn old_store(dir: &Path) {
    std::fs::create_dir_all(dir.join("sled")).unwrap();
    let mut control = Vec::new();
    for (what, slot) in old("store.control.") {
        let at: usize = what.rsplit('.').next().unwrap().parse().unwrap();
        control.resize(at, 0);
        control.extend_from_slice(&slot);
    }
    std::fs::write(dir.join("control"), control).unwrap();
    let db = open_sled(&dir.join("sled"));
    for (what, frame) in old("store.sled.") {
        let (tree, key) = what["store.sled.".len()..].split_once('.').unwrap();
        let key = hex::decode(key).unwrap();
        db.open_tree(tree).unwrap().insert(key, frame).unwrap();
    }
    db.flush().unwrap();
}

#[test]
fn an_old_store_opens_with_everything_that_was_in_it() {
    let (now, then) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    old_store(then.path());
    let (made, found) = runtime().block_on(async {
        let mut made = make(now.path()).await;
        let mut old = open(then.path());
        (found(&mut made).await, found(&mut old).await)
    });
    assert_eq!(found, made);
    assert_eq!(found.revoked.len(), 3);
}

#[test]
fn an_old_snapshot_is_installed() {
    let (now, then) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    drop(open(then.path()));
    let (_, snapshot) = old("store.snapshot").remove(0);
    let (made, installed) = runtime().block_on(async {
        let mut made = make(now.path()).await;
        let name = snapshot_file(now.path());
        let name = name.file_name().unwrap();
        std::fs::write(then.path().join("snapshots").join(name), snapshot).unwrap();
        let mut store = open(then.path());
        (found(&mut made).await, found(&mut store).await)
    });
    assert_eq!(installed.applied, Some(log_id(1, 3)));
    assert_eq!(
        (installed.applied, installed.revoked),
        (made.applied, made.revoked)
    );
}
