//! Work on the store of a stopped node, on real files: a sled that is written anew holds what it held, a quorum that is
//! recovered is so whole or not at all, and a kill at any step leaves one or the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::{EntryPayload, Membership};
use raft_store::command::{CreateJoinToken, Op, RegisterNode};
use raft_store::names::{ClusterId, Incarnation, NodeName};
use raft_store::state::node::NodeStatus;
use raft_store::storage::{
    Compacted, Control, OpenError, Opened, RecoverError, Recovered, Store, StoreOptions,
};
use raft_store::{Entry, LogId, MemberNode, Vote};

use crate::common::*;

fn options(dir: &Path) -> StoreOptions {
    StoreOptions {
        dir: dir.to_path_buf(),
        node_name: "n1".into(),
        incarnation: Incarnation([1; 16]),
        cache_bytes: 8 << 20,
        on_barrier: None,
        on_fatal: Box::new(|why| eprintln!("fatal: {why}")),
    }
}

// Tests wait with a deadline; the ban on clocks is for what the crate itself does.
#[allow(clippy::disallowed_methods)]
fn compact(dir: &Path, rewrite: bool) -> Result<Compacted, OpenError> {
    fatal();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match Store::compact(options(dir), rewrite) {
            // A store that was just dropped is closed by its writer thread.
            Err(OpenError::InUse(_)) if Instant::now() < deadline => std::thread::yield_now(),
            done => return done,
        }
    }
}

/// Everything that a start finds.
#[derive(Debug, PartialEq)]
struct Contents {
    control: Control,
    vote: Option<Vote>,
    entries: Vec<Entry>,
    applied: Option<LogId>,
    digest: u128,
}

fn contents(dir: &Path) -> Contents {
    let contents = runtime().block_on(async {
        let mut store = open(dir);
        let published = store.machine.published().load_full();
        Contents {
            control: store.control.get(),
            vote: store.log.read_vote().await.unwrap(),
            entries: all_entries(&mut store).await,
            applied: store.machine.applied_state().await.unwrap().0,
            digest: published.digest,
        }
    });
    closed(dir);
    contents
}

fn leftovers(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("sled.")).collect()
}

/// A store in which more was written over and purged than is left.
fn worn(dir: &Path) {
    runtime().block_on(async {
        let mut store = open(dir);
        fill(&mut store, 400, 4000).await;
        store.log.save_vote(&vote(3)).await.unwrap();
        snapshot_of(&mut store).await;
        store.log.purge(log_id(1, 300)).await.unwrap();
    });
    closed(dir);
}

#[test]
fn a_store_that_is_written_anew_is_smaller_and_holds_the_same() {
    let dir = tempfile::tempdir().unwrap();
    worn(dir.path());
    let before = contents(dir.path());
    let looked = compact(dir.path(), false).unwrap();
    assert_eq!(looked.before, looked.after, "a look writes nothing");
    let done = compact(dir.path(), true).unwrap();
    assert_eq!(done.live, looked.live);
    assert!(done.after < done.before, "{done:?}");
    assert_eq!(contents(dir.path()), before);
    assert_eq!(leftovers(dir.path()), Vec::<String>::new());
    // It goes on, and is found again.
    runtime().block_on(async {
        let mut store = open(dir.path());
        store.log.blocking_append([entry(1, 400, 10)]).await.unwrap();
        store.log.save_vote(&vote(4)).await.unwrap();
    });
    closed(dir.path());
    let after = contents(dir.path());
    assert_eq!(after.entries.len(), before.entries.len() + 1);
    assert_eq!(after.vote, Some(vote(4)));
}

#[test]
fn what_is_not_whole_or_is_not_there_is_not_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let unused = compact(dir.path(), true).unwrap_err();
    assert!(matches!(unused, OpenError::Unused(_)), "{unused}");
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing was made"
    );
    let store = open(dir.path());
    let refused = Store::compact(options(dir.path()), true).unwrap_err();
    assert!(matches!(refused, OpenError::InUse(_)), "{refused}");
    drop(store);
    closed(dir.path());
    worn(dir.path());
    std::fs::write(dir.path().join("sled/db"), b"").unwrap();
    let refused = compact(dir.path(), true).unwrap_err().to_string();
    assert!(refused.contains(REMEDY), "{refused}");
    assert_eq!(leftovers(dir.path()), Vec::<String>::new());
}

