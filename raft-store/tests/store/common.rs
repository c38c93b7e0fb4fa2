//! Opening stores and filling them with entries.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::{CommittedLeaderId, EntryPayload, LeaderId, RaftLogReader, RaftSnapshotBuilder};
use raft_store::command::{AddRevocations, Command, Op, Origin, RequestId};
use raft_store::names::Incarnation;
use raft_store::state::access::RevocationKey;
use raft_store::storage::{OpenError, Opened, SnapshotReceiver, Store, StoreOptions, install_log_hook};
use raft_store::{Entry, LogId, Snapshot, SnapshotFile, Vote};

/// What every refusal advises.
pub(crate) const REMEDY: &str = "join a new node under a new node_id with an empty directory";

/// What the log hook called fatal, of all stores of this process.
pub(crate) fn fatal() -> &'static Mutex<Vec<String>> {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    install_log_hook(|why| SAID.lock().unwrap().push(why)).unwrap();
    &SAID
}

pub(crate) fn try_open(dir: &Path) -> Result<Opened, OpenError> {
    try_open_as("n1", dir)
}

/// Waits until a store that was dropped is closed: its files may be looked at.
pub(crate) fn closed(dir: &Path) {
    let refused = try_open_as("nobody", dir).err();
    assert!(matches!(refused, Some(OpenError::OtherNode { .. })));
}

// Tests wait with a deadline; the ban on clocks is for what the crate itself does.
#[allow(clippy::disallowed_methods)]
fn try_open_as(node_name: &str, dir: &Path) -> Result<Opened, OpenError> {
    fatal();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let opened = Store::open(StoreOptions {
            dir: dir.to_path_buf(),
            node_name: node_name.into(),
            incarnation: Incarnation([1; 16]),
            cache_bytes: 8 << 20,
            on_barrier: None,
            on_fatal: Box::new(|why| eprintln!("fatal: {why}")),
        });
        match opened {
            // A store that was just dropped is closed by its writer thread.
            Err(OpenError::InUse(_)) if Instant::now() < deadline => std::thread::yield_now(),
            other => return other,
        }
    }
}

pub(crate) fn open(dir: &Path) -> Opened {
    try_open(dir).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

pub(crate) fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

pub(crate) fn vote(term: u64) -> Vote {
    Vote {
        leader_id: LeaderId::new(term, 1),
        committed: false,
    }
}

/// An entry whose command adds revocations of about `size` bytes.
pub(crate) fn entry(term: u64, index: u64, size: usize) -> Entry {
    let reason = "x".repeat(size);
    let op = Op::AddRevocations(AddRevocations {
        revocations: vec![(RevocationKey::CommonName(format!("cn-{index}")), reason)],
    });
    command(term, index, op)
}

/// An entry that carries an operation of node 1.
pub(crate) fn command(term: u64, index: u64, op: Op) -> Entry {
    let id = RequestId::Node {
        node: 1,
        nonce: u128::from(index).to_be_bytes(),
    };
    let command = Command {
        id,
        body_hash: [0; 32],
        origin: Origin::Node(1),
        approvals: vec![],
        at: index as i64,
        op,
    };
    Entry {
        log_id: log_id(term, index),
        payload: EntryPayload::Normal(command),
    }
}

/// The first entry of a log: without a cluster, commands are refused.
pub(crate) fn founding() -> Entry {
    use raft_store::command::CreateCluster;
    use raft_store::names::{ClusterId, NodeName};
    let op = Op::CreateCluster(CreateCluster {
        cluster_id: ClusterId([1; 16]),
        name: "test".into(),
        trk_id: [0; 8],
        founder: 1,
        founder_name: NodeName::new("n1").unwrap(),
        incarnation: Incarnation([1; 16]),
        api_address: "a".into(),
        cluster_address: "c".into(),
        acl: Default::default(),
        revocations: vec![],
    });
    let id = RequestId::Node {
        node: 1,
        nonce: [0xff; 16],
    };
    let command = Command {
        id,
        body_hash: [0; 32],
        origin: Origin::Node(1),
        approvals: vec![],
        at: 0,
        op,
    };
    Entry {
        log_id: log_id(1, 0),
        payload: EntryPayload::Normal(command),
    }
}

/// Entries 0..count, appended one by one, then applied.
pub(crate) async fn fill(store: &mut Opened, count: u64, size: usize) {
    for index in 0..count {
        let entry = if index == 0 {
            founding()
        } else {
            entry(1, index, size)
        };
        store.log.blocking_append([entry.clone()]).await.unwrap();
        store.machine.apply([entry]).await.unwrap();
    }
}

/// A snapshot of what is applied.
pub(crate) async fn snapshot_of(store: &mut Opened) -> Snapshot {
    let mut builder = store.machine.get_snapshot_builder().await;
    builder.build_snapshot().await.unwrap()
}

/// Keeps another store's snapshot as the receiver does: durable under its final name in the store's own
/// directory, before anybody installs it.
pub(crate) fn receive(store: &Opened, snapshot: &Snapshot) -> SnapshotFile {
    let bytes = std::fs::read(&snapshot.snapshot.path).unwrap();
    let mut receiver = SnapshotReceiver::create(&store.control.snapshot_dir(), &snapshot.meta).unwrap();
    receiver.push(&bytes).unwrap();
    receiver.finish().unwrap()
}

/// Opens sled itself on a closed store.
#[allow(clippy::disallowed_methods)]
pub(crate) fn open_sled(dir: &Path) -> sled::Db {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match sled::Config::new().path(dir).open() {
            // It gives its lock back a moment after it is dropped.
            Err(error) if error.to_string().contains("lock") && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Flips one bit of a file.
pub(crate) fn flip_bit(path: &Path, bit: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}

pub(crate) async fn all_entries(store: &mut Opened) -> Vec<Entry> {
    store.log.try_get_log_entries(..).await.unwrap()
}

pub(crate) async fn last_log(store: &mut Opened) -> Option<LogId> {
    store.log.get_log_state().await.unwrap().last_log_id
}

/// xorshift64*: tests are random but repeatable by their seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
