//! Whatever was handed out decrypts, to what it was made of, on every node that is ready, until its version is taken out of
//! use or destroyed; from then on on none. And who may encrypt is refused only for the moment, or by a node that cannot.

use std::collections::BTreeMap;

use hsm_api::ErrorCode;
use hsm_api::admin::KeyState;

use super::Found;
use super::excused::Excused;
use super::observed::{NodeView, Observed, Opened};
use crate::history::{History, Operation};

pub(super) const NAME: &str = "ciphertexts";

/// When somebody has first wanted to take a version out of use, or to destroy it.
#[derive(Default)]
struct Wanted {
    disused: BTreeMap<(String, u32), u64>,
    destroyed: BTreeMap<(String, u32), u64>,
}

impl Wanted {
    fn of(history: &History) -> Self {
        let mut wanted = Self::default();
        for done in &history.changes {
            match &done.operation {
                Operation::Use {
                    context,
                    version,
                    enable: false,
                    ..
                } => {
                    let key = (context.clone(), *version);
                    wanted.disused.entry(key).or_insert(done.invoked);
                }
                Operation::Destroy { context, version, .. } => {
                    let key = (context.clone(), *version);
                    wanted.disused.entry(key.clone()).or_insert(done.invoked);
                    wanted.destroyed.entry(key).or_insert(done.invoked);
                }
                _ => {}
            }
        }
        wanted
    }

    /// Whether a refusal at this time is what somebody wanted.
    fn explains(&self, key: &(String, u32), code: ErrorCode, at: u64) -> bool {
        let since = match code {
            ErrorCode::KeyVersionDisabled => self.disused.get(key),
            ErrorCode::KeyVersionDestroyed => self.destroyed.get(key),
            _ => None,
        };
        since.is_some_and(|since| *since <= at)
    }
}

pub(super) fn judge(history: &History, observed: &Observed, tokens_fail: &Excused, found: &mut Found) {
    during(history, tokens_fail, found);
    for node in observed.nodes.iter().filter(|node| node.ready) {
        at_the_end(history, node, found);
    }
}

fn during(history: &History, tokens_fail: &Excused, found: &mut Found) {
    let wanted = Wanted::of(history);
    found.violations(NAME, &history.revived);
    found.violations(NAME, &history.watched.withheld);
    found.violations(NAME, &history.refused_to_encrypt);
    found.unexplained(NAME, &history.internal, tokens_fail);
    for (key, version) in &history.versions {
        found.violations(NAME, &version.wrong);
        found.checked(NAME, version.opened);
        for (code, refused) in &version.refused {
            let excused = match code.parse::<ErrorCode>() {
                // Not now, or not here.
                Ok(code) if code.retryable() || code.status() == 503 => true,
                // Each at its time, above.
                Ok(ErrorCode::Internal) => true,
                Ok(code) => wanted.explains(key, code, refused.first_at),
                Err(_) => code == "unreachable",
            };
            if !excused {
                found.violation(
                    NAME,
                    format!(
                        "{} ciphertexts of {} version {} were refused with {code}, first by node {}, and nobody had wanted that",
                        refused.count, key.0, key.1, refused.first_node
                    ),
                );
            }
        }
    }
}

fn at_the_end(history: &History, node: &NodeView, found: &mut Found) {
    for ((context, version), known) in &history.versions {
        if known.kept.is_empty() {
            continue;
        }
        let mut opened = node.opened.iter();
        let opened = opened.find(|opened| opened.context == *context && opened.version == *version);
        let (Some(opened), Some(view)) = (opened, node.version(context, *version)) else {
            if node.keys.is_some() && node.version(context, *version).is_none() {
                found.violation(
                    NAME,
                    format!(
                        "node {} does not know {context} version {version}, under which {} ciphertexts were handed out",
                        node.node, known.total
                    ),
                );
            } else {
                let text = format!("node {} was not asked for {context} version {version}", node.node);
                found.undecided(NAME, text);
            }
            continue;
        };
        let refused: u64 = opened.refused.values().sum();
        found.checked(NAME, opened.right + opened.wrong + refused);
        let wrong = match view.state {
            KeyState::Pending | KeyState::Active | KeyState::DecryptOnly => opened.wrong + refused,
            _ => opened.wrong + opened.right,
        };
        if wrong > 0 {
            found.violation(NAME, text(node.node, view.state, opened));
        }
    }
}

