//! `--dry-run`: what a change would do, from what the nodes say now. Nothing is sent that changes anything. What would
//! be refused is a failure with the code a node would give; what only the change itself would find out is said.

use anyhow::Result;
use hsm_api::admin::{ClusterStatus, ContextInfo, KeyState, ListKeksResponse, NodeRole, WhoAmI};
use hsm_api::{Client, ErrorCode};
use serde::Serialize;

use super::Session;
use crate::exit::would_be_refused;
use crate::output;

/// The role that may do everything.
const ADMIN: &str = "admin";
/// Roles that may make keys.
pub(super) const OPERATE: &[&str] = &[ADMIN, "operator"];
/// Roles that may change the cluster and its slots.
pub(super) const ADMINISTER: &[&str] = &[ADMIN];

/// What would be done.
#[derive(Debug, Serialize)]
pub(super) struct Preview {
    /// Always true: nobody shall take this for the result.
    dry_run: bool,
    would: String,
    /// What cannot be known before.
    not_checked: Vec<String>,
}

impl Preview {
    /// `would` goes on from "would".
    pub(super) fn new(would: impl Into<String>) -> Self {
        Self {
            dry_run: true,
            would: would.into(),
            not_checked: Vec::new(),
        }
    }

    pub(super) fn not_checked(mut self, what: impl Into<String>) -> Self {
        self.not_checked.push(what.into());
        self
    }

    pub(super) fn print(&self, session: &Session) -> Result<()> {
        output::print(session.format(), self, || self.text())
    }

    fn text(&self) -> String {
        let mut text = format!("would {}\n", self.would);
        for what in &self.not_checked {
            text.push_str(&format!("not checked: {what}\n"));
        }
        text.push_str("dry run: nothing was changed\n");
        text
    }
}

/// Whether the caller has one of these roles.
pub(super) async fn check_role(session: &Session, client: &Client, roles: &[&str]) -> Result<()> {
    let answer = session.ask(client, "whoami", client.whoami()).await?;
    has_role(&answer.body, roles)
}

fn has_role(me: &WhoAmI, roles: &[&str]) -> Result<()> {
    if me.roles.iter().any(|role| roles.contains(&role.as_str())) {
        return Ok(());
    }
    let held = if me.roles.is_empty() {
        "no role".to_owned()
    } else {
        me.roles.join(", ")
    };
    Err(would_be_refused(
        ErrorCode::RoleRequired,
        format!("needs the role {}; {} has {held}", roles.join(" or "), me.cn),
    ))
}

/// The cluster as the node that answers sees it, if it could be changed now.
pub(super) async fn check_leader(session: &Session, client: &Client) -> Result<ClusterStatus> {
    let answer = session
        .ask(client, "cluster status", client.cluster_status())
        .await?;
    let status = answer.into_body();
    can_be_changed(&status)?;
    Ok(status)
}

fn can_be_changed(status: &ClusterStatus) -> Result<()> {
    let node = &status.node_id;
    if belongs_to_none(status) {
        let detail = format!("{node} belongs to no cluster yet");
        return Err(would_be_refused(ErrorCode::Uninitialised, detail));
    }
    if status.leader.is_none() {
        let detail = format!("{node} knows no leader: no majority of the cluster answers");
        return Err(would_be_refused(ErrorCode::NoQuorum, detail));
    }
    Ok(())
}

/// Whether the node that answered could still make or join a cluster.
pub(super) fn belongs_to_none(status: &ClusterStatus) -> bool {
    status.cluster_id.is_empty() || status.role == NodeRole::Uninitialised
}

/// What a new version meets on its way that the state says already.
pub(super) fn note_members(mut preview: Preview, status: &ClusterStatus) -> Preview {
    if !status.silent_voters.is_empty() {
        preview = preview.not_checked(format!(
            "whether {} stays silent: the version is used once every member has proven it or has been out of service \
             for cluster.fence_after_ms, and given up otherwise",
            status.silent_voters.join(", ")
        ));
    }
    preview
}

/// A context as the nodes list it.
pub(super) fn find<'a>(keks: &'a ListKeksResponse, context: &str) -> Option<&'a ContextInfo> {
    keks.contexts.iter().find(|info| info.context == context)
}

/// The number of a context's next version.
pub(super) fn next_version(info: &ContextInfo) -> u32 {
    let highest = info.versions.iter().map(|version| version.version).max();
    highest.unwrap_or_default().saturating_add(1)
}

/// The version that is being rotated in, if there is one: the next one waits for it.
pub(super) fn pending_version(info: &ContextInfo) -> Option<u32> {
    let pending = |version: &&hsm_api::admin::KeyVersionInfo| version.state == KeyState::Pending;
    info.versions.iter().find(pending).map(|version| version.version)
}

