//! `hsmctl cluster join`: shows the keys of the joining node's slots, waits for a yes, has the node join, and
//! compares what the cluster has then. A join token is read from a file or standard input, never from the arguments.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use hsm_api::admin::{
    ClusterStatus, JoinRequest, JoinResponse, JoinTokenResponse, NodeRole, SlotFingerprint, SlotState,
};
use hsm_api::{Client, ErrorCode, SecretText};
use zeroize::Zeroizing;

use super::preview::{self, Preview};
use super::{MEMBERSHIP, Session};
use crate::exit::{repeatable_failed, usage, would_be_refused};
use crate::files;
use crate::output::{self, Format, note, or_dash};
use crate::terminal::{self, Questions, Terminal};

/// Longest input with a token.
const MAX_TOKEN: usize = 4096;
/// Hex digits of a SHA-256.
const DIGITS: usize = 64;
/// What has to be typed for yes.
const YES: &str = "yes";
/// A node registers its slots' keys as soon as it has the state; one that has nothing to import may vote before.
const REGISTERED_WITHIN: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Arguments of `cluster join`.
#[derive(Debug, Args)]
pub(crate) struct Join {
    /// File with the token, or with what `cluster token -o json` or `-o yaml` printed [default: standard input].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// SHA-256 of the cluster CA, from `cluster token`; needed unless the file has it.
    #[arg(long, value_name = "HEX")]
    cluster_ca_sha256: Option<String>,
    /// Cluster listeners of members, host:port; any will do.
    #[arg(
        long = "leader",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        required = true
    )]
    leaders: Vec<String>,
    /// Take the slots' keys for the node's without asking: for scripts.
    #[arg(long)]
    yes: bool,
    /// Say whether the node could join as far as it knows itself, and let it be.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn join(session: &Session, args: Join) -> Result<()> {
    let client = session.client_of_one(MEMBERSHIP)?;
    // First: a script that lacks the option is told so before anything is done.
    let remedy = "compare the fingerprints of the node's slot keys some other way, and say --yes";
    let terminal = match session.questions() {
        _ if args.yes => None,
        Questions::Asked if args.dry_run => None,
        questions => Some(Terminal::open(questions, remedy)?),
    };
    let text = match &args.token_file {
        Some(path) => files::read_secret(path)?,
        None => {
            terminal::announce_stdin(session.questions(), "the token", "--token-file")?;
            token_from_stdin()?
        }
    };
    let (token, printed_digest) = parse_token(&text)?;
    let Some(cluster_ca_sha256) = args.cluster_ca_sha256.or(printed_digest) else {
        return Err(usage(
            "the cluster CA is not pinned: give --cluster-ca-sha256 as `hsmctl cluster token` printed it",
        ));
    };
    let request = JoinRequest {
        token,
        cluster_ca_sha256,
        leader_addresses: args.leaders,
    };
    if args.dry_run {
        return dry_run(session, &client, &request).await;
    }
    let confirmed = confirm(session, &client, terminal).await?;
    let what = format!("cluster join through {}", request.leader_addresses.join(", "));
    let answer = session
        .ask(&client, &what, client.join(&request))
        .await
        .map_err(repeatable_failed)?;
    let mut joined = answer.into_body();
    wait_registered(session, &client, &confirmed, &mut joined).await?;
    let joined = &joined;
    output::print(session.format(), joined, || {
        let mut text = output::pairs([
            ("cluster", joined.cluster_id.clone()),
            ("raft id", joined.raft_id.to_string()),
            ("role", joined.role.to_string()),
        ]);
        text.push_str(&keys_text(&joined.slots));
        text
    })?;
    compare(&confirmed, &joined.slots)
}

/// Does not look at the slots' keys: a node that has none yet would make them.
async fn dry_run(session: &Session, client: &Client, request: &JoinRequest) -> Result<()> {
    preview::check_role(session, client, preview::ADMINISTER).await?;
    let status = session
        .ask(client, "cluster status", client.cluster_status())
        .await?;
    foresee(request, &status)?.print(session)
}

fn foresee(request: &JoinRequest, status: &ClusterStatus) -> Result<Preview> {
    let pin = &request.cluster_ca_sha256;
    if pin.len() != DIGITS || !pin.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let detail = format!("--cluster-ca-sha256: expected {DIGITS} hex digits");
        return Err(would_be_refused(ErrorCode::InvalidArgument, detail));
    }
    let node = &status.node_id;
    // A learner's join goes on.
    if !preview::belongs_to_none(status) && status.role != NodeRole::Learner {
        let detail = format!("{node} belongs to the cluster {} already", status.cluster_name);
        return Err(would_be_refused(ErrorCode::AlreadyInitialised, detail));
    }
    let mut preview = Preview::new(format!(
        "have {node} join through {}, once the keys of its slots are confirmed: it receives the state, imports and \
         proves every key, and then votes",
        request.leader_addresses.join(" or ")
    ))
    .not_checked("the token and the SHA-256 of the cluster CA: the cluster says, and a token is good for one join")
    .not_checked("whether the members can be reached, and reach the node");
    for slot in status.slots.iter().filter(|slot| slot.state != SlotState::Ready) {
        preview = preview.not_checked(format!(
            "slot {}, which is {} now ({}): a join needs it ready",
            slot.slot,
            slot.state,
            or_dash(slot.reason.as_deref())
        ));
    }
    Ok(preview)
}

