//! `hsmctl cluster`: status and members; what changes a cluster has a file for each command.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use hsm_api::admin::{ClusterStatus, KnownToRemoved, Member, MembersResponse, NodeRole};
use hsm_api::client::Retry;
use serde::Serialize;

use super::{
    READ, Session, cluster_init, cluster_leader, cluster_rekey, cluster_remove, cluster_token, join, rotate,
};
use crate::output::{self, or_dash};

/// The cluster and its members.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Make a cluster of one node, seeded by that node's configuration.
    Init(cluster_init::Init),
    /// Make a one-time token with which a node joins.
    Token(cluster_token::Token),
    /// Make the node at --endpoint join a cluster; returns once it votes. Shows the public key of each of its slots
    /// first, and asks whether they are the node's.
    Join(join::Join),
    /// Take a node out of the cluster for good, and replace the transport keys that it had, which rotates what it held.
    Remove(cluster_remove::Remove),
    /// Put a node in another's place, in one change of the membership: the new one joins, and the old one goes in the
    /// moment in which the new one votes. Then replace the transport keys that the old one had, which rotates what it held.
    Replace(cluster_remove::Replace),
    /// Make new versions of contexts' keys, as `hsmctl rotate` does.
    Rotate(rotate::Rotate),
    /// Have another node lead.
    TransferLeader(cluster_leader::TransferLeader),
    /// Show the cluster as a node sees it.
    Status(Status),
    /// List the members, and the nodes that were removed.
    Members,
    /// Replace a transport key or the replication key, in two phases.
    #[command(subcommand)]
    Rekey(cluster_rekey::RekeyCommand),
}

/// Arguments of `cluster status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Ask every endpoint, one line each.
    #[arg(long)]
    all: bool,
}

pub(super) async fn run(session: &Session, command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Init(args) => cluster_init::init(session, &args).await,
        ClusterCommand::Token(args) => cluster_token::token(session, args).await,
        ClusterCommand::Join(args) => join::join(session, args).await,
        ClusterCommand::Remove(args) => cluster_remove::remove(session, args).await,
        ClusterCommand::Replace(args) => cluster_remove::replace(session, args).await,
        ClusterCommand::Rotate(args) => rotate::rotate(session, args).await,
        ClusterCommand::TransferLeader(args) => cluster_leader::transfer(session, args).await,
        ClusterCommand::Status(args) if args.all => status_of_all(session).await,
        ClusterCommand::Status(_) => status(session).await,
        ClusterCommand::Members => members(session).await,
        ClusterCommand::Rekey(command) => cluster_rekey::run(session, command).await,
    }
}

async fn status(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session
        .ask(&client, "cluster status", client.cluster_status())
        .await?;
    let status = &answer.body;
    output::print(session.format(), status, || status_text(status))
}

fn status_text(status: &ClusterStatus) -> String {
    let millis = |value: Option<u64>| or_dash(value.map(|ms| format!("{ms} ms")));
    let mut text = output::pairs([
        (
            "cluster",
            format!("{} ({})", status.cluster_name, or_dash(known(&status.cluster_id))),
        ),
        ("epoch", status.epoch.to_string()),
        ("node", format!("{} (raft id {})", status.node_id, status.raft_id)),
        ("role", status.role.to_string()),
        ("term", status.term.to_string()),
        (
            "leader",
            or_dash(status.leader.as_ref().map(|leader| leader.node_id.clone())),
        ),
        (
            "log",
            format!(
                "last {}, committed {}, applied {}",
                status.last_log_index, status.committed_index, status.applied_index
            ),
        ),
        ("quorum ack age", millis(status.quorum_ack_age_ms)),
        ("staleness", millis(status.staleness_ms)),
        ("failures tolerated", tolerance(status)),
        ("ready", if status.ready { "yes" } else { "no" }.to_owned()),
    ]);
    text.push_str(&known_to_removed(status.known_to_removed));
    for reason in &status.not_ready {
        text.push_str(&format!("  not ready: {}: {}\n", reason.code, reason.detail));
    }
    let slots = status.slots.iter().map(|slot| {
        [
            slot.slot.clone(),
            slot.label.clone(),
            slot.state.to_string(),
            slot.missing_keys.to_string(),
            slot.reason.clone().unwrap_or_default(),
        ]
    });
    text.push('\n');
    text.push_str(&output::table(
        ["SLOT", "LABEL", "STATE", "MISSING", "REASON"],
        slots,
    ));
    text
}

