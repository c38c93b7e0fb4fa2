//! `hsmctl create-kek`, with the flags it had in version 1.

use anyhow::Result;
use clap::Args;
use hsm_api::ErrorCode;
use hsm_api::admin::{CreateKekRequest, ListKeksResponse};

use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, usage, would_be_refused};
use crate::output;

/// The only size of a KEK.
const KEK_BITS: u32 = 256;

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
    /// Say what would be made, and make nothing.
    #[arg(long)]
    dry_run: bool,
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
        let mut request = CreateKekRequest::new(context);
        request.label.clone_from(&self.label);
        request.version = self.version.or(labelled_version);
        request.size = self.size;
        Ok(request)
    }
}

pub(super) async fn create(session: &Session, args: CreateKek) -> Result<()> {
    let request = args.request()?;
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::OPERATE).await?;
        let status = preview::check_leader(session, &client).await?;
        let keks = session.ask(&client, "list-kek", client.list_keks()).await?;
        let foreseen = foresee(&request, &keks)?;
        return preview::note_members(foreseen, &status).print(session);
    }
    let key = idempotency_key(args.idempotency_key);
    let what = format!("create-kek {}", request.context);
    let answer = session
        .ask(&client, &what, client.create_kek(&request, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    let made = &answer.body;
    output::print_change(session.format(), &answer, || {
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

/// What the nodes would make of a request, as far as their list of keys says.
fn foresee(request: &CreateKekRequest, keks: &ListKeksResponse) -> Result<Preview> {
    let context = &request.context;
    if let Some(size) = request.size.filter(|size| *size != KEK_BITS) {
        let detail = format!("size: {size}: a KEK has {KEK_BITS} bits");
        return Err(would_be_refused(ErrorCode::InvalidArgument, detail));
    }
    let known = preview::find(keks, context);
    let next = known.map_or(1, preview::next_version);
    if let Some(number) = request.version.filter(|number| *number != next) {
        let exists = known.is_some_and(|info| info.versions.iter().any(|version| version.version == number));
        return Err(if exists {
            let detail = format!("version {number} of {context} exists already");
            would_be_refused(ErrorCode::AlreadyExists, detail)
        } else {
            let detail = format!("version {number} of {context} is not the next one, which is {next}");
            would_be_refused(ErrorCode::InvalidArgument, detail)
        });
    }
    let label = request.label.clone();
    if let Some(label) = label.as_deref().filter(|label| preview::label_taken(keks, label)) {
        let detail = format!("a key version with the label {label} exists already");
        return Err(would_be_refused(ErrorCode::AlreadyExists, detail));
    }
    let label = label.unwrap_or_else(|| format!("kek-{context}-v{next}"));
    let Some(info) = known else {
        return Ok(
            Preview::new(format!("make the context {context} and its version 1, {label}")).not_checked(
                format!(
                    "whether a slot in the configuration of the node that is asked lists {context} \
                 (hsm.slots.<name>.contexts); without one it is refused"
                ),
            ),
        );
    };
    let mut would = format!("make version {next} of {context}, {label}, in slot {}", info.slot);
    if let Some(pending) = preview::pending_version(info) {
        would.push_str(&format!(
            ", once version {pending} is active, or given up after all"
        ));
    } else if let Some(active) = info.active_version {
        would.push_str(&format!(
            "; version {active} would only decrypt once it is active"
        ));
    }
    Ok(Preview::new(would))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::preview::tests::keks;
    use super::*;
    use crate::exit::Exit;

    fn args(context: Option<&str>, label: Option<&str>, version: Option<u32>) -> CreateKek {
        CreateKek {
            label: label.map(str::to_owned),
            context: context.map(str::to_owned),
            version,
            size: None,
            idempotency_key: None,
            dry_run: false,
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

    fn foreseen(args: &CreateKek) -> Result<String> {
        let preview = foresee(&args.request()?, &keks())?;
        Ok(serde_json::to_value(&preview)?["would"]
            .as_str()
            .unwrap()
            .to_owned())
    }

    #[test]
    fn a_dry_run_says_which_version_would_be_made() {
        let would = foreseen(&args(Some("exchange-key"), None, None)).unwrap();
        assert!(
            would.contains("version 4 of exchange-key, kek-exchange-key-v4, in slot exchange")
                && would.contains("version 3 would only decrypt"),
            "{would}"
        );
        let would = foreseen(&args(None, Some("kek-order-key-v1"), None)).unwrap();
        assert!(
            would.contains("version 1 of order-key, kek-order-key-v1"),
            "{would}"
        );
        let would = foreseen(&args(Some("2fa"), Some("mine"), Some(2))).unwrap();
        assert!(
            would.contains("version 2 of 2fa, mine, in slot 2fa, once version 1"),
            "{would}"
        );
        let would = foreseen(&args(Some("new"), None, None)).unwrap();
        assert!(
            would.contains("make the context new and its version 1, kek-new-v1"),
            "{would}"
        );
    }

    #[test]
    fn a_dry_run_is_refused_as_the_command_would_be() {
        let wrong_size = CreateKek {
            size: Some(128),
            ..args(Some("2fa"), None, None)
        };
        for (args, exit, word) in [
            (wrong_size, Exit::Usage, "256"),
            (
                args(Some("exchange-key"), None, Some(2)),
                Exit::Conflict,
                "exists already",
            ),
            (
                args(Some("exchange-key"), None, Some(7)),
                Exit::Usage,
                "which is 4",
            ),
            (args(Some("new"), None, Some(2)), Exit::Usage, "which is 1"),
            (
                args(Some("new"), Some("kek-2fa-v1"), None),
                Exit::Conflict,
                "kek-2fa-v1",
            ),
        ] {
            let error = foreseen(&args).unwrap_err();
            assert_eq!(Exit::of(&error), exit, "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
