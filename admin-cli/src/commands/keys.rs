//! `hsmctl create-kek` and `list-kek`, with the flags they had in version 1.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{ContextInfo, CreateKekRequest, KeyVersionInfo};

use super::{CHANGE, READ, Session, idempotency_key};
use crate::exit::{change_failed, usage};
use crate::output::{self, or_dash};

/// Arguments of `create-kek`.
#[derive(Debug, Args)]
pub(crate) struct CreateKek {
    /// Label in the token [default: kek-CONTEXT-vVERSION]; names the context if --context does not.
    #[arg(long)]
    label: Option<String>,
    /// The context; made too, if the nodes' configuration maps it to a slot.
    #[arg(long)]
    context: Option<String>,
    /// Number of the version; it can only be the next one, which is taken if none is given.
    #[arg(long)]
    version: Option<u32>,
    /// Bits; there is only 256.
    #[arg(long)]
    size: Option<u32>,
    /// Under the same key a repeated command makes one version.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

/// Arguments of `list-kek`.
#[derive(Debug, Args)]
pub(crate) struct ListKek {
    /// With ids, times and the nodes that have proven each version.
    #[arg(long)]
    verbose: bool,
}

/// Context and number in a label of version 1's form, `kek-<context>-v<N>`; both parts around the context
/// may be missing.
fn parse_label(label: &str) -> (&str, Option<u32>) {
    let name = label.strip_prefix("kek-").unwrap_or(label);
    match name.rsplit_once("-v") {
        Some((context, digits)) if !context.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
            match digits.parse() {
                Ok(version) => (context, Some(version)),
                Err(_) => (name, None),
            }
        }
        _ => (name, None),
    }
}

impl CreateKek {
    fn request(&self) -> Result<CreateKekRequest> {
        let labelled = self.label.as_deref().map(parse_label);
        let (context, labelled_version) = match (&self.context, labelled) {
            (Some(context), Some((same, version))) if same == context => (context.as_str(), version),
            (Some(context), _) => (context.as_str(), None),
            (None, Some((context, version))) => (context, version),
            (None, None) => {
                return Err(usage(
                    "which key? give --context CONTEXT, or --label kek-CONTEXT-vN",
                ));
            }
        };
        Ok(CreateKekRequest {
            context: context.to_owned(),
            label: self.label.clone(),
            version: self.version.or(labelled_version),
            size: self.size,
        })
    }
}

pub(super) async fn create(session: &Session, args: CreateKek) -> Result<()> {
    let request = args.request()?;
    let client = session.client(CHANGE)?;
    let key = idempotency_key(args.idempotency_key);
    let what = format!("create-kek {}", request.context);
    let answer = session
        .ask(&client, &what, client.create_kek(&request, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    let made = &answer.body;
    output::print(session.format(), made, || {
        output::table(
            ["CONTEXT", "VERSION", "KEY ID", "STATE"],
            [[
                made.context.clone(),
                made.version.to_string(),
                made.key_id.clone(),
                made.state.to_string(),
            ]],
        )
    })
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
        context.slot.clone(),
        context.binding.to_string(),
        version.version.to_string(),
        version.key_id.clone(),
        version.state.to_string(),
    ]
}

fn verbose_row((context, version): (&ContextInfo, &KeyVersionInfo)) -> [String; 12] {
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
        version.acks.join(","),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn args(context: Option<&str>, label: Option<&str>, version: Option<u32>) -> CreateKek {
        CreateKek {
            label: label.map(str::to_owned),
            context: context.map(str::to_owned),
            version,
            size: None,
            idempotency_key: None,
        }
    }

    fn asked(context: Option<&str>, label: Option<&str>, version: Option<u32>) -> (String, Option<u32>) {
        let request = args(context, label, version).request().unwrap();
        (request.context, request.version)
    }

    #[test]
    fn a_label_of_version_1_names_context_and_number() {
        assert_eq!(parse_label("kek-exchange-key-v12"), ("exchange-key", Some(12)));
        assert_eq!(parse_label("kek-a-v1-v2"), ("a-v1", Some(2)));
        assert_eq!(parse_label("kek-2fa"), ("2fa", None));
        assert_eq!(parse_label("my-vault"), ("my-vault", None));
        assert_eq!(parse_label("kek--v1"), ("-v1", None));
        assert_eq!(parse_label("kek-x-v99999999999"), ("x-v99999999999", None));
    }

    #[test]
    fn what_is_said_goes_before_what_the_label_says() {
        assert_eq!(asked(None, Some("kek-2fa-v3"), None), ("2fa".into(), Some(3)));
        assert_eq!(asked(None, Some("kek-2fa-v3"), Some(4)), ("2fa".into(), Some(4)));
        assert_eq!(
            asked(Some("2fa"), Some("kek-2fa-v3"), None),
            ("2fa".into(), Some(3))
        );
        assert_eq!(
            asked(Some("order"), Some("kek-2fa-v3"), None),
            ("order".into(), None)
        );
        assert_eq!(asked(Some("2fa"), None, None), ("2fa".into(), None));
        assert!(args(None, None, Some(1)).request().is_err());
    }
}
