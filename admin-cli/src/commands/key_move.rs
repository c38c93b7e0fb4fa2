//! `hsmctl key move`: the next version of a context in another slot; returns once it is active there.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{ListKeksResponse, MoveKeyRequest};

use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, would_be_refused};
use crate::output::{self, or_dash};

/// Arguments of `key move`.
#[derive(Debug, Args)]
pub(crate) struct Move {
    /// The context.
    context: String,
    /// The slot of its next versions.
    #[arg(long, value_name = "SLOT")]
    to: String,
    /// Under the same key a repeated command moves once and makes one version.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn relocate(session: &Session, args: Move) -> Result<()> {
    let client = session.client(CHANGE)?;
    let (context, to) = (&args.context, &args.to);
    if args.dry_run {
        preview::check_role(session, &client, preview::OPERATE).await?;
        let status = preview::check_leader(session, &client).await?;
        let keks = session.ask(&client, "list-kek", client.list_keks()).await?;
        let foreseen = foresee(context, to, &keks)?.not_checked(format!(
            "whether slot {to} exists and is open on every node: hsmctl slot status --slot {to}"
        ));
        return preview::note_members(foreseen, &status).print(session);
    }
    let key = idempotency_key(args.idempotency_key);
    let what = format!("key move {context} --to {to}");
    let request = MoveKeyRequest { slot: to.clone() };
    let answer = session
        .ask(&client, &what, client.move_key(context, &request, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    let done = &answer.body;
    output::print_change(session.format(), &answer, || {
        output::table(
            ["CONTEXT", "SLOT", "VERSION", "KEY ID", "BEFORE"],
            [[
                done.context.clone(),
                done.slot.clone(),
                done.version.to_string(),
                done.key_id.clone(),
                or_dash(done.previous_version),
            ]],
        )
    })
}

/// What a move would do, as far as the nodes' list of keys says.
fn foresee(context: &str, to: &str, keks: &ListKeksResponse) -> Result<Preview> {
    let Some(info) = preview::find(keks, context) else {
        let detail = format!("context {context} does not exist");
        return Err(would_be_refused(ErrorCode::NotFound, detail));
    };
    let active = info
        .versions
        .iter()
        .find(|version| Some(version.version) == info.active_version);
    let encrypts_there = active.is_none_or(|active| active.slot == to);
    if info.slot == to && encrypts_there {
        let detail = format!(
            "context {context} is in slot {to} already; for a new version there: hsmctl rotate {context}"
        );
        return Err(would_be_refused(ErrorCode::Conflict, detail));
    }
    let next = preview::next_version(info);
    if let Some(pending) = preview::pending_version(info) {
        return Ok(Preview::new(format!(
            "make version {next} of {context} in slot {to} once version {pending}, which is being rotated in, is \
             active or given up"
        )));
    }
    let before = match active {
        Some(active) => format!(
            "; version {} would only decrypt, in slot {}, once it is active",
            active.version, active.slot
        ),
        None => String::new(),
    };
    Ok(Preview::new(format!(
        "make version {next} of {context}, and those after it, in slot {to}{before}"
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::preview::tests::keks;
    use super::*;
    use crate::exit::Exit;

    fn would(context: &str, to: &str, keks: &ListKeksResponse) -> Result<String> {
        let preview = foresee(context, to, keks)?;
        let json = serde_json::to_value(&preview)?;
        Ok(json["would"].as_str().unwrap().to_owned())
    }

    #[test]
    fn a_dry_run_says_where_the_next_version_would_be_and_where_the_others_stay() {
        assert_eq!(
            would("exchange-key", "2fa", &keks()).unwrap(),
            "make version 4 of exchange-key, and those after it, in slot 2fa; version 3 would only decrypt, in slot \
             exchange, once it is active"
        );
        let without_a_key = would("order-key", "2fa", &keks()).unwrap();
        assert!(without_a_key.ends_with("in slot 2fa"), "{without_a_key}");
        let busy = would("2fa", "exchange", &keks()).unwrap();
        assert!(busy.contains("once version 1"), "{busy}");
    }

    #[test]
    fn a_dry_run_is_refused_as_the_move_would_be() {
        for (context, to) in [("no-such", "2fa"), ("exchange-key", "exchange")] {
            let error = would(context, to, &keks()).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Conflict, "{error}");
        }
        // Moved, and no version was made there yet: it goes on.
        let mut moved = keks();
        for info in &mut moved.contexts {
            info.slot = "2fa".to_owned();
        }
        let on = would("exchange-key", "2fa", &moved).unwrap();
        assert!(on.contains("in slot 2fa; version 3"), "{on}");
    }
}
