//! What the store promises in normal running: barriers, votes, sizes, refusals at open.

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::{CommittedLeaderId, LeaderId, RaftLogReader};
use raft_store::command::{AdvanceWaits, Done, Forbidden, Op, Outcome};
use raft_store::names::ClusterId;
use raft_store::storage::Poison;
use raft_store::{Entry, LogId, Vote};

use crate::common::*;

#[test]
fn every_vote_and_append_passes_a_barrier_before_it_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        for index in 0..10 {
            let before = store.control.figures().barriers;
            store.log.blocking_append([entry(1, index, 10)]).await.unwrap();
            assert!(store.control.figures().barriers > before);
            assert_eq!(store.control.get().last_log, Some(log_id(1, index)));
            let before = store.control.figures().barriers;
            store.log.save_vote(&vote(index + 1)).await.unwrap();
            assert!(store.control.figures().barriers > before);
            assert_eq!(store.control.get().vote, Some(vote(index + 1)));
        }
    });
}

#[test]
fn a_leaders_own_committed_vote_comes_back_uncommitted_and_others_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        store.control.join_cluster(ClusterId([1; 16]), 1, 7).unwrap();
        let committed = |node| Vote {
            leader_id: LeaderId::new(5, node),
            committed: true,
        };
        store.log.save_vote(&committed(7)).await.unwrap();
        assert!(!store.log.read_vote().await.unwrap().unwrap().committed);
        store.log.save_vote(&committed(8)).await.unwrap();
        assert!(store.log.read_vote().await.unwrap().unwrap().committed);
    });
}

/// Both entries carry a command of node 1's driver; one was appended by node 2.
#[test]
fn who_appended_an_entry_is_read_from_its_log_id_as_it_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        let waits = || {
            Op::AdvanceWaits(AdvanceWaits {
                elapsed_ms: 1,
                expected: vec![],
            })
        };
        let of_another = Entry {
            log_id: LogId::new(CommittedLeaderId::new(2, 2), 2),
            ..command(2, 2, waits())
        };
        let entries = [founding(), command(1, 1, waits()), of_another];
        store.log.blocking_append(entries.clone()).await.unwrap();
        let outcomes = store.machine.apply(entries).await.unwrap();
        let operation = "advance_waits".to_string();
        let refused = Outcome::Refused(Forbidden::Driver { operation }.into());
        assert_eq!(outcomes[1..], [Outcome::Done(Done::Ok), refused]);
    });
}

#[test]
fn a_node_gets_one_identity_and_no_other_takes_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let control = || open(dir.path()).control;
    let (first, second) = (ClusterId([1; 16]), ClusterId([2; 16]));
    assert!(control().join_cluster(first, 1, 7).unwrap());
    for (cluster, epoch, raft_id) in [(second, 1, 7), (first, 2, 7), (first, 1, 8)] {
        assert!(!control().join_cluster(cluster, epoch, raft_id).unwrap());
    }
    // Repeated after a crash it is the same.
    assert!(control().join_cluster(first, 1, 7).unwrap());
    let own = control().get();
    assert_eq!((own.cluster_id, own.epoch, own.raft_id), (first, 1, 7));
}

#[test]
fn rows_at_their_largest_never_spill_into_blob_files() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 1, 0).await;
        for index in 1..150 {
            let size = match index % 5 {
                0 => raft_store::codec::MAX_COMMAND_BYTES - 400,
                1 => 6000,
                2 => 12_300,
                3 => 1,
                _ => 40_000,
            };
            let entry: Entry = entry(1, index, size);
            store.log.blocking_append([entry.clone()]).await.unwrap();
            store.machine.apply([entry]).await.unwrap();
        }
    });
    let mut store = open(dir.path());
    let blobs = dir.path().join("sled/blobs");
    let spilled = std::fs::read_dir(&blobs).map_or(0, Iterator::count);
    assert_eq!(spilled, 0);
    assert_eq!(runtime().block_on(all_entries(&mut store)).len(), 150);
}

#[test]
fn a_follower_far_behind_reads_from_disk_what_left_the_cache_in_frames_of_bounded_size() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        for index in 0..500u64 {
            store
                .log
                .blocking_append([entry(1, index, 60_000)])
                .await
                .unwrap();
        }
        let first = store.log.limited_get_log_entries(0, 500).await.unwrap();
        assert!(
            !first.is_empty() && first.len() < 20,
            "{} entries of 60 kB",
            first.len()
        );
        let middle = store.log.try_get_log_entries(190..260).await.unwrap();
        let indexes: Vec<u64> = middle.iter().map(|e| e.log_id.index).collect();
        assert_eq!(indexes, (190..260).collect::<Vec<_>>());
    });
}

#[test]
fn a_truncated_tail_is_gone_after_reopening_and_shorter_than_promised_is_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        // What is applied is never truncated.
        fill(&mut store, 10, 9000).await;
        for index in 10..20 {
            store.log.blocking_append([entry(1, index, 9000)]).await.unwrap();
        }
        store.log.truncate(log_id(1, 12)).await.unwrap();
        assert_eq!(last_log(&mut store).await, Some(log_id(1, 11)));
        store.log.blocking_append([entry(2, 12, 10)]).await.unwrap();
    });
    runtime().block_on(async {
        let mut store = open(dir.path());
        assert_eq!(last_log(&mut store).await, Some(log_id(2, 12)));
        assert_eq!(all_entries(&mut store).await.len(), 13);
    });
}

#[test]
fn another_node_or_a_second_process_may_not_open_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let held = open(dir.path());
    let options = |name: &str| raft_store::storage::StoreOptions {
        dir: dir.path().into(),
        node_name: name.into(),
        incarnation: Default::default(),
        cache_bytes: 1 << 20,
        on_barrier: None,
        on_fatal: Box::new(|_| {}),
    };
    let open = raft_store::storage::Store::open;
    assert!(
        open(options("n1"))
            .err()
            .unwrap()
            .to_string()
            .contains("another process")
    );
    drop(held);
    drop(crate::common::open(dir.path()));
    let why = loop {
        let why = open(options("n2")).err().unwrap().to_string();
        if !why.contains("another process") {
            break why;
        }
    };
    assert!(why.contains("belongs to node_id \"n1\""), "{why}");
}

#[test]
fn a_poisoned_node_never_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path())
        .control
        .poison(Poison::RolledBack {
            durable_index: 3,
            seen_index: 9,
        })
        .unwrap();
    let why = try_open(dir.path()).err().unwrap().to_string();
    assert!(why.contains("older copy") && why.contains("new node_id"), "{why}");
}

#[test]
fn the_digest_depends_on_the_rows_alone() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    runtime().block_on(async {
        let mut one = open(a.path());
        let mut all_at_once = open(b.path());
        let mut entries = vec![founding()];
        entries.extend((1..50).map(|index| entry(1, index, 100)));
        for entry in entries.clone() {
            one.machine.apply([entry]).await.unwrap();
        }
        all_at_once.machine.apply(entries).await.unwrap();
        assert_eq!(
            one.machine.published().load().digest,
            all_at_once.machine.published().load().digest
        );
    });
}
