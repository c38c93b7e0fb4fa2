//! The production store on real sled files: openraft's suite, crashes, damage, and what it promises.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
mod contents;
mod damage;
#[cfg(feature = "failpoints")]
mod failpoints;
mod golden;
mod keys;
mod kill;
mod limits;
mod maintenance;
mod promises;
mod snapshots;
mod space;
mod start;
mod suite;
mod watch;
