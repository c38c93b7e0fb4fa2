//! At most one version of a context is active; numbers go up one by one, and whatever is not there any more was abandoned or
//! destroyed and is still listed; no number, and no key, is there twice.

use std::collections::{BTreeMap, BTreeSet};

use hsm_api::admin::KeyState;

use super::Found;
use super::observed::{ContextState, NodeView, Observed, VersionView};
use crate::history::{Answer, ContextView, Done, History, Operation, Outcome};

pub(super) const NAME: &str = "versions";

pub(super) fn judge(history: &History, observed: &Observed, found: &mut Found) {
    found.violations(NAME, &history.behind);
    for done in &history.changes {
        if let (Operation::Keys { node }, Outcome::Ok(Answer::Keys { contexts })) =
            (&done.operation, &done.outcome)
        {
            for seen in contexts {
                during(*node, seen, found);
            }
        }
    }
    acknowledged(history, found);
    for node in &observed.nodes {
        for context in node.keys.iter().flatten() {
            at_the_end(node.node, context, history, found);
        }
    }
    agreed(&observed.nodes, found);
}

fn during(node: u32, seen: &ContextView, found: &mut Found) {
    found.checked(NAME, 1);
    if seen.active.len() > 1 {
        let text = format!(
            "node {node}: {} has several active versions: {:?}",
            seen.context, seen.active
        );
        found.violation(NAME, text);
    }
    if seen.listed != seen.highest {
        let text = format!(
            "node {node}: {} lists {} versions, and the highest is {}",
            seen.context, seen.listed, seen.highest
        );
        found.violation(NAME, text);
    }
}

/// Of requests one after the other, the later one has the higher version; no two have the same.
fn acknowledged(history: &History, found: &mut Found) {
    let mut made: BTreeMap<(&str, u32), &str> = BTreeMap::new();
    // By context: when, and which.
    let mut answered: BTreeMap<&str, Vec<(u64, u32)>> = BTreeMap::new();
    let mut first: Vec<(&str, &str, &Done, u32)> = Vec::new();
    let mut keys = BTreeSet::new();
    for done in &history.changes {
        let (Operation::Rotate { context, key } | Operation::Create { context, key }) = &done.operation
        else {
            continue;
        };
        // A repeat may be answered late with what was made early.
        let is_first = keys.insert(key.as_str());
        let (Outcome::Ok(Answer::Rotated { version, .. }), Some(completed)) = (&done.outcome, done.completed)
        else {
            continue;
        };
        found.checked(NAME, 1);
        if let Some(other) = made.insert((context.as_str(), *version), key)
            && other != key
        {
            let text =
                format!("{context} version {version} is the answer to two requests, {other} and {key}");
            found.violation(NAME, text);
        }
        answered.entry(context).or_default().push((completed, *version));
        if is_first {
            first.push((context.as_str(), key.as_str(), done, *version));
        }
    }
    for (context, key, done, version) in first {
        let before = answered.get(context).into_iter().flatten();
        let before = before.filter(|(completed, _)| *completed < done.invoked);
        if let Some((_, higher)) = before.max_by_key(|(_, version)| *version)
            && *higher >= version
        {
            let text = format!(
                "{context} version {version} was made for {key}, which was asked for after version {higher} was acknowledged"
            );
            found.violation(NAME, text);
        }
    }
}

fn at_the_end(node: u32, context: &ContextState, history: &History, found: &mut Found) {
    found.checked(NAME, context.versions.len() as u64);
    let name = &context.context;
    let active: Vec<u32> = context
        .versions
        .iter()
        .filter(|version| version.state == KeyState::Active)
        .map(|version| version.number)
        .collect();
    if active.len() > 1 || active.first().copied() != context.active {
        let text = format!(
            "node {node}: {name} has the active versions {active:?}, and says that {:?} is active",
            context.active
        );
        found.violation(NAME, text);
    }
    let numbers = context.versions.iter().map(|version| version.number);
    if !numbers.clone().eq(1..=context.versions.len() as u32) {
        let text = format!(
            "node {node}: the versions of {name} are no unbroken row: {:?}",
            numbers.collect::<Vec<_>>()
        );
        found.violation(NAME, text);
    }
    let ids: BTreeSet<&str> = context
        .versions
        .iter()
        .map(|version| version.id.as_str())
        .collect();
    if ids.len() != context.versions.len() {
        found.violation(NAME, format!("node {node}: two versions of {name} have one key"));
    }
    for version in &context.versions {
        let used = history.versions.get(&(name.clone(), version.number));
        if !version.activated && used.is_some_and(|used| used.total > 0) {
            let text = format!(
                "node {node}: {name} version {} is {} and was never active, and ciphertexts were handed out under it",
                version.number, version.state
            );
            found.violation(NAME, text);
        }
    }
}

