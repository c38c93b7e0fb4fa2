//! Which contexts have a key for certain: somebody was told of a version there, or was given a ciphertext. A node that has been
//! ready for long enough since then may not say that a context has none.

use std::collections::BTreeMap;

use super::super::event::{Answer, Operation, Outcome};
use crate::workload::KEYED;

/// After so long whoever serves has heard of one: as long as a node whose disk is slow on purpose is given with everything else.
const HEARD: u64 = 16_000_000_000;
/// When the first ones were made, which every node has known since before it was ready.
const BEFORE: u64 = 0;

/// See the module.
#[derive(Debug)]
pub(crate) struct Made(BTreeMap<String, u64>);

impl Default for Made {
    /// A playground is handed over with a key in each of these.
    fn default() -> Self {
        Self(
            KEYED
                .iter()
                .map(|context| ((*context).to_owned(), BEFORE))
                .collect(),
        )
    }
}

impl Made {
    /// An operation was over at this time.
    pub(crate) fn ends(&mut self, operation: &Operation, at: u64, outcome: &Outcome) {
        let context = match (operation, outcome) {
            (
                Operation::Rotate { context, .. } | Operation::Create { context, .. },
                Outcome::Ok(Answer::Rotated { .. }),
            )
            | (Operation::Encrypt { context, .. }, Outcome::Ok(Answer::Sealed { .. })) => context,
            _ => return,
        };
        if self.since(context).is_none() {
            self.0.insert(context.clone(), at);
        }
    }

    /// Whether somebody who serves and is asked at this time has heard of it.
    pub(crate) fn is_known(&self, context: &str, asked: u64) -> bool {
        let since = self.since(context);
        since.is_some_and(|since| since == BEFORE || since.saturating_add(HEARD) <= asked)
    }

    /// Since when it has one, in nanoseconds since the run began.
    pub(super) fn since(&self, context: &str) -> Option<u64> {
        self.0.get(context).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_has_a_key_from_its_first_answer_on_and_those_of_a_playground_have_one_at_once() {
        let mut made = Made::default();
        assert!(KEYED.iter().all(|context| made.since(context) == Some(0)));
        let create = Operation::Create {
            context: "chaos-1".to_owned(),
            key: "k".to_owned(),
        };
        let rotated = Outcome::Ok(Answer::Rotated {
            version: 1,
            previous: None,
        });
        let unknown = Outcome::Unknown { why: String::new() };
        made.ends(&create, 5, &unknown);
        assert_eq!(made.since("chaos-1"), None, "it may not have been made");
        made.ends(&create, 7, &rotated);
        made.ends(&create, 9, &rotated);
        assert_eq!(made.since("chaos-1"), Some(7));
        let known = |context, asked| made.is_known(context, asked);
        assert!(known("2fa", 1) && !known("order-key", u64::MAX));
        assert!(!known("chaos-1", HEARD) && known("chaos-1", HEARD + 7));
    }
}
