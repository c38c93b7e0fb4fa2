//! Breaks a real cluster under a workload and checks what it acknowledged: a schedule of faults that follows from a seed, clients
//! that write down every call and its outcome, oracles that judge what was written down, and seeded bugs that show that the
//! oracles find what they are for.
//!
//! The schedule and the workload follow from the seed. Interleavings do not: a run is repeated, never replayed step by step.

pub mod bugs;
pub mod cluster;
mod ending;
pub mod failover;
pub mod faults;
pub mod folder;
pub mod history;
pub mod network;
pub mod options;
pub mod oracles;
pub mod random;
pub mod record;
pub mod replay;
pub mod run;
pub mod schedule;
pub mod selftest;
pub mod verdict;
pub mod workload;
