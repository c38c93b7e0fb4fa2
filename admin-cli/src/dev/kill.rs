//! `hsmctl dev kill`: one signal to one node, and its end if the signal asks for that. It takes no lock, so that a
//! node can be killed at any moment of what another command does.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use nix::sys::signal::Signal;

use super::down::PATIENCE;
use super::layout::Layout;
use super::{Place, process};
use crate::exit::missing;
use crate::output::note;
use crate::progress::Progress;

/// The kernel is quick.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// Arguments of `dev kill`.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    #[command(flatten)]
    place: Place,
    /// Number of the node, from 1.
    #[arg(long, value_name = "I", value_parser = clap::value_parser!(u32).range(1..))]
    node: u32,
    /// Name of the signal: KILL, TERM, STOP, CONT, …. After KILL, TERM and INT the command waits for the node's end.
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
        return Err(missing(format!("node {} does not run", node.number)));
    }
    note(&format!("node {}: {}", node.number, args.signal));
    // Whoever starts it again right after this must not meet the old process.
    let Some((limit, why)) = end_after(args.signal) else {
        return Ok(());
    };
    let progress = Progress::of(&format!("node {}: ends", node.number));
    let gone = process::wait_until_gone(&node, limit);
    drop(progress);
    if !gone {
        bail!(
            "node {}: still there {limit:?} after {}; {why}",
            node.number,
            args.signal
        );
    }
    Ok(())
}

/// How long a node may take to end after a signal that ends it, and what else may be the matter.
fn end_after(signal: Signal) -> Option<(Duration, &'static str)> {
    match signal {
        Signal::SIGKILL => Some((AFTER_KILL, "is the disk hanging?")),
        Signal::SIGTERM | Signal::SIGINT => Some((
            PATIENCE,
            "a stopped one has to go on first (--signal CONT), another one is still draining",
        )),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn only_after_signals_that_end_a_node_its_end_is_waited_for() {
        for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
            assert!(end_after(signal).is_some(), "{signal}");
        }
        for signal in [Signal::SIGSTOP, Signal::SIGCONT, Signal::SIGHUP] {
            assert!(end_after(signal).is_none(), "{signal}");
        }
    }

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
