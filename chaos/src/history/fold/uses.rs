//! Which key versions are in use again for certain: that was acknowledged, and every wish for the opposite had ended before it was
//! asked for. Nobody who knows of it may refuse to decrypt under them.

use std::collections::BTreeMap;

use hsm_api::admin::KeyState;

use super::super::event::{Answer, Operation, Outcome};

/// Requests to take a version out of use.
#[derive(Default)]
struct Wishes {
    /// Whose outcome is not known: they may be done at any time.
    open: u32,
    /// When the last of the others ended.
    ended: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Uses {
    wishes: BTreeMap<(String, u32), Wishes>,
    /// When it was acknowledged; nobody has wanted it out of use since.
    back: BTreeMap<(String, u32), u64>,
}

/// The version that somebody wants in use or out of it, and which of the two.
fn wanted(operation: &Operation) -> Option<((String, u32), bool)> {
    match operation {
        Operation::Use {
            context,
            version,
            enable,
            ..
        } => Some(((context.clone(), *version), *enable)),
        Operation::Destroy { context, version, .. } => Some(((context.clone(), *version), false)),
        Operation::Undo { context, version, .. } => Some(((context.clone(), *version), true)),
        _ => None,
    }
}

impl Uses {
    pub(super) fn begins(&mut self, operation: &Operation) {
        if let Some((key, false)) = wanted(operation) {
            self.back.remove(&key);
            self.wishes.entry(key).or_default().open += 1;
        }
    }

    pub(super) fn ends(
        &mut self,
        operation: &Operation,
        (invoked, completed): (u64, u64),
        outcome: &Outcome,
    ) {
        let Some((key, in_use)) = wanted(operation) else {
            return;
        };
        if !in_use {
            if !matches!(outcome, Outcome::Unknown { .. }) {
                let wishes = self.wishes.entry(key).or_default();
                wishes.open = wishes.open.saturating_sub(1);
                wishes.ended = wishes.ended.max(completed);
            }
            return;
        }
        // A late repeat is answered with what the version is by then.
        let readable = matches!(
            outcome,
            Outcome::Ok(Answer::State {
                state: KeyState::Active | KeyState::DecryptOnly
            })
        );
        let wishes = self.wishes.get(&key);
        if readable && wishes.is_none_or(|wishes| wishes.open == 0 && wishes.ended < invoked) {
            self.back.insert(key, completed);
        }
    }

    /// Since when a version is in use again for certain.
    pub(super) fn back(&self, key: &(String, u32)) -> Option<u64> {
        self.back.get(key).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn using(enable: bool) -> Operation {
        Operation::Use {
            context: "c".to_owned(),
            version: 1,
            enable,
            key: "k".to_owned(),
        }
    }

    fn ok(state: KeyState) -> Outcome {
        Outcome::Ok(Answer::State { state })
    }

    #[test]
    fn a_version_is_back_once_that_is_acknowledged_and_nobody_can_have_undone_it() {
        let unknown = || Outcome::Unknown { why: String::new() };
        let refused = || Outcome::Refused {
            code: "no_quorum".to_owned(),
        };
        // How the wish for the opposite ended, and when; the version is asked back for from 10 to 20.
        for (outcome, ended, back) in [
            (ok(KeyState::Disabled), 9, Some(20)),
            (refused(), 9, Some(20)),
            (ok(KeyState::Disabled), 15, None),
            (unknown(), 9, None),
        ] {
            let mut uses = Uses::default();
            uses.begins(&using(false));
            uses.ends(&using(false), (1, ended), &outcome);
            uses.begins(&using(true));
            uses.ends(&using(true), (10, 20), &ok(KeyState::DecryptOnly));
            let key = ("c".to_owned(), 1);
            assert_eq!(uses.back(&key), back, "{outcome:?} {ended}");
            // From the next wish on it may be out of use, whatever comes of that.
            uses.begins(&using(false));
            assert_eq!(uses.back(&key), None);
        }
        let mut uses = Uses::default();
        uses.ends(&using(true), (10, 20), &ok(KeyState::Disabled));
        assert_eq!(uses.back(&("c".to_owned(), 1)), None, "a late repeat");
    }
}
