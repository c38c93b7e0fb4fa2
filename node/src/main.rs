//! hsm-node: parses the command line, then hands over to [`hsm_node::app`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hsm_node::logging;

/// A node of the clustered key service.
#[derive(Parser)]
#[command(name = "hsm-node", version, long_version = LONG_VERSION)]
struct Arguments {
    /// The configuration file.
    #[arg(long, short, env = "CONFIG_PATH", default_value = "config.yaml")]
    config: PathBuf,
    /// Check the configuration and the files it names, say what has no effect, and end.
    #[arg(long)]
    check: bool,
}

/// Release packaging looks for the feature's name.
const LONG_VERSION: &str = if cfg!(feature = "failpoints") {
    concat!(
        env!("CARGO_PKG_VERSION"),
        "\nfeatures: failpoints (for tests only)"
    )
} else {
    concat!(env!("CARGO_PKG_VERSION"), "\nfeatures: none")
};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match hsm_node::app::run(&arguments.config, arguments.check) {
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
