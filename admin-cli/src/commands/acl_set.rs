//! `hsmctl acl set`: a file in the place of the rules that are in force. Read strictly, shown as differences, confirmed,
//! and refused if somebody else was quicker.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use hsm_api::admin::{AclDocument, SetAclRequest};
use hsm_api::{Client, ClientError, ErrorCode};
use serde::Serialize;

use super::acl_changes::changes;
use super::{CHANGE, Session, idempotency_key, preview};
use crate::exit::{change_failed, usage, would_be_refused};
use crate::output::{self, note};
use crate::terminal::Destruction;

/// Arguments of `acl set`.
#[derive(Debug, Args)]
pub(crate) struct Set {
    /// The document, as `acl get -o yaml` prints it. Without its digest, it replaces whatever is in force now.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// The cluster's name, in place of typing it.
    #[arg(long, value_name = "CLUSTER")]
    confirm: Option<String>,
    /// Under the same key a repeated command makes one change.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What was changed, or would be.
#[derive(Debug, Serialize)]
struct Outcome {
    /// Only of a dry run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
    /// One difference each.
    changes: Vec<String>,
    /// Names the rules that are in force now, or would be.
    digest: String,
    /// Of a state that has them, once they are changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
}

pub(super) async fn set(session: &Session, args: &Set) -> Result<()> {
    let mut wanted = read(&args.file)?;
    let client = session.client(CHANGE)?;
    let status = preview::check_leader(session, &client).await?;
    let now = session.ask(&client, "acl get", client.acl()).await?.into_body();
    let changes = changes(&now, &wanted);
    // What was not read as something is read as what is there.
    if wanted.digest.is_none() {
        wanted.digest = now.digest.clone();
    }
    let request = |dry_run| SetAclRequest {
        acl: wanted.clone(),
        dry_run,
    };
    let digest = foresee(session, &client, &request(true)).await?;
    let mut outcome = Outcome {
        dry_run: args.dry_run,
        changes,
        digest,
        index: None,
    };
    if args.dry_run || outcome.changes.is_empty() {
        return outcome.print(session);
    }
    note(&outcome.changes.join("\n"));
    let warning = format!(
        "Access control of the cluster {} will be changed like this.",
        status.cluster_name
    );
    let confirmation = Destruction {
        warning: &warning,
        name: &status.cluster_name,
        option: "--confirm",
        answered: args.confirm.as_deref(),
    };
    confirmation.confirm(session.questions())?;
    let key = idempotency_key(args.idempotency_key.clone());
    let answer = session
        .ask(&client, "acl set", client.set_acl(&request(false), Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    outcome.index = answer.meta.index.map(|index| index.to_string());
    outcome.print(session)
}

/// What a node says to it before anybody is asked: a refusal is a refusal either way.
async fn foresee(session: &Session, client: &Client, request: &SetAclRequest) -> Result<String> {
    let answer = session
        .ask(client, "acl set", client.set_acl(request, None))
        .await
        .map_err(foreseen)?;
    Ok(answer.into_body().digest)
}

fn foreseen(error: ClientError) -> anyhow::Error {
    let refusal = error
        .api()
        .and_then(|answer| Some((answer.code?, answer.detail.clone())));
    match refusal {
        // It says that it was not done, whatever was asked.
        Some((code, detail)) if code != ErrorCode::OutcomeUnknown => would_be_refused(code, detail),
        _ => error.into(),
    }
}

impl Outcome {
    fn print(&self, session: &Session) -> Result<()> {
        output::print(session.format(), self, || self.text())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if self.changes.is_empty() {
            text.push_str("nothing to change: these rules are in force\n");
        } else if self.dry_run {
            text.push_str(&format!("{}\n", self.changes.join("\n")));
        }
        text.push_str(&format!("digest {}\n", self.digest));
        if self.dry_run {
            text.push_str("dry run: nothing was changed\n");
        }
        text
    }
}

fn read(path: &Path) -> Result<AclDocument> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read"))?;
    parse(&text).map_err(|problem| usage(format!("{shown}: {problem}")))
}

/// The document, or what is wrong with it and where.
fn parse(text: &str) -> Result<AclDocument, String> {
    let mut place = String::new();
    let options = serde_saphyr::options! { with_snippet: false };
    let parsed = serde_saphyr::with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize::<_, AclDocument>(deserializer).map_err(|error| {
            place = error.path().to_string();
            error.into_inner()
        })
    });
    parsed.map_err(|error| match place.as_str() {
        "" | "." => error.to_string(),
        place => format!("{place}: {error}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const WHOLE: &str = "\
mappings:
  Trading: [exchange-key]
  \"2FA\": {contexts: [2fa], operations: [decrypt]}
rules:
  - who: {cn: batch}
    contexts: [2fa]
    operations: [rewrap]
roles:
  admin:
    - {issuer: 'CN=CA', ou: Admin}
";

    #[test]
    fn a_file_is_yaml_or_json() {
        let document = parse(WHOLE).unwrap();
        assert_eq!(
            document.mappings["2FA"].operations.as_deref().unwrap(),
            ["decrypt"]
        );
        assert_eq!(document.rules[0].who.cn.as_deref(), Some("batch"));
        let json = serde_json::to_string(&document).unwrap();
        assert_eq!(parse(&json).unwrap(), document);
        let yaml = output::yaml(&document).unwrap();
        assert_eq!(parse(&yaml).unwrap(), document);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_place() {
        for (from, to, place) in [
            ("[exchange-key]", "exchange-key", "mappings.Trading"),
            ("contexts: [2fa], ", "", "mappings.2FA"),
            ("{cn: batch}", "{nc: batch}", "rules[0].who"),
            ("operations: [rewrap]", "operation: [rewrap]", "rules[0]"),
            ("ou: Admin", "ou: [Admin]", "roles.admin[0].ou"),
        ] {
            let error = parse(&WHOLE.replacen(from, to, 1)).unwrap_err();
            assert!(error.starts_with(place), "{to:?}: {error}");
        }
        for (text, says) in [
            (WHOLE.replace("roles:", "rolls:"), "rolls"),
            (WHOLE.replace("mappings:", "mapping:"), "mapping"),
            ("mappings: {}\n".to_owned(), "roles"),
            ("{".to_owned(), ""),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn an_outcome_says_whether_anything_was_done() {
        let outcome = |dry_run, changes: &[&str]| Outcome {
            dry_run,
            changes: changes.iter().map(|line| (*line).to_owned()).collect(),
            digest: "ab".to_owned(),
            index: None,
        };
        let text = outcome(true, &["+ ou A: b"]).text();
        assert!(
            text.starts_with("+ ou A: b\n") && text.ends_with("nothing was changed\n"),
            "{text}"
        );
        assert!(outcome(false, &[]).text().starts_with("nothing to change"));
        let json = serde_json::to_value(outcome(false, &["+ ou A: b"])).unwrap();
        assert!(
            json.get("dry_run").is_none() && json["changes"][0] == "+ ou A: b",
            "{json}"
        );
    }
}
