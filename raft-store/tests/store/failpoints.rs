//! Kills between the steps of purging and of installing a snapshot: the store reopens.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use openraft::RaftSnapshotBuilder;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};

use crate::common::*;

const POINT: &str = "STORE_FAILPOINT";
const DIRS: &str = "STORE_FAILPOINT_DIRS";

fn kill_self() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}

/// The child: installs a snapshot over an older state and purges, dying at the armed point.
#[test]
fn child_that_dies_at_a_failpoint() {
    let (Ok(point), Ok(dirs)) = (std::env::var(POINT), std::env::var(DIRS)) else {
        return;
    };
    let (source, target) = dirs.split_once(':').unwrap();
    runtime().block_on(async {
        let mut store = open(source.as_ref());
        fill(&mut store, 700, 200).await;
        let snapshot = store
            .machine
            .get_snapshot_builder()
            .await
            .build_snapshot()
            .await
            .unwrap();
        let mut behind = open(target.as_ref());
        fill(&mut behind, 30, 200).await;
        // As the receiver does: durable under its final name in our directory before it is installed.
        let bytes = std::fs::read(&snapshot.snapshot.path).unwrap();
        let dir = behind.control.snapshot_dir();
        let mut receiver = raft_store::storage::SnapshotReceiver::create(&dir, &snapshot.meta).unwrap();
        receiver.push(&bytes).unwrap();
        let file = receiver.finish().unwrap();
        fail::cfg_callback(&*point, kill_self).unwrap();
        // openraft may purge as soon as the install is queued.
        if point == "store::between_purge_and_promise" {
            behind
                .log
                .purge(snapshot.meta.last_log_id.unwrap())
                .await
                .unwrap();
        }
        behind
            .machine
            .install_snapshot(&snapshot.meta, Box::new(file))
            .await
            .unwrap();
        behind
            .log
            .purge(snapshot.meta.last_log_id.unwrap())
            .await
            .unwrap();
        behind.log.blocking_append([entry(1, 700, 10)]).await.unwrap();
    });
}

#[test]
fn a_kill_at_any_step_of_snapshot_and_purge_is_recovered() {
    let points = [
        "store::before_install",
        "store::in_install",
        "store::before_pointer",
        "store::after_pointer",
        "store::before_purge",
        "store::between_purge_and_promise",
        "store::after_purge",
    ];
    for point in points {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "failpoints::child_that_dies_at_a_failpoint",
                "--exact",
                "--test-threads=1",
            ])
            .env(POINT, point)
            .env(
                DIRS,
                format!("{}:{}", source.path().display(), target.path().display()),
            )
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{point} must have been reached");
        runtime().block_on(async {
            let mut store = try_open(target.path()).unwrap_or_else(|e| panic!("{point}: {e}"));
            let applied = store.machine.applied_state().await.unwrap().0;
            assert_eq!(
                applied,
                Some(log_id(1, 699)),
                "{point}: the durable snapshot is in the state"
            );
            assert_eq!(
                store.machine.published().load().state.revocations().len(),
                699,
                "{point}"
            );
        });
    }
}
