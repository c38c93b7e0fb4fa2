//! `hsmctl cleanup-old-versions`. Version 1 deleted what was made long ago, which is the version just retired. Here
//! versions are disabled that have been retired for long, are not among the newest, and are not used; nothing is
//! destroyed. What version 1 would have done is said.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{CleanupRequest, CleanupResponse, CleanupVersion};

use super::{CHANGE, Session, idempotency_key};
use crate::exit::change_failed;
use crate::output::{self, Format, note};

/// Arguments of `cleanup-old-versions`.
#[derive(Debug, Args)]
pub(crate) struct Cleanup {
    /// Only this context's versions.
    #[arg(long)]
    context: Option<String>,
    /// Say which versions would be disabled, and disable none.
    #[arg(long)]
    dry_run: bool,
    /// Accepted, as version 1 had it: nothing is asked, because what is disabled can be enabled again.
    #[arg(long)]
    force: bool,
    /// Under the same key a repeated command disables each version once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

pub(super) async fn run(session: &Session, args: Cleanup) -> Result<()> {
    let client = session.client(CHANGE)?;
    let request = CleanupRequest {
        context: args.context,
        dry_run: args.dry_run,
    };
    let key = idempotency_key(args.idempotency_key);
    let call = client.clean_up_keys(&request, Some(&key));
    let answer = session
        .ask(&client, "cleanup-old-versions", call)
        .await
        .map_err(|error| change_failed(error, &key))?;
    let done = &answer.body;
    if session.format() == Format::Table {
        note(&difference(done));
        if args.force {
            note("--force changes nothing here: nothing is asked, and `hsmctl key enable` takes it back");
        }
    }
    output::print_change(session.format(), &answer, || text(done))
}

fn text(done: &CleanupResponse) -> String {
    let verb = if done.dry_run {
        "would be disabled"
    } else {
        "disabled"
    };
    let row = |version: &CleanupVersion| {
        [
            version.context.clone(),
            version.version.to_string(),
            version.key_id.clone(),
            version.slot.clone(),
            if version.disabled { verb } else { "kept" }.to_owned(),
            version.kept_because.clone(),
        ]
    };
    let header = ["CONTEXT", "VERSION", "KEY ID", "SLOT", "OUTCOME", "BECAUSE"];
    let mut text = output::table(header, done.versions.iter().map(row));
    if done.dry_run {
        text.push_str("\ndry run: nothing was changed\n");
    }
    text
}

/// How version 1's rule would have ended.
fn difference(done: &CleanupResponse) -> String {
    let spared: Vec<&str> = done
        .versions
        .iter()
        .filter(|version| version.deleted_by_v1 && !version.disabled)
        .map(|version| version.key_id.as_str())
        .collect();
    let rule = "version 1 deleted what was made long ago; here only what was retired long ago, is not among the newest \
                and is not used is disabled, and nothing is destroyed";
    if spared.is_empty() {
        return rule.to_owned();
    }
    format!("{rule}. Version 1 would have deleted {}", spared.join(", "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn response(dry_run: bool) -> CleanupResponse {
        let version = |number: u32, disabled, deleted_by_v1| CleanupVersion {
            context: "c".to_owned(),
            version: number,
            key_id: format!("kek-c-v{number}"),
            slot: "s".to_owned(),
            disabled,
            kept_because: if disabled {
                ""
            } else {
                "retired within the last 30 d"
            }
            .to_owned(),
            deleted_by_v1,
        };
        CleanupResponse {
            dry_run,
            versions: vec![
                version(1, true, true),
                version(2, false, true),
                version(3, false, false),
            ],
        }
    }

    #[test]
    fn what_version_1_would_have_deleted_is_named() {
        let said = difference(&response(false));
        assert!(said.ends_with("Version 1 would have deleted kek-c-v2"), "{said}");
        let nothing = CleanupResponse {
            dry_run: false,
            versions: Vec::new(),
        };
        assert!(!difference(&nothing).contains("would have"));
    }

    #[test]
    fn a_dry_run_does_not_say_that_anything_is_disabled() {
        let seen = text(&response(true));
        assert!(
            seen.contains("would be disabled") && seen.ends_with("nothing was changed\n"),
            "{seen}"
        );
        let seen = text(&response(false));
        assert!(
            seen.contains("disabled") && !seen.contains("would be") && seen.contains("retired within"),
            "{seen}"
        );
    }
}