fn keys_text(keys: &[SlotFingerprint]) -> String {
    keys.iter()
        .map(|key| format!("slot {}  node key {}\n", key.slot, key.spki_sha256))
        .collect()
}

/// The keys of the node's slots, which somebody has said yes to. Without a terminal that somebody is a script.
async fn confirm(
    session: &Session,
    client: &Client,
    terminal: Option<Terminal>,
) -> Result<Vec<SlotFingerprint>> {
    let answer = session
        .ask(client, "cluster join: slot keys", client.slot_keys())
        .await?;
    let keys = answer.into_body().slots;
    let shown = keys_text(&keys);
    let Some(mut terminal) = terminal else {
        if session.format() == Format::Table {
            note(&format!(
                "taken for the node's own, as --yes says:\n{}",
                shown.trim_end()
            ));
        }
        return Ok(keys);
    };
    let question = format!(
        "The cluster will encrypt its slots' transport keys to these public keys (SHA-256):\n{shown}Whoever has the \
         private key of another one would get every key of the slot. Are these the keys in the node's own tokens? \
         Type {YES} to join: "
    );
    if terminal.ask(&question)? != YES {
        bail!("not confirmed: nothing was joined, and the token is not used");
    }
    Ok(keys)
}

/// Until all keys that were confirmed are registered; a node without keys to import votes before that.
async fn wait_registered(
    session: &Session,
    client: &Client,
    confirmed: &[SlotFingerprint],
    joined: &mut JoinResponse,
) -> Result<()> {
    let begun = std::time::Instant::now();
    while !absent(confirmed, &joined.slots).is_empty() && begun.elapsed() < REGISTERED_WITHIN {
        tokio::time::sleep(ASK_AGAIN).await;
        let answer = session
            .ask(client, "cluster join: registered slot keys", client.slot_keys())
            .await
            .context("the node has joined, and which slot keys are registered for it is not known")?;
        joined.slots = answer.into_body().slots;
    }
    Ok(())
}

/// Names of the slots whose key is not registered.
fn absent<'a>(confirmed: &'a [SlotFingerprint], registered: &[SlotFingerprint]) -> Vec<&'a str> {
    let is_registered = |key: &&SlotFingerprint| registered.iter().any(|other| other.slot == key.slot);
    confirmed
        .iter()
        .filter(|key| !is_registered(key))
        .map(|key| key.slot.as_str())
        .collect()
}

/// What was confirmed has to be what the cluster has.
fn compare(confirmed: &[SlotFingerprint], registered: &[SlotFingerprint]) -> Result<()> {
    let other: Vec<String> = registered
        .iter()
        .filter(|key| !confirmed.contains(key))
        .map(|key| {
            let shown = confirmed.iter().find(|other| other.slot == key.slot);
            format!(
                "slot {}: registered {}, confirmed {}",
                key.slot,
                key.spki_sha256,
                or_dash(shown.map(|other| &other.spki_sha256))
            )
        })
        .collect();
    if !other.is_empty() {
        bail!(
            "THE NODE HAS JOINED WITH OTHER SLOT KEYS THAN THOSE CONFIRMED: {}. Whoever has their private keys gets the \
             keys of these slots: stop the node, and find out who registered them",
            other.join("; ")
        );
    }
    let absent = absent(confirmed, registered);
    if !absent.is_empty() {
        bail!(
            "the node has joined, and no key is registered for {}: compare it with the one confirmed once there is \
             one (GET /admin/v1/cluster/slot-keys); the node's log says what it waits for",
            absent.join(", ")
        );
    }
    Ok(())
}

