//! `hsmctl slot`: tokens, and the slots of a node that they are for.

use clap::Subcommand;

use super::slot_init::Init;
use super::slot_status::Status;
use super::slot_unlock::Unlock;

/// Where SoftHSM is on Debian.
pub(crate) const DEFAULT_MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// Tokens, and the slots they are for.
#[derive(Debug, Subcommand)]
pub(crate) enum SlotCommand {
    /// Initialise a token and set its PINs.
    Init(Init),
    /// Show the slots of every named node.
    Status(Status),
    /// Have a node open one of its slots now, with the PIN it is configured with.
    Unlock(Unlock),
}
