//! A run in which nothing went on proves nothing: while the cluster can answer, clients are answered. How much is asked for, of
//! encryptions and of decryptions, is far below what two cores do; a standstill is found, not a slow machine.
//!
//! Two things are looked at: phases, calm ones and those of one fault; and the whole run, in which faults follow each other too
//! closely for phases, but for the times at which nobody can answer.

use super::Found;
use super::excused::named;
use crate::ending::{CALM_ENDS, FAULTS_BEGIN};
use crate::history::{History, Operation, Outcome};
use crate::schedule::{FaultKind, Fired};

pub(super) const NAME: &str = "throughput";
/// After a fault was taken back, until a phase begins: an election, a restart, a token that is opened again.
const RECOVERY_MS: u64 = 15_000;
/// A shorter phase says nothing.
const SHORTEST_MS: u64 = 3_000;
/// Ciphertexts in each second of a calm phase, on average; and as many that are decrypted.
const CALM: f64 = 2.0;
/// The same while a fault lasts that leaves somebody who answers, and over the whole run.
const BROKEN: f64 = 0.5;
/// Seconds without a ciphertext, of those in which somebody can answer.
const QUIET: u64 = 30;
/// Changes of the state are acknowledged this often at least, by all clients together, on average; of two that follow each other
/// the second comes no later than twice this.
const CHANGE_EVERY_MS: u64 = 60_000;

/// Who answers while a fault lasts, by the promises of the product: all without a quorum for a minute, any of them as long as
/// there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answers {
    /// Somebody, at once.
    Somebody,
    /// It may meet every node, a little: nothing is asked for because of it.
    Unsure,
    /// Somebody; but clients wait for one that does not answer, all of them at times.
    Slowly,
    /// Nobody.
    Nobody,
}

impl Answers {
    /// In a cluster of so many nodes.
    fn during(fired: &Fired, nodes: usize) -> Self {
        use FaultKind as Kind;
        // The harness could not undo it, so nobody knows what is broken until the end; and of one or two nodes every one is needed.
        let all_needed = nodes < 3 && (!fired.kind.is_weather() || fired.kind == Kind::ClockStep);
        if !fired.was_undone() || all_needed {
            return Self::Nobody;
        }
        match fired.kind {
            Kind::KillAll => Self::Nobody,
            // Of one node, where that is named: the others go on.
            Kind::LostWrites if named(&fired.target).is_empty() => Self::Nobody,
            Kind::Pause | Kind::TokenHung => Self::Slowly,
            Kind::Loss | Kind::ByteRate | Kind::Failpoint => Self::Unsure,
            _ => Self::Somebody,
        }
    }
}

/// A fault in time, in milliseconds.
#[derive(Debug, Clone)]
struct Lasted {
    name: &'static str,
    from: u64,
    to: u64,
    answers: Answers,
}

/// Part of a run.
#[derive(Debug, Clone, PartialEq)]
struct Phase {
    name: &'static str,
    from_ms: u64,
    to_ms: u64,
    /// Ciphertexts in each second.
    least: f64,
}

/// What clients got, in each second of the run.
#[derive(Clone, Copy)]
struct Got<'a> {
    /// What was done with so many ciphertexts.
    done: &'static str,
    in_second: &'a [u32],
}

impl Got<'_> {
    fn in_second(&self, second: u64) -> u64 {
        let second = usize::try_from(second).unwrap_or(usize::MAX);
        self.in_second.get(second).copied().map_or(0, u64::from)
    }
}

