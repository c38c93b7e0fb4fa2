//! The production store on real sled files: openraft's suite, crashes, damage, and what it promises.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;
mod damage;
#[cfg(feature = "failpoints")]
mod failpoints;
mod golden;
mod kill;
mod limits;
mod maintenance;
mod promises;
mod snapshots;
mod start;
mod suite;
mod watch;