/// How many more failures are survived, and who has failed already.
fn tolerance(status: &ClusterStatus) -> String {
    let tolerated = status.failure_tolerance;
    if status.voters == 0 {
        return tolerated.to_string();
    }
    let silent = &status.silent_voters;
    let heard = usize::try_from(status.voters).map_or(0, |voters| voters.saturating_sub(silent.len()));
    let mut text = format!("{tolerated} ({heard} of {} voters heard", status.voters);
    if status.majority > 0 {
        text.push_str(&format!(", {} are a majority", status.majority));
    }
    if !silent.is_empty() {
        text.push_str("; silent: ");
        text.push_str(&silent.join(", "));
    }
    if !status.behind_voters.is_empty() {
        text.push_str("; behind: ");
        text.push_str(&status.behind_voters.join(", "));
    }
    if status.role != NodeRole::Leader {
        text.push_str("; who is behind the leader knows");
    }
    text.push(')');
    text
}

/// What is to be replaced because removed nodes know it; nothing is said of nothing.
fn known_to_removed(known: KnownToRemoved) -> String {
    let mut text = String::new();
    let mut line = |line: String| text.push_str(&format!("  known to removed nodes: {line}\n"));
    if known.versions > 0 {
        let (versions, see) = (known.versions, "hsmctl cluster members");
        line(format!("the active versions of {versions} contexts ({see})"));
    }
    let see = "hsmctl cluster rekey status";
    if known.transport_keys > 0 {
        let keys = known.transport_keys;
        line(format!("the transport keys of {keys} slots ({see})"));
    }
    if known.replication_key {
        line(format!("the replication key ({see})"));
    }
    text
}

fn known(id: &str) -> Option<&str> {
    Some(id).filter(|id| !id.is_empty())
}

