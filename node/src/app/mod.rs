//! Puts a node together: configuration, secrets, certificates, tokens, consensus, listeners; then waits
//! for a signal and takes it apart again. Assembly only: nothing here decides anything.

mod descriptors;
mod entrance;
mod failure;
mod files;
pub mod maintenance;
mod start;
mod stop;
mod v1_keys;

use std::path::Path;

pub use failure::StartFailure;

use crate::config::Config;
use crate::{http, log_budget, logging, secrets};

/// Runs a node until it is told to stop. `check_only`: looks at the configuration and at the files it names,
/// and ends. [`logging::last_words`] has to be called before the process ends.
///
/// # Errors
/// Why the node does not start, naming key, value and remedy.
pub fn run(path: &Path, check_only: bool) -> Result<(), StartFailure> {
    // Before the configuration is read: version 1's may hold a PIN.
    secrets::harden_process()?;
    let config = Config::load(path)?;
    if check_only {
        // Files of the log are the running node's.
        logging::init(&config.logging.on_standard_error())?;
    } else {
        logging::init(&config.logging)?;
    }
    let outcome = run_configured(config, path, check_only);
    log_budget::say_suppressed();
    http::say_refusals_left_out();
    if let Err(failure) = &outcome {
        let exit_code = failure.exit_code();
        if matches!(failure, StartFailure::Removed(_)) {
            tracing::error!(%failure, exit_code, "the node has ended for good");
        } else {
            tracing::error!(%failure, exit_code, "the node does not start");
        }
    }
    outcome
}

fn run_configured(config: Config, path: &Path, check_only: bool) -> Result<(), StartFailure> {
    for key in &config.ignored {
        tracing::warn!("configuration: {key}");
    }
    for warning in &config.warnings {
        tracing::warn!("configuration: {warning}");
    }
    if check_only {
        files::check(&config)?;
        println!("{}: ok", path.display());
        return Ok(());
    }
    #[cfg(feature = "failpoints")]
    crate::failpoints::arm_from_environment().map_err(StartFailure::Failpoints)?;
    start::run(config)
}

/// Ends the process at once, because going on could acknowledge what is not so.
fn die(why: &str) -> ! {
    tracing::error!(why, "the node stops at once");
    logging::last_words(Some(&format!("hsm-node: {why}")));
    std::process::exit(i32::from(failure::FATAL))
}
