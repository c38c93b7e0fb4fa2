//! Space on disk over very many rotations: sled's file, the snapshots and what little else there is stay within a multiple
//! of the state, however much was written and replaced.
//!
//! A rotation is what three nodes propose for one: a version made, held, leased and activated, and the fourth last one
//! destroyed, so that three are kept; its tombstone stays. The entries of a rotation are appended together, so that they
//! share one barrier, and are applied one by one; rows, snapshots and purges are those of production. That is harder on
//! sled than production is: it is given no time to clean up.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use raft_store::state::ClusterState;
use raft_store::storage::Opened;

use crate::common::*;
use crate::keys::{Keys, all_done};

/// How many rotations: a hundred thousand take the better part of an hour.
const ROTATIONS: &str = "HSM_SPACE_ROTATIONS";
const USUAL: u64 = 600;
/// `cluster.raft.snapshot_every` and `keep_logs`, unless configured (`node/src/config/cluster.rs`).
const SNAPSHOT_EVERY: u64 = 1000;
const KEEP_LOGS: u64 = 500;
/// Bytes on disk for each byte of live state.
const RATIO: u64 = 20;
/// sled takes space in segments of so much; below one of them a ratio says nothing.
const SEGMENT: u64 = 512 << 10;

/// What is measured at each snapshot, which holds the live state and nothing else.
#[derive(Clone, Copy, Default, Debug)]
struct Space {
    disk: u64,
    sled: u64,
    /// Rows of state and log, as the node's metrics have them.
    live: u64,
    state: u64,
}

impl Space {
    fn of(store: &Opened, dir: &Path, state: u64) -> Self {
        let figures = store.control.figures();
        Self {
            disk: on_disk(dir),
            sled: figures.sled_bytes,
            live: figures.live_bytes,
            state,
        }
    }

    /// How much of what it may take is taken, in thousandths.
    fn taken(&self) -> u64 {
        self.disk * 1000 / (self.state.max(SEGMENT) * RATIO)
    }

    fn told(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{:.2} MiB on disk ({:.2} sled), {:.2} MiB live state ({:.2} with the log): {:.1} times the state",
            mib(self.disk),
            mib(self.sled),
            mib(self.state),
            mib(self.live),
            self.disk as f64 / self.state.max(1) as f64
        )
    }
}

/// Bytes that all files below a directory take.
fn on_disk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| {
            let path = entry.unwrap().path();
            match std::fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => on_disk(&path),
                // sled makes its file longer than what it has written.
                Ok(meta) => meta.len().max(meta.blocks() * 512),
                // Removed since it was listed.
                Err(_) => 0,
            }
        })
        .sum()
}

fn versions(state: &ClusterState) -> BTreeMap<&'static str, u32> {
    let mut states = BTreeMap::new();
    for version in state.versions().values() {
        *states.entry(version.state.as_str()).or_default() += 1;
    }
    states
}

/// A store that takes snapshots and purges its log as openraft does with the node's settings.
struct Driven {
    store: Opened,
    covered: u64,
    purged: u64,
}

impl Driven {
    /// Appends and applies; the size of the snapshot that became due with it.
    async fn run(&mut self, entries: Vec<raft_store::Entry>) -> Option<u64> {
        let last = entries.last()?.log_id.index;
        self.store.log.blocking_append(entries.clone()).await.unwrap();
        for entry in entries {
            all_done(&self.store.machine.apply([entry]).await.unwrap());
        }
        if last - self.covered < SNAPSHOT_EVERY {
            return None;
        }
        let snapshot = snapshot_of(&mut self.store).await;
        self.covered = last;
        let upto = last.saturating_sub(KEEP_LOGS);
        if upto > self.purged {
            self.store.log.purge(log_id(1, upto)).await.unwrap();
            self.purged = upto;
        }
        Some(std::fs::metadata(&snapshot.snapshot.path).unwrap().len())
    }
}

// Tests measure; the ban on clocks is for what the crate itself does.
#[allow(clippy::disallowed_methods)]
#[test]
fn space_stays_within_twenty_times_the_live_state() {
    let rotations: u64 = std::env::var(ROTATIONS).map_or(USUAL, |count| count.parse().expect(ROTATIONS));
    let dir = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let (last, digest, expected) = runtime().block_on(async {
        let mut keys = Keys::starting_at(1);
        let mut driven = Driven {
            store: open(dir.path()),
            covered: 0,
            purged: 0,
        };
        let first = std::iter::once(founding()).chain(keys.beginning()).collect();
        driven.run(first).await;
        let (mut last, mut worst) = (Space::default(), Space::default());
        let mut told = 0;
        for rotation in 1..=rotations {
            let Some(state) = driven.run(keys.rotation()).await else {
                continue;
            };
            last = Space::of(&driven.store, dir.path(), state);
            if last.taken() > worst.taken() {
                worst = last;
            }
            if rotation * 10 / rotations > told {
                told = rotation * 10 / rotations;
                println!("{rotation} rotations, {:.0?}: {}", begun.elapsed(), last.told());
            }
            assert!(
                last.taken() <= 1000,
                "after {rotation} rotations: {}",
                last.told()
            );
        }
        assert!(last.state > 0, "{rotations} rotations are too few for a snapshot");
        println!(
            "{rotations} rotations in {:.0?}: at its end {}; at its worst {}",
            begun.elapsed(),
            last.told(),
            worst.told()
        );
        let published = driven.store.machine.published().load_full();
        (last, published.digest, keys.expected())
    });
    closed(dir.path());
    let reopening = Instant::now();
    let store = open(dir.path());
    let published = store.machine.published().load_full();
    assert_eq!(published.digest, digest, "reopened with another state");
    assert_eq!(versions(&published.state), expected);
    println!(
        "reopened in {:.1?}: {}",
        reopening.elapsed(),
        Space::of(&store, dir.path(), last.state).told()
    );
}