pub(super) fn judge(history: &History, fired: &[Fired], nodes: usize, found: &mut Found) {
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
    let mut lasted: Vec<Lasted> = fired
        .iter()
        .map(|fired| Lasted {
            name: fired.kind.name(),
            from: fired.at_ms,
            to: fired.healed_ms,
            answers: Answers::during(fired, nodes),
        })
        .collect();
    lasted.sort_by_key(|one| one.from);
    let phases = phases(begin, end, &lasted);
    let dead = dead(&lasted);
    let live = live_seconds(begin, end, &dead);
    let encrypted = Got {
        done: "handed out",
        in_second: &history.encrypted_in,
    };
    let decrypted = Got {
        done: "decrypted",
        in_second: &history.decrypted_in,
    };
    for got in [encrypted, decrypted] {
        found.checked(NAME, phases.len() as u64);
        for text in phases.iter().filter_map(|phase| stalled(phase, got)) {
            found.violation(NAME, text);
        }
        found.checked(NAME, live.len() as u64);
        let whole = [too_few(&live, got), standstill(begin, end, &live, got)];
        for text in whole.into_iter().flatten() {
            found.violation(NAME, text);
        }
    }
    for text in changes(history, begin, end, &dead) {
        found.violation(NAME, text);
    }
}

fn phases(begin: u64, end: u64, lasted: &[Lasted]) -> Vec<Phase> {
    let mut phases = Vec::new();
    let mut calm_from = begin;
    let calm = |from_ms, to_ms| Phase {
        name: "calm",
        from_ms,
        to_ms,
        least: CALM,
    };
    for one in lasted {
        phases.push(calm(calm_from, one.from));
        if one.answers == Answers::Somebody {
            phases.push(Phase {
                name: one.name,
                // Who was talking to a node that dies asks the next one.
                from_ms: one.from + 3_000,
                to_ms: one.to,
                least: BROKEN,
            });
        }
        calm_from = calm_from.max(one.to.saturating_add(RECOVERY_MS));
    }
    phases.push(calm(calm_from, end));
    phases.retain(|phase| phase.to_ms >= phase.from_ms.saturating_add(SHORTEST_MS));
    // What leaves nobody who answers, or nobody at once, goes on beside the weather.
    for one in lasted {
        let until = match one.answers {
            Answers::Nobody => one.to.saturating_add(RECOVERY_MS),
            Answers::Slowly => one.to,
            Answers::Somebody | Answers::Unsure => continue,
        };
        phases.retain(|phase| phase.to_ms <= one.from || phase.from_ms >= until);
    }
    phases
}

/// Whole seconds that lie within the phase.
fn stalled(phase: &Phase, got: Got<'_>) -> Option<String> {
    let (from, to) = (phase.from_ms.div_ceil(1000), phase.to_ms / 1000);
    let seconds = to.saturating_sub(from);
    if seconds == 0 {
        return None;
    }
    let count: u64 = (from..to).map(|second| got.in_second(second)).sum();
    let rate = count as f64 / seconds as f64;
    (rate < phase.least).then(|| {
        format!(
            "{}: from second {from} to {to} of the run {count} ciphertexts were {}, {rate:.2} in a second; {} are asked \
             for",
            phase.name, got.done, phase.least
        )
    })
}

/// When nobody can answer, in order and without overlaps.
fn dead(lasted: &[Lasted]) -> Vec<(u64, u64)> {
    let mut dead: Vec<(u64, u64)> = Vec::new();
    for one in lasted.iter().filter(|one| one.answers == Answers::Nobody) {
        match dead.last_mut() {
            Some((_, to)) if *to >= one.from => *to = (*to).max(one.to),
            _ => dead.push((one.from, one.to)),
        }
    }
    dead
}

/// Whole seconds in which somebody can answer. What clients lose after the end of a fault is what the bounds leave room for.
fn live_seconds(begin: u64, end: u64, dead: &[(u64, u64)]) -> Vec<u64> {
    let overlaps = |second: u64| {
        let mut dead = dead.iter();
        dead.any(|(from, to)| *from < (second + 1) * 1000 && *to > second * 1000)
    };
    let seconds = begin.div_ceil(1000)..end / 1000;
    seconds.filter(|second| !overlaps(*second)).collect()
}

