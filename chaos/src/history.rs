//! What the cluster acknowledged, and what follows from it: every version whose rotation was acknowledged exists on
//! every node, and every ciphertext that was handed out decrypts there. Of each version a fixed number of
//! ciphertexts is kept, drawn evenly from all of it, so that a long run forgets no version.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hsm_api::admin::{ContextInfo, KeyState};
use hsm_api::client::{Client, Retry};
use hsm_api::data::DecryptRequest;
use hsm_api::{Base64, ClientError};

use crate::playground::Playground;
use crate::random::Random;

/// What is encrypted in.
pub(crate) const CONTEXT: &str = "exchange-key";
/// Ciphertexts kept of each version.
const KEPT: usize = 50;
/// Violations that are told one by one; beyond it the first tell enough.
const TOLD: usize = 100;
/// A follower hears of what was acknowledged a moment later; a busy node is asked again.
const SETTLED: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);

/// An acknowledged encryption.
pub(crate) struct Sealed {
    pub(crate) plaintext: Vec<u8>,
    pub(crate) ciphertext: Base64,
    pub(crate) version: u32,
}

/// What is known of one version.
#[derive(Default)]
struct Version {
    /// Ciphertexts that were acknowledged.
    total: u64,
    kept: Vec<Sealed>,
}

/// See the module.
pub(crate) struct History {
    random: Random,
    versions: BTreeMap<u32, Version>,
    rotations: BTreeSet<u32>,
    /// Calls that failed, or whose outcome is unknown.
    failures: u64,
    violations: Vec<String>,
}