fn text(node: u32, state: KeyState, opened: &Opened) -> String {
    let refused: Vec<String> = opened
        .refused
        .iter()
        .map(|(code, count)| format!("{count} refused with {code}"))
        .collect();
    format!(
        "at the end, on node {node}: of ciphertexts of {} version {}, which is {state}, {} decrypted, {} to something else, {}",
        opened.context,
        opened.version,
        opened.right,
        opened.wrong,
        if refused.is_empty() {
            "none refused".to_owned()
        } else {
            refused.join(", ")
        }
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, context, fired, nodes_with, told, version, with_version};
    use super::*;
    use crate::history::{Answer, Few, Moment, Outcome, Refusals, Version};
    use crate::schedule::FaultKind;

    fn refused(code: &str, first_at: u64) -> Version {
        let refusals = Refusals {
            count: 3,
            first_at,
            first_node: 2,
        };
        Version {
            refused: BTreeMap::from([(code.to_owned(), refusals)]),
            ..Version::default()
        }
    }

    fn opened(right: u64, wrong: u64, code: Option<&str>) -> Opened {
        Opened {
            context: "c".to_owned(),
            version: 1,
            right,
            wrong,
            refused: code.iter().map(|code| ((*code).to_owned(), 1)).collect(),
        }
    }

    fn at_end(state: KeyState, opened: Option<Opened>) -> Vec<String> {
        let mut observed = nodes_with(vec![context("c", vec![version(1, state)])]);
        observed.nodes.truncate(1);
        observed.nodes[0].opened = opened.into_iter().collect();
        let history = with_version(Script::default().history(), "c", 1, Version::default());
        told(|found| judge(&history, &observed, &nothing(), found))
    }

    #[test]
    fn at_the_end_what_is_readable_decrypts_and_nothing_else_does() {
        for (state, opened, violations) in [
            (KeyState::DecryptOnly, opened(5, 0, None), 0),
            (KeyState::Active, opened(4, 1, None), 1),
            (
                KeyState::DecryptOnly,
                opened(4, 0, Some("key_version_not_ready")),
                1,
            ),
            (KeyState::Disabled, opened(0, 0, Some("key_version_disabled")), 0),
            (
                KeyState::Destroyed,
                opened(0, 0, Some("key_version_destroyed")),
                0,
            ),
            (KeyState::Destroyed, opened(1, 0, None), 1),
            (KeyState::Destroying, opened(0, 1, None), 1),
        ] {
            let said = at_end(state, Some(opened));
            assert_eq!(said.len(), violations, "{state}: {said:?}");
        }
    }

    #[test]
    fn a_version_that_a_node_does_not_know_is_lost() {
        let history = with_version(Script::default().history(), "c", 1, Version::default());
        let observed = nodes_with(vec![context("c", vec![version(2, KeyState::Active)])]);
        let said = told(|found| judge(&history, &observed, &nothing(), found));
        assert_eq!(said.len(), 2, "{said:?}");
        // Who was not asked is no violation, and no pass.
        assert!(at_end(KeyState::Active, None).is_empty());
    }

    fn nothing() -> Excused {
        Excused::by(&[], |_| true)
    }

    #[test]
    fn an_internal_error_is_excused_by_what_was_done_to_the_tokens_then_and_there() {
        let faults = [fired(FaultKind::TokenErrors, 10_000, 20_000, "node 2, 0x30")];
        let excused = Excused::by(&faults, |_| true);
        let mut history = Script::default().history();
        for (second, node) in [(12, 2), (12, 3), (60, 2)] {
            history.internal.push(Moment {
                at: second * 1_000_000_000,
                node,
                text: format!("{second} {node}"),
            });
        }
        let said = told(|found| during(&history, &excused, found));
        assert_eq!(said, ["12 3", "60 2"]);
        assert_eq!(told(|found| during(&history, &nothing(), found)).len(), 3);
    }

    #[test]
    fn what_is_in_use_again_is_refused_by_nobody_who_knows() {
        let mut history = Script::default().history();
        history.watched.withheld.push("withheld".to_owned());
        assert_eq!(told(|found| during(&history, &nothing(), found)), ["withheld"]);
    }

    #[test]
    fn a_refusal_to_encrypt_that_nobody_can_explain_is_told() {
        let mut history = Script::default().history();
        history.refused_to_encrypt.push("access_denied".to_owned());
        assert_eq!(
            told(|found| during(&history, &nothing(), found)),
            ["access_denied"]
        );
    }

    #[test]
    fn a_wrong_plaintext_is_told_wherever_it_was_seen() {
        let mut wrong = Few::default();
        wrong.push("plaintext 1 …".to_owned());
        let version = Version {
            wrong,
            ..Version::default()
        };
        let history = with_version(Script::default().history(), "c", 1, version);
        let said = told(|found| during(&history, &nothing(), found));
        assert_eq!(said, ["plaintext 1 …"]);
    }

    #[test]
    fn a_refusal_is_excused_by_the_times_or_by_who_wanted_it() {
        let history = |version, operation: Option<Operation>| {
            let mut script = Script::default();
            if let Some(operation) = operation {
                script.did(operation, Outcome::Ok(Answer::Done));
            }
            with_version(script.history(), "c", 1, version)
        };
        let disable = || Operation::Use {
            context: "c".to_owned(),
            version: 1,
            enable: false,
            key: "k".to_owned(),
        };
        let destroy = || Operation::Destroy {
            context: "c".to_owned(),
            version: 1,
            key: "k".to_owned(),
        };
        for (version, operation, violations) in [
            (refused("overloaded", 1), None, 0),
            (refused("slot_failed", 1), None, 0),
            (refused("unreachable", 1), None, 0),
            (refused("unknown_key_version", 1), None, 1),
            (refused("authentication_failed", 1), None, 1),
            (refused("key_version_disabled", 10), Some(disable()), 0),
            // Before anybody asked for it, and for a reason that nobody gave.
            (refused("key_version_disabled", 9), Some(disable()), 1),
            (refused("key_version_destroyed", 10), Some(disable()), 1),
            (refused("key_version_destroyed", 10), Some(destroy()), 0),
            (refused("a_code_of_tomorrow", 10), None, 1),
        ] {
            let history = history(version.clone(), operation);
            let said = told(|found| during(&history, &nothing(), found));
            assert_eq!(said.len(), violations, "{version:?}: {said:?}");
        }
    }
}
