//! `hsmctl`, also called as `hsm-admin` and `create-kek`: administers nodes through their API. It opens a
//! token only to initialise it, and never takes a secret from its arguments.

mod cli;
mod commands;
mod dev;
#[cfg(test)]
mod docs;
mod exit;
mod files;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod names;
mod output;
mod profile;
mod progress;
mod terminal;
mod v1_config;

use std::process::ExitCode;

/// Carries out what the process was started for.
pub fn run() -> ExitCode {
    let invocation = names::translate(std::env::args_os());
    for warning in &invocation.warnings {
        output::note(warning);
    }
    let name = invocation.name;
    let status = match cli::parse(name, &invocation.args) {
        Ok(mut cli) => {
            let prepared = commands::prepare(name, &mut cli);
            // A profile may say it.
            let format = cli.global.output.unwrap_or_default();
            exit::report(prepared.and_then(|()| commands::run(name, cli)), name, format)
        }
        Err(error) => exit::report_parser(&error, cli::format_asked_for(&invocation.args)),
    };
    status.as_process_exit(name.is_v1())
}
