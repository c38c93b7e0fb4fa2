//! What was said to be destroyed stays so, and is in no token of any node: tokens are looked into past the nodes. The reverse
//! too: what a node can use is in its token.

use std::collections::BTreeSet;

use hsm_api::admin::KeyState;

use super::Found;
use super::observed::{NodeView, Observed, TokenView, VersionView};
use crate::history::{Answer, History, Operation, Outcome};

pub(super) const NAME: &str = "destruction";
/// Versions that were looked for in tokens, of all states.
pub(super) const TOKENS: &str = "tokens";

pub(super) fn judge(history: &History, observed: &Observed, found: &mut Found) {
    let acknowledged = acknowledged(history);
    for node in &observed.nodes {
        for (context, version) in &acknowledged {
            stays(node, context, *version, found);
        }
        tokens(node, &acknowledged, found);
    }
}

/// Versions that anybody has called destroyed.
fn acknowledged(history: &History) -> BTreeSet<(&str, u32)> {
    let of = |outcome: &Outcome| {
        matches!(
            outcome,
            Outcome::Ok(Answer::State {
                state: KeyState::Destroyed
            })
        )
    };
    let mut all = BTreeSet::new();
    for done in &history.changes {
        if let Operation::Show { context, version, .. } | Operation::Destroy { context, version, .. } =
            &done.operation
            && of(&done.outcome)
        {
            all.insert((context.as_str(), *version));
        }
    }
    all
}

fn stays(node: &NodeView, context: &str, version: u32, found: &mut Found) {
    if node.keys.is_none() {
        return;
    }
    found.checked(NAME, 1);
    let state = node.version(context, version).map(|known| known.state);
    if state != Some(KeyState::Destroyed) {
        let state = state.map_or("not there", KeyState::as_str);
        let text = format!(
            "node {}: {context} version {version} was said to be destroyed, and is {state}",
            node.node
        );
        found.violation(NAME, text);
    }
}

fn tokens(node: &NodeView, acknowledged: &BTreeSet<(&str, u32)>, found: &mut Found) {
    for context in node.keys.iter().flatten() {
        for version in &context.versions {
            let Some(token) = node.tokens.iter().find(|token| token.slot == version.slot) else {
                continue;
            };
            found.checked(TOKENS, 1);
            let gone = acknowledged.contains(&(context.context.as_str(), version.number));
            if let Some(what) = wrong(version, token, gone, node.ready) {
                let text = format!(
                    "node {}: {} version {} is {}, and its key {} {what}",
                    node.node, context.context, version.number, version.state, version.id
                );
                found.violation(NAME, text);
            }
        }
    }
}

fn wrong(version: &VersionView, token: &TokenView, gone: bool, ready: bool) -> Option<String> {
    let held = token.ids.contains(&version.id);
    let over = gone || version.state == KeyState::Destroyed;
    let usable = matches!(version.state, KeyState::Active | KeyState::DecryptOnly);
    match (held, over) {
        (true, true) => Some(format!("is in the token of slot {}", token.slot)),
        (false, false) if usable && ready => Some(format!(
            "is not in the token of slot {}, whose node is ready",
            token.slot
        )),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, context, judged, nodes_with, version};
    use super::*;

    fn said(seen: Option<KeyState>, state: KeyState, ids: Vec<u32>) -> Vec<String> {
        let mut script = Script::default();
        if let Some(state) = seen {
            let show = Operation::Show {
                context: "c".to_owned(),
                version: 1,
                node: 1,
            };
            script.did(show, Outcome::Ok(Answer::State { state }));
        }
        let mut observed = nodes_with(vec![context("c", vec![version(1, state)])]);
        observed.nodes.truncate(1);
        observed.nodes[0].tokens = vec![TokenView {
            slot: "exchange".to_owned(),
            ids: ids.iter().map(|id| format!("{id:032x}")).collect(),
        }];
        judged(&script.history(), &observed, judge)
    }

    #[test]
    fn what_is_destroyed_is_in_no_token_and_what_is_used_is() {
        use KeyState::{Active, DecryptOnly, DestroyScheduled, Destroyed};
        for (seen, state, ids, violations) in [
            (None, Active, vec![1], 0),
            (None, DecryptOnly, vec![], 1),
            (None, DestroyScheduled, vec![], 0),
            (None, Destroyed, vec![], 0),
            (None, Destroyed, vec![1], 1),
            (Some(Destroyed), Destroyed, vec![2], 0),
            // It has come back, in the state and in the token.
            (Some(Destroyed), DecryptOnly, vec![1], 2),
        ] {
            let name = format!("{seen:?} {state} {ids:?}");
            let said = said(seen, state, ids);
            assert_eq!(said.len(), violations, "{name}: {said:?}");
        }
    }

    #[test]
    fn a_token_that_nobody_looked_into_is_no_witness() {
        let observed = nodes_with(vec![context("c", vec![version(1, KeyState::Active)])]);
        assert!(judged(&Script::default().history(), &observed, judge).is_empty());
    }
}
