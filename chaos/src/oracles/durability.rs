//! Whatever change was acknowledged is there at the end, on every node, unless somebody has asked for its reverse since.
//! (That rotations and access control are there in their order is the register's; here is looked whether they are there.)

use std::collections::BTreeMap;

use hsm_api::admin::KeyState;

use super::Found;
use super::observed::{NodeView, Observed};
use crate::history::{Answer, Done, History, Operation, Outcome};

pub(super) const NAME: &str = "durability";

pub(super) fn judge(history: &History, observed: &Observed, found: &mut Found) {
    let made = made(history);
    let used = last_uses(history);
    let revoked = revoked(history);
    for node in &observed.nodes {
        for (context, version) in &made {
            rotated(node, context, *version, found);
        }
        for ((context, version), done) in &used {
            in_use(node, context, *version, done, found);
        }
        for (cn, done) in &revoked {
            turned_away(node, cn, done, found);
        }
    }
}

fn made(history: &History) -> Vec<(&str, u32)> {
    let of = |done: &'_ Done| match (&done.operation, &done.outcome) {
        (
            Operation::Rotate { .. } | Operation::Create { .. },
            Outcome::Ok(Answer::Rotated { version, .. }),
        ) => Some(*version),
        _ => None,
    };
    let mut made: Vec<(&str, u32)> = Vec::new();
    for done in &history.changes {
        if let (Some(version), Operation::Rotate { context, .. } | Operation::Create { context, .. }) =
            (of(done), &done.operation)
        {
            made.push((context.as_str(), version));
        }
    }
    made
}

fn rotated(node: &NodeView, context: &str, version: u32, found: &mut Found) {
    if node.keys.is_none() {
        return;
    }
    found.checked(NAME, 1);
    let known = node.version(context, version);
    let state = known.map(|known| known.state);
    if !matches!(known, Some(known) if known.activated) {
        let state = state.map_or("not there", KeyState::as_str);
        let text = format!(
            "node {}: {context} version {version}, whose rotation was acknowledged, is {state}",
            node.node
        );
        found.violation(NAME, text);
    }
}

/// Of each version the last change of its use, if it is known what became of it, and nobody has asked for another one before
/// it was over.
fn last_uses(history: &History) -> BTreeMap<(&str, u32), &Done> {
    let mut last: BTreeMap<(&str, u32), Vec<&Done>> = BTreeMap::new();
    for done in &history.changes {
        if let Operation::Use { context, version, .. }
        | Operation::Destroy { context, version, .. }
        | Operation::Undo { context, version, .. } = &done.operation
        {
            last.entry((context.as_str(), *version)).or_default().push(done);
        }
    }
    last.into_iter()
        .filter_map(|(key, all)| {
            let effective = all
                .iter()
                .filter(|done| !matches!(done.outcome, Outcome::Refused { .. }));
            let newest = effective.clone().max_by_key(|done| done.invoked)?;
            let clear = effective
                .filter(|done| done.invoked != newest.invoked)
                .all(|done| done.completed.is_some_and(|completed| completed < newest.invoked));
            (clear && matches!(newest.outcome, Outcome::Ok(_))).then_some((key, *newest))
        })
        .collect()
}

fn in_use(node: &NodeView, context: &str, version: u32, done: &Done, found: &mut Found) {
    use KeyState::{DecryptOnly, DestroyScheduled, Destroyed, Destroying, Disabled};
    let Some(known) = node.version(context, version) else {
        return;
    };
    // A late repeat is answered with what the version is by then, and does nothing.
    let (wanted, answered): (&[KeyState], _) = match (&done.operation, &done.outcome) {
        (Operation::Destroy { .. }, Outcome::Ok(Answer::State { state })) => {
            (&[DestroyScheduled, Destroying, Destroyed], *state)
        }
        (Operation::Use { enable: true, .. }, Outcome::Ok(Answer::State { state })) => {
            (&[DecryptOnly], *state)
        }
        (Operation::Use { enable: false, .. }, Outcome::Ok(Answer::State { state })) => (&[Disabled], *state),
        (Operation::Undo { .. }, Outcome::Ok(Answer::State { state })) => (&[DecryptOnly, Disabled], *state),
        _ => return,
    };
    if !wanted.contains(&answered) {
        return;
    }
    found.checked(NAME, 1);
    if !wanted.contains(&known.state) {
        let text = format!(
            "node {}: {context} version {version} is {}, and the last change of it was acknowledged as {answered}",
            node.node, known.state
        );
        found.violation(NAME, text);
    }
}