/// What one endpoint said.
#[derive(Serialize)]
struct Seen {
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<ClusterStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn status_of_all(session: &Session) -> Result<()> {
    // One attempt each: a dead node is an answer here.
    let client = session
        .client(READ)?
        .with_retry(Retry::Until(Duration::from_secs(2)));
    let endpoints: Vec<String> = client.endpoints().map(str::to_owned).collect();
    let mut seen = Vec::with_capacity(endpoints.len());
    for endpoint in endpoints {
        let one = client.on(&endpoint)?;
        let answer = session.ask(&one, "cluster status", one.cluster_status()).await;
        let (status, error) = match answer {
            Ok(answer) => (Some(answer.into_body()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        seen.push(Seen {
            endpoint,
            status,
            error,
        });
    }
    output::print(session.format(), &seen, || {
        let header = [
            "ENDPOINT", "NODE", "ROLE", "TERM", "LEADER", "LAST", "APPLIED", "STALE", "READY",
        ];
        output::table(header, seen.iter().map(row_of_one))
    })
}

fn row_of_one(seen: &Seen) -> [String; 9] {
    let Some(status) = &seen.status else {
        let mut row: [String; 9] = std::array::from_fn(|_| "-".to_owned());
        row[0].clone_from(&seen.endpoint);
        row[2] = "no answer".to_owned();
        return row;
    };
    [
        seen.endpoint.clone(),
        status.node_id.clone(),
        status.role.to_string(),
        status.term.to_string(),
        or_dash(status.leader.as_ref().map(|leader| leader.node_id.clone())),
        status.last_log_index.to_string(),
        status.applied_index.to_string(),
        or_dash(status.staleness_ms.map(|ms| format!("{ms} ms"))),
        if status.ready { "yes" } else { "no" }.to_owned(),
    ]
}

async fn members(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session.ask(&client, "cluster members", client.members()).await?;
    output::print(session.format(), &answer.body, || {
        let header = [
            "NODE",
            "RAFT ID",
            "ROLE",
            "STATE",
            "LEADER",
            "API",
            "CLUSTER",
            "LAG",
            "LAST SEEN",
            "SLOTS",
            "JOINED",
        ];
        let table = output::table(header, answer.members.iter().map(member_row));
        table + &held_back(&answer.members) + &leaving(&answer.members) + &removed(&answer.body)
    })
}

/// Who is to leave, below the table.
fn leaving(members: &[Member]) -> String {
    let one = |member: &Member| {
        let leaving = member.leaving.as_ref()?;
        let (name, since) = (&member.node_id, &leaving.since);
        Some(match &leaving.successor {
            Some(successor) => format!("\n{name} leaves once {successor} can take its place (asked {since})"),
            None => format!("\n{name} leaves (asked {since})"),
        })
    };
    members.iter().filter_map(one).collect()
}

/// Who was removed, and what is to be done about that.
fn removed(members: &MembersResponse) -> String {
    if members.removed.is_empty() {
        return String::new();
    }
    let rows = members.removed.iter().map(|removed| {
        [
            removed.node_id.clone(),
            removed.raft_id.to_string(),
            removed.removed_at.clone(),
            if removed.held.is_empty() {
                "-".to_owned()
            } else {
                removed.held.join(" ")
            },
        ]
    });
    let header = ["REMOVED", "RAFT ID", "AT", "STILL TO ROTATE"];
    format!("\n{}", output::table(header, rows))
}

/// What keeps learners from being let in, below the table: a line for each reason.
fn held_back(members: &[Member]) -> String {
    let of = |member: &Member| {
        let name = member.node_id.clone();
        let reasons = member.held_back.clone().into_iter();
        reasons.map(move |reason| format!("\n{name} is held back: {reason}"))
    };
    members.iter().flat_map(of).collect()
}

fn member_row(member: &Member) -> [String; 11] {
    let slots: Vec<String> = member
        .slots
        .iter()
        .map(|slot| format!("{}:{}", slot.slot, slot.state))
        .collect();
    [
        member.node_id.clone(),
        member.raft_id.to_string(),
        member.role.to_string(),
        or_dash(member.state),
        if member.is_leader { "yes" } else { "" }.to_owned(),
        member.api_address.clone(),
        member.cluster_address.clone(),
        or_dash(member.lag),
        or_dash(member.last_seen_ms.map(|ms| format!("{ms} ms"))),
        slots.join(" "),
        member.joined_at.clone(),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_cluster_is_shown_as_such() {
        let status: ClusterStatus = serde_json::from_value(serde_json::json!({
            "cluster_id": "", "cluster_name": "playground", "epoch": 0, "node_id": "hsm-node-1", "raft_id": 0,
            "role": "uninitialised", "term": 0, "leader": null, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": null, "staleness_ms": null, "ready": false,
            "not_ready": [{"code": "uninitialised", "detail": "run cluster init or join"}],
            "slots": [{"slot": "2fa", "label": "slot-2fa", "state": "ready", "missing_keys": 0}],
            "failure_tolerance": 0
        }))
        .unwrap();
        let text = status_text(&status);
        assert!(
            text.contains("playground (-)") && text.contains("not ready: uninitialised"),
            "{text}"
        );
        assert!(text.contains("slot-2fa"), "{text}");
    }

    fn of_five(silent: &[&str]) -> ClusterStatus {
        serde_json::from_value(serde_json::json!({
            "cluster_id": "01", "cluster_name": "c", "epoch": 1, "node_id": "hsm-node-1", "raft_id": 1,
            "role": "leader", "term": 1, "leader": null, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": 0, "staleness_ms": 0, "ready": true, "slots": [],
            "failure_tolerance": 2 - silent.len().min(2), "voters": 5, "silent_voters": silent
        }))
        .unwrap()
    }

    #[test]
    fn what_has_failed_already_is_named_where_failures_are_counted() {
        assert_eq!(tolerance(&of_five(&[])), "2 (5 of 5 voters heard)");
        assert_eq!(
            tolerance(&of_five(&["hsm-node-4", "hsm-node-5"])),
            "0 (3 of 5 voters heard; silent: hsm-node-4, hsm-node-5)"
        );
        let with_majority = ClusterStatus {
            majority: 3,
            ..of_five(&[])
        };
        assert_eq!(
            tolerance(&with_majority),
            "2 (5 of 5 voters heard, 3 are a majority)"
        );
        let loads = ClusterStatus {
            failure_tolerance: 1,
            behind_voters: vec!["hsm-node-3".to_owned()],
            ..of_five(&[])
        };
        assert_eq!(tolerance(&loads), "1 (5 of 5 voters heard; behind: hsm-node-3)");
        let follows = ClusterStatus {
            role: NodeRole::Follower,
            ..of_five(&[])
        };
        assert_eq!(
            tolerance(&follows),
            "2 (5 of 5 voters heard; who is behind the leader knows)"
        );
        // An older node says the number only.
        let older = ClusterStatus {
            voters: 0,
            ..of_five(&[])
        };
        assert_eq!(tolerance(&older), "2");
    }

    #[test]
    fn what_removed_nodes_know_stands_in_the_status_until_it_is_replaced() {
        assert!(!status_text(&of_five(&[])).contains("removed"));
        let status = ClusterStatus {
            known_to_removed: KnownToRemoved {
                versions: 2,
                transport_keys: 1,
                replication_key: true,
            },
            ..of_five(&[])
        };
        let text = status_text(&status);
        for line in [
            "  known to removed nodes: the active versions of 2 contexts (hsmctl cluster members)\n",
            "  known to removed nodes: the transport keys of 1 slots (hsmctl cluster rekey status)\n",
            "  known to removed nodes: the replication key (hsmctl cluster rekey status)\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_keeps_a_learner_from_being_let_in_stands_below_the_table() {
        let member = |name: &str, reasons: &[&str]| -> Member {
            serde_json::from_value(serde_json::json!({
                "node_id": name, "raft_id": 4, "role": "learner", "api_address": "a:1", "cluster_address": "a:2",
                "is_leader": false, "joined_at": "2030-01-01T00:00:00Z", "slots": [], "held_back": reasons
            }))
            .unwrap()
        };
        assert_eq!(held_back(&[member("n1", &[])]), "");
        assert_eq!(
            held_back(&[member("n1", &[]), member("n2", &["a: x", "b: y"])]),
            "\nn2 is held back: a: x\nn2 is held back: b: y"
        );
    }

    #[test]
    fn who_leaves_and_who_was_removed_stand_below_the_table() {
        let answer: MembersResponse = serde_json::from_value(serde_json::json!({
            "members": [{
                "node_id": "n2", "raft_id": 2, "role": "voter", "api_address": "a:1", "cluster_address": "a:2",
                "is_leader": false, "joined_at": "2030-01-01T00:00:00Z", "slots": [],
                "leaving": {"since": "2030-01-02T00:00:00Z", "successor": "n4"}
            }],
            "removed": [
                {"node_id": "n3", "raft_id": 7, "removed_at": "2030-01-03T00:00:00Z", "held": ["a", "b"]},
                {"node_id": "n3", "raft_id": 9, "removed_at": "2030-01-04T00:00:00Z"}
            ]
        }))
        .unwrap();
        let text = leaving(&answer.members);
        assert_eq!(
            text,
            "\nn2 leaves once n4 can take its place (asked 2030-01-02T00:00:00Z)"
        );
        let text = removed(&answer);
        assert!(text.contains("STILL TO ROTATE") && text.contains("a b"), "{text}");
        assert_eq!(
            text.lines().filter(|line| line.starts_with("n3")).count(),
            2,
            "{text}"
        );
        let none = MembersResponse {
            members: answer.members,
            removed: vec![],
        };
        assert_eq!(removed(&none), "");
    }

    #[test]
    fn a_silent_member_is_listed_as_such() {
        let member: Member = serde_json::from_value(serde_json::json!({
            "node_id": "hsm-node-4", "raft_id": 4, "role": "voter", "state": "silent", "api_address": "a:1",
            "cluster_address": "a:2", "is_leader": false, "joined_at": "2030-01-01T00:00:00Z",
            "slots": [{"slot": "2fa", "state": "silent"}]
        }))
        .unwrap();
        let row = member_row(&member);
        assert_eq!((row[3].as_str(), row[9].as_str()), ("silent", "2fa:silent"));
    }
}
