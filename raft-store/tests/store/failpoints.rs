//! Kills between the steps of making a store, of purging and of installing a snapshot: the store reopens, with
//! everything that was durable.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};

use crate::common::*;

/// What the child does, the point at which it dies, and where: `source:target`.
const PLAN: &str = "STORE_FAILPOINT_PLAN";
const POINT: &str = "STORE_FAILPOINT";
const DIRS: &str = "STORE_FAILPOINT_DIRS";

const ENTRIES: u64 = 300;

const INSTALL: [&str; 4] = [
    "store::before_install",
    "store::in_install",
    "store::before_pointer",
    "store::after_pointer",
];
const PURGE: [&str; 3] = [
    "store::before_purge",
    "store::between_purge_and_promise",
    "store::after_purge",
];

fn kill_self() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}

fn arm(point: &str) {
    fail::cfg_callback(point, kill_self).unwrap();
}

/// The child. `open` only opens the target; the others receive the source's snapshot over an older state, and then
/// install and purge in the named order. openraft may purge as soon as the install is queued.
#[test]
fn child_that_dies_at_a_failpoint() {
    let (Ok(plan), Ok(point), Ok(dirs)) = (std::env::var(PLAN), std::env::var(POINT), std::env::var(DIRS))
    else {
        return;
    };
    let (source, target) = dirs.split_once(':').unwrap();
    if plan == "open" {
        arm(&point);
        drop(open(target.as_ref()));
        return;
    }
    runtime().block_on(async {
        let mut source = open(source.as_ref());
        let snapshot = source.machine.get_current_snapshot().await.unwrap().unwrap();
        let mut behind = open(target.as_ref());
        fill(&mut behind, 30, 200).await;
        let file = receive(&behind, &snapshot);
        let end = snapshot.meta.last_log_id.unwrap();
        arm(&point);
        if plan == "purge first" {
            behind.log.purge(end).await.unwrap();
        }
        behind
            .machine
            .install_snapshot(&snapshot.meta, Box::new(file))
            .await
            .unwrap();
        behind.log.purge(end).await.unwrap();
    });
}

/// Runs the child; it must die at the point.
fn die(plan: &str, point: &str, source: &Path, target: &Path) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "failpoints::child_that_dies_at_a_failpoint",
            "--exact",
            "--test-threads=1",
        ])
        .env(PLAN, plan)
        .env(POINT, point)
        .env(DIRS, format!("{}:{}", source.display(), target.display()))
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9), "{plan}: {point} must have been reached");
}

/// A store with a snapshot of all its entries.
fn source() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, ENTRIES, 200).await;
        snapshot_of(&mut store).await;
    });
    closed(dir.path());
    dir
}

/// The durable snapshot is in the state, the log goes on after it, and a further start finds the same.
fn recovered(target: &Path, what: &str) {
    let end = log_id(1, ENTRIES - 1);
    for next in [ENTRIES, ENTRIES + 1] {
        runtime().block_on(async {
            let mut store = try_open(target).unwrap_or_else(|e| panic!("{what}: {e}"));
            let applied = store.machine.applied_state().await.unwrap().0;
            assert_eq!(applied, Some(end), "{what}");
            let published = store.machine.published().load_full();
            assert_eq!(published.state.revocations().len() as u64, ENTRIES - 1, "{what}");
            let before = log_id(1, next - 1);
            assert_eq!(last_log(&mut store).await, Some(before), "{what}");
            store.log.blocking_append([entry(1, next, 10)]).await.unwrap();
        });
    }
}

#[test]
fn a_kill_at_any_step_of_snapshot_and_purge_is_recovered_in_either_order() {
    let source = source();
    for plan in ["install first", "purge first"] {
        for point in INSTALL.into_iter().chain(PURGE) {
            let target = tempfile::tempdir().unwrap();
            die(plan, point, source.path(), target.path());
            recovered(target.path(), &format!("{plan}, {point}"));
        }
    }
}

#[test]
fn a_kill_while_a_start_installs_a_snapshot_is_recovered_by_the_next_one() {
    let source = source();
    for plan in ["install first", "purge first"] {
        for point in INSTALL {
            let target = tempfile::tempdir().unwrap();
            die(plan, "store::before_install", source.path(), target.path());
            die("open", point, source.path(), target.path());
            recovered(target.path(), &format!("{plan}, then at open {point}"));
        }
    }
}

/// Nothing was purged yet, so the start has to bring the log to the state as well.
#[test]
fn a_kill_while_a_start_fits_the_log_to_a_snapshot_is_recovered_by_the_next_one() {
    let source = source();
    for point in ["store::between_cut_and_purge"].into_iter().chain(PURGE) {
        let target = tempfile::tempdir().unwrap();
        die(
            "install first",
            "store::before_install",
            source.path(),
            target.path(),
        );
        die("open", point, source.path(), target.path());
        recovered(target.path(), point);
    }
}

#[test]
fn a_kill_while_control_is_being_made_leaves_a_directory_that_is_still_new() {
    let dir = tempfile::tempdir().unwrap();
    die("open", "store::before_control", dir.path(), dir.path());
    runtime().block_on(async {
        let mut store = open(dir.path());
        fill(&mut store, 3, 10).await;
    });
    let mut store = open(dir.path());
    assert_eq!(runtime().block_on(all_entries(&mut store)).len(), 3);
}