fn too_few(live: &[u64], got: Got<'_>) -> Option<String> {
    let count: u64 = live.iter().map(|second| got.in_second(*second)).sum();
    let least = (live.len() as f64 * BROKEN).floor();
    ((count as f64) < least).then(|| {
        format!(
            "in the {} seconds of the run in which somebody could answer {count} ciphertexts were {}; {least} are asked \
             for",
            live.len(),
            got.done
        )
    })
}

/// The longest time without any ciphertext; what nobody can answer in it does not count.
fn standstill(begin: u64, end: u64, live: &[u64], got: Got<'_>) -> Option<String> {
    let (mut quiet, mut since, mut longest) = (0, begin / 1000, (0, 0, 0));
    for second in begin.div_ceil(1000)..end / 1000 {
        if got.in_second(second) > 0 {
            (quiet, since) = (0, second + 1);
        } else if live.binary_search(&second).is_ok() {
            quiet += 1;
            if quiet > longest.0 {
                longest = (quiet, since, second + 1);
            }
        }
    }
    let (quiet, from, to) = longest;
    (quiet > QUIET).then(|| {
        format!(
            "from second {from} to {to} of the run no ciphertext was {}, and somebody could answer in {quiet} of them; {QUIET} \
             are let pass",
            got.done
        )
    })
}

/// Of a time, in milliseconds, what is not dead.
fn live_ms(from: u64, to: u64, dead: &[(u64, u64)]) -> u64 {
    let within = |(begins, ends): &(u64, u64)| (*ends).min(to).saturating_sub((*begins).max(from));
    let lost: u64 = dead.iter().map(within).sum();
    to.saturating_sub(from).saturating_sub(lost)
}

