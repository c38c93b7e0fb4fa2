//! The wire contract of hsm-service: paths, headers, requests, answers and error codes, shared by
//! server and clients; behind feature `client` the Rust client. It must never decide anything:
//! what a request means is the node's business.
#![warn(missing_docs)]

mod wire;

pub mod admin;
#[cfg(feature = "client")]
pub mod client;
pub mod code;
pub mod data;
pub mod headers;
pub mod maintenance;
pub mod paths;
pub mod problem;
pub mod suggest;
pub mod v1;

#[cfg(feature = "client")]
pub use client::{Client, ClientError, Retry};
pub use code::ErrorCode;
pub use headers::StateIndex;
pub use problem::Problem;
pub use wire::{Base64, DecodeError, SecretBase64, SecretText};
