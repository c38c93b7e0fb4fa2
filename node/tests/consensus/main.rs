//! Consensus on real processes, real TLS and real sled files, without tokens or HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod child;
mod cluster;
mod failover;
mod identity;
mod partition;
mod relay;
mod waiting;
