//! `hsmctl key release`: an adopted version is given back to version 1.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{KeyOrigin, KeyState, ListKeksResponse};

use super::key::{self, Named};
use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, would_be_refused};
use crate::output;
use crate::terminal::Destruction;

/// Arguments of `key release`.
#[derive(Debug, Args)]
pub(crate) struct Release {
    /// The version: adopted, retired or disabled.
    #[arg(value_name = "CONTEXT/vN")]
    version: Named,
    /// The version again, instead of typing it.
    #[arg(long, value_name = "CONTEXT/vN")]
    confirm: Option<String>,
    /// Under the same key a repeated command releases once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be released, and release nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn release(session: &Session, args: Release) -> Result<()> {
    let client = session.client(CHANGE)?;
    let named = &args.version;
    if args.dry_run {
        preview::check_role(session, &client, preview::OPERATE).await?;
        preview::check_leader(session, &client).await?;
        let keks = session.ask(&client, "key release", client.list_keks()).await?;
        return foresee(named, &keks)?.print(session);
    }
    let (warning, name) = (warning(named), named.to_string());
    let question = Destruction {
        warning: &warning,
        name: &name,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    question.confirm(session.questions())?;
    let key = idempotency_key(args.idempotency_key);
    let call = client.release_key(&named.context, named.version, Some(&key));
    let answer = session
        .ask(&client, &format!("key release {named}"), call)
        .await
        .map_err(|error| change_failed(error, &key))?;
    output::print_change(session.format(), &answer, || key::text(named, &answer.body.info))
}

fn warning(version: &Named) -> String {
    format!(
        "{version} will decrypt nothing any more, on any node, and its number is not used again. Version 1's own key stays in \
         its token, and can be adopted again under another number."
    )
}

fn foresee(version: &Named, keks: &ListKeksResponse) -> Result<Preview> {
    let refused = |why: &str| {
        let detail = format!("{version} {why}");
        Err(would_be_refused(ErrorCode::Conflict, detail))
    };
    if let Some(info) = key::find(keks, version)
        && info.state == KeyState::Abandoned
        && info.origin == KeyOrigin::Adopted
    {
        return Ok(Preview::new(format!("leave {version} as it is: it was released")));
    }
    let info = key::retired(keks, version)?;
    if info.origin != KeyOrigin::Adopted {
        return refused("was made here and not adopted: there is nobody to give it back to");
    }
    if info.state == KeyState::DestroyScheduled {
        return refused("is destroy_scheduled; undo its destruction first");
    }
    Ok(Preview::new(format!(
        "release {version}: the nodes remove their copies of the key {:?}, and version 1's own stays in its token",
        info.key_id
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::key::tests::{keks_with, named};
    use super::*;
    use crate::exit::Exit;

    fn adopted(state: KeyState) -> ListKeksResponse {
        let mut keks = keks_with(state);
        for version in keks.contexts.iter_mut().flat_map(|info| &mut info.versions) {
            version.origin = KeyOrigin::Adopted;
        }
        keks
    }

    #[test]
    fn a_dry_run_says_what_stays() {
        let version = named("exchange-key/v2");
        let would = |state| {
            let preview = foresee(&version, &adopted(state)).unwrap();
            let preview = serde_json::to_value(&preview).unwrap();
            preview["would"].as_str().unwrap().to_owned()
        };
        for state in [KeyState::DecryptOnly, KeyState::Disabled] {
            let would = would(state);
            assert!(would.contains("version 1's own stays"), "{would}");
        }
        assert!(would(KeyState::Abandoned).contains("leave"));
    }

    #[test]
    fn a_dry_run_is_refused_as_the_release_would_be() {
        let version = named("exchange-key/v2");
        for keks in [
            keks_with(KeyState::DecryptOnly),
            adopted(KeyState::DestroyScheduled),
            adopted(KeyState::Active),
            adopted(KeyState::Destroyed),
        ] {
            let error = foresee(&version, &keks).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Conflict, "{error}");
        }
    }
}
