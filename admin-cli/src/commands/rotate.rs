//! `hsmctl rotate`: returns once the new version is active.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::ListKeksResponse;

use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, would_be_refused};
use crate::output;

/// Arguments of `rotate`.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    /// The context whose key gets a new version.
    context: String,
    /// Under the same key a repeated command makes one version.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be made, and make nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn rotate(session: &Session, args: Rotate) -> Result<()> {
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::OPERATE).await?;
        let status = preview::check_leader(session, &client).await?;
        let keks = session.ask(&client, "list-kek", client.list_keks()).await?;
        let foreseen = foresee(&args.context, &keks)?;
        return preview::note_members(foreseen, &status).print(session);
    }
    let key = idempotency_key(args.idempotency_key);
    let what = format!("rotate {}", args.context);
    let answer = session
        .ask(&client, &what, client.rotate(&args.context, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
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

/// What a rotation would do, as far as the nodes' list of keys says.
fn foresee(context: &str, keks: &ListKeksResponse) -> Result<Preview> {
    let Some(info) = preview::find(keks, context) else {
        let detail = format!("context {context} does not exist");
        return Err(would_be_refused(ErrorCode::NotFound, detail));
    };
    if let Some(pending) = preview::pending_version(info) {
        return Ok(Preview::new(format!(
            "make version {} of {context} once version {pending}, which is being rotated in, is active or given up",
            preview::next_version(info)
        )));
    }
    let Some(active) = info.active_version else {
        let detail = format!(
            "context {context} has no active version to rotate; make its first one with: hsmctl create-kek --context \
             {context}"
        );
        return Err(would_be_refused(ErrorCode::ContextHasNoKey, detail));
    };
    Ok(Preview::new(format!(
        "make version {} of {context} in slot {}; version {active} would only decrypt once it is active",
        preview::next_version(info),
        info.slot
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::preview::tests::keks;
    use super::*;
    use crate::exit::Exit;

    fn foreseen(context: &str) -> Result<String> {
        let preview = foresee(context, &keks())?;
        Ok(serde_json::to_value(&preview)?["would"]
            .as_str()
            .unwrap()
            .to_owned())
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
