//! `hsmctl dev kill`: one signal to one node. It takes no lock, so that a node can be killed at any moment of
//! what another command does.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use nix::sys::signal::Signal;

use super::layout::Layout;
use super::{Place, process};
use crate::output::note;

/// The kernel is quick.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// Arguments of `dev kill`.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    #[command(flatten)]
    place: Place,
    /// Number of the node, from 1.
    #[arg(long, value_name = "I")]
    node: u32,
    /// Name of the signal: KILL, TERM, STOP, CONT, ….
    #[arg(long, default_value = "KILL", value_parser = parse_signal)]
    signal: Signal,
}

/// `KILL`, `SIGKILL`, `kill`, `9`.
fn parse_signal(text: &str) -> Result<Signal, String> {
    let upper = text.to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return Signal::try_from(number).map_err(|_| format!("{text}: no such signal"));
    }
    let name = if upper.starts_with("SIG") {
        upper
    } else {
        format!("SIG{upper}")
    };
    Signal::from_str(&name).map_err(|_| format!("{text}: no such signal; KILL, TERM, STOP, CONT are some"))
}

pub(super) fn kill(args: &Kill) -> Result<()> {
    let (layout, facts) = Layout::open(&args.place.dir)?;
    let node = layout.node(facts, args.node)?;
    if !process::signal(&node, args.signal)? {
        bail!("node {} does not run", node.number);
    }
    if args.signal == Signal::SIGKILL && !process::wait_until_gone(&node, AFTER_KILL) {
        bail!(
            "node {}: still there {AFTER_KILL:?} after SIGKILL; is the disk hanging?",
            node.number
        );
    }
    note(&format!("node {}: {}", node.number, args.signal));
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_taken_in_every_usual_form() {
        for text in ["KILL", "SIGKILL", "kill", "9"] {
            assert_eq!(parse_signal(text), Ok(Signal::SIGKILL), "{text}");
        }
        assert_eq!(parse_signal("stop"), Ok(Signal::SIGSTOP));
        for text in ["", "KILLL", "0", "99", "-9"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
