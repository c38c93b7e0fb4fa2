//! Work on the directory of a node that is stopped, on its machine. The work itself is `hsm-node`'s, the program that the
//! directory belongs to; here it is asked about, shown and confirmed.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use hsm_api::maintenance::{Compaction, LeftOut, LogPoint, QuorumRecovery};
use serde::de::DeserializeOwned;

use super::Session;
use crate::dev::node_binary;
use crate::exit::with_hint;
use crate::output::{self, note, or_dash};
use crate::terminal::Destruction;

/// What to do about a stopped node.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// The quorum is gone for good: make this survivor the only voter of a new epoch.
    ///
    /// Only if most voters are lost and never come back. Whatever was acknowledged and is not in this node's log is lost.
    /// The other nodes have no part in the new epoch: they are refused, and have to be emptied and joined again. Look with
    /// --dry-run at each survivor first, and recover on the one whose last entry has the highest term, then index.
    RecoverQuorum(RecoverQuorum),
    /// Write the node's store anew, so that it takes no more room than what is in it.
    ///
    /// Whenever it is interrupted, the node starts with the same contents. It needs as much free room as the contents take.
    Compact(Compact),
}

/// Arguments of `node recover-quorum`.
#[derive(Debug, Args)]
pub(crate) struct RecoverQuorum {
    #[command(flatten)]
    node: Stopped,
    /// The node's name, instead of typing it.
    #[arg(long, value_name = "NODE_ID")]
    confirm: Option<String>,
    /// Say what would be done and what may be lost, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `node compact`.
#[derive(Debug, Args)]
pub(crate) struct Compact {
    #[command(flatten)]
    node: Stopped,
    /// Say what it takes, and write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Which node.
#[derive(Debug, Args)]
struct Stopped {
    /// The node's configuration; paths in it are relative to the working directory, as for the node [default:
    /// $CONFIG_PATH, else config.yaml].
    #[arg(long, value_name = "FILE")]
    node_config: Option<PathBuf>,
}

impl NodeCommand {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        match self {
            Self::RecoverQuorum(args) => recover_quorum(session, args),
            Self::Compact(args) => compact(session, &args),
        }
    }
}

fn recover_quorum(session: &Session, args: RecoverQuorum) -> Result<()> {
    let ask = |further: &[&str]| -> Result<QuorumRecovery> { args.node.ask("recover-quorum", further) };
    let seen = ask(&["--dry-run"])?;
    if args.dry_run || seen.done_before {
        return output::print(session.format(), &seen, || recovery_text(&seen));
    }
    note(&recovery_text(&seen));
    let warning = warning(&seen);
    let destruction = Destruction {
        warning: &warning,
        name: &seen.node_id,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    destruction.confirm(session.questions())?;
    let done = ask(&["--confirm", &seen.node_id])?;
    output::print(session.format(), &done, || recovery_text(&done))
}

fn compact(session: &Session, args: &Compact) -> Result<()> {
    let further: &[&str] = if args.dry_run { &["--dry-run"] } else { &[] };
    let done: Compaction = args.node.ask("compact", further)?;
    output::print(session.format(), &done, || compaction_text(&done))
}

impl Stopped {
    /// Runs hsm-node, which says on its standard error what is wrong.
    fn ask<T: DeserializeOwned>(&self, what: &str, further: &[&str]) -> Result<T> {
        let binary = node_binary()?;
        let shown = binary.display();
        let mut command = Command::new(&binary);
        if let Some(config) = &self.node_config {
            command.arg("--config").arg(config);
        }
        let output = command
            .arg(what)
            .args(further)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("start {shown}"))?;
        if !output.status.success() {
            let hint = "nothing was changed unless it says so above; asked again, it goes on where it was";
            let failed = anyhow::anyhow!("{shown} {what}: {}", output.status);
            return Err(with_hint(failed, hint));
        }
        match serde_json::from_slice(&output.stdout) {
            Ok(answer) => Ok(answer),
            Err(error) => {
                bail!("{shown} {what}: its answer cannot be read ({error}); are both of the same release?")
            }
        }
    }
}

fn warning(seen: &QuorumRecovery) -> String {
    format!(
        "{} will be the only voter of epoch {}. Changes that were acknowledged and are not in its log, which ends at {}, are \
         lost: it cannot know of them, because the voters that had them are gone. Its last {} entries become committed, \
         whether or not anybody was told so. {} will never be taken back; their directories have to be emptied.",
        seen.node_id,
        seen.new_epoch,
        point(seen.last_log),
        seen.uncertain_entries,
        names(&seen.left_out),
    )
}

fn names(nodes: &[LeftOut]) -> String {
    let names: Vec<&str> = nodes.iter().map(|node| node.node_id.as_str()).collect();
    names.join(", ")
}

fn point(at: LogPoint) -> String {
    format!("term {}, index {}", at.term, at.index)
}

fn recovery_text(seen: &QuorumRecovery) -> String {
    let state = match (seen.done, seen.done_before) {
        (_, true) => "done before: start the node",
        (true, false) => "done: start the node",
        (false, false) => "nothing was changed",
    };
    let left_out = seen.left_out.iter().map(|node| {
        let reported = or_dash(node.last_report_at.clone());
        format!(
            "{} (raft id {}, {}, last report {reported})",
            node.node_id, node.raft_id, node.role
        )
    });
    let left_out: Vec<String> = left_out.collect();
    let or_none = |keys: &[String]| {
        if keys.is_empty() {
            "none".to_owned()
        } else {
            keys.join(", ")
        }
    };
    output::pairs([
        ("node", format!("{} (raft id {})", seen.node_id, seen.raft_id)),
        ("directory", seen.data_dir.clone()),
        ("cluster", seen.cluster_id.clone()),
        ("epoch", format!("{} → {}", seen.epoch, seen.new_epoch)),
        ("last entry", point(seen.last_log)),
        ("known committed", point(seen.applied)),
        ("uncertain entries", seen.uncertain_entries.to_string()),
        ("last change in the log", or_dash(seen.last_change_at.clone())),
        ("in contact at least until", or_dash(seen.last_written_at.clone())),
        ("left out", left_out.join("; ")),
        ("keys not proven here", or_none(&seen.unproven_keys)),
        ("adopted keys that are elsewhere", or_none(&seen.keys_elsewhere)),
        ("state", state.to_owned()),
    ])
}

fn compaction_text(done: &Compaction) -> String {
    let state = if done.done {
        "written anew: start the node"
    } else {
        "whole; nothing was written"
    };
    output::pairs([
        ("node", done.node_id.clone()),
        ("directory", done.data_dir.clone()),
        ("bytes before", done.bytes_before.to_string()),
        ("bytes now", done.bytes_after.to_string()),
        ("bytes of rows", done.live_bytes.to_string()),
        ("state", state.to_owned()),
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn seen(done: bool, done_before: bool) -> QuorumRecovery {
        serde_json::from_value(serde_json::json!({
            "node_id": "hsm-node-3", "raft_id": 9, "data_dir": "/var/lib/hsm", "cluster_id": "01", "epoch": 1,
            "new_epoch": 2, "done": done, "done_before": done_before, "last_log": {"term": 7, "index": 40},
            "applied": {"term": 7, "index": 38}, "uncertain_entries": 2, "last_written_at": "2030-01-01T00:00:00Z",
            "left_out": [
                {"node_id": "hsm-node-1", "raft_id": 1, "role": "voter", "last_report_at": "2030-01-01T00:00:00Z"},
                {"node_id": "hsm-node-2", "raft_id": 4, "role": "learner"}
            ],
            "unproven_keys": ["exchange-key/v3"], "keys_elsewhere": []
        }))
        .unwrap()
    }

    #[test]
    fn what_may_be_lost_and_who_is_left_out_is_said_before_it_is_done() {
        let warning = warning(&seen(false, false));
        for part in [
            "hsm-node-3 will be the only voter of epoch 2",
            "acknowledged",
            "term 7, index 40",
            "2 entries become committed",
            "hsm-node-1, hsm-node-2",
        ] {
            assert!(warning.contains(part), "{part}: {warning}");
        }
        let text = recovery_text(&seen(false, false));
        for part in [
            "1 → 2",
            "exchange-key/v3",
            "none",
            "nothing was changed",
            "raft id 4, learner",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_repeated_recovery_says_that_it_was_done() {
        assert!(recovery_text(&seen(true, false)).contains("done: start the node"));
        assert!(recovery_text(&seen(true, true)).contains("done before: start the node"));
    }
}
