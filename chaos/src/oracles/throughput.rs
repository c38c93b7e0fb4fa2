//! A run in which nothing went on proves nothing: while the cluster can answer, clients are answered. How much is asked for
//! is far below what two cores do; a standstill is found, not a slow machine.

use super::Found;
use crate::ending::{CALM_ENDS, FAULTS_BEGIN};
use crate::history::{History, Operation, Outcome};
use crate::schedule::Fired;

const NAME: &str = "throughput";
/// After a fault was taken back, until a phase begins: an election, a restart, a token that is opened again.
const RECOVERY_MS: u64 = 15_000;
/// A shorter phase says nothing.
const SHORTEST_MS: u64 = 3_000;
/// Ciphertexts in each second of a calm phase, on average.
const CALM: f64 = 2.0;
/// The same while a fault lasts that leaves somebody who answers.
const BROKEN: f64 = 0.5;
/// Changes of the state are acknowledged this often at least, by all clients together.
const CHANGE_EVERY_MS: u64 = 60_000;

/// Part of a run.
#[derive(Debug, Clone, PartialEq)]
struct Phase {
    name: String,
    from_ms: u64,
    to_ms: u64,
    /// Ciphertexts in each second.
    least: f64,
}

pub(super) fn judge(history: &History, fired: &[Fired], found: &mut Found) {
    let noted = |what: &str| {
        // The last one: a run ends with its last calm.
        let mut notes = history.notes.iter().rev();
        notes
            .find(|(_, noted)| noted == what)
            .map(|(at, _)| at / 1_000_000)
    };
    let Some(begin) = noted(FAULTS_BEGIN) else {
        return;
    };
    let end = noted(CALM_ENDS).unwrap_or(history.ended / 1_000_000);
    let lasted: Vec<(String, u64, u64, bool)> = fired
        .iter()
        .map(|fired| {
            let name = fired.kind.name();
            (name.to_owned(), fired.at_ms, fired.healed_ms, answers(name))
        })
        .collect();
    for phase in phases(begin, end, &lasted) {
        found.checked(NAME, 1);
        if let Some(text) = stalled(&phase, &history.encrypted_in) {
            found.violation(NAME, text);
        }
    }
    changes(history, begin, end, found);
}

/// Whether somebody can encrypt while this goes on, by the promises of the product: all of them without a quorum for a minute,
/// and any of them as long as there is one.
fn answers(kind: &str) -> bool {
    // Whole clusters, and what may meet every node at once.
    !matches!(
        kind,
        "kill-all" | "lost-writes" | "loss" | "byte-rate" | "failpoint"
    )
}

fn phases(begin: u64, end: u64, lasted: &[(String, u64, u64, bool)]) -> Vec<Phase> {
    let mut phases = Vec::new();
    let mut calm_from = begin;
    let mut lasted = lasted.to_vec();
    lasted.sort_by_key(|(_, from, ..)| *from);
    for (name, from, to, answers) in lasted {
        phases.push(Phase {
            name: "calm".to_owned(),
            from_ms: calm_from,
            to_ms: from,
            least: CALM,
        });
        if answers {
            phases.push(Phase {
                name,
                // Who was talking to a node that dies asks the next one.
                from_ms: from + 3_000,
                to_ms: to,
                least: BROKEN,
            });
        }
        calm_from = calm_from.max(to + RECOVERY_MS);
    }
    phases.push(Phase {
        name: "calm".to_owned(),
        from_ms: calm_from,
        to_ms: end,
        least: CALM,
    });
    phases.retain(|phase| phase.to_ms >= phase.from_ms + SHORTEST_MS);
    phases
}

/// Whole seconds that lie within the phase.
fn stalled(phase: &Phase, encrypted_in: &[u32]) -> Option<String> {
    let (from, to) = (phase.from_ms.div_ceil(1000), phase.to_ms / 1000);
    let seconds = to.saturating_sub(from);
    if seconds == 0 {
        return None;
    }
    let encrypted: u64 = (from..to)
        .map(|second| {
            let second = usize::try_from(second).unwrap_or(usize::MAX);
            encrypted_in.get(second).copied().map_or(0, u64::from)
        })
        .sum();
    let rate = encrypted as f64 / seconds as f64;
    (rate < phase.least).then(|| {
        format!(
            "{}: from second {from} to {to} of the run {encrypted} ciphertexts were handed out, {rate:.2} in a second; {} are \
             asked for",
            phase.name, phase.least
        )
    })
}

fn changes(history: &History, begin: u64, end: u64, found: &mut Found) {
    let minutes = end.saturating_sub(begin) / CHANGE_EVERY_MS;
    let made = history.changes.iter().filter(|done| {
        done.operation.is_change() && matches!(done.outcome, Outcome::Ok(_)) && asked_by_all(&done.operation)
    });
    let made = made.count() as u64;
    found.checked(NAME, 1);
    if made < minutes {
        let text = format!(
            "{made} changes of the state were acknowledged in {} s: at least one a minute is asked for",
            (end - begin) / 1000
        );
        found.violation(NAME, text);
    }
}

/// Those that are asked for all the time.
fn asked_by_all(operation: &Operation) -> bool {
    matches!(
        operation,
        Operation::Rotate { .. }
            | Operation::Create { .. }
            | Operation::SetAcl { .. }
            | Operation::Revoke { .. }
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Script, told};
    use super::*;
    use crate::history::Answer;

    fn fault(name: &str, from: u64, to: u64) -> (String, u64, u64, bool) {
        (name.to_owned(), from, to, answers(name))
    }

    #[test]
    fn a_run_is_cut_into_what_is_broken_and_what_is_not() {
        let lasted = [fault("kill-all", 60_000, 64_000), fault("pause", 20_000, 30_000)];
        let phases = phases(1_000, 100_000, &lasted);
        let cut: Vec<(&str, u64, u64)> = phases
            .iter()
            .map(|phase| (phase.name.as_str(), phase.from_ms, phase.to_ms))
            .collect();
        assert_eq!(
            cut,
            [
                ("calm", 1_000, 20_000),
                ("pause", 23_000, 30_000),
                ("calm", 45_000, 60_000),
                ("calm", 79_000, 100_000)
            ]
        );
    }

    #[test]
    fn a_standstill_in_any_phase_is_found() {
        let phase = Phase {
            name: "calm".to_owned(),
            from_ms: 1_500,
            to_ms: 5_500,
            least: CALM,
        };
        // What lies outside does not count.
        assert!(stalled(&phase, &[100, 100, 0, 0, 0, 100]).is_some());
        assert!(stalled(&phase, &[0, 0, 2, 2, 2, 0]).is_none());
        assert!(stalled(&phase, &[]).is_some());
    }

    #[test]
    fn a_stalled_run_is_no_pass_and_a_run_without_phases_is_not_judged() {
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, &[], found)).is_empty());
        history.notes = vec![
            (0, FAULTS_BEGIN.to_owned()),
            (70_000_000_000, CALM_ENDS.to_owned()),
        ];
        let said = told(|found| judge(&history, &[], found));
        assert_eq!(said.len(), 2, "no ciphertext and no change: {said:?}");
        let mut script = Script::default();
        let cn = "victim".to_owned();
        script.did(Operation::Revoke { cn }, Outcome::Ok(Answer::Done));
        history.changes = script.history().changes;
        history.encrypted_in = vec![5; 70];
        assert!(told(|found| judge(&history, &[], found)).is_empty());
    }
}