/// The last word on each common name, if it is known and nothing overlaps it.
fn revoked(history: &History) -> BTreeMap<&str, &Done> {
    let mut all: BTreeMap<&str, Vec<&Done>> = BTreeMap::new();
    for done in &history.changes {
        if let Operation::Revoke { cn } | Operation::Unrevoke { cn } = &done.operation
            && !matches!(done.outcome, Outcome::Refused { .. })
        {
            all.entry(cn).or_default().push(done);
        }
    }
    all.into_iter()
        .filter_map(|(cn, all)| {
            let newest = *all.iter().max_by_key(|done| done.invoked)?;
            let clear = all
                .iter()
                .filter(|done| done.invoked != newest.invoked)
                .all(|done| done.completed.is_some_and(|completed| completed < newest.invoked));
            (clear && matches!(newest.outcome, Outcome::Ok(_))).then_some((cn, newest))
        })
        .collect()
}

fn turned_away(node: &NodeView, cn: &str, done: &Done, found: &mut Found) {
    let Some(revoked) = &node.revoked else { return };
    found.checked(NAME, 1);
    let wanted = matches!(done.operation, Operation::Revoke { .. });
    if revoked.iter().any(|known| known == cn) != wanted {
        let (is, was) = if wanted {
            ("not revoked", "revocation")
        } else {
            ("revoked", "pardon")
        };
        found.violation(
            NAME,
            format!("node {}: {cn} is {is}, and its {was} was acknowledged", node.node),
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, context, judged, nodes_with, version};
    use super::*;

    fn ok(state: KeyState) -> Outcome {
        Outcome::Ok(Answer::State { state })
    }

    fn unknown() -> Outcome {
        Outcome::Unknown { why: String::new() }
    }

    fn use_of(enable: bool) -> Operation {
        Operation::Use {
            context: "c".to_owned(),
            version: 1,
            enable,
            key: "k".to_owned(),
        }
    }

    fn destroy() -> Operation {
        Operation::Destroy {
            context: "c".to_owned(),
            version: 1,
            key: "k".to_owned(),
        }
    }

    fn count(script: &Script, state: KeyState) -> usize {
        let observed = nodes_with(vec![context(
            "c",
            vec![version(1, state), version(2, KeyState::Active)],
        )]);
        judged(&script.clone().history(), &observed, judge).len()
    }

    #[test]
    fn an_acknowledged_rotation_has_to_be_there_and_not_given_up() {
        let mut script = Script::default();
        let rotate = Operation::Rotate {
            context: "c".to_owned(),
            key: "k".to_owned(),
        };
        let answer = Answer::Rotated {
            version: 1,
            previous: None,
        };
        script.did(rotate, Outcome::Ok(answer));
        assert_eq!(count(&script, KeyState::Destroyed), 0);
        assert_eq!(count(&script, KeyState::Abandoned), 2);
        let observed = nodes_with(vec![context("c", Vec::new())]);
        assert_eq!(judged(&script.history(), &observed, judge).len(), 2);
    }

    #[test]
    fn the_last_change_of_a_version_stands() {
        use KeyState::{DecryptOnly, DestroyScheduled, Destroyed, Disabled};
        let mut script = Script::default();
        script.did(use_of(false), ok(Disabled));
        assert_eq!((count(&script, Disabled), count(&script, DecryptOnly)), (0, 2));
        script.did(use_of(true), ok(DecryptOnly));
        assert_eq!((count(&script, Disabled), count(&script, DecryptOnly)), (2, 0));
        // Either may be true.
        let mut open = script.clone();
        open.did(use_of(false), unknown());
        assert_eq!((count(&open, Disabled), count(&open, DecryptOnly)), (0, 0));
        // A late repeat did nothing.
        let mut repeated = script.clone();
        repeated.did(use_of(false), ok(DecryptOnly));
        assert_eq!(
            (count(&repeated, Disabled), count(&repeated, DecryptOnly)),
            (0, 0)
        );
        script.did(destroy(), ok(DestroyScheduled));
        assert_eq!((count(&script, Destroyed), count(&script, DecryptOnly)), (0, 2));
    }

    #[test]
    fn a_revocation_stands_until_it_is_taken_back() {
        let cn = || "victim".to_owned();
        let mut script = Script::default();
        script.did(Operation::Revoke { cn: cn() }, Outcome::Ok(Answer::Done));
        let mut observed = nodes_with(Vec::new());
        for node in &mut observed.nodes {
            node.revoked = Some(vec![cn()]);
        }
        assert!(judged(&script.clone().history(), &observed, judge).is_empty());
        observed.nodes[1].revoked = Some(Vec::new());
        assert_eq!(judged(&script.clone().history(), &observed, judge).len(), 1);
        let mut open = script.clone();
        open.did(Operation::Unrevoke { cn: cn() }, unknown());
        assert!(judged(&open.history(), &observed, judge).is_empty());
        script.did(Operation::Unrevoke { cn: cn() }, Outcome::Ok(Answer::Done));
        assert_eq!(judged(&script.history(), &observed, judge).len(), 1);
    }
}
