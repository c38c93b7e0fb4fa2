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

/// Requests to put a version back into use whose outcome is not known.
#[derive(Default)]
struct Returns {
    enabled: u32,
    undone: u32,
}

/// See the module.
#[derive(Default)]
pub(super) struct Uses {
    wishes: BTreeMap<(String, u32), Wishes>,
    returns: BTreeMap<(String, u32), Returns>,
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
        match wanted(operation) {
            Some((key, false)) => {
                self.back.remove(&key);
                self.wishes.entry(key).or_default().open += 1;
            }
            Some((key, true)) => *self.returning(key, operation) += 1,
            None => {}
        }
    }

    fn returning(&mut self, key: (String, u32), operation: &Operation) -> &mut u32 {
        let returns = self.returns.entry(key).or_default();
        match operation {
            Operation::Undo { .. } => &mut returns.undone,
            _ => &mut returns.enabled,
        }
    }

    /// Whether what this one has just done may be taken back at any time, by a request that went before it and was not answered. A
    /// destruction that waits is taken back by nothing but its own reverse.
    pub(super) fn may_end(&self, operation: &Operation) -> bool {
        let Some(returns) = wanted(operation).and_then(|(key, _)| self.returns.get(&key)) else {
            return false;
        };
        match operation {
            Operation::Destroy { .. } => returns.undone > 0,
            _ => returns.undone + returns.enabled > 0,
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
        if !matches!(outcome, Outcome::Unknown { .. }) {
            let open = self.returning(key.clone(), operation);
            *open = open.saturating_sub(1);
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

    /// Whether somebody has ever wanted a version out of use, whatever came of it.
    pub(super) fn was_unwanted(&self, key: &(String, u32)) -> bool {
        self.wishes.contains_key(key)
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

    #[test]
    fn what_is_out_of_use_may_come_back_by_a_request_that_was_not_answered() {
        let (context, key) = (|| "c".to_owned(), || "k".to_owned());
        let undo = Operation::Undo {
            context: context(),
            version: 1,
            key: key(),
        };
        let destroy = Operation::Destroy {
            context: context(),
            version: 1,
            key: key(),
        };
        let unknown = Outcome::Unknown { why: String::new() };
        for (before, outcome, disabled, destroyed) in [
            (&undo, &unknown, true, true),
            (&using(true), &unknown, true, false),
            (&undo, &ok(KeyState::DecryptOnly), false, false),
            (&using(true), &ok(KeyState::DecryptOnly), false, false),
        ] {
            let mut uses = Uses::default();
            assert!(!uses.may_end(&destroy));
            uses.begins(before);
            assert!(uses.may_end(&using(false)), "it is under way");
            uses.ends(before, (1, 2), outcome);
            let ends = (uses.may_end(&using(false)), uses.may_end(&destroy));
            assert_eq!(ends, (disabled, destroyed), "{before:?} {outcome:?}");
        }
    }
}
