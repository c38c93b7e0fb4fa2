//! `hsmctl slot unlock`: asks the node that has the slot.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{ClusterStatus, SlotState, UnlockSlotRequest};

use super::preview::{self, Preview};
use super::{CHANGE, Session};
use crate::exit::{repeatable_failed, would_be_refused};
use crate::output::{self, or_dash};

/// Arguments of `slot unlock`.
#[derive(Debug, Args)]
pub(crate) struct Unlock {
    /// The slot, as the node's configuration names it.
    #[arg(long, value_name = "SLOT")]
    slot: String,
    /// Try the PIN once although the token reports wrong PINs since the last right one.
    #[arg(long)]
    retry: bool,
    /// Say what state the slot is in, and do not touch it.
    #[arg(long)]
    dry_run: bool,
}

/// Asks the one node that is named: a slot is that node's alone.
pub(super) async fn unlock(session: &Session, args: &Unlock) -> Result<()> {
    let client = session.client_of_one(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        let status = session
            .ask(&client, "cluster status", client.cluster_status())
            .await?;
        return foresee(args, &status)?.print(session);
    }
    let request = UnlockSlotRequest { retry: args.retry };
    let what = format!("slot unlock {}", args.slot);
    let answer = session
        .ask(&client, &what, client.unlock_slot(&args.slot, &request))
        .await
        .map_err(repeatable_failed)?;
    let slot = &answer.body;
    output::print(session.format(), slot, || {
        output::pairs([
            ("slot", slot.slot.clone()),
            ("label", slot.label.clone()),
            ("state", slot.state.to_string()),
            ("reason", or_dash(slot.reason.clone())),
            ("missing keys", slot.missing_keys.to_string()),
        ])
    })
}

fn foresee(args: &Unlock, status: &ClusterStatus) -> Result<Preview> {
    let (name, node) = (&args.slot, &status.node_id);
    let Some(slot) = status.slots.iter().find(|slot| slot.slot == *name) else {
        let names: Vec<&str> = status.slots.iter().map(|slot| slot.slot.as_str()).collect();
        let detail = format!(
            "slot {name:?}: {node} has no such slot; it has {}",
            names.join(", ")
        );
        return Err(would_be_refused(ErrorCode::NotFound, detail));
    };
    if slot.state == SlotState::Ready {
        return Ok(Preview::new(format!(
            "change nothing: slot {name} of {node} is open"
        )));
    }
    let reason = or_dash(slot.reason.as_deref());
    let would = format!(
        "have {node} open slot {name}, which is {} now ({reason}), with the PIN it is configured with",
        slot.state
    );
    Ok(Preview::new(would).not_checked("the PIN, and whether the token takes another attempt"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_dry_run_says_what_the_slot_is_like() {
        let status: ClusterStatus = serde_json::from_value(serde_json::json!({
            "cluster_id": "01", "cluster_name": "c", "epoch": 1, "node_id": "hsm-node-1", "raft_id": 1,
            "role": "leader", "term": 1, "leader": null, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": 0, "staleness_ms": 0, "ready": true, "failure_tolerance": 0,
            "slots": [
                {"slot": "2fa", "label": "l", "state": "locked", "reason": "wrong PINs", "missing_keys": 0},
                {"slot": "exchange", "label": "l", "state": "ready", "missing_keys": 0}
            ]
        }))
        .unwrap();
        let foreseen = |slot: &str| {
            let args = Unlock {
                slot: slot.to_owned(),
                retry: false,
                dry_run: true,
            };
            foresee(&args, &status).map(|preview| serde_json::to_string(&preview).unwrap())
        };
        assert!(foreseen("2fa").unwrap().contains("locked now (wrong PINs)"));
        assert!(foreseen("exchange").unwrap().contains("change nothing"));
        let error = foreseen("3fa").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict);
        assert!(error.to_string().contains("it has 2fa, exchange"), "{error}");
    }
}
