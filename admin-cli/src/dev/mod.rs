//! `hsmctl dev`: a complete cluster on this machine, with certificates, tokens and PINs of its own.
//! Everything in it is marked DEV and lies in one private folder; nothing outside that folder is written.

mod config;
mod down;
mod env;
mod form;
mod kill;
mod layout;
mod pki;
mod ports;
mod process;
mod ready;
mod status;
mod tokens;
mod up;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

pub(crate) use process::node_binary;

use crate::commands::Session;

/// The playground.
#[derive(Debug, Subcommand)]
pub(crate) enum DevCommand {
    /// Start the cluster of a folder; make it first if there is none, continue if that was interrupted.
    Up(up::Up),
    /// Stop all nodes; data and keys stay.
    Down(down::Down),
    /// Send a signal to one node, SIGKILL if no other is named.
    Kill(kill::Kill),
    /// Start one node.
    Start(Start),
    /// Show which nodes run and which are ready.
    Status(Place),
    /// What a node's process is before it becomes hsm-node.
    #[command(hide = true)]
    ExecNode(Start),
}

/// The folder of a playground.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The playground's folder.
    #[arg(long, env = "HSM_DEV_DIR", value_name = "DIR")]
    dir: PathBuf,
}

/// One node of a playground.
#[derive(Debug, Args)]
pub(crate) struct Start {
    #[command(flatten)]
    place: Place,
    /// Number of the node, from 1.
    #[arg(long, value_name = "I", value_parser = clap::value_parser!(u32).range(1..))]
    node: u32,
}

/// Carries a command out.
pub(crate) fn run(session: &Session, command: DevCommand) -> Result<()> {
    match command {
        DevCommand::Up(args) => up::up(session, &args),
        DevCommand::Down(args) => down::down(&args),
        DevCommand::Kill(args) => kill::kill(&args),
        DevCommand::Start(args) => up::start(&args),
        DevCommand::Status(place) => status::status(session, &place),
        DevCommand::ExecNode(args) => process::become_node(&args),
    }
}
