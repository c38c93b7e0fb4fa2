//! `hsmctl`, also called as `hsm-admin` and `create-kek`: administers nodes through their API. It opens a
//! token only to initialise it, and never takes a secret from its arguments.

mod cli;
mod commands;
mod dev;
mod exit;
mod files;
mod output;
mod profile;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let invocation = cli::translate(std::env::args_os());
    for warning in &invocation.warnings {
        output::note(warning);
    }
    let status = match cli::Cli::try_parse_from(&invocation.args) {
        Ok(cli) => {
            let format = cli.global.output;
            exit::report(commands::run(cli), format)
        }
        Err(error) => exit::report_parser(&error, cli::format_asked_for(&invocation.args)),
    };
    status.as_process_exit(invocation.v1)
}
