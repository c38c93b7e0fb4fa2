//! `hsmctl update-checksums`. Version 1 wrote hashes of labels into its metadata and called them checksums. Here a node
//! proves each key with its check record before it acknowledges it, and the cluster remembers who has: this shows it.
//! Nothing is changed, with or without `--dry-run`.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{KeyOrigin, KeyState, ListKeksResponse, Member};
use serde::Serialize;

use super::{READ, Session};
use crate::output::{self, Format, note, or_dash};

/// Arguments of `update-checksums`.
#[derive(Debug, Args)]
pub(crate) struct UpdateChecksums {
    /// Accepted, as version 1 had it: there is nothing to update either way.
    #[arg(long)]
    dry_run: bool,
}

/// One key version that nodes are to hold.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Proof {
    context: String,
    version: u32,
    key_id: String,
    state: KeyState,
    proven: bool,
    proven_by: Vec<String>,
    missing: Vec<String>,
}

/// Succeeds whatever it finds, as version 1 did: `missing` says what is not as it should be.
pub(super) async fn show(session: &Session, args: &UpdateChecksums) -> Result<()> {
    let client = session.client(READ)?;
    let keks = session
        .ask(&client, "update-checksums", client.list_keks())
        .await?;
    let members = session.ask(&client, "update-checksums", client.members()).await?;
    let proofs = proofs(&keks, &members.members);
    if session.format() == Format::Table {
        let asked = if args.dry_run { "--dry-run: " } else { "" };
        note(&format!(
            "{asked}nothing is updated: nodes prove keys with check records, not with checksums"
        ));
    }
    output::print(session.format(), &proofs, || {
        let header = ["CONTEXT", "VERSION", "KEY ID", "STATE", "PROVEN BY", "MISSING"];
        output::table(header, proofs.iter().map(row))
    })
}

fn row(proof: &Proof) -> [String; 6] {
    let names = |names: &[String]| or_dash(Some(names.join(",")).filter(|names| !names.is_empty()));
    [
        proof.context.clone(),
        proof.version.to_string(),
        proof.key_id.clone(),
        proof.state.to_string(),
        names(&proof.proven_by),
        names(&proof.missing),
    ]
}

/// Of every version that is to lie in tokens, who has proven it and who has not.
fn proofs(keks: &ListKeksResponse, members: &[Member]) -> Vec<Proof> {
    let mut proofs = Vec::new();
    for info in &keks.contexts {
        let held = info.versions.iter().filter(|version| is_held(version.state));
        proofs.extend(held.map(|version| {
            let missing: Vec<String> = members
                .iter()
                .map(|member| member.node_id.clone())
                .filter(|name| !version.acks.contains(name))
                // What version 1 made is nowhere but where it was found.
                .filter(|name| version.origin != KeyOrigin::Adopted || version.holders.contains(name))
                .collect();
            Proof {
                context: info.context.clone(),
                version: version.version,
                key_id: version.key_id.clone(),
                state: version.state,
                proven: missing.is_empty(),
                proven_by: version.acks.clone(),
                missing,
            }
        }));
    }
    proofs
}

/// A version that is over, or on its way out, need not be anywhere.
fn is_held(state: KeyState) -> bool {
    !matches!(
        state,
        KeyState::Destroying | KeyState::Destroyed | KeyState::Abandoned
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::preview::tests::keks;
    use super::*;

    fn member(name: &str) -> Member {
        serde_json::from_value(serde_json::json!({
            "node_id": name, "raft_id": 1, "role": "voter", "api_address": "a:1", "cluster_address": "a:2",
            "is_leader": false, "slots": [], "joined_at": "2030-01-01T00:00:00Z"
        }))
        .unwrap()
    }

    #[test]
    fn who_has_not_proven_a_key_is_named() {
        let proofs = proofs(&keks(), &[member("hsm-node-1"), member("hsm-node-2")]);
        let seen: Vec<(&str, bool, String)> = proofs
            .iter()
            .map(|proof| (proof.key_id.as_str(), proof.proven, proof.missing.join(",")))
            .collect();
        assert_eq!(
            seen,
            [
                ("kek-2fa-v1", false, "hsm-node-2".to_owned()),
                ("kek-exchange-key-v2", true, String::new()),
                ("kek-exchange-key-v3", false, "hsm-node-2".to_owned()),
            ]
        );
        assert_eq!(row(&proofs[1])[5], "-");
    }
}
