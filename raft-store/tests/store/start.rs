//! What a start makes, clears away, and refuses without calling it damaged.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use openraft::storage::RaftLogStorage;
use raft_store::codec;
use raft_store::command::{AdmitNode, Op};
use raft_store::state::table::RowKind;

use crate::common::*;

/// What a refusal advises when nothing is wrong but the release.
const OTHER_REMEDY: &str = "start that release";

#[test]
fn a_new_data_directory_is_closed_to_others() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("var/hsm");
    drop(open(&dir));
    for made in ["", "sled", "snapshots"] {
        let mode = dir.join(made).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{made}");
    }
    let mode = dir.join("control").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// With and without a complete one beside it: sled makes its first when it is opened for the second time.
#[test]
fn a_snapshot_that_sled_was_killed_over_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..3 {
        runtime().block_on(async {
            let mut store = open(dir.path());
            if round == 0 {
                fill(&mut store, 20, 100).await;
            }
            assert_eq!(all_entries(&mut store).await.len(), 20);
            let published = store.machine.published().load_full();
            assert_eq!(published.state.revocations().len(), 19);
        });
        closed(dir.path());
        let half = dir.path().join("sled/snap.7FFFFFFFFFFFFFFF.generating");
        std::fs::write(half, b"half").unwrap();
    }
}

#[test]
fn a_file_system_that_cannot_be_asked_is_taken_for_full() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("data");
    let store = open(&dir);
    assert!(store.control.figures().free_bytes > 0);
    std::fs::rename(&dir, top.path().join("elsewhere")).unwrap();
    let figures = store.control.figures();
    assert!(figures.below_reserve && figures.below_last && figures.free_bytes == 0);
}

#[test]
fn live_bytes_are_those_of_the_rows_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let full = runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 40, 1000).await;
        let full = store.control.figures();
        assert!((80_000..120_000).contains(&full.live_bytes), "{full:?}");
        assert!(full.sled_bytes >= full.live_bytes, "{full:?}");
        snapshot_of(&mut store).await;
        store.log.purge(log_id(1, 38)).await.unwrap();
        store.control.figures().live_bytes
    });
    assert!((40_000..60_000).contains(&full), "the log's are gone: {full}");
    assert_eq!(open(dir.path()).control.figures().live_bytes, full);
}

/// Puts a row into a closed store, as a release that wrote it would.
fn plant(dir: &Path, tree: &str, kind: u8, version: u8, key: &[u8], value: &[u8]) {
    closed(dir);
    let key = [key, &[0, 0]].concat();
    let mut frame = [b"HR".as_slice(), &[kind, version, 0, 1]].concat();
    frame.extend_from_slice(&(value.len() as u32).to_be_bytes());
    frame.extend_from_slice(value);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&key), &frame);
    frame.extend_from_slice(&crc.to_be_bytes());
    let db = open_sled(&dir.join("sled"));
    db.open_tree(tree).unwrap().insert(key, frame).unwrap();
    db.flush().unwrap();
}

#[test]
fn rows_of_a_newer_release_are_refused_as_such_and_not_as_damage() {
    const LOG: u8 = 200;
    const SLOT: u8 = 4;
    const SLOTS_ARE: u8 = RowKind::Slot.version();
    let unknown_op = {
        let entry = command(1, 3, Op::AdmitNode(AdmitNode { node: 9 }));
        let mut bytes = codec::encode(&entry).unwrap();
        // The operation's number, then its one field.
        let at = bytes.len() - 12;
        assert_eq!(bytes[at..at + 4], [2, 0, 0, 0]);
        bytes[at] = 99;
        bytes
    };
    let log_key = [&[LOG], 3u64.to_be_bytes().as_slice()].concat();
    type Case<'a> = (&'a str, u8, u8, &'a [u8], &'a [u8]);
    let cases: [Case<'_>; 5] = [
        ("log", LOG, 1, &log_key, &unknown_op),
        ("log", LOG, 2, &log_key, b"anything"),
        ("log", 222, 1, &[222], b"anything"),
        ("state-0", SLOT, SLOTS_ARE + 1, &[SLOT, b's'], b"anything"),
        ("state-0", 77, 1, &[77, b'k'], b"anything"),
    ];
    for (tree, kind, version, key, value) in cases {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let mut store = open(dir.path());
            fill(&mut store, 3, 10).await;
        });
        plant(dir.path(), tree, kind, version, key, value);
        let why = try_open(dir.path()).err().unwrap().to_string();
        assert!(
            why.contains("data_dir") && why.contains(OTHER_REMEDY) && !why.contains(REMEDY),
            "{tree}, kind {kind}, version {version}: {why}"
        );
    }
}

#[test]
fn rows_that_no_release_wrote_are_damage() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 3, 10).await;
    });
    plant(dir.path(), "state-0", 4, 0, &[4, b's'], b"anything");
    let why = try_open(dir.path()).err().unwrap().to_string();
    assert!(why.contains("no release wrote") && why.contains(REMEDY), "{why}");
}
