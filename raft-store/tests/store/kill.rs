//! `kill -9` at any moment: everything that was acknowledged is there afterwards.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use openraft::RaftLogReader;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};

use crate::common::*;

const DIR: &str = "STORE_KILL_DIR";

/// The child: appends, votes, applies, snapshots and purges for ever, and says what was acknowledged.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(dir) = std::env::var(DIR) else { return };
    runtime().block_on(async {
        let mut store = open(dir.as_ref());
        let entries = all_entries(&mut store).await;
        let applied = store.machine.applied_state().await.unwrap().0;
        store
            .machine
            .apply(entries.into_iter().filter(|e| Some(e.log_id) > applied))
            .await
            .unwrap();
        let mut index = last_log(&mut store).await.map_or(0, |id| id.index + 1);
        loop {
            let entry = if index == 0 {
                founding()
            } else {
                entry(1, index, (index as usize * 37) % 9000)
            };
            store.log.blocking_append([entry.clone()]).await.unwrap();
            println!("log {index}");
            store.machine.apply([entry]).await.unwrap();
            if index % 3 == 0 {
                store.log.save_vote(&vote(index + 1)).await.unwrap();
                println!("vote {}", index + 1);
            }
            if index % 20 == 19 {
                use openraft::RaftSnapshotBuilder;
                store
                    .machine
                    .get_snapshot_builder()
                    .await
                    .build_snapshot()
                    .await
                    .unwrap();
                store.log.purge(log_id(1, index - 10)).await.unwrap();
            }
            index += 1;
        }
    });
}

#[test]
fn nothing_acknowledged_is_lost_over_twenty_kills() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x6b69_6c6c);
    let (mut last, mut voted) = (None, 0);
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "kill::child_that_writes_until_it_is_killed",
                "--exact",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut wanted = 5 + random.below(40);
        let mut note = |line: &str| {
            // The harness writes `test name ... ` before the child's first line.
            if let Some(at) = line.find("log ") {
                last = line[at + 4..].parse::<u64>().ok().or(last);
            } else if let Some(at) = line.find("vote ") {
                voted = line[at + 5..].parse().unwrap_or(voted);
            }
        };
        while wanted > 0 {
            note(&lines.next().expect("the child goes on").unwrap());
            wanted -= 1;
        }
        child.kill().unwrap();
        for line in lines.map_while(Result::ok) {
            note(&line);
        }
        child.wait().unwrap();

        runtime().block_on(async {
            let mut store = try_open(dir.path()).unwrap_or_else(|e| panic!("round {round}: {e}"));
            let found = last_log(&mut store).await.unwrap().index;
            assert!(
                found >= last.unwrap(),
                "round {round}: {last:?} acknowledged, log ends at {found}"
            );
            let vote = store
                .log
                .read_vote()
                .await
                .unwrap()
                .map_or(0, |v| v.leader_id.term);
            assert!(
                vote >= voted,
                "round {round}: vote {voted} acknowledged, found {vote}"
            );
            let entries = store.log.try_get_log_entries(..).await.unwrap();
            let applied = store.machine.applied_state().await.unwrap().0;
            store
                .machine
                .apply(entries.into_iter().filter(|e| Some(e.log_id) > applied))
                .await
                .unwrap();
            let published = store.machine.published().load_full();
            assert_eq!(
                published.state.revocations().len() as u64,
                found,
                "every entry is applied exactly once"
            );
        });
    }
}
