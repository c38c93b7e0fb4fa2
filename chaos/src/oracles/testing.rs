//! Histories and clusters for the tests of the oracles.

use hsm_api::admin::KeyState;

use super::observed::{ContextState, NodeView, Observed, VersionView};
use super::{Found, Judgement};
use crate::history::{Done, History, Kept, Operation, Outcome, Version};
use crate::schedule::{Effect, FaultKind, Fired};

/// A history in the making: one operation after the other.
#[derive(Default, Clone)]
pub(super) struct Script {
    changes: Vec<Done>,
    at: u64,
}

impl Script {
    pub(super) fn did(&mut self, operation: Operation, outcome: Outcome) {
        self.did_at(operation, None, outcome);
    }

    /// With `X-HSM-Index`.
    pub(super) fn did_at(&mut self, operation: Operation, index: Option<u64>, outcome: Outcome) {
        self.at += 10;
        let known = !matches!(outcome, Outcome::Unknown { .. });
        self.changes.push(Done {
            process: 1,
            operation,
            outcome,
            invoked: self.at,
            completed: known.then_some(self.at + 5),
            index,
        });
    }

    pub(super) fn history(self) -> History {
        History {
            changes: self.changes,
            ended: self.at + 10,
            ..History::default()
        }
    }
}

/// A history with ciphertexts of one version.
pub(super) fn with_version(
    mut history: History,
    context: &str,
    number: u32,
    mut version: Version,
) -> History {
    if version.kept.is_empty() {
        version.total += 1;
        version.kept.push(Kept {
            number: 1,
            ciphertext: "sealed".to_owned(),
        });
    }
    history.versions.insert((context.to_owned(), number), version);
    history
}

/// A fault that had its effect, with its times in milliseconds.
pub(super) fn fired(kind: FaultKind, at_ms: u64, healed_ms: u64, target: &str) -> Fired {
    Fired {
        step: 1,
        kind,
        at_ms,
        target: target.to_owned(),
        effect: Effect::Counted,
        healed_ms,
    }
}

/// What one oracle tells.
pub(super) fn judged(
    history: &History,
    observed: &Observed,
    oracle: impl Fn(&History, &Observed, &mut Found),
) -> Vec<String> {
    told(|found| oracle(history, observed, found))
}

/// What one oracle could not decide.
pub(super) fn undecided(oracle: impl Fn(&mut Found)) -> Vec<String> {
    let mut found = Found::default();
    oracle(&mut found);
    found.undecided
}

/// What one oracle tells.
pub(super) fn told(oracle: impl Fn(&mut Found)) -> Vec<String> {
    let mut found = Found::default();
    oracle(&mut found);
    match found.judgement() {
        Judgement::Violations(findings) => findings.into_iter().map(|finding| finding.text).collect(),
        Judgement::Pass | Judgement::Inconclusive(_) => Vec::new(),
    }
}

pub(super) fn version(number: u32, state: KeyState) -> VersionView {
    VersionView {
        number,
        state,
        activated: !matches!(state, KeyState::Pending | KeyState::Abandoned),
        id: format!("{number:032x}"),
        slot: "exchange".to_owned(),
    }
}

pub(super) fn context(name: &str, versions: Vec<VersionView>) -> ContextState {
    let active = versions.iter().find(|version| version.state == KeyState::Active);
    ContextState {
        context: name.to_owned(),
        active: active.map(|version| version.number),
        versions,
    }
}

/// Two nodes that say the same.
pub(super) fn nodes_with(contexts: Vec<ContextState>) -> Observed {
    let view = |node| NodeView {
        node,
        ready: true,
        keys: Some(contexts.clone()),
        ..NodeView::default()
    };
    Observed {
        nodes: vec![view(1), view(2)],
        ..Observed::default()
    }
}

/// One node with these contexts: retired versions, and the active one.
pub(super) fn node_with(contexts: &[(&str, &[u32], Option<u32>)]) -> Observed {
    let states = contexts.iter().map(|(name, retired, active)| {
        let retired = retired
            .iter()
            .map(|number| version(*number, KeyState::DecryptOnly));
        let active = active.iter().map(|number| version(*number, KeyState::Active));
        context(name, retired.chain(active).collect())
    });
    let mut observed = nodes_with(states.collect());
    observed.nodes.truncate(1);
    observed
}