fn changes(history: &History, begin: u64, end: u64, dead: &[(u64, u64)]) -> Vec<String> {
    let made = history.changes.iter().filter(|done| {
        done.operation.is_change() && matches!(done.outcome, Outcome::Ok(_)) && asked_by_all(&done.operation)
    });
    let at = made.filter_map(|done| Some(done.completed? / 1_000_000));
    let mut at: Vec<u64> = at.filter(|at| (begin..=end).contains(at)).collect();
    at.sort_unstable();
    let mut texts = Vec::new();
    let live = live_ms(begin, end, dead);
    if (at.len() as u64) < live / CHANGE_EVERY_MS {
        texts.push(format!(
            "{} changes of the state were acknowledged in the {} s in which somebody could answer: at least one a minute is \
             asked for",
            at.len(),
            live / 1000
        ));
    }
    let ends = std::iter::once(begin).chain(at.iter().copied());
    let gaps = ends.zip(at.iter().copied().chain([end]));
    let longest = gaps.max_by_key(|(from, to)| live_ms(*from, *to, dead));
    if let Some((from, to)) = longest.filter(|(from, to)| live_ms(*from, *to, dead) > 2 * CHANGE_EVERY_MS) {
        texts.push(format!(
            "from second {} to {} of the run no change of the state was acknowledged; {} s are let pass",
            from / 1000,
            to / 1000,
            2 * CHANGE_EVERY_MS / 1000
        ));
    }
    texts
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
    use super::super::testing::{Script, fired, told};
    use super::*;
    use crate::history::Answer;

    fn lasted(faults: &[(FaultKind, u64, u64)]) -> Vec<Lasted> {
        let one = |(kind, from, to): &(FaultKind, u64, u64)| Lasted {
            name: kind.name(),
            from: *from,
            to: *to,
            answers: Answers::during(&fired(*kind, *from, *to, ""), 3),
        };
        let mut lasted: Vec<Lasted> = faults.iter().map(one).collect();
        lasted.sort_by_key(|one| one.from);
        lasted
    }

    fn cut(faults: &[(FaultKind, u64, u64)]) -> Vec<(&'static str, u64, u64)> {
        let phases = phases(1_000, 100_000, &lasted(faults));
        phases
            .iter()
            .map(|phase| (phase.name, phase.from_ms, phase.to_ms))
            .collect()
    }

    #[test]
    fn a_run_is_cut_into_what_is_broken_and_what_is_not() {
        use FaultKind::{DiskFull, KillAll};
        assert_eq!(
            cut(&[(KillAll, 60_000, 64_000), (DiskFull, 20_000, 30_000)]),
            [
                ("calm", 1_000, 20_000),
                ("disk-full", 23_000, 30_000),
                ("calm", 45_000, 60_000),
                ("calm", 79_000, 100_000)
            ]
        );
    }

    #[test]
    fn in_bad_weather_nothing_is_asked_for_while_nobody_answers() {
        use FaultKind::{Delay, KillAll, Loss, Pause};
        let calm = |from| ("calm", from, 100_000);
        assert_eq!(
            cut(&[(Delay, 1_000, 18_000)]),
            [("delay", 4_000, 18_000), calm(33_000)]
        );
        // All were dead in it.
        assert_eq!(
            cut(&[(Delay, 1_000, 18_000), (KillAll, 12_000, 20_000)]),
            [calm(35_000)]
        );
        // Both clients may have waited for the one that stood still.
        assert_eq!(
            cut(&[(Delay, 1_000, 18_000), (Pause, 14_000, 18_000)]),
            [calm(33_000)]
        );
        // What may meet all, a little, asks for nothing itself and excuses nobody.
        assert_eq!(
            cut(&[(Delay, 1_000, 18_000), (Loss, 12_000, 20_000)]),
            [("delay", 4_000, 18_000), calm(35_000)]
        );
    }

    #[test]
    fn what_the_harness_could_not_undo_has_no_end_that_could_be_judged() {
        assert_eq!(
            cut(&[(FaultKind::DiskFull, 20_000, u64::MAX)]),
            [("calm", 1_000, 20_000)]
        );
        let lasted = lasted(&[(FaultKind::DiskFull, 20_000, u64::MAX)]);
        assert_eq!(
            live_seconds(1_000, 100_000, &dead(&lasted)),
            (1..20).collect::<Vec<u64>>()
        );
    }

    #[test]
    fn of_one_node_or_two_every_one_is_needed() {
        for (kind, nodes, answers) in [
            (FaultKind::KillLeader, 3, Answers::Somebody),
            (FaultKind::KillLeader, 2, Answers::Nobody),
            (FaultKind::TokenSlow, 1, Answers::Somebody),
            (FaultKind::ClockStep, 1, Answers::Nobody),
            (FaultKind::KillAll, 5, Answers::Nobody),
        ] {
            assert_eq!(
                Answers::during(&fired(kind, 0, 1, ""), nodes),
                answers,
                "{kind} {nodes}"
            );
        }
    }

    #[test]
    fn where_one_node_of_several_has_lost_power_the_others_answer() {
        for (target, nodes, answers) in [
            ("node 2: 7 changes lost", 3, Answers::Somebody),
            ("nodes [1, 2, 3]: 7 changes lost", 3, Answers::Nobody),
            ("node 2: 7 changes lost", 2, Answers::Nobody),
            ("unknown", 3, Answers::Nobody),
        ] {
            let lost = fired(FaultKind::LostWrites, 0, 1, target);
            assert_eq!(Answers::during(&lost, nodes), answers, "{target} of {nodes}");
        }
    }

    #[test]
    fn a_standstill_in_any_phase_is_found() {
        let phase = Phase {
            name: "calm",
            from_ms: 1_500,
            to_ms: 5_500,
            least: CALM,
        };
        let stalled = |in_second: &[u32]| {
            let got = Got {
                done: "handed out",
                in_second,
            };
            super::stalled(&phase, got)
        };
        // What lies outside does not count.
        assert!(stalled(&[100, 100, 0, 0, 0, 100]).is_some());
        assert!(stalled(&[0, 0, 2, 2, 2, 0]).is_none());
        assert!(stalled(&[]).is_some());
    }

    /// A run of 200 seconds in which one fault of a kind follows the other, each of them short.
    fn busy(kind: FaultKind, encrypted_in: Vec<u32>) -> Vec<String> {
        let mut history = Script::default().history();
        history.notes = vec![
            (0, FAULTS_BEGIN.to_owned()),
            (200_000_000_000, CALM_ENDS.to_owned()),
        ];
        history.encrypted_in = encrypted_in;
        history.decrypted_in = vec![9; 200];
        // One second in five is left to whoever can answer.
        let faults: Vec<Fired> = (0..40)
            .map(|number| fired(kind, 5_000 * number + 1_000, 5_000 * number + 5_000, ""))
            .collect();
        let said = told(|found| judge(&history, &faults, 3, found));
        // Nothing was changed in it, which is found too.
        said.into_iter()
            .filter(|text| !text.contains("changes") && !text.contains("no change"))
            .collect()
    }

    #[test]
    fn a_standstill_over_many_short_faults_is_found() {
        let answered = |from: usize, to: usize| -> Vec<u32> {
            (0..200)
                .map(|second| if (from..to).contains(&second) { 0 } else { 9 })
                .collect()
        };
        assert!(busy(FaultKind::KillLeader, answered(0, 0)).is_empty());
        assert!(busy(FaultKind::KillLeader, answered(50, 80)).is_empty());
        let said = busy(FaultKind::KillLeader, answered(50, 81));
        assert!(
            said.len() == 1 && said[0].contains("from second 50 to 81"),
            "{said:?}"
        );
        // While all were dead nobody could answer.
        assert!(busy(FaultKind::KillAll, answered(50, 190)).is_empty());
        let said = busy(FaultKind::KillAll, answered(0, 200));
        assert_eq!(said.len(), 2, "too few, and too long: {said:?}");
    }

    #[test]
    fn a_stalled_run_is_no_pass_and_a_run_without_phases_is_not_judged() {
        let mut history = Script::default().history();
        assert!(told(|found| judge(&history, &[], 3, found)).is_empty());
        history.notes = vec![
            (0, FAULTS_BEGIN.to_owned()),
            (70_000_000_000, CALM_ENDS.to_owned()),
        ];
        let said = told(|found| judge(&history, &[], 3, found));
        assert_eq!(
            said.len(),
            7,
            "no ciphertext, and none decrypted, each in three ways, and no change: {said:?}"
        );
        let mut script = Script::default();
        let cn = "victim".to_owned();
        script.did(Operation::Revoke { cn }, Outcome::Ok(Answer::Done));
        history.changes = script.history().changes;
        history.encrypted_in = vec![5; 70];
        let said = told(|found| judge(&history, &[], 3, found));
        assert!(
            said.len() == 3 && said.iter().all(|text| text.contains("decrypted")),
            "decryption that stands still is found: {said:?}"
        );
        history.decrypted_in = vec![5; 70];
        assert!(told(|found| judge(&history, &[], 3, found)).is_empty());
    }

    #[test]
    fn changes_that_stop_half_way_are_found_however_many_there_were() {
        let changes_at = |seconds: std::ops::Range<u64>| -> Vec<crate::history::Done> {
            let mut script = Script::default();
            for _ in seconds.clone() {
                let cn = "victim".to_owned();
                script.did(Operation::Revoke { cn }, Outcome::Ok(Answer::Done));
            }
            let mut changes = script.history().changes;
            for (done, second) in changes.iter_mut().zip(seconds) {
                done.completed = Some(second * 1_000_000_000);
            }
            changes
        };
        let said = |made: std::ops::Range<u64>, faults: &[(FaultKind, u64, u64)]| {
            let mut history = Script::default().history();
            history.changes = changes_at(made);
            changes(&history, 10_000, 600_000, &dead(&lasted(faults)))
        };
        assert!(said(10..600, &[]).is_empty());
        assert!(said(10..481, &[]).is_empty());
        assert_eq!(said(10..300, &[]).len(), 1, "half of the run without a change");
        assert!(said(10..300, &[(FaultKind::KillAll, 300_000, 500_000)]).is_empty());
        // Before the run, and after it, is no part of it.
        assert_eq!(said(0..10, &[]).len(), 2);
    }
}