/// They have settled.
fn agreed(nodes: &[NodeView], found: &mut Found) {
    let mut known = nodes
        .iter()
        .filter_map(|node| Some((node.node, node.keys.as_ref()?)));
    let Some((first, keys)) = known.next() else { return };
    for (node, others) in known {
        found.checked(NAME, 1);
        for context in keys {
            let other = others.iter().find(|other| other.context == context.context);
            if !other.is_some_and(|other| alike(context, other)) {
                let text = format!(
                    "nodes {first} and {node} say different things of {}: {context:?} and {other:?}",
                    context.context
                );
                found.violation(NAME, text);
            }
        }
    }
}

/// The same versions in the same states; how far a destruction is, one node may hear a moment after the other.
fn alike(one: &ContextState, other: &ContextState) -> bool {
    use KeyState::{DestroyScheduled, Destroyed, Destroying};
    let ends = |state| matches!(state, DestroyScheduled | Destroying | Destroyed);
    let same = |(one, other): (&VersionView, &VersionView)| {
        let states = one.state == other.state || (ends(one.state) && ends(other.state));
        states && (one.number, &one.id, &one.slot) == (other.number, &other.id, &other.slot)
    };
    one.active == other.active
        && one.versions.len() == other.versions.len()
        && one.versions.iter().zip(&other.versions).all(same)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, context, judged, nodes_with, version, with_version};
    use super::*;
    use crate::history::Version;

    fn end(versions: &[(u32, KeyState)]) -> Vec<String> {
        let versions = versions.iter().map(|(number, state)| version(*number, *state));
        let observed = nodes_with(vec![context("c", versions.collect())]);
        let mut said = judged(&Script::default().history(), &observed, judge);
        // Both nodes say the same.
        said.truncate(said.len() / 2);
        said
    }

    #[test]
    fn a_context_has_one_active_version_and_an_unbroken_row_of_numbers() {
        use KeyState::{Abandoned, Active, DecryptOnly, Destroyed};
        assert!(end(&[(1, Destroyed), (2, Abandoned), (3, DecryptOnly), (4, Active)]).is_empty());
        assert_eq!(end(&[(1, Active), (2, Active)]).len(), 1);
        assert_eq!(end(&[(1, DecryptOnly), (3, Active)]).len(), 1, "a gap");
        assert_eq!(end(&[(2, DecryptOnly), (1, Active)]).len(), 1, "another order");
    }

    #[test]
    fn what_was_encrypted_under_was_active() {
        let history = with_version(Script::default().history(), "c", 2, Version::default());
        let states = |second| vec![version(1, KeyState::Active), version(2, second)];
        for (second, violations) in [
            (KeyState::DecryptOnly, 0),
            (KeyState::Abandoned, 2),
            (KeyState::Pending, 2),
        ] {
            let observed = nodes_with(vec![context("c", states(second))]);
            assert_eq!(judged(&history, &observed, judge).len(), violations, "{second}");
        }
    }

    #[test]
    fn nodes_that_have_settled_say_the_same() {
        let mut observed = nodes_with(vec![context("c", vec![version(1, KeyState::Active)])]);
        observed.nodes[1].keys.as_mut().unwrap()[0].versions[0].id = "another".to_owned();
        assert_eq!(judged(&Script::default().history(), &observed, judge).len(), 1);
    }

    #[test]
    fn numbers_that_were_acknowledged_go_up() {
        let rotate = |key: &str| Operation::Rotate {
            context: "c".to_owned(),
            key: key.to_owned(),
        };
        let made = |version| {
            Outcome::Ok(Answer::Rotated {
                version,
                previous: None,
            })
        };
        let observed = nodes_with(Vec::new());
        let mut script = Script::default();
        script.did(rotate("a"), made(2));
        script.did(rotate("b"), made(3));
        // A repeat is answered with what it made.
        script.did(rotate("a"), made(2));
        assert!(judged(&script.clone().history(), &observed, judge).is_empty());
        let mut twice = script.clone();
        twice.did(rotate("d"), made(3));
        // Once for the number, once for its order.
        assert_eq!(judged(&twice.history(), &observed, judge).len(), 2);
        script.did(rotate("e"), made(1));
        assert_eq!(judged(&script.history(), &observed, judge).len(), 1);
    }

    #[test]
    fn what_a_node_listed_during_the_run_is_looked_at_too() {
        let seen = |active: &[u32], listed| {
            let contexts = vec![ContextView {
                context: "c".to_owned(),
                active: active.to_vec(),
                listed,
                highest: 3,
            }];
            let mut script = Script::default();
            script.did(
                Operation::Keys { node: 1 },
                Outcome::Ok(Answer::Keys { contexts }),
            );
            judged(&script.history(), &nodes_with(Vec::new()), judge).len()
        };
        assert_eq!((seen(&[3], 3), seen(&[2, 3], 3), seen(&[3], 2)), (0, 1, 1));
    }
}
