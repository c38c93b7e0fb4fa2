//! `hsmctl slot status`: every named node is asked, because a slot is its node's alone.

use anyhow::Result;
use clap::Args;
use hsm_api::ClientError;
use hsm_api::admin::{ClusterStatus, SlotState, SlotStatus};
use serde::Serialize;

use super::{READ, Session};
use crate::output::{self, note, or_dash};

/// Arguments of `slot status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Only this slot.
    #[arg(long, value_name = "SLOT")]
    slot: Option<String>,
}

/// A slot of one node.
#[derive(Debug, Serialize)]
struct Line {
    node_id: String,
    #[serde(flatten)]
    slot: SlotStatus,
}

/// Prints what answered, then fails with the first node that did not: the list is not whole without it.
pub(super) async fn status(session: &Session, args: &Status) -> Result<()> {
    let client = session.client(READ)?;
    let mut lines = Vec::new();
    let mut failure: Option<ClientError> = None;
    for endpoint in client.endpoints() {
        let one = client.on(endpoint)?;
        match session.ask(&one, "slot status", one.cluster_status()).await {
            Ok(answer) => lines.extend(lines_of(answer.into_body(), args)),
            Err(error) => {
                note(&format!("{endpoint}: {error}"));
                failure.get_or_insert(error);
            }
        }
    }
    if !lines.is_empty() || failure.is_none() {
        output::print(session.format(), &lines, || {
            let header = ["NODE", "SLOT", "LABEL", "STATE", "MISSING KEYS", "REASON"];
            output::table(header, lines.iter().map(row))
        })?;
    }
    failure.map_or(Ok(()), |error| Err(error.into()))
}

fn lines_of(status: ClusterStatus, args: &Status) -> impl Iterator<Item = Line> {
    let ClusterStatus { node_id, slots, .. } = status;
    let wanted = args.slot.clone();
    let asked_for = move |slot: &SlotStatus| wanted.as_ref().is_none_or(|wanted| slot.slot == *wanted);
    slots.into_iter().filter(asked_for).map(move |slot| Line {
        node_id: node_id.clone(),
        slot,
    })
}

fn row(line: &Line) -> [String; 6] {
    let Line { node_id, slot } = line;
    let state = match slot.state {
        // The node says why only once nothing is left to try.
        SlotState::Ready if slot.missing_keys > 0 && slot.reason.is_some() => {
            format!("{}, keys missing", slot.state)
        }
        SlotState::Ready if slot.missing_keys > 0 => format!("{}, importing", slot.state),
        _ => slot.state.to_string(),
    };
    [
        node_id.clone(),
        slot.slot.clone(),
        slot.label.clone(),
        state,
        slot.missing_keys.to_string(),
        or_dash(slot.reason.clone()),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn slot(name: &str, state: &str, missing_keys: u32) -> SlotStatus {
        serde_json::from_value(serde_json::json!({
            "slot": name, "label": format!("slot-{name}"), "state": state, "missing_keys": missing_keys,
        }))
        .unwrap()
    }

    #[test]
    fn a_slot_that_lacks_keys_is_not_called_ready_and_no_more() {
        let shown = |state, missing| {
            row(&Line {
                node_id: "n1".to_owned(),
                slot: slot("a", state, missing),
            })
        };
        assert_eq!(shown("ready", 0)[3], "ready");
        assert_eq!(shown("ready", 2)[3..5], ["ready, importing", "2"]);
        assert_eq!(shown("failed", 2)[3], "failed");
        let mut stuck = slot("a", "ready", 2);
        stuck.reason = Some("nothing is left to try".to_owned());
        let line = Line {
            node_id: "n1".to_owned(),
            slot: stuck,
        };
        assert_eq!(
            row(&line)[3..],
            ["ready, keys missing", "2", "nothing is left to try"]
        );
    }
}
