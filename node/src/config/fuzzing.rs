//! See [`crate::fuzzing`].
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::{Config, ConfigError, yaml_options};

/// Every secret that a configuration may name is set; version 1's PIN only where the file has none.
fn parse(text: &str, pin_in_file: bool) -> Result<Config, ConfigError> {
    let env = |name: &str| match name {
        "TOKEN_REPLICATION_KEY" => Some("k".to_owned()),
        "HSM_PIN" => (!pin_in_file).then(|| "1234".to_owned()),
        name if name.starts_with("HSM_PIN_") || name.starts_with("PIN_") => Some("1234".to_owned()),
        _ => None,
    };
    Config::parse(text, Path::new("x"), Some(0o600), &env)
}

/// What a node would print of it.
fn said(parsed: &Result<Config, ConfigError>) -> String {
    match parsed {
        Ok(config) => format!("{config:?}"),
        Err(error) => format!("{error} {error:?}"),
    }
}

/// A configuration: what is accepted keeps the rules that the rest of the node relies on, and whatever is printed of
/// it, the PIN is not in it.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let pin = pin(text);
    let parsed = parse(text, pin.is_some());
    if let Some(pin) = &pin {
        let other = text.replacen(pin, &"Z".repeat(pin.len()), 1);
        // A word of ours may happen to be the PIN.
        let of_ours = || said(&parse(&other, true)).contains(pin);
        assert!(!said(&parsed).contains(pin) || of_ours(), "a PIN was printed");
    }
    let Ok(config) = parsed else { return false };
    let mut seen = BTreeSet::new();
    for slot in &config.hsm.slots {
        assert!(slot.threads > 0);
        for context in &slot.contexts {
            assert!(seen.insert(context.to_string()), "{context} is in two slots");
        }
    }
    let staleness = config.staleness;
    assert!(staleness.ready <= staleness.encrypt && staleness.ready <= staleness.decrypt);
    assert!(config.destroy.min_wait <= config.destroy.default_wait);
    let raft = config.cluster.raft;
    assert!(raft.heartbeat < raft.election_min && raft.election_min <= raft.election_max);
    true
}

/// The PIN in the file, if it stands there once and can be told from anything else.
fn pin(text: &str) -> Option<String> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct File {
        hsm: Option<Hsm>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Hsm {
        pin: Option<String>,
    }
    // An alias would make the PIN something else too.
    if text.contains(['*', '&']) {
        return None;
    }
    let file: File = serde_saphyr::from_str_with_options(text, yaml_options()).ok()?;
    let pin = file.hsm?.pin?;
    let can_be_told = pin.len() >= 8 && pin.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (can_be_told && text.matches(&pin).count() == 1).then_some(pin)
}