/// The store of voter 1 of 1, 2 and 3, of which it has applied less than it has. Node 3 is registered by entry 3.
fn one_of_three(dir: &Path) {
    let membership = || {
        let node = |id: u64| {
            (
                id,
                MemberNode {
                    name: format!("n{id}"),
                    cluster_address: "c".into(),
                },
            )
        };
        let nodes: BTreeMap<u64, MemberNode> = (1..=3).map(node).collect();
        Entry {
            log_id: log_id(1, 1),
            payload: EntryPayload::Membership(Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes)),
        }
    };
    let token = Op::CreateJoinToken(CreateJoinToken {
        secret_hash: [5; 32],
        expires_at: i64::MAX,
        node: None,
    });
    let register = Op::RegisterNode(RegisterNode {
        token: 2,
        secret_hash: [5; 32],
        name: NodeName::new("n3").unwrap(),
        incarnation: Incarnation([3; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
    });
    runtime().block_on(async {
        let mut store = open(dir);
        store.control.join_cluster(ClusterId([1; 16]), 1, 1).unwrap();
        store.log.save_vote(&vote(1)).await.unwrap();
        let mut entries = vec![
            founding(),
            membership(),
            command(1, 2, token),
            command(1, 3, register),
        ];
        entries.extend((4..8).map(|index| entry(1, index, 10)));
        for (index, entry) in entries.into_iter().enumerate() {
            store.log.blocking_append([entry.clone()]).await.unwrap();
            if index < 6 {
                store.machine.apply([entry]).await.unwrap();
            }
        }
    });
    closed(dir);
}

fn recover(dir: &Path) -> Result<Recovered, RecoverError> {
    let done = open(dir).recover_quorum(1000, [7; 16]);
    closed(dir);
    done
}

/// Applies what a lone leader would commit.
async fn apply_all(store: &mut Opened) {
    let applied = store.machine.applied_state().await.unwrap().0;
    let entries = all_entries(store).await.into_iter();
    let entries: Vec<Entry> = entries.filter(|entry| Some(entry.log_id) > applied).collect();
    store.machine.apply(entries).await.unwrap();
}

/// The survivor is alone in the new epoch, with everything that it had.
fn check_recovered(dir: &Path) {
    runtime().block_on(async {
        let mut store = open(dir);
        let control = store.control.get();
        assert_eq!((control.epoch, control.raft_id, &control.poison), (2, 1, &None));
        assert!(store.recovering.is_some(), "the start that follows says so");
        let vote = store.log.read_vote().await.unwrap().unwrap();
        assert!(!vote.committed, "it has to win an election");
        assert_eq!(last_log(&mut store).await.unwrap().index, 9);
        assert!(vote.leader_id.term >= last_log(&mut store).await.unwrap().leader_id.term);
        apply_all(&mut store).await;
        let published = store.machine.published().load_full();
        assert_eq!(published.state.epoch(), 2);
        assert_eq!(published.membership.voter_ids().collect::<Vec<_>>(), [1]);
        assert_eq!(
            published.state.revocations().len(),
            4,
            "those that were not applied too"
        );
        let registered: u64 = 3;
        let node = published.state.nodes().get(&registered).unwrap();
        assert!(matches!(node.status, NodeStatus::Removed { .. }), "{node:?}");
        // A barrier: what is applied waits for one.
        let next = Vote::new(vote.leader_id.term + 1, 1);
        store.log.save_vote(&next).await.unwrap();
    });
    closed(dir);
    // What was applied is not recovered once more.
    let store = open(dir);
    assert!(store.recovering.is_none());
    let refused = store.outlook().unwrap().may_recover();
    assert!(matches!(refused, Err(RecoverError::OnlyVoter)), "{refused:?}");
    drop(store);
    closed(dir);
}

#[test]
fn a_survivor_keeps_what_it_has_and_is_alone_in_the_next_epoch() {
    let dir = tempfile::tempdir().unwrap();
    one_of_three(dir.path());
    let before = contents(dir.path());
    let store = open(dir.path());
    let outlook = store.outlook().unwrap();
    assert_eq!(outlook.last_log, log_id(1, 7));
    assert_eq!(outlook.applied, Some(log_id(1, 5)));
    assert_eq!(outlook.last_change, Some(7));
    assert_eq!(outlook.next_epoch(), 2);
    assert_eq!(outlook.membership.voter_ids().count(), 3);
    assert_eq!(outlook.state.revocations().len(), 4);
    outlook.may_recover().unwrap();
    drop(store);
    closed(dir.path());
    assert_eq!(contents(dir.path()), before, "a look changes nothing");

    let recovered = recover(dir.path()).unwrap();
    assert_eq!((recovered.epoch, recovered.last_log.index), (2, 9));
    let again = recover(dir.path());
    assert!(matches!(again, Err(RecoverError::Recovered(2))), "{again:?}");
    check_recovered(dir.path());
}

#[test]
fn whoever_belongs_to_no_cluster_or_needs_nobody_recovers_nothing() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 3, 10).await;
    });
    closed(dir.path());
    let refused = recover(dir.path());
    assert!(matches!(refused, Err(RecoverError::NoCluster)), "{refused:?}");
    runtime().block_on(async {
        let mut store = open(dir.path());
        store.control.join_cluster(ClusterId([1; 16]), 1, 1).unwrap();
        let alone = BTreeMap::from([(1, MemberNode::default())]);
        let entry = Entry {
            log_id: log_id(1, 3),
            payload: EntryPayload::Membership(Membership::new(vec![BTreeSet::from([1])], alone)),
        };
        store.log.blocking_append([entry]).await.unwrap();
    });
    closed(dir.path());
    let refused = recover(dir.path());
    assert!(matches!(refused, Err(RecoverError::OnlyVoter)), "{refused:?}");
}

