//! `hsmctl key usage`: who still needs an old version?

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{Invocations, KeyUsage, KeyUsageResponse};

use super::{READ, Session};
use crate::exit::missing;
use crate::output::{self, or_dash};

/// Arguments of `key usage`.
#[derive(Debug, Args)]
pub(crate) struct Usage {
    /// Only this context's versions.
    context: Option<String>,
}

pub(super) async fn usage(session: &Session, args: &Usage) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session.ask(&client, "key usage", client.key_usage()).await?;
    let usage = only(answer.into_body(), args.context.as_deref())?;
    output::print(session.format(), &usage, || {
        let header = [
            "CONTEXT",
            "VERSION",
            "KEY ID",
            "STATE",
            "ENCRYPTED",
            "DECRYPTED",
            "LEASED",
            "LAST USED",
            "LAST USED BY",
        ];
        output::table(header, usage.versions.iter().map(row))
    })
}

fn only(mut usage: KeyUsageResponse, context: Option<&str>) -> Result<KeyUsageResponse> {
    let Some(context) = context else { return Ok(usage) };
    usage.versions.retain(|version| version.context == context);
    if usage.versions.is_empty() {
        return Err(missing(format!("{context}: there is no such context with a key")));
    }
    Ok(usage)
}

/// How much of what a version takes was given to the nodes.
pub(super) fn leased(invocations: Invocations) -> String {
    let Invocations { leased, limit } = invocations;
    let percent = leased.saturating_mul(100).checked_div(limit).unwrap_or(100);
    format!("{leased} of {limit} ({percent} %)")
}

fn row(usage: &KeyUsage) -> [String; 9] {
    let mut nodes: Vec<_> = usage.nodes.iter().collect();
    // RFC 3339 in UTC sorts by time, but for fractions of one second.
    nodes.sort_by(|a, b| b.last_used.cmp(&a.last_used));
    let nodes: Vec<String> = nodes
        .iter()
        .map(|node| format!("{} ({})", node.node_id, node.last_used))
        .collect();
    [
        usage.context.clone(),
        usage.version.to_string(),
        usage.key_id.clone(),
        usage.state.to_string(),
        usage.encryptions.to_string(),
        usage.decryptions.to_string(),
        or_dash(usage.invocations.map(leased)),
        or_dash(usage.last_used.clone()),
        or_dash(Some(nodes.join(", ")).filter(|nodes| !nodes.is_empty())),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn usage() -> KeyUsageResponse {
        let version = |context: &str, nodes: &[(&str, &str)]| {
            let nodes: Vec<_> = nodes
                .iter()
                .map(|(node, at)| serde_json::json!({"node_id": node, "last_used": at}))
                .collect();
            serde_json::json!({
                "context": context, "version": 1, "key_id": "k", "state": "decrypt_only", "encryptions": 5,
                "decryptions": 7, "nodes": nodes
            })
        };
        let used = [
            ("hsm-node-1", "2030-01-01T00:00:00Z"),
            ("hsm-node-2", "2030-01-02T00:00:00Z"),
        ];
        serde_json::from_value(
            serde_json::json!({"versions": [version("2fa", &[]), version("exchange-key", &used)]}),
        )
        .unwrap()
    }

    #[test]
    fn who_used_a_version_last_stands_first() {
        let rows: Vec<_> = usage().versions.iter().map(row).collect();
        assert_eq!((rows[0][7].as_str(), rows[0][8].as_str()), ("-", "-"));
        assert!(rows[1][8].starts_with("hsm-node-2 ("), "{:?}", rows[1]);
    }

    #[test]
    fn what_was_leased_stands_beside_its_limit() {
        let mut usage = usage();
        assert_eq!(row(&usage.versions[0])[6], "-", "an older node does not say");
        let invocations = |leased, limit| Some(Invocations { leased, limit });
        for (given, shown) in [
            (invocations(900, 2000), "900 of 2000 (45 %)"),
            (invocations(0, 0), "0 of 0 (100 %)"),
        ] {
            usage.versions[0].invocations = given;
            assert_eq!(row(&usage.versions[0])[6], shown);
        }
    }

    #[test]
    fn one_context_can_be_asked_about() {
        assert_eq!(only(usage(), Some("2fa")).unwrap().versions.len(), 1);
        assert_eq!(only(usage(), None).unwrap().versions.len(), 2);
        let error = only(usage(), Some("none")).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict);
    }
}
