//! `hsmctl cluster transfer-leader`: another node leads, and nobody stops.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{ClusterStatus, TransferLeaderRequest};

use super::preview::{self, Preview};
use super::{CHANGE, Session};
use crate::exit::{repeatable_failed, would_be_refused};
use crate::output;

/// Arguments of `cluster transfer-leader`.
#[derive(Debug, Args)]
pub(crate) struct TransferLeader {
    /// The voter that shall lead; the one that is best if none is named.
    #[arg(value_name = "NODE_ID")]
    node: Option<String>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn transfer(session: &Session, args: TransferLeader) -> Result<()> {
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
    }
    // Whoever leads now is to be relieved: a repeat that finds another one leading moves nothing more.
    let status = preview::check_leader(session, &client).await?;
    if args.dry_run {
        return foresee(&args, &status)?.print(session);
    }
    let request = TransferLeaderRequest {
        from: status.leader.map(|leader| leader.raft_id),
        to: args.node,
    };
    let answer = session
        .ask(
            &client,
            "cluster transfer-leader",
            client.transfer_leader(&request),
        )
        .await
        .map_err(repeatable_failed)?;
    let led = &answer.body;
    output::print_change(session.format(), &answer, || {
        output::pairs([
            ("leader", format!("{} (raft id {})", led.leader, led.raft_id)),
            ("before", led.before.clone()),
        ])
    })
}

fn foresee(args: &TransferLeader, status: &ClusterStatus) -> Result<Preview> {
    let leader = status.leader.as_ref().map(|leader| leader.node_id.as_str());
    let now = leader.unwrap_or("nobody");
    if status.voters == 1 {
        let detail = format!("{now} is the only voter: there is nobody to hand over to");
        return Err(would_be_refused(ErrorCode::Conflict, detail));
    }
    let would = match args.node.as_deref() {
        Some(node) if Some(node) == leader => format!("change nothing: {node} leads already"),
        Some(node) => format!("have {node} lead in the place of {now}"),
        None => format!("have another voter lead in the place of {now}"),
    };
    Ok(Preview::new(would).not_checked("whether that voter has the whole log and is elected in time"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn status(voters: u32) -> ClusterStatus {
        serde_json::from_value(serde_json::json!({
            "cluster_id": "01", "cluster_name": "c", "epoch": 1, "node_id": "n1", "raft_id": 1, "role": "leader",
            "term": 1, "leader": {"raft_id": 1, "node_id": "n1"}, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": 0, "staleness_ms": 0, "ready": true, "slots": [],
            "failure_tolerance": 1, "voters": voters
        }))
        .unwrap()
    }

    fn would(node: Option<&str>, voters: u32) -> Result<String> {
        let args = TransferLeader {
            node: node.map(str::to_owned),
            dry_run: true,
        };
        let json = serde_json::to_value(foresee(&args, &status(voters))?)?;
        Ok(json["would"].as_str().unwrap().to_owned())
    }

    #[test]
    fn a_dry_run_says_who_would_lead() {
        assert_eq!(would(Some("n2"), 3).unwrap(), "have n2 lead in the place of n1");
        assert!(would(None, 3).unwrap().contains("another voter"));
        assert!(would(Some("n1"), 3).unwrap().contains("leads already"));
        assert_eq!(Exit::of(&would(None, 1).unwrap_err()), Exit::Conflict);
    }
}
