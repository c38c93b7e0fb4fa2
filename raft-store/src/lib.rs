//! The replicated state of the cluster and its storage.
//!
//! [`state`] and [`command`] are pure data and transitions: no clock, no randomness, no I/O, so that
//! every node that applies the same log reaches the same state. [`storage`] keeps log, vote and state
//! on sled by the rules that make lost writes visible. Nothing here knows a token or HTTP.

#![warn(missing_docs)]

pub mod codec;
pub mod command;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod names;
pub mod state;
pub mod storage;

mod raft_types;
mod seeded;

pub use raft_types::{
    Entry, LogId, MemberNode, Snapshot, SnapshotFile, SnapshotMeta, StoredMembership, TypeConfig, Vote,
};
