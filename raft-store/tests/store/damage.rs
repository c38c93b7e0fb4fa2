//! Damage to the files: the store reopens whole or is refused. Never fewer entries, never an older vote.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::{RaftLogReader, RaftSnapshotBuilder};

use crate::common::*;

const FLIPS: u64 = 300;
const CUTS: u64 = 50;

/// A closed store with votes, a purged log, a snapshot and applied rows; and what it holds.
struct Reference {
    dir: tempfile::TempDir,
    vote: raft_store::Vote,
    entries: Vec<u8>,
    digest: u128,
}

fn reference() -> Reference {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 120, 300).await;
        store.log.save_vote(&vote(2)).await.unwrap();
        store
            .machine
            .get_snapshot_builder()
            .await
            .build_snapshot()
            .await
            .unwrap();
        store.log.purge(log_id(1, 60)).await.unwrap();
        for index in 120..200 {
            let entry = entry(3, index, 2000);
            store.log.blocking_append([entry.clone()]).await.unwrap();
            store.machine.apply([entry]).await.unwrap();
            store.log.save_vote(&vote(3 + index)).await.unwrap();
        }
        store.log.save_vote(&vote(999)).await.unwrap();
    });
    let (vote, entries, digest) = contents(dir.path()).unwrap();
    Reference {
        dir,
        vote,
        entries,
        digest,
    }
}

/// What a store holds, or why it was refused.
fn contents(dir: &Path) -> Result<(raft_store::Vote, Vec<u8>, u128), String> {
    runtime().block_on(async {
        let mut store = try_open(dir).map_err(|e| e.to_string())?;
        let entries = store
            .log
            .try_get_log_entries(..)
            .await
            .map_err(|e| e.to_string())?;
        let vote = store.log.read_vote().await.map_err(|e| e.to_string())?;
        // The state may lag: what the log holds above it is applied again, as openraft does.
        let applied = store.machine.applied_state().await.map_err(|e| e.to_string())?.0;
        let behind: Vec<_> = entries
            .iter()
            .filter(|e| Some(e.log_id) > applied)
            .cloned()
            .collect();
        store.machine.apply(behind).await.map_err(|e| e.to_string())?;
        let digest = store.machine.published().load().digest;
        let entries = raft_store::codec::encode(&entries).map_err(|e| e.to_string())?;
        Ok((vote.unwrap_or_default(), entries, digest))
    })
}

/// Damages copies of the reference; returns how many opened whole and how many were refused.
fn damage(seed: u64, times: u64, file: &str, how: impl Fn(&std::fs::File, u64, &mut Random)) -> (u64, u64) {
    // sled reports its panics on standard error: hundreds of them would hide everything else.
    std::panic::set_hook(Box::new(|_| {}));
    let reference = reference();
    let mut random = Random(seed);
    let (mut whole, mut refused, mut wrong) = (0, 0, Vec::new());
    for round in 0..times {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(reference.dir.path(), copy.path());
        let target = OpenOptions::new()
            .read(true)
            .write(true)
            .open(copy.path().join(file))
            .unwrap();
        how(&target, target.metadata().unwrap().len(), &mut random);
        match contents(copy.path()) {
            Err(why) => {
                assert!(why.contains("data_dir"), "a refusal names the directory: {why}");
                refused += 1;
            }
            Ok((vote, entries, digest)) => {
                whole += 1;
                if vote != reference.vote || entries != reference.entries || digest != reference.digest {
                    wrong.push(round);
                }
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(
        wrong.is_empty(),
        "seed {seed}: {file}: opened with other contents in rounds {wrong:?}"
    );
    println!("{file}: {times} damaged, {whole} opened whole, {refused} refused, 0 wrong (seed {seed})");
    (whole, refused)
}

fn flip(file: &std::fs::File, len: u64, random: &mut Random) {
    let (at, bit) = (random.below(len), random.below(8));
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
}

fn cut(file: &std::fs::File, len: u64, random: &mut Random) {
    file.set_len(random.below(len)).unwrap();
}

#[test]
fn a_flipped_bit_in_sled_is_harmless_or_refused() {
    let (whole, refused) = damage(0x5eed_0001, FLIPS, "sled/db", flip);
    assert!(
        whole > 0 && refused > 0,
        "the test must reach both: {whole} {refused}"
    );
}

#[test]
fn a_cut_tail_of_sled_is_harmless_or_refused() {
    damage(0x5eed_0002, CUTS, "sled/db", cut);
}

#[test]
fn a_flipped_bit_in_control_is_harmless_or_refused() {
    let (whole, _) = damage(0x5eed_0003, FLIPS, "control", flip);
    assert!(whole > 0);
}

#[test]
fn a_cut_tail_of_control_is_harmless_or_refused() {
    damage(0x5eed_0004, CUTS, "control", cut);
}

#[test]
fn a_missing_sled_or_control_is_refused() {
    let reference = reference();
    for gone in ["sled/db", "control"] {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(reference.dir.path(), copy.path());
        std::fs::remove_file(copy.path().join(gone)).unwrap();
        let why = contents(copy.path()).unwrap_err();
        assert!(why.contains("is missing"), "{why}");
    }
}

#[test]
fn an_older_copy_of_sled_beside_a_newer_control_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let older = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 10, 100).await;
    });
    drop(open(dir.path()));
    copy_dir(&dir.path().join("sled"), older.path());
    runtime().block_on(async {
        let mut store = open(dir.path());
        store.log.blocking_append([entry(1, 10, 100)]).await.unwrap();
    });
    drop(open(dir.path()));
    std::fs::remove_dir_all(dir.path().join("sled")).unwrap();
    copy_dir(older.path(), &dir.path().join("sled"));
    let why = contents(dir.path()).unwrap_err();
    assert!(why.contains("acknowledged and is missing"), "{why}");
}

#[test]
fn a_damaged_snapshot_that_is_needed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(source.path());
        fill(&mut store, 50, 100).await;
        let snapshot = store
            .machine
            .get_snapshot_builder()
            .await
            .build_snapshot()
            .await
            .unwrap();
        let mut empty = open(dir.path());
        empty
            .machine
            .install_snapshot(&snapshot.meta, snapshot.snapshot)
            .await
            .unwrap();
        empty.log.purge(snapshot.meta.last_log_id.unwrap()).await.unwrap();
        assert_eq!(
            empty.machine.published().load().digest,
            store.machine.published().load().digest,
            "an installed snapshot is the same state"
        );
    });
    assert!(contents(dir.path()).is_ok());
}
