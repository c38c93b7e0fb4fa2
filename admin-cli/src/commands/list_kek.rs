//! `hsmctl list-kek`, with the flag it had in version 1.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{ContextInfo, KeyVersionInfo};

use super::key::held_by;
use super::{READ, Session};
use crate::output::{self, or_dash};

/// Arguments of `list-kek`.
#[derive(Debug, Args)]
pub(crate) struct ListKek {
    /// With ids, times and the nodes that have proven each version.
    #[arg(long)]
    verbose: bool,
}

pub(super) async fn list(session: &Session, args: &ListKek) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session.ask(&client, "list-kek", client.list_keks()).await?;
    let keks = &answer.body;
    output::print(session.format(), keks, || {
        let versions = || {
            keks.contexts
                .iter()
                .flat_map(|context| context.versions.iter().map(move |version| (context, version)))
        };
        if args.verbose {
            let header = [
                "CONTEXT",
                "SLOT",
                "BINDING",
                "VERSION",
                "KEY ID",
                "STATE",
                "KEY UID",
                "CREATED",
                "ACTIVATED",
                "RETIRED",
                "ORIGIN",
                "HELD BY",
                "PROVEN BY",
            ];
            output::table(header, versions().map(verbose_row))
        } else {
            let header = ["CONTEXT", "SLOT", "BINDING", "VERSION", "KEY ID", "STATE"];
            output::table(header, versions().map(row))
        }
    })
}

fn row((context, version): (&ContextInfo, &KeyVersionInfo)) -> [String; 6] {
    [
        context.context.clone(),
        version.slot.clone(),
        context.binding.to_string(),
        version.version.to_string(),
        version.key_id.clone(),
        version.state.to_string(),
    ]
}

fn verbose_row((context, version): (&ContextInfo, &KeyVersionInfo)) -> [String; 13] {
    let [name, slot, binding, number, key_id, state] = row((context, version));
    [
        name,
        slot,
        binding,
        number,
        key_id,
        state,
        version.key_uid.clone(),
        version.created_at.clone(),
        or_dash(version.activated_at.clone()),
        or_dash(version.retired_at.clone()),
        version.origin.to_string(),
        held_by(version),
        version.acks.join(","),
    ]
}
