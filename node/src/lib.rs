//! hsm-node: a node of the clustered key service.
//!
//! `config`, `secrets`, `tls`, `identity` and `policy` are read at the edge; `consensus` replicates;
//! `slots` and `sync` keep tokens and state together; `rotation` makes keys, `leases` bounds their use, `destruction`
//! ends them; `http`, `health`
//! and `admin` answer; `app` puts it all together.

#![warn(missing_docs)]

// At a point a process dies, or lets in whoever comes. If another crate's feature could bring them in, `--version` would
// not say so and releases would not be refused.
const _: () = assert!(
    cfg!(feature = "failpoints") == fail::has_failpoints(),
    "failpoints are compiled in without hsm-node's own feature `failpoints`: build hsm-node with it, or without any"
);

pub mod admin;
pub mod app;
pub mod clock;
pub mod config;
pub mod consensus;
pub mod destruction;
mod durable;
#[cfg(feature = "failpoints")]
pub mod failpoints;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod health;
pub mod http;
pub mod identity;
pub mod keyring;
pub mod leases;
mod lock;
pub mod log_budget;
pub mod logging;
pub mod metrics;
pub mod policy;
pub mod readiness;
pub mod rekey;
pub mod rotation;
pub mod secrets;
mod seeded;
pub mod slots;
pub mod sync;
#[cfg(test)]
mod test_log;
pub mod tls;