fn token_from_stdin() -> Result<Zeroizing<String>> {
    let input = data_of_stdin()?;
    let text = std::str::from_utf8(&input).context("the token on standard input is not text")?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn data_of_stdin() -> Result<Zeroizing<Vec<u8>>> {
    files::read_bounded(
        super::data::unbuffered_stdin()?,
        MAX_TOKEN,
        "the token on standard input",
    )
}

/// The token, and the digest of the CA if the text is what `cluster token` prints for programs.
fn parse_token(text: &str) -> Result<(SecretText, Option<String>)> {
    let text = text.trim();
    if text.is_empty() {
        bail!("there is no token: make one with `hsmctl cluster token`");
    }
    // A token has neither brace nor blank.
    let printed = if text.starts_with('{') {
        serde_json::from_str::<JoinTokenResponse>(text).ok()
    } else if text.contains(char::is_whitespace) {
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::from_str_with_options::<JoinTokenResponse>(text, options).ok()
    } else {
        return Ok((SecretText::from(text), None));
    };
    // The parsers' messages may repeat what they could not read.
    let Some(printed) = printed else {
        bail!("this is neither a token nor what `hsmctl cluster token` prints with -o json or -o yaml");
    };
    Ok((printed.token, Some(printed.cluster_ca_sha256)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_token_is_taken_bare_or_as_it_was_printed() {
        let (token, digest) = parse_token(" hsm-join-1.7.ab\n").unwrap();
        assert_eq!((token.expose(), digest), ("hsm-join-1.7.ab", None));
        let printed = r#"{"token": "hsm-join-1.7.ab", "cluster_ca_sha256": "00ff", "expires_at": "2030-01-01T00:00:00Z"}"#;
        let (token, digest) = parse_token(printed).unwrap();
        assert_eq!(
            (token.expose(), digest.as_deref()),
            ("hsm-join-1.7.ab", Some("00ff"))
        );
        let json: serde_json::Value = serde_json::from_str(printed).unwrap();
        let (token, digest) = parse_token(&output::yaml(&json).unwrap()).unwrap();
        assert_eq!(
            (token.expose(), digest.as_deref()),
            ("hsm-join-1.7.ab", Some("00ff"))
        );
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        assert!(parse_token(" \n").is_err());
        for text in ["{\"token\": planted}", "token: [planted]\nother: planted"] {
            let error = parse_token(text).unwrap_err().to_string();
            assert!(!error.contains("planted"), "{error}");
        }
    }

    fn status(cluster: &str, role: &str) -> ClusterStatus {
        serde_json::from_value(serde_json::json!({
            "cluster_id": cluster, "cluster_name": "c", "epoch": 0, "node_id": "hsm-node-2", "raft_id": 0,
            "role": role, "term": 0, "leader": null, "last_log_index": 0, "committed_index": 0,
            "applied_index": 0, "quorum_ack_age_ms": null, "staleness_ms": null, "ready": false,
            "slots": [{"slot": "2fa", "label": "l", "state": "locked", "reason": "wrong PINs", "missing_keys": 0}],
            "failure_tolerance": 0
        }))
        .unwrap()
    }

    #[test]
    fn a_dry_run_says_what_the_node_knows_and_what_it_does_not() {
        let request = |pin: &str| JoinRequest {
            token: SecretText::from("planted"),
            cluster_ca_sha256: pin.to_owned(),
            leader_addresses: vec!["hsm-1:8445".to_owned()],
        };
        let right = request(&"0f".repeat(32));
        for now in [status("", "uninitialised"), status("01", "learner")] {
            let preview = serde_json::to_string(&foresee(&right, &now).unwrap()).unwrap();
            assert!(
                preview.contains("hsm-node-2 join through hsm-1:8445") && preview.contains("wrong PINs"),
                "{preview}"
            );
            assert!(!preview.contains("planted"), "{preview}");
        }
        let member = foresee(&right, &status("01", "follower")).unwrap_err();
        assert_eq!(Exit::of(&member), Exit::Conflict, "{member}");
        let short = foresee(&request("0f"), &status("", "uninitialised")).unwrap_err();
        assert_eq!(Exit::of(&short), Exit::Usage, "{short}");
    }

    fn keys(keys: &[(&str, &str)]) -> Vec<SlotFingerprint> {
        let key = |(slot, print): &(&str, &str)| SlotFingerprint {
            slot: (*slot).to_owned(),
            spki_sha256: (*print).to_owned(),
        };
        keys.iter().map(key).collect()
    }

    #[test]
    fn another_key_than_the_one_confirmed_is_a_failure() {
        let confirmed = keys(&[("2fa", "aa"), ("exchange", "bb")]);
        assert!(compare(&confirmed, &confirmed).is_ok());
        let text =
            |registered: &[(&str, &str)]| compare(&confirmed, &keys(registered)).unwrap_err().to_string();
        let error = text(&[("2fa", "aa"), ("exchange", "cc")]);
        assert!(
            error.contains("OTHER SLOT KEYS") && error.contains("slot exchange: registered cc, confirmed bb"),
            "{error}"
        );
        assert!(!error.contains("slot 2fa"), "{error}");
        let error = text(&[("2fa", "aa"), ("exchange", "bb"), ("more", "dd")]);
        assert!(error.contains("slot more: registered dd, confirmed -"), "{error}");
        let error = text(&[("2fa", "aa")]);
        assert!(error.contains("no key is registered for exchange"), "{error}");
    }
}