impl History {
    /// Nothing yet. What is kept follows from the seed and from what happens.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            versions: BTreeMap::new(),
            rotations: BTreeSet::new(),
            failures: 0,
            violations: Vec::new(),
        }
    }

    /// A ciphertext was handed out.
    pub(crate) fn encrypted(&mut self, sealed: Sealed) {
        let version = self.versions.entry(sealed.version).or_default();
        version.total += 1;
        if version.kept.len() < KEPT {
            version.kept.push(sealed);
            return;
        }
        // Each of the `total` so far is kept with the same chance.
        let place = usize::try_from(self.random.below(version.total)).unwrap_or(usize::MAX);
        if let Some(kept) = version.kept.get_mut(place) {
            *kept = sealed;
        }
    }

    /// A rotation was acknowledged.
    pub(crate) fn rotated(&mut self, version: u32) {
        if self.rotations.last().is_some_and(|last| *last >= version) {
            let last = self.rotations.last().copied().unwrap_or_default();
            self.violation(format!("version {version} was made after version {last}"));
        }
        self.rotations.insert(version);
    }

    /// Calls failed that may fail while nodes are killed.
    pub(crate) fn failed(&mut self, calls: u64) {
        self.failures += calls;
    }

    /// What came of decrypting an acknowledged ciphertext.
    pub(crate) fn opened(&mut self, what: &str, outcome: Opened) {
        match outcome {
            Opened::Right => {}
            Opened::NotNow => self.failed(1),
            Opened::Wrong(why) => self.violation(format!("{what}: {why}")),
        }
    }

    fn violation(&mut self, text: String) {
        if self.violations.len() < TOLD {
            self.violations.push(text);
        }
    }

    pub(crate) fn encryptions(&self) -> u64 {
        self.versions.values().map(|version| version.total).sum()
    }

    pub(crate) fn rotations(&self) -> usize {
        self.rotations.len()
    }

    /// One line for people.
    pub(crate) fn summary(&self) -> String {
        let kept: usize = self.versions.values().map(|version| version.kept.len()).sum();
        format!(
            "{} encryptions under {} versions and {} rotations acknowledged, {} calls failed or unknown; {kept} \
             ciphertexts to be decrypted on every node",
            self.encryptions(),
            self.versions.len(),
            self.rotations(),
            self.failures
        )
    }

    /// Asks every node for everything; returns what is wrong.
    pub(crate) async fn check(mut self, playground: &Playground) -> Result<Vec<String>> {
        for node in 1..=playground.nodes {
            let admin = playground.client("admin", &[node], Retry::Until(SETTLED))?;
            for text in self.missing_on(node, &admin).await? {
                self.violation(text);
            }
            let client = playground.client("trading-1", &[node], Retry::Until(SETTLED))?;
            let mut wrong = Vec::new();
            for sealed in self.versions.values().flat_map(|version| &version.kept) {
                let why = match open(&client, sealed).await {
                    Opened::Right => continue,
                    Opened::NotNow => format!("no answer within {SETTLED:?}"),
                    Opened::Wrong(why) => why,
                };
                wrong.push(format!(
                    "node {node}: {} of version {}: {why}",
                    text(sealed),
                    sealed.version
                ));
            }
            for text in wrong {
                self.violation(text);
            }
        }
        Ok(self.violations)
    }

    /// Acknowledged rotations that a node does not know, once it has had the time to hear of them.
    async fn missing_on(&self, node: usize, admin: &Client) -> Result<Vec<String>> {
        let deadline = Instant::now() + SETTLED;
        loop {
            let keks = admin
                .list_keks()
                .await
                .with_context(|| format!("list keys of node {node}"))?;
            let known = keks.contexts.iter().find(|info| info.context == CONTEXT);
            let missing = self.missing_in(node, known);
            if missing.is_empty() || Instant::now() >= deadline {
                return Ok(missing);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn missing_in(&self, node: usize, known: Option<&ContextInfo>) -> Vec<String> {
        let state = |number: u32| {
            let versions = &known?.versions;
            let found = versions.iter().find(|version| version.version == number)?;
            Some(found.state)
        };
        self.rotations
            .iter()
            .filter_map(|number| match state(*number) {
                Some(KeyState::Active | KeyState::DecryptOnly) => None,
                Some(state) => Some(format!(
                    "node {node}: version {number}, whose rotation was acknowledged, is {state}"
                )),
                None => Some(format!(
                    "node {node}: version {number}, whose rotation was acknowledged, is not there"
                )),
            })
            .collect()
    }
}

/// What came of decrypting an acknowledged ciphertext.
pub(crate) enum Opened {
    Right,
    /// The node is down, busy or not in step: that may be while nodes are killed.
    NotNow,
    /// What must never be.
    Wrong(String),
}

/// Decrypts an acknowledged ciphertext.
pub(crate) async fn open(client: &Client, sealed: &Sealed) -> Opened {
    let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
    match client.decrypt(&request).await {
        Ok(answer) if answer.plaintext.as_slice() == sealed.plaintext.as_slice() => Opened::Right,
        Ok(_) => Opened::Wrong("it decrypted to something else".to_owned()),
        Err(error) if is_excused(&error) => Opened::NotNow,
        Err(error) => Opened::Wrong(error.to_string()),
    }
}

/// Whether a call may fail so while nodes are killed: nobody is there, or whoever is says that it cannot now.
fn is_excused(error: &ClientError) -> bool {
    match error {
        ClientError::Api(answer) => matches!(answer.status, 429 | 503 | 504),
        ClientError::Decode { .. } | ClientError::Request(_) => false,
        ClientError::Connect { .. }
        | ClientError::Tls { .. }
        | ClientError::Transport { .. }
        | ClientError::Timeout { .. }
        | ClientError::RefusedAfterSilence { .. }
        | ClientError::NoneAnswered { .. } => true,
    }
}

fn text(sealed: &Sealed) -> String {
    String::from_utf8_lossy(&sealed.plaintext).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;
    use hsm_api::admin::{BindingMode, KeyOrigin, KeyVersionInfo};
    use hsm_api::client::ApiError;

    use super::*;

    fn sealed(version: u32, number: u64) -> Sealed {
        Sealed {
            plaintext: format!("plaintext {number}").into_bytes(),
            ciphertext: Base64::from(b"sealed"),
            version,
        }
    }

    fn api(status: u16) -> ClientError {
        ClientError::Api(Box::new(ApiError {
            status,
            code: None::<ErrorCode>,
            code_text: String::new(),
            detail: String::new(),
            request_id: None,
            retryable: false,
            retry_after: None,
            node: None,
            endpoint: String::new(),
        }))
    }

    fn context(versions: &[(u32, KeyState)]) -> ContextInfo {
        let version = |(number, state): &(u32, KeyState)| KeyVersionInfo {
            version: *number,
            key_id: format!("kek-{CONTEXT}-v{number}"),
            key_uid: String::new(),
            slot: "exchange".to_owned(),
            state: *state,
            created_at: String::new(),
            activated_at: None,
            retired_at: None,
            acks: Vec::new(),
            origin: KeyOrigin::Generated,
            holders: Vec::new(),
            destruction: None,
            invocations: None,
        };
        ContextInfo {
            context: CONTEXT.to_owned(),
            slot: "exchange".to_owned(),
            binding: BindingMode::Shared,
            active_version: None,
            versions: versions.iter().map(version).collect(),
        }
    }

    #[test]
    fn every_version_keeps_some_and_the_totals_are_true() {
        let mut history = History::new(1);
        for number in 0..1000 {
            history.encrypted(sealed(1, number));
        }
        history.encrypted(sealed(2, 1000));
        assert_eq!(history.encryptions(), 1001);
        assert_eq!(history.versions[&1].kept.len(), KEPT);
        assert_eq!(history.versions[&2].kept.len(), 1);
        // Not the first ones only.
        let late = history.versions[&1].kept.iter().any(|kept| {
            let number: u64 = text(kept).trim_start_matches("plaintext ").parse().unwrap();
            number >= 500
        });
        assert!(late);
    }

    #[test]
    fn an_acknowledged_rotation_has_to_be_there_and_not_given_up() {
        let mut history = History::new(1);
        for version in [2, 3, 4] {
            history.rotated(version);
        }
        let known = context(&[
            (1, KeyState::DecryptOnly),
            (2, KeyState::DecryptOnly),
            (3, KeyState::Abandoned),
        ]);
        let missing = history.missing_in(2, Some(&known));
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert!(missing[0].contains("version 3") && missing[0].contains("abandoned"));
        assert!(missing[1].contains("version 4") && missing[1].contains("not there"));
        assert_eq!(history.missing_in(2, None).len(), 3);
        let all = context(&[
            (2, KeyState::DecryptOnly),
            (3, KeyState::DecryptOnly),
            (4, KeyState::Active),
        ]);
        assert!(history.missing_in(2, Some(&all)).is_empty());
    }

    #[test]
    fn one_version_acknowledged_twice_is_a_violation() {
        let mut history = History::new(1);
        history.rotated(2);
        history.rotated(2);
        assert_eq!(history.violations.len(), 1);
        assert_eq!(history.rotations(), 1);
    }

    #[test]
    fn only_absence_and_being_busy_excuse_a_decryption() {
        for status in [429, 503, 504] {
            assert!(is_excused(&api(status)), "{status}");
        }
        for status in [400, 403, 404, 500, 502] {
            assert!(!is_excused(&api(status)), "{status}");
        }
        let gone = ClientError::Connect {
            endpoint: String::new(),
            reason: String::new(),
        };
        assert!(is_excused(&gone));
        let unreadable = ClientError::Decode {
            endpoint: String::new(),
            status: 200,
            reason: String::new(),
        };
        assert!(!is_excused(&unreadable));
    }
}