/// Whether a version goes by this label, or did; only one that was given up before it was used has given it back.
pub(super) fn label_taken(keks: &ListKeksResponse, label: &str) -> bool {
    let mut versions = keks.contexts.iter().flat_map(|info| &info.versions);
    versions.any(|version| version.state != KeyState::Abandoned && version.key_id == label)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;
    use crate::exit::Exit;

    /// `exchange-key` with an abandoned, a retired and an active version, `2fa` with a first one on its way, `order-key`
    /// without any.
    pub(in super::super) fn keks() -> ListKeksResponse {
        let version = |number: u32, label: &str, state: &str, acks: &[&str]| {
            json!({
                "version": number, "key_id": label, "key_uid": "00", "slot": "exchange", "state": state,
                "created_at": "2030-01-01T00:00:00Z", "acks": acks, "origin": "generated"
            })
        };
        serde_json::from_value(json!({"contexts": [
            {"context": "2fa", "slot": "2fa", "binding": "private", "active_version": null,
             "versions": [version(1, "kek-2fa-v1", "pending", &["hsm-node-1"])]},
            {"context": "exchange-key", "slot": "exchange", "binding": "shared", "active_version": 3,
             "versions": [
                version(1, "kek-exchange-key-v1", "abandoned", &[]),
                version(2, "kek-exchange-key-v2", "decrypt_only", &["hsm-node-1", "hsm-node-2"]),
                version(3, "kek-exchange-key-v3", "active", &["hsm-node-1"])
             ]},
            {"context": "order-key", "slot": "exchange", "binding": "shared", "active_version": null, "versions": []}
        ]}))
        .unwrap()
    }

    fn status(cluster: &str, role: &str, leader: bool) -> ClusterStatus {
        let leader = leader.then(|| json!({"raft_id": 1, "node_id": "hsm-node-1"}));
        serde_json::from_value(json!({
            "cluster_id": cluster, "cluster_name": "c", "epoch": 1, "node_id": "hsm-node-2", "raft_id": 2,
            "role": role, "term": 1, "leader": leader, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": null, "staleness_ms": 0, "ready": true, "slots": [],
            "failure_tolerance": 1, "voters": 3, "silent_voters": ["hsm-node-3"]
        }))
        .unwrap()
    }

    #[test]
    fn who_may_not_is_told_so_with_the_nodes_code() {
        let me = |roles: &[&str]| -> WhoAmI {
            serde_json::from_value(json!({"cn": "a", "ou": null, "roles": roles, "contexts": []})).unwrap()
        };
        has_role(&me(&["admin"]), OPERATE).unwrap();
        has_role(&me(&["auditor", "operator"]), OPERATE).unwrap();
        for roles in [&["operator"][..], &[]] {
            let error = has_role(&me(roles), ADMINISTER).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Refused);
            assert!(error.to_string().contains("role_required"), "{error}");
        }
    }

    #[test]
    fn without_a_cluster_or_a_leader_nothing_could_be_changed() {
        can_be_changed(&status("01", "follower", true)).unwrap();
        for (now, code) in [
            (status("", "uninitialised", false), "uninitialised"),
            (status("01", "candidate", false), "no_quorum"),
        ] {
            let error = can_be_changed(&now).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Unavailable);
            assert!(error.to_string().contains(code), "{error}");
        }
    }

    #[test]
    fn numbers_count_what_was_given_up_and_labels_do_not() {
        let keks = keks();
        let exchange = find(&keks, "exchange-key").unwrap();
        assert_eq!((next_version(exchange), pending_version(exchange)), (4, None));
        let two_factor = find(&keks, "2fa").unwrap();
        assert_eq!(
            (next_version(two_factor), pending_version(two_factor)),
            (2, Some(1))
        );
        assert_eq!(next_version(find(&keks, "order-key").unwrap()), 1);
        assert!(label_taken(&keks, "kek-exchange-key-v2") && label_taken(&keks, "kek-2fa-v1"));
        assert!(!label_taken(&keks, "kek-exchange-key-v1") && !label_taken(&keks, "other"));
        assert!(find(&keks, "no-such").is_none());
    }

    #[test]
    fn a_preview_says_that_it_is_one() {
        let preview = note_members(Preview::new("make a key"), &status("01", "follower", true));
        let text = preview.text();
        assert!(
            text.starts_with("would make a key\n") && text.ends_with("dry run: nothing was changed\n"),
            "{text}"
        );
        assert!(text.contains("not checked: whether hsm-node-3"), "{text}");
        assert_eq!(serde_json::to_value(&preview).unwrap()["dry_run"], true);
    }
}
