//! Puts a node together: configuration, secrets, certificates, tokens, consensus, listeners; then waits
//! for a signal and takes it apart again. Assembly only: nothing here decides anything.

mod failure;
mod start;
mod stop;

use std::path::Path;

pub use failure::StartFailure;

use crate::config::Config;
use crate::{logging, secrets};

/// Runs a node until it is told to stop. `check_only`: says what the configuration holds and ends.
///
/// # Errors
/// Why the node does not start, naming key, value and remedy.
pub fn run(path: &Path, check_only: bool) -> Result<(), StartFailure> {
    let config = Config::load(path)?;
    logging::init(&config.logging)?;
    for key in &config.ignored {
        tracing::warn!("configuration: {key}");
    }
    for warning in &config.warnings {
        tracing::warn!("configuration: {warning}");
    }
    if check_only {
        println!("{}: ok", path.display());
        return Ok(());
    }
    // Before the first secret is read.
    secrets::harden_process()?;
    #[cfg(feature = "failpoints")]
    crate::failpoints::arm_from_environment().map_err(StartFailure::Failpoints)?;
    start::run(config)
}

/// Ends the process at once, because going on could acknowledge what is not so.
fn die(why: &str) -> ! {
    tracing::error!(why, "the node stops at once");
    eprintln!("hsm-node: {why}");
    std::process::exit(i32::from(failure::FATAL))
}
