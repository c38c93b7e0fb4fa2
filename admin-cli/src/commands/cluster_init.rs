//! `hsmctl cluster init`: the node that is asked founds a cluster of its own.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{ClusterStatus, SlotState};

use super::preview::{self, Preview};
use super::{MEMBERSHIP, Session};
use crate::exit::{repeatable_failed, would_be_refused};
use crate::output::{self, or_dash};

/// Arguments of `cluster init`.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Say whether the node could, and make nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn init(session: &Session, args: &Init) -> Result<()> {
    let client = session.client_of_one(MEMBERSHIP)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        let status = session
            .ask(&client, "cluster status", client.cluster_status())
            .await?;
        return foresee(&status)?.print(session);
    }
    let answer = session
        .ask(&client, "cluster init", client.cluster_init())
        .await
        .map_err(repeatable_failed)?;
    let made = &answer.body;
    output::print(session.format(), made, || {
        output::pairs([
            ("cluster", made.cluster_id.clone()),
            ("epoch", made.epoch.to_string()),
            ("raft id", made.raft_id.to_string()),
        ])
    })
}

fn foresee(status: &ClusterStatus) -> Result<Preview> {
    let (node, cluster) = (&status.node_id, &status.cluster_name);
    if !preview::belongs_to_none(status) {
        let detail = format!("{node} belongs to the cluster {cluster} already");
        return Err(would_be_refused(ErrorCode::AlreadyInitialised, detail));
    }
    let mut preview = Preview::new(format!(
        "make the cluster {cluster} of {node} alone, with access control, roles and revocations from its configuration"
    ));
    for slot in status.slots.iter().filter(|slot| slot.state != SlotState::Ready) {
        preview = preview.not_checked(format!(
            "slot {}, which is {} now: {}",
            slot.slot,
            slot.state,
            or_dash(slot.reason.as_deref())
        ));
    }
    Ok(preview)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn status(cluster: &str, role: &str) -> ClusterStatus {
        serde_json::from_value(serde_json::json!({
            "cluster_id": cluster, "cluster_name": "playground", "epoch": 0, "node_id": "hsm-node-1", "raft_id": 0,
            "role": role, "term": 0, "leader": null, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": null, "staleness_ms": null, "ready": false, "slots": [],
            "failure_tolerance": 0
        }))
        .unwrap()
    }

    #[test]
    fn a_second_cluster_would_be_refused() {
        let preview = serde_json::to_value(foresee(&status("", "uninitialised")).unwrap()).unwrap();
        let would = preview["would"].as_str().unwrap();
        assert!(
            would.starts_with("make the cluster playground of hsm-node-1"),
            "{would}"
        );
        let error = foresee(&status("01", "leader")).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict, "{error}");
    }
}
