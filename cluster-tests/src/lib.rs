//! The harness of the cluster tests: real nodes as processes, made by `hsmctl dev` in a folder and on ports of
//! their own, clients that never retry behind a test's back, proxies, relays for partitions, balancers, load,
//! failpoints and metrics. It waits for conditions with deadlines, and leaves no process behind, however a test ends.

#![warn(missing_docs)]

pub mod alerts;
pub mod client;
pub mod crowd;
pub mod edge;
pub mod failpoints;
pub mod fixture;
mod guard;
pub mod haproxy;
pub mod http1;
pub mod http2;
pub mod lanes;
mod leashed;
pub mod load;
pub mod metrics;
pub mod nginx;
pub mod node;
pub mod once;
pub mod playground;
pub mod ports;
pub mod program;
pub mod proxy;
pub mod relay;
pub mod shim;
pub mod stalls;
pub mod subnet;
mod token_pool;
pub mod vitals;
pub mod wait;
pub mod wall_clock;
pub mod weather;

pub use client::{Ca, Identity, Pki};
pub use edge::Edge;
pub use haproxy::Haproxy;
pub use load::Load;
pub use metrics::Metrics;
pub use nginx::Nginx;
pub use node::Node;
pub use once::Once;
pub use playground::{Leader, Playground};
pub use program::Program;
pub use proxy::Proxy;
pub use relay::Relays;
pub use shim::Shim;
pub use stalls::Stalls;
pub use subnet::Subnet;
pub use wait::until;
pub use weather::Weather;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// A program that was built beside these tests: `target/debug/NAME` for `target/debug/deps/cluster-…`.
/// `HSM_BIN_DIR` names another folder.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("HSM_BIN_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe().context("find this test")?;
            let folder = own.parent().context("this test is in no folder")?;
            let folder = if folder.ends_with("deps") {
                folder.parent()
            } else {
                Some(folder)
            };
            folder.context("this test is in no folder")?.to_owned()
        }
    };
    let path = folder.join(name);
    if !path.is_file() {
        bail!(
            "{}: no such program; build it first: cargo build --workspace --bins --features failpoints",
            path.display()
        );
    }
    path.canonicalize().with_context(|| path.display().to_string())
}
