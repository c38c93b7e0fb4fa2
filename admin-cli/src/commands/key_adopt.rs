//! `hsmctl key adopt`: keys that version 1 made become versions. The node that is named looks into its own token; all of
//! version 1's keys at once are named by its `metadata.yaml`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use hsm_api::Client;
use hsm_api::admin::{
    ADOPT_MAX_KEYS, AdoptKey, AdoptKeysRequest, AdoptKeysResponse, AdoptedVersion, BindingMode, SkippedKey,
};
use hsm_api::v1::{Metadata, V1Context, V1Version};

use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, missing, usage};
use crate::files;
use crate::output::{self, Format, note, or_dash};

/// No list of versions is longer.
const MAX_FILE: usize = 1 << 20;

/// Whom a context's ciphertexts are bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// To the OU: every certificate of the unit can decrypt.
    Shared,
    /// To the CN; version 1's default.
    Private,
    /// To nobody.
    None,
}

impl From<Mode> for BindingMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Shared => Self::Shared,
            Mode::Private => Self::Private,
            Mode::None => Self::None,
        }
    }
}

/// Arguments of `key adopt`.
#[derive(Debug, Args)]
pub(crate) struct Adopt {
    /// The context; made too, if it does not exist. With --metadata-file: only this one.
    #[arg(long, required_unless_present = "metadata_file")]
    context: Option<String>,
    /// Label of the key in the token, which version 1's clients name as key_id.
    #[arg(
        long,
        required_unless_present = "metadata_file",
        conflicts_with = "metadata_file"
    )]
    label: Option<String>,
    /// Number of the version it becomes [default: the one in a label of the form kek-CONTEXT-vN, else the next one].
    #[arg(long, conflicts_with = "metadata_file")]
    version: Option<u32>,
    /// The slot whose token has it; needed for a new context that the node's configuration does not place.
    #[arg(long)]
    slot: Option<String>,
    /// CKA_ID of the key in hex, where several in the token have the label.
    #[arg(long, value_name = "HEX", conflicts_with = "metadata_file")]
    id: Option<String>,
    /// Whom version 1 bound the context's ciphertexts to, as its hsm.keys.CONTEXT.mode said; needed for a new context that
    /// stands in no hsm.keys of the node. It is for good.
    #[arg(long)]
    mode: Option<Mode>,
    /// Although the token has further keys of the context that nobody has adopted; they can be adopted later.
    #[arg(long)]
    only: bool,
    /// Leave out the keys of the file that are not in the token, and name each; without it one of them refuses all of its
    /// context. What was encrypted under them cannot be decrypted. A context that does not exist, and of which none is in the
    /// token, is refused all the same. See --dry-run first.
    #[arg(long, requires = "metadata_file")]
    skip_missing: bool,
    /// Adopt every version that this file of version 1 lists (its metadata.yaml); it is only read.
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// Under the same key a repeated command adopts each key once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Have the node look into its token and say what would be adopted; nothing is changed.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn adopt(session: &Session, args: Adopt) -> Result<()> {
    let requests = requests(&args)?;
    let client = session.client_of_one(CHANGE)?;
    let key = idempotency_key(args.idempotency_key);
    let mut answers = Vec::with_capacity(requests.len());
    for request in &requests {
        match one(session, &client, request, &key).await {
            Ok(answer) => answers.push(answer),
            Err(error) => {
                if !answers.is_empty() {
                    note(&format!(
                        "{} before {}: done; the same command again goes on",
                        contexts(&answers),
                        request.context
                    ));
                }
                return Err(error);
            }
        }
    }
    for answer in &answers {
        if let Some(text) = left_out(answer) {
            note(&text);
        }
    }
    if session.format() == Format::Table && answers.iter().any(is_unproven) {
        note("the node has not proven every key yet: hsmctl key show CONTEXT/vN says when, its log why not");
    }
    let text = || answers.iter().map(text).collect::<Vec<_>>().join("\n");
    match (&args.metadata_file, answers.as_slice()) {
        (None, [answer]) => output::print(session.format(), answer, text),
        _ => output::print(session.format(), &answers, text),
    }
}

