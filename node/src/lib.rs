//! hsm-node: a node of the clustered key service.
//!
//! `config`, `secrets`, `tls`, `identity` and `policy` are read at the edge; `consensus` replicates;
//! `slots` and `sync` keep tokens and state together; `http`, `health` and `admin` answer.

pub mod admin {
    //! Administration.
    pub mod call;
}
pub mod clock;
pub mod config;
pub mod consensus;
pub mod identity;
pub mod logging;
pub mod policy;
pub mod secrets;
pub mod tls;
pub mod health;
pub mod http;
pub mod keyring;
pub mod metrics;
pub mod slots;
