//! What the issue of the three-node cluster promises, shown on real processes, tokens and connections. One
//! binary, so that the harness is linked once; each test makes a cluster of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bad_input;
mod canary;
mod common;
mod copied_token;
mod data_plane;
mod durability;
mod failover;
mod joining;
mod metrics;
mod partitions;
mod pkcs11;
mod playground;
mod restart;
mod rotation;
mod startup;
mod token_kills;
mod tokens;
mod v1_ciphertexts;
mod victim;
