//! `hsmctl cluster join`: shows the keys of the joining node's slots, waits for a yes, has the node join, and
//! compares what the cluster has then. A join token is read from a file or standard input, never from the arguments.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use hsm_api::admin::{JoinRequest, JoinResponse, JoinTokenResponse, SlotFingerprint};
use hsm_api::{Client, SecretText};
use zeroize::Zeroizing;

use super::{MEMBERSHIP, Session};
use crate::exit::{repeatable_failed, usage};
use crate::files;
use crate::output::{self, Format, note, or_dash};
use crate::terminal::Terminal;

/// Longest input with a token.
const MAX_TOKEN: usize = 4096;
/// What has to be typed for yes.
const YES: &str = "yes";
/// A node registers its slots' keys as soon as it has the state; one that has nothing to import may vote before.
const REGISTERED_WITHIN: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Arguments of `cluster join`.
#[derive(Debug, Args)]
pub(crate) struct Join {
    /// File with the token, or with the JSON of `cluster token -o json` [default: standard input].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// SHA-256 of the cluster CA, from `cluster token`; needed unless the JSON has it.
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
}

pub(super) async fn join(session: &Session, args: Join) -> Result<()> {
    let client = session.client_of_one(MEMBERSHIP)?;
    // First: a script that lacks the option is told so before anything is done.
    let terminal = if args.yes {
        None
    } else {
        let remedy = "compare the fingerprints of the node's slot keys some other way, and say --yes";
        Some(Terminal::open(remedy)?)
    };
    let text = match &args.token_file {
        Some(path) => files::read_secret(path)?,
        None => token_from_stdin()?,
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

/// The token, and the digest of the CA if the text is the JSON that `cluster token` prints.
fn parse_token(text: &str) -> Result<(SecretText, Option<String>)> {
    let text = text.trim();
    if text.is_empty() {
        bail!("there is no token: make one with `hsmctl cluster token`");
    }
    if !text.starts_with('{') {
        return Ok((SecretText::from(text), None));
    }
    // serde's messages may repeat what they could not read.
    let Ok(printed) = serde_json::from_str::<JoinTokenResponse>(text) else {
        bail!("the token's JSON is not what `hsmctl cluster token -o json` prints");
    };
    Ok((printed.token, Some(printed.cluster_ca_sha256)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

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
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        assert!(parse_token(" \n").is_err());
        let error = parse_token("{\"token\": planted}").unwrap_err().to_string();
        assert!(!error.contains("planted"), "{error}");
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
