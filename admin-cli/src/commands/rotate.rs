//! `hsmctl rotate` and `rotation-status`.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::RotationStatus;

use super::{CHANGE, READ, Session, idempotency_key};
use crate::exit::change_failed;
use crate::output::{self, or_dash, patiently};

/// Arguments of `rotate`.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    /// The context whose key gets a new version.
    context: String,
    /// Under the same key a repeated command makes one version.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

pub(super) async fn rotate(session: &Session, args: Rotate) -> Result<()> {
    let client = session.client(CHANGE)?;
    let key = idempotency_key(args.idempotency_key);
    let waiting = format!("{}: every node imports and proves the new key", args.context);
    let answer = patiently(&waiting, client.rotate(&args.context, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    let done = &answer.body;
    output::print(session.format(), done, || {
        output::table(
            ["CONTEXT", "VERSION", "KEY ID", "BEFORE"],
            [[
                done.context.clone(),
                done.version.to_string(),
                done.key_id.clone(),
                done.previous_version.to_string(),
            ]],
        )
    })
}

pub(super) async fn status(session: &Session) -> Result<()> {
    let answer = session.client(READ)?.rotation_status().await?;
    output::print(session.format(), &answer.body, || {
        let header = [
            "CONTEXT",
            "ACTIVE",
            "SINCE",
            "PENDING",
            "PROVEN BY",
            "MISSING",
            "EVERY",
            "NEXT ROTATION",
        ];
        output::table(header, answer.contexts.iter().map(row))
    })
}

fn row(status: &RotationStatus) -> [String; 8] {
    [
        status.context.clone(),
        or_dash(status.active_version),
        or_dash(status.active_since.clone()),
        or_dash(status.pending_version),
        status.acks.join(","),
        or_dash(Some(status.missing.join(",")).filter(|missing| !missing.is_empty())),
        format!("{} days", status.rotation_interval_days),
        or_dash(status.next_rotation_due.clone()),
    ]
}
