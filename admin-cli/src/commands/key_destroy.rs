//! `hsmctl key destroy`, and `delete-kek` of version 1, which is the same here: it waits, and can be undone until then.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use hsm_api::admin::{DestroyKeyRequest, KeyState, KeyUsageResponse, ListKeksResponse};
use hsm_api::{Client, ErrorCode};

use super::key::{self, Named, span};
use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, missing, would_be_refused};
use crate::output::{self, note};
use crate::terminal::{Destruction, Terminal};

/// Arguments of `key destroy`.
#[derive(Debug, Args)]
pub(crate) struct Destroy {
    /// The version, retired or disabled.
    #[arg(value_name = "CONTEXT/vN")]
    version: Named,
    /// How long it can be undone, such as 7d, 36h or 90m; the nodes have a minimum, and a default [default: 7d,
    /// unless they are configured otherwise].
    #[arg(long, value_name = "TIME", value_parser = time)]
    wait: Option<Duration>,
    /// Although it was used in the last days.
    #[arg(long = "override")]
    override_recent_use: bool,
    /// The version again, instead of typing it.
    #[arg(long, value_name = "CONTEXT/vN")]
    confirm: Option<String>,
    /// Under the same key a repeated command destroys once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be destroyed, and destroy nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `delete-kek`.
#[derive(Debug, Args)]
pub(crate) struct DeleteKek {
    /// Label of the version that is to be destroyed.
    #[arg(long)]
    label: String,
    /// Do not ask for the label again.
    #[arg(long)]
    confirm: bool,
    /// Under the same key a repeated command destroys once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be destroyed, and destroy nothing.
    #[arg(long)]
    dry_run: bool,
}

/// A destruction that is confirmed.
struct Meant {
    version: Named,
    request: DestroyKeyRequest,
    idempotency_key: Option<String>,
}

pub(super) async fn destroy(session: &Session, args: Destroy) -> Result<()> {
    let client = session.client(CHANGE)?;
    let request = DestroyKeyRequest {
        wait_seconds: args.wait.map(|wait| wait.as_secs()),
        override_recent_use: args.override_recent_use,
    };
    if args.dry_run {
        return dry_run(session, &client, &args.version, &request).await;
    }
    let version = args.version;
    let (warning, name) = (warning(&version), version.to_string());
    let destruction = Destruction {
        warning: &warning,
        name: &name,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    destruction.confirm(session.questions())?;
    let meant = Meant {
        version,
        request,
        idempotency_key: args.idempotency_key,
    };
    schedule(session, &client, meant).await
}

pub(super) async fn delete_kek(session: &Session, args: DeleteKek) -> Result<()> {
    let client = session.client(CHANGE)?;
    let keks = session.ask(&client, "delete-kek", client.list_keks()).await?;
    let Some(version) = labelled(&keks, &args.label) else {
        let text = format!("{:?}: no key version has this label", args.label);
        return Err(missing(text));
    };
    note(&format!(
        "delete-kek is `key destroy {version}`: the key is out of use at once and destroyed after the nodes' default \
         wait; until then `hsmctl key undo-destroy {version}` takes it back"
    ));
    let request = DestroyKeyRequest::default();
    if args.dry_run {
        return dry_run(session, &client, &version, &request).await;
    }
    if !args.confirm {
        let warning = warning(&version);
        let remedy = format!("{warning} If that is meant, say --confirm");
        let mut terminal = Terminal::open(session.questions(), &remedy)?;
        if terminal.ask(&format!("{warning}\nType {} to go on: ", args.label))? != args.label {
            bail!("not confirmed: nothing was changed");
        }
    }
    let meant = Meant {
        version,
        request,
        idempotency_key: args.idempotency_key,
    };
    schedule(session, &client, meant).await
}

async fn schedule(session: &Session, client: &Client, meant: Meant) -> Result<()> {
    let named = &meant.version;
    let key = idempotency_key(meant.idempotency_key);
    let what = format!("key destroy {named}");
    let call = client.destroy_key(&named.context, named.version, &meant.request, Some(&key));
    let answer = session
        .ask(client, &what, call)
        .await
        .map_err(|error| change_failed(error, &key))?;
    let info = &answer.body.info;
    output::print_change(session.format(), &answer, || key::text(named, info))
}

async fn dry_run(
    session: &Session,
    client: &Client,
    version: &Named,
    request: &DestroyKeyRequest,
) -> Result<()> {
    preview::check_role(session, client, preview::ADMINISTER).await?;
    preview::check_leader(session, client).await?;
    let keks = session.ask(client, "key list", client.list_keks()).await?;
    let usage = session.ask(client, "key usage", client.key_usage()).await?;
    foresee(version, request, &keks, &usage)?.print(session)
}

fn warning(version: &Named) -> String {
    format!(
        "{version} will decrypt nothing from now on, and will be destroyed on every node once its wait is over; what \
         was encrypted under it and not re-wrapped is lost then."
    )
}

fn labelled(keks: &ListKeksResponse, label: &str) -> Option<Named> {
    let all = keks
        .contexts
        .iter()
        .flat_map(|info| info.versions.iter().map(move |version| (info, version)));
    // What was given up before it was used has given its label back.
    let mut own = all.filter(|(_, version)| version.key_id == label && version.state != KeyState::Abandoned);
    own.next().map(|(info, version)| Named {
        context: info.context.clone(),
        version: version.version,
    })
}

fn foresee(
    version: &Named,
    request: &DestroyKeyRequest,
    keks: &ListKeksResponse,
    usage: &KeyUsageResponse,
) -> Result<Preview> {
    let info = key::retired(keks, version)?;
    if info.state == KeyState::DestroyScheduled {
        let detail = format!("{version} is destroy_scheduled already; to change its wait, undo that first");
        return Err(would_be_refused(ErrorCode::Conflict, detail));
    }
    let wait = match request.wait_seconds {
        Some(seconds) => span(seconds),
        None => "the nodes' default wait".to_owned(),
    };
    let mut preview = Preview::new(format!(
        "take {version} out of use at once, and destroy it on every node after {wait}"
    ));
    if request.wait_seconds.is_some() {
        preview = preview.not_checked("whether the nodes allow so short a wait");
    }
    let used = usage
        .versions
        .iter()
        .find(|used| used.context == version.context && used.version == version.version)
        .and_then(|used| used.last_used.as_ref());
    Ok(match used {
        Some(at) if !request.override_recent_use => preview.not_checked(format!(
            "whether the nodes take its last use, {at}, for recent: then it is refused without --override"
        )),
        _ => preview,
    })
}

/// `7d`, `36h`, `90m`, `30s`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?}: write a number and its unit, such as 7d, 36h, 90m or 30s");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let length: u64 = match unit {
        'd' => 86_400,
        'h' => 3600,
        'm' => 60,
        's' => 1,
        _ => return Err(wrong()),
    };
    let number = text.strip_suffix(unit).unwrap_or_default();
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<u64>().ok().filter(|_| is_number);
    let seconds = number.and_then(|number| number.checked_mul(length));
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::key::tests::{keks_with, named};
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_wait_has_a_unit() {
        for (text, seconds) in [("7d", 604_800), ("36h", 129_600), ("90m", 5400), ("30s", 30)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        for wrong in [
            "",
            "7",
            "d",
            "7dd",
            "-7d",
            "+7d",
            "7 d",
            "1.5d",
            "99999999999999999999d",
            "7ä",
        ] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_label_names_its_version() {
        let keks = keks_with(KeyState::DecryptOnly);
        assert_eq!(
            labelled(&keks, "kek-exchange-key-v2"),
            Some(named("exchange-key/v2"))
        );
        assert_eq!(labelled(&keks, "kek-exchange-key-v1"), None, "it was given up");
        assert_eq!(labelled(&keks, "no-such"), None);
    }

    fn usage(last_used: Option<&str>) -> KeyUsageResponse {
        serde_json::from_value(serde_json::json!({"versions": [{
            "context": "exchange-key", "version": 2, "key_id": "k", "state": "decrypt_only", "encryptions": 0,
            "decryptions": 1, "last_used": last_used
        }]}))
        .unwrap()
    }

    #[test]
    fn a_dry_run_says_what_only_the_nodes_know() {
        let version = named("exchange-key/v2");
        let seen = |request: &DestroyKeyRequest, last_used| {
            let keks = keks_with(KeyState::Disabled);
            let preview = foresee(&version, request, &keks, &usage(last_used)).unwrap();
            serde_json::to_value(&preview).unwrap()
        };
        let seen_unused = seen(&DestroyKeyRequest::default(), None);
        assert!(seen_unused["would"].as_str().unwrap().contains("default wait"));
        assert_eq!(seen_unused["not_checked"], serde_json::json!([]));
        let request = DestroyKeyRequest {
            wait_seconds: Some(172_800),
            override_recent_use: false,
        };
        let seen_used = seen(&request, Some("2030-01-01T00:00:00Z"));
        assert!(seen_used["would"].as_str().unwrap().ends_with("after 2 d"));
        assert_eq!(seen_used["not_checked"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_dry_run_is_refused_as_the_destruction_would_be() {
        let refused = |text: &str, state| {
            let request = DestroyKeyRequest::default();
            foresee(&named(text), &request, &keks_with(state), &usage(None)).unwrap_err()
        };
        for (text, state) in [
            ("exchange-key/v3", KeyState::DecryptOnly),
            ("exchange-key/v2", KeyState::DestroyScheduled),
            ("exchange-key/v2", KeyState::Destroyed),
            ("none/v1", KeyState::DecryptOnly),
        ] {
            assert_eq!(Exit::of(&refused(text, state)), Exit::Conflict, "{text}");
        }
    }
}
