//! What the service promises, shown on real processes, tokens and connections. One
//! binary, so that the harness is linked once; each test makes a cluster of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod audit;
mod bad_input;
mod batches;
#[cfg(feature = "failpoints")]
mod by_age;
mod by_hand;
mod canary;
mod chaos;
mod cli;
mod common;
mod copied_token;
mod damage;
mod data_plane;
mod durability;
mod examples;
mod failover;
#[cfg(feature = "failpoints")]
mod forgeries;
mod forming;
mod full_disk;
mod handover;
#[cfg(feature = "failpoints")]
mod hanging_up;
mod haproxy_examples;
mod hung_token;
mod invocations;
#[cfg(feature = "failpoints")]
mod joiner;
mod joining;
mod key_commands;
mod key_life;
mod load_balancers;
mod lost_data;
#[cfg(feature = "failpoints")]
mod member_kills;
mod members;
mod metrics;
mod min_index;
mod mixed;
mod moves;
mod nginx_examples;
mod notice;
mod open_connections;
mod overload;
mod partitions;
mod pkcs11;
mod playground;
mod previous_release;
mod profiles;
mod prompt;
mod proxies;
mod recovery;
mod rekey;
#[cfg(feature = "failpoints")]
mod rekey_kills;
mod restart;
mod restarted_alone;
#[cfg(feature = "failpoints")]
mod returning;
mod revocations;
mod roles;
mod rolling;
mod rotation;
#[cfg(feature = "failpoints")]
mod rotation_kills;
mod sessions;
mod site;
mod slots;
// Its tests need failpoints; what they share does not.
#[cfg_attr(not(feature = "failpoints"), allow(dead_code))]
mod snapshots;
mod space;
mod startup;
mod stopping;
mod tls_ending;
mod token_kills;
mod tokens;
mod v1_adoption;
mod v1_ciphertexts;
mod v1_migration;
mod v1_service;
mod v1_users;
mod victim;
mod waiting;
mod wall_clock;
