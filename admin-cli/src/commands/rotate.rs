//! `hsmctl rotate`, and `hsmctl cluster rotate`, which is the same: returns once the new version is active. Of several
//! contexts see [`rotate_each`].

use anyhow::Result;
use clap::Args;
use hsm_api::admin::ListKeksResponse;
use hsm_api::{Client, ErrorCode};

use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key, rotate_each};
use crate::exit::{change_failed, would_be_refused};
use crate::output;

/// Arguments of `rotate` and `cluster rotate`.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    #[command(flatten)]
    which: Which,
    /// Under the same key a repeated command makes one version of each context.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be made, and make nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What is rotated: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The context whose key gets a new version.
    context: Option<String>,
    /// Every context that has a key, one after the other; one that is refused does not keep the others.
    #[arg(long)]
    all: bool,
    /// Every context whose versions are made in this slot, in the same way.
    #[arg(long, value_name = "SLOT")]
    slot: Option<String>,
}

pub(super) async fn rotate(session: &Session, args: Rotate) -> Result<()> {
    let client = session.client(CHANGE)?;
    if args.dry_run {
        return dry_run(session, &client, &args.which).await;
    }
    let key = idempotency_key(args.idempotency_key);
    match args.which.context {
        Some(context) => one(session, &client, &context, &key).await,
        None => rotate_each::rotate(session, &client, args.which.slot.as_deref(), &key).await,
    }
}

async fn one(session: &Session, client: &Client, context: &str, key: &str) -> Result<()> {
    let what = format!("rotate {context}");
    let answer = session
        .ask(client, &what, client.rotate(context, Some(key)))
        .await
        .map_err(|error| change_failed(error, key))?;
    let done = &answer.body;
    output::print_change(session.format(), &answer, || {
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

async fn dry_run(session: &Session, client: &Client, which: &Which) -> Result<()> {
    preview::check_role(session, client, preview::OPERATE).await?;
    let status = preview::check_leader(session, client).await?;
    let keks = session.ask(client, "list-kek", client.list_keks()).await?;
    let would = match &which.context {
        Some(context) => foresee(context, &keks)?,
        None => rotate_each::foresee(&keks, which.slot.as_deref())?,
    };
    preview::note_members(Preview::new(would), &status).print(session)
}

/// What a rotation would do, as far as the nodes' list of keys says.
pub(super) fn foresee(context: &str, keks: &ListKeksResponse) -> Result<String> {
    let Some(info) = preview::find(keks, context) else {
        let detail = format!("context {context} does not exist");
        return Err(would_be_refused(ErrorCode::NotFound, detail));
    };
    if let Some(pending) = preview::pending_version(info) {
        return Ok(format!(
            "make version {} of {context} once version {pending}, which is being rotated in, is active or given up",
            preview::next_version(info)
        ));
    }
    let Some(active) = info.active_version else {
        let detail = format!(
            "context {context} has no active version to rotate; make its first one with: hsmctl create-kek --context \
             {context}"
        );
        return Err(would_be_refused(ErrorCode::ContextHasNoKey, detail));
    };
    Ok(format!(
        "make version {} of {context} in slot {}; version {active} would only decrypt once it is active",
        preview::next_version(info),
        info.slot
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use clap::Parser;

    use super::super::preview::tests::keks;
    use super::*;
    use crate::cli::Cli;
    use crate::exit::Exit;

    fn foreseen(context: &str) -> Result<String> {
        foresee(context, &keks())
    }

    /// Under both names.
    #[test]
    fn exactly_one_of_a_context_all_and_a_slot_is_rotated() {
        for rotate in ["hsmctl rotate", "hsmctl cluster rotate"] {
            let parsed = |args: &str| {
                let line = format!("{rotate}{args}");
                Cli::try_parse_from(line.split(' ')).map(drop)
            };
            for good in [
                " exchange-key",
                " --all",
                " --slot exchange",
                " --all --dry-run",
                " --all --idempotency-key k",
            ] {
                parsed(good).unwrap();
            }
            for bad in [
                "",
                " --dry-run",
                " exchange-key --all",
                " exchange-key --slot exchange",
                " --all --slot exchange",
                " exchange-key 2fa",
            ] {
                assert!(parsed(bad).is_err(), "{rotate}{bad}");
            }
        }
    }

    #[test]
    fn a_dry_run_says_which_version_would_come_and_which_would_go() {
        let would = foreseen("exchange-key").unwrap();
        assert_eq!(
            would,
            "make version 4 of exchange-key in slot exchange; version 3 would only decrypt once it is active"
        );
        let would = foreseen("2fa").unwrap();
        assert!(would.contains("version 2 of 2fa once version 1"), "{would}");
    }

    #[test]
    fn a_dry_run_is_refused_as_the_rotation_would_be() {
        let error = foreseen("no-such").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict, "{error}");
        let error = foreseen("order-key").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Unavailable, "{error}");
        assert!(
            error
                .to_string()
                .contains("hsmctl create-kek --context order-key"),
            "{error}"
        );
    }
}