/// Kills at every step, in a child.
#[cfg(feature = "failpoints")]
mod kills {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const WHAT: &str = "STORE_MAINTENANCE";
    const POINT: &str = "STORE_MAINTENANCE_POINT";
    const DIR: &str = "STORE_MAINTENANCE_DIR";

    const COMPACT: [&str; 7] = [
        "compact::before_copy",
        "compact::in_copy",
        "compact::before_verify",
        "compact::before_swap",
        "compact::between_renames",
        "compact::before_removal",
        "compact::after_removal",
    ];

    #[test]
    fn child_that_dies_in_maintenance() {
        let (Ok(what), Ok(point), Ok(dir)) = (std::env::var(WHAT), std::env::var(POINT), std::env::var(DIR))
        else {
            return;
        };
        let arm = || {
            fail::cfg_callback(&point, || {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            })
            .unwrap();
        };
        match what.as_str() {
            "compact" => {
                arm();
                compact(dir.as_ref(), true).unwrap();
            }
            _ => {
                let store = open(dir.as_ref());
                arm();
                store.recover_quorum(1000, [7; 16]).unwrap();
            }
        }
    }

    fn die(what: &str, point: &str, dir: &Path) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "maintenance::kills::child_that_dies_in_maintenance",
                "--exact",
                "--test-threads=1",
            ])
            .env(WHAT, what)
            .env(POINT, point)
            .env(DIR, dir)
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{what}: {point} must have been reached");
    }

    #[test]
    fn a_kill_at_any_step_of_writing_anew_leaves_the_same_contents() {
        let origin = tempfile::tempdir().unwrap();
        worn(origin.path());
        let before = contents(origin.path());
        for point in COMPACT {
            let dir = tempfile::tempdir().unwrap();
            copy_dir(origin.path(), dir.path());
            die("compact", point, dir.path());
            assert_eq!(contents(dir.path()), before, "{point}");
            assert_eq!(leftovers(dir.path()), Vec::<String>::new(), "{point}");
            // And another one does what that one did not.
            compact(dir.path(), true).unwrap();
            assert_eq!(contents(dir.path()), before, "{point}, then again");
        }
    }

    /// What a kill has left is finished, or taken back, by the next compaction as well as by a start.
    #[test]
    fn a_killed_compaction_is_followed_by_another_without_a_start_in_between() {
        let origin = tempfile::tempdir().unwrap();
        worn(origin.path());
        let before = contents(origin.path());
        for (first, second) in [
            ("compact::between_renames", "compact::between_renames"),
            ("compact::before_swap", "compact::before_removal"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            copy_dir(origin.path(), dir.path());
            die("compact", first, dir.path());
            die("compact", second, dir.path());
            compact(dir.path(), true).unwrap();
            assert_eq!(contents(dir.path()), before, "{first}, {second}");
        }
    }

    #[test]
    fn a_kill_at_any_step_of_a_recovery_leaves_the_old_epoch_or_the_new_one() {
        for (point, done) in [
            ("recover::before_write", Some(false)),
            // Whether sled had written it by then is sled's.
            ("recover::before_barrier", None),
            ("recover::before_control", Some(true)),
            ("recover::after_control", Some(true)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            one_of_three(dir.path());
            let before = contents(dir.path());
            die("recover", point, dir.path());
            let after = contents(dir.path());
            let is_new = after.control.epoch == 2;
            assert!(done.is_none_or(|done| done == is_new), "{point}");
            if is_new {
                let again = recover(dir.path());
                assert!(matches!(again, Err(RecoverError::Recovered(2))), "{again:?}");
            } else {
                assert_eq!(after, before, "{point}");
                recover(dir.path()).unwrap();
            }
            check_recovered(dir.path());
        }
    }
}
