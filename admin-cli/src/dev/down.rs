//! `hsmctl dev down`: stops every node of a playground. Data, tokens and certificates stay.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use nix::sys::signal::Signal;

use super::layout::{Layout, Node};
use super::{Place, process};
use crate::output::note;
use crate::progress::Progress;

/// Longer than a node's drain.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
const AFTER_KILL: Duration = Duration::from_secs(10);

/// Arguments of `dev down`.
#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    place: Place,
    /// Kill at once instead of letting requests finish.
    #[arg(long)]
    now: bool,
}

pub(super) fn down(args: &Down) -> Result<()> {
    let (layout, facts) = Layout::open(&args.place.dir)?;
    // A kill does not wait for an `up` that hangs.
    let _lock = if args.now { None } else { Some(layout.lock()?) };
    let nodes = layout.nodes(facts)?;
    if !args.now {
        for node in &nodes {
            if process::signal(node, Signal::SIGTERM)? {
                // A stopped process gets its SIGTERM when it goes on.
                process::signal(node, Signal::SIGCONT)?;
            }
        }
        let progress = Progress::of("the nodes finish their requests");
        let stubborn: Vec<&Node> = nodes
            .iter()
            .filter(|node| !process::wait_until_gone(node, PATIENCE))
            .collect();
        drop(progress);
        for node in stubborn {
            note(&format!(
                "node {}: still runs after {PATIENCE:?}, killed",
                node.number
            ));
        }
    }
    for node in &nodes {
        process::signal(node, Signal::SIGKILL)?;
    }
    let alive: Vec<String> = nodes
        .iter()
        .filter(|node| !process::wait_until_gone(node, AFTER_KILL))
        .map(Node::id)
        .collect();
    if !alive.is_empty() {
        bail!(
            "{}: still there {AFTER_KILL:?} after SIGKILL; is the disk hanging?",
            alive.join(", ")
        );
    }
    note(&format!(
        "stopped; the same cluster comes back with: hsmctl dev up --dir {}",
        args.place.dir.display()
    ));
    Ok(())
}
