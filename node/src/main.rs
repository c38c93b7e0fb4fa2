//! hsm-node: parses the command line, then hands over to [`hsm_node::app`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use hsm_node::app::{StartFailure, maintenance};
use hsm_node::logging;
use serde::Serialize;

/// A node of the clustered key service.
#[derive(Parser)]
#[command(name = "hsm-node", version, long_version = LONG_VERSION.as_str())]
struct Arguments {
    /// The configuration file.
    #[arg(long, short, env = "CONFIG_PATH", default_value = "config.yaml")]
    config: PathBuf,
    /// Check the configuration and the files it names, say what has no effect, and end.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    maintenance: Option<Maintenance>,
}

/// Work on the directory of this node while it is stopped. `hsmctl node` asks first and shows what comes of it.
#[derive(Subcommand)]
enum Maintenance {
    /// The quorum is gone for good: make this node the only voter of a new epoch. What its log does not have is lost.
    RecoverQuorum {
        /// This node's cluster.node_id, to say that it is meant.
        #[arg(long, value_name = "NODE_ID")]
        confirm: Option<String>,
        /// Say what would be done and what may be lost, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write the store anew, so that it takes no more room than what is in it.
    Compact {
        /// Say what it takes, and write nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

/// Release packaging looks for the feature's name, and the record of `chaos` for the commit, which is known where whoever builds
/// says it.
static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let features = if cfg!(feature = "failpoints") {
        "failpoints (for tests only)"
    } else {
        "none"
    };
    let commit = option_env!("HSM_BUILD_COMMIT").filter(|commit| !commit.is_empty());
    let commit = commit
        .map(|commit| format!("\ncommit: {commit}"))
        .unwrap_or_default();
    format!("{}\nfeatures: {features}{commit}", env!("CARGO_PKG_VERSION"))
});

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.check && arguments.maintenance.is_some() {
        let why = "--check looks at the configuration, and at nothing else";
        Arguments::command()
            .error(ErrorKind::ArgumentConflict, why)
            .exit();
    }
    let path = &arguments.config;
    let done = match arguments.maintenance {
        None => hsm_node::app::run(path, arguments.check),
        Some(Maintenance::RecoverQuorum { confirm, dry_run }) => {
            show(maintenance::recover_quorum(path, confirm.as_deref(), dry_run))
        }
        Some(Maintenance::Compact { dry_run }) => show(maintenance::compact(path, dry_run)),
    };
    match done {
        Ok(()) => {
            logging::last_words(None);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            logging::last_words(Some(&format!("hsm-node: {failure}")));
            ExitCode::from(failure.exit_code())
        }
    }
}

/// What was done, as JSON on standard output.
fn show(outcome: Result<impl Serialize, StartFailure>) -> Result<(), StartFailure> {
    let outcome = outcome?;
    let text = serde_json::to_string_pretty(&outcome).map_err(std::io::Error::from)?;
    println!("{text}");
    Ok(())
}