async fn one(
    session: &Session,
    client: &Client,
    request: &AdoptKeysRequest,
    key: &str,
) -> Result<AdoptKeysResponse> {
    let what = format!("key adopt {}", request.context);
    let answer = session
        .ask(client, &what, client.adopt_keys(request, Some(key)))
        .await;
    Ok(answer.map_err(|error| change_failed(error, key))?.into_body())
}

fn requests(args: &Adopt) -> Result<Vec<AdoptKeysRequest>> {
    let request = |context: &str, keys| AdoptKeysRequest {
        context: context.to_owned(),
        keys,
        slot: args.slot.clone(),
        binding: args.mode.map(BindingMode::from),
        only: args.only,
        skip_missing: args.skip_missing,
        dry_run: args.dry_run,
    };
    let Some(path) = &args.metadata_file else {
        let (Some(context), Some(label)) = (&args.context, &args.label) else {
            return Err(usage(
                "which key? give --context CONTEXT and --label LABEL, or --metadata-file FILE",
            ));
        };
        let key = AdoptKey {
            label: label.clone(),
            version: args.version,
            id: args.id.clone(),
            created_at: None,
        };
        return Ok(vec![request(context, vec![key])]);
    };
    let listed = listed(path, args.context.as_deref())?;
    let key = |version: &V1Version| AdoptKey {
        label: version.label.clone(),
        version: Some(version.number),
        id: version.id.clone(),
        created_at: version.created_at.clone(),
    };
    Ok(listed
        .iter()
        .map(|context| request(&context.name, context.versions.iter().map(key).collect()))
        .collect())
}

/// The contexts of the file that have versions; one of them, if one is named.
fn listed(path: &Path, only: Option<&str>) -> Result<Vec<V1Context>> {
    let shown = path.display();
    let file = std::fs::File::open(path).with_context(|| format!("{shown}"))?;
    let bytes = files::read_bounded(file, MAX_FILE, "the list of versions")?;
    let wrong = |why: String| usage(format!("{shown}: {why}"));
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("is not text".to_owned()))?;
    parse(text, only).map_err(wrong)?.map_or_else(
        || {
            let of = only.map(|context| format!(" of {context}")).unwrap_or_default();
            Err(missing(format!("{shown}: lists no versions{of}")))
        },
        Ok,
    )
}

fn parse(text: &str, only: Option<&str>) -> Result<Option<Vec<V1Context>>, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let metadata: Option<Metadata> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| format!("is not version 1's list of keys: {error}"))?;
    let contexts = metadata.unwrap_or_default().contexts();
    let mut contexts = contexts.map_err(|error| error.to_string())?;
    contexts.retain(|context| {
        !context.versions.is_empty() && only.is_none_or(|only| only == context.name.as_str())
    });
    if let Some(many) = contexts
        .iter()
        .find(|context| context.versions.len() > ADOPT_MAX_KEYS)
    {
        return Err(format!(
            "rotation.{}: {} versions, and {ADOPT_MAX_KEYS} are adopted at a time; adopt them one by one with --label",
            many.name,
            many.versions.len()
        ));
    }
    Ok(Some(contexts).filter(|contexts| !contexts.is_empty()))
}

fn contexts(answers: &[AdoptKeysResponse]) -> String {
    let names: Vec<&str> = answers.iter().map(|answer| answer.context.as_str()).collect();
    names.join(", ")
}

fn is_unproven(answer: &AdoptKeysResponse) -> bool {
    !answer.dry_run && answer.versions.iter().any(|version| !version.proven)
}

