//! Administration: calls over HTTP, authorised where they arrive and again on the leader, which carries
//! them out. Reads are answered by the node that was asked; every call leaves an audit line.

pub mod access;
pub mod adopt;
pub mod arrival;
pub mod audit;
pub mod authorise;
pub mod call;
pub mod cleanup;
pub mod differences;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod join_token;
pub mod key_life;
pub mod rekey;
pub mod rekey_status;
pub mod removal;
pub mod revoked_file;
pub mod routes;
pub mod seed;
pub mod seeding;
pub mod service;
pub mod views;

pub use call::{AdminBody, AdminCall, CallError};
pub use routes::{AdminParts, Changes, Placements, router};
pub use seed::Seed;
pub use service::{AdminService, ServiceParts};