/// Names every key that the token lacks: nobody shall find that out by a ciphertext that does not open.
fn left_out(answer: &AdoptKeysResponse) -> Option<String> {
    if answer.skipped.is_empty() {
        return None;
    }
    let name = |key: &SkippedKey| match key.version {
        Some(version) => format!("{} (v{version})", key.key_id),
        None => key.key_id.clone(),
    };
    let names: Vec<String> = answer.skipped.iter().map(name).collect();
    let skipped = if answer.dry_run {
        "would be skipped"
    } else {
        "skipped"
    };
    Some(format!(
        "{}: {skipped}, not in the token: {}; what was encrypted under them cannot be decrypted here",
        answer.context,
        names.join(", ")
    ))
}

fn text(answer: &AdoptKeysResponse) -> String {
    let outcome = |version: &AdoptedVersion| match (version.new, answer.dry_run) {
        (false, _) => "adopted before",
        (true, true) => "would be adopted",
        (true, false) => "adopted",
    };
    let row = |version: &AdoptedVersion| {
        [
            answer.context.clone(),
            answer.slot.clone(),
            answer.binding.to_string(),
            version.version.to_string(),
            version.key_id.clone(),
            outcome(version).to_owned(),
            if version.proven { "yes" } else { "no" }.to_owned(),
        ]
    };
    let header = [
        "CONTEXT", "SLOT", "MODE", "VERSION", "KEY ID", "OUTCOME", "PROVEN",
    ];
    let skipped = |key: &SkippedKey| {
        [
            answer.context.clone(),
            answer.slot.clone(),
            answer.binding.to_string(),
            or_dash(key.version),
            key.key_id.clone(),
            "skipped: not in the token".to_owned(),
            "no".to_owned(),
        ]
    };
    let rows = answer
        .versions
        .iter()
        .map(row)
        .chain(answer.skipped.iter().map(skipped));
    let mut text = output::table(header, rows);
    let active = or_dash(answer.active_version.map(|version| format!("v{version}")));
    match (answer.dry_run, answer.active_version) {
        (true, None) if !answer.versions.is_empty() => {
            text.push_str("\nthen a fresh version would be made, which encrypts\n")
        }
        _ => text.push_str(&format!("\nencrypts: {active}\n")),
    }
    if answer.dry_run {
        text.push_str("dry run: nothing was changed\n");
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const FILE: &str = "
rotation:
  2fa: {current: kek-2fa-v1, versions: [{label: kek-2fa-v1, version: 1, checksum: ab}]}
  exchange-key:
    current: kek-exchange-key-v2
    versions:
      - {label: kek-exchange-key-v2, version: 2, created_at: 2024-01-01T00:00:00Z}
      - {label: old, version: 1}
  none: {versions: []}
";

    fn args() -> Adopt {
        Adopt {
            context: Some("c".to_owned()),
            label: Some("old".to_owned()),
            version: None,
            slot: None,
            id: None,
            mode: None,
            only: false,
            skip_missing: false,
            metadata_file: None,
            idempotency_key: None,
            dry_run: true,
        }
    }

    #[test]
    fn one_key_is_one_request_and_a_file_is_one_for_each_context() {
        let one = requests(&args()).unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!((one[0].context.as_str(), one[0].dry_run), ("c", true));
        assert_eq!(
            (one[0].keys[0].label.as_str(), one[0].keys[0].version),
            ("old", None)
        );

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.yaml");
        std::fs::write(&path, FILE).unwrap();
        let of = |context: Option<&str>| Adopt {
            context: context.map(str::to_owned),
            label: None,
            metadata_file: Some(path.clone()),
            ..args()
        };
        let all = requests(&of(None)).unwrap();
        let names: Vec<&str> = all.iter().map(|request| request.context.as_str()).collect();
        assert_eq!(names, ["2fa", "exchange-key"]);
        let numbers: Vec<_> = all[1].keys.iter().map(|key| key.version).collect();
        assert_eq!(numbers, [Some(1), Some(2)]);
        let made: Vec<_> = all[1].keys.iter().map(|key| key.created_at.as_deref()).collect();
        assert_eq!(made, [None, Some("2024-01-01T00:00:00Z")]);
        assert_eq!(requests(&of(Some("2fa"))).unwrap().len(), 1);
        let error = requests(&of(Some("none"))).unwrap_err();
        assert!(error.to_string().contains("lists no versions of none"), "{error}");
    }

    #[test]
    fn what_is_said_of_a_key_is_asked_for() {
        let said = Adopt {
            id: Some("0a".to_owned()),
            mode: Some(Mode::Private),
            only: true,
            ..args()
        };
        let request = requests(&said).unwrap().remove(0);
        assert_eq!(
            (request.binding, request.only),
            (Some(BindingMode::Private), true)
        );
        assert_eq!(request.keys[0].id.as_deref(), Some("0a"));
        assert_eq!(requests(&args()).unwrap()[0].binding, None);
    }

    #[test]
    fn a_file_that_is_none_of_version_1s_is_refused() {
        for (text, part) in [
            ("rotation: [", "is not version 1's list of keys"),
            ("rotation: {c: {current: a}}", "rotation.c: current"),
        ] {
            let error = parse(text, None).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let many: String = (1..=65)
            .map(|number| format!("      - {{label: l{number}, version: {number}}}\n"))
            .collect();
        let text = format!("rotation:\n  c:\n    versions:\n{many}");
        assert!(parse(&text, None).unwrap_err().contains("65 versions"));
    }

    fn answer(dry_run: bool, active_version: Option<u32>) -> AdoptKeysResponse {
        AdoptKeysResponse {
            context: "c".to_owned(),
            slot: "default".to_owned(),
            binding: BindingMode::Shared,
            dry_run,
            versions: vec![AdoptedVersion {
                version: 1,
                key_id: "kek-c-v1".to_owned(),
                new: true,
                proven: !dry_run,
            }],
            skipped: Vec::new(),
            active_version,
        }
    }

    #[test]
    fn every_key_that_is_left_out_is_named() {
        assert_eq!(left_out(&answer(false, Some(2))), None);
        let skipped = |dry_run| AdoptKeysResponse {
            skipped: vec![
                SkippedKey {
                    key_id: "gone".to_owned(),
                    version: Some(7),
                },
                SkippedKey {
                    key_id: "lost".to_owned(),
                    version: None,
                },
            ],
            ..answer(dry_run, None)
        };
        let said = left_out(&skipped(false)).unwrap();
        assert!(
            said.starts_with("c: skipped, not in the token: gone (v7), lost;"),
            "{said}"
        );
        assert!(left_out(&skipped(true)).unwrap().contains("would be skipped"));
        let seen = text(&skipped(true));
        assert_eq!(seen.matches("skipped: not in the token").count(), 2, "{seen}");
        assert!(seen.contains("gone") && seen.contains("lost"), "{seen}");
        // Where nothing of a context is there, nothing is made.
        let none = AdoptKeysResponse {
            versions: Vec::new(),
            ..skipped(true)
        };
        assert!(!text(&none).contains("a fresh version"));
    }

    #[test]
    fn what_is_missing_is_skipped_only_where_that_is_said() {
        assert!(!requests(&args()).unwrap()[0].skip_missing);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.yaml");
        std::fs::write(&path, FILE).unwrap();
        let skipping = Adopt {
            context: None,
            label: None,
            metadata_file: Some(path),
            skip_missing: true,
            ..args()
        };
        let requests = requests(&skipping).unwrap();
        assert!(requests.iter().all(|request| request.skip_missing));
    }

    #[test]
    fn a_dry_run_does_not_say_that_anything_was_adopted() {
        let seen = text(&answer(true, None));
        assert!(
            seen.contains("would be adopted") && seen.contains("a fresh version"),
            "{seen}"
        );
        assert!(seen.ends_with("nothing was changed\n"), "{seen}");
        assert!(seen.contains("shared"), "to whom it is bound is for good: {seen}");
        let seen = text(&answer(false, Some(2)));
        assert!(seen.contains("yes") && seen.ends_with("encrypts: v2\n"), "{seen}");
        assert!(!is_unproven(&answer(true, None)) && !is_unproven(&answer(false, Some(2))));
    }
}
