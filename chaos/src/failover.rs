//! How long a cluster takes no changes after its leader was killed, and what becomes meanwhile of encryptions and decryptions on
//! the other nodes: both from what was written down in a run, so that whoever has its folder can count again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};

use anyhow::{Context, Result, bail};
use hsm_api::ErrorCode;
use serde::{Deserialize, Serialize};

use crate::folder::{self, Folder};
use crate::history::{Answer, Line, Made, Operation, Outcome};
use crate::oracles::Finding;
use crate::schedule::{Effect, FaultKind, Fired, Plan};

/// The oracle that judges them.
const NAME: &str = "failover";
/// Requests that failed and are told one by one.
const TOLD: usize = 5;
/// In front of the number of the step and of the node.
const MARK: &str = "leader killed: step ";

/// What is noted right before a leader is sent SIGKILL.
#[must_use]
pub(crate) fn mark(step: u32, node: u32) -> String {
    format!("{MARK}{step}, node {node}")
}

fn marked(note: &str) -> Option<(u32, u32)> {
    let (step, node) = note.strip_prefix(MARK)?.split_once(", node ")?;
    Some((step.parse().ok()?, node.parse().ok()?))
}

/// The fail-overs of a run: one for each `kill-leader` that counts, which is one after which another node has committed in a
/// higher term.
///
/// A fail-over lasts from the last change that any client was told of before the signal was sent, to the first answer that
/// any client had to a change that it asked for after that. Both ends are seen by clients, so it is never shorter than the
/// time in which no change was possible; the fault itself asks for one right before the kill and for more right after it, so
/// that it is hardly longer. One in which none was acknowledged has no length that anybody knows, and is counted apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailOvers {
    /// Milliseconds of each that has ended, in their order.
    pub ms: Vec<u64>,
    /// Those in which no change was acknowledged until the next leader was killed, or the run was over.
    #[serde(default)]
    pub unended: u64,
    /// Encryptions and decryptions that were under way during one, on nodes other than the killed one.
    pub asked: u64,
    /// Those of them that were not answered as they should be: refused for whatever reason but that somebody had taken the
    /// version out of use or the context had no key until shortly before, or not answered at all.
    pub failed: u64,
    /// The first of these.
    #[serde(skip)]
    pub failures: Vec<String>,
}

/// What is wrong with the fail-overs of a run. Only where nothing but nodes were killed is anything asked for: beside bad lines, full
/// disks and broken tokens others than the killed one may refuse for reasons of their own.
///
/// # Errors
/// As [`FailOvers::of`].
pub(crate) fn findings(run: &Folder, plan: &Plan, fired: &[Fired]) -> Result<Vec<Finding>> {
    let planned = plan.steps.iter().map(|step| step.fault.kind());
    let mut kinds = planned.chain(fired.iter().map(|one| one.kind));
    if kinds.all(FaultKind::is_kill) {
        Ok(FailOvers::of(run)?.findings())
    } else {
        Ok(Vec::new())
    }
}

impl FailOvers {
    /// Of a run, by its folder.
    ///
    /// # Errors
    /// The run has not come so far that its folder says which faults were carried out; a history that cannot be read.
    pub fn of(run: &Folder) -> Result<Self> {
        let fired: Vec<Fired> = run.read(folder::FIRED)?;
        let path = run.file(folder::HISTORY);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let mut lines = BufReader::new(file).lines().enumerate().peekable();
        let mut reading = Reading::default();
        while let Some((number, line)) = lines.next() {
            let line = line.with_context(|| path.display().to_string())?;
            match serde_json::from_str(&line) {
                Ok(line) => reading.line(line),
                // Whoever wrote it may have been killed.
                Err(_) if lines.peek().is_none() => break,
                Err(error) => bail!("{}: line {}: {error}", path.display(), number + 1),
            }
        }
        Ok(reading.finish(&fired))
    }

    /// In a run of kills alone.
    fn findings(&self) -> Vec<Finding> {
        let mut texts = Vec::new();
        if self.failed > 0 {
            texts.push(format!(
                "{} of {} encryptions and decryptions failed on nodes that were not killed, while a killed leader was \
                 replaced; the first: {}",
                self.failed,
                self.asked,
                self.failures.join("; ")
            ));
        }
        if self.unended > 0 {
            texts.push(format!(
                "after {} kills of the leader no change was acknowledged until the next one or the end of the run",
                self.unended
            ));
        }
        let finding = |text| Finding { oracle: NAME, text };
        texts.into_iter().map(finding).collect()
    }

    /// With those of another run.
    pub fn add(&mut self, other: &Self) {
        self.ms.extend(&other.ms);
        self.unended += other.unended;
        self.asked += other.asked;
        self.failed += other.failed;
    }

    /// So many of a hundred took this long at most, in milliseconds, by the nearest rank. None if there was no fail-over.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<u64> {
        let mut sorted = self.ms.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100);
        sorted.get(rank.saturating_sub(1)).copied()
    }
}

impl fmt::Display for FailOvers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |percent| self.percentile(percent).unwrap_or_default() as f64 / 1000.0;
        write!(
            f,
            "{} leaders replaced: changes back after p50 {:.2} s, p99 {:.2} s, at most {:.2} s; meanwhile {} encryptions and \
             decryptions on the others, {} failed",
            self.ms.len(),
            seconds(50),
            seconds(99),
            seconds(100),
            self.asked,
            self.failed
        )?;
        if self.unended > 0 {
            write!(f, "; {} more without an end", self.unended)?;
        }
        Ok(())
    }
}

/// One of them. Times are nanoseconds.
struct Span {
    step: u32,
    killed: u32,
    /// The last acknowledgement before.
    from: u64,
    /// The signal.
    at: u64,
    /// The first acknowledgement of what was asked for after it.
    until: Option<u64>,
    asked: u64,
    failed: u64,
    /// The first of these.
    failures: Vec<String>,
}

/// A history, line by line.
#[derive(Default)]
struct Reading {
    /// What is under way, with when it was begun.
    open: HashMap<u64, (u64, Operation)>,
    made: Made,
    acknowledged: Option<u64>,
    spans: Vec<Span>,
}

impl Reading {
    fn line(&mut self, line: Line) {
        match line {
            Line::Noted { at, what } => {
                if let Some((step, killed)) = marked(&what) {
                    self.spans.push(Span {
                        step,
                        killed,
                        from: self.acknowledged.unwrap_or(at),
                        at,
                        until: None,
                        asked: 0,
                        failed: 0,
                        failures: Vec::new(),
                    });
                }
            }
            Line::Invoked {
                at, id, operation, ..
            } => {
                self.open.insert(id, (at, operation));
            }
            Line::Completed { at, id, outcome, .. } => {
                if let Some((invoked, operation)) = self.open.remove(&id) {
                    self.completed(invoked, at, &operation, &outcome);
                    self.made.ends(&operation, at, &outcome);
                }
            }
            Line::Begun { .. } | Line::Sampled { .. } => {}
        }
    }

    fn completed(&mut self, invoked: u64, at: u64, operation: &Operation, outcome: &Outcome) {
        let span = self.spans.last_mut();
        match operation {
            Operation::Encrypt { node, context, .. } | Operation::Decrypt { node, context, .. } => {
                let known = self.made.is_known(context, invoked);
                let meant = span
                    .filter(|span| span.killed != *node && span.until.is_none_or(|until| invoked < until));
                if let Some(span) = meant {
                    span.asked += 1;
                    if has_failed(outcome, known) {
                        span.failed += 1;
                        if span.failures.len() < TOLD {
                            span.failures.push(format!("{operation:?}: {outcome:?}"));
                        }
                    }
                }
            }
            change if change.is_change() && matches!(outcome, Outcome::Ok(_)) => {
                self.acknowledged = self.acknowledged.max(Some(at));
                if let Some(span) = span.filter(|span| span.until.is_none() && invoked > span.at) {
                    span.until = Some(at);
                }
            }
            _ => {}
        }
    }

    fn finish(self, fired: &[Fired]) -> FailOvers {
        // Of a step that was repeated, the last attempt is the one that counts. Where the cluster has failed, it counts too.
        let counts = |one: &&Fired| matches!(one.effect, Effect::Counted) || one.effect.failure().is_some();
        let counted: BTreeSet<u32> = fired
            .iter()
            .filter(|one| one.kind == FaultKind::KillLeader)
            .filter(counts)
            .map(|one| one.step)
            .collect();
        let last: BTreeMap<u32, usize> = self
            .spans
            .iter()
            .enumerate()
            .map(|(place, span)| (span.step, place))
            .collect();
        let mut found = FailOvers::default();
        for (place, span) in self.spans.iter().enumerate() {
            if !counted.contains(&span.step) || last.get(&span.step) != Some(&place) {
                continue;
            }
            match span.until {
                Some(until) => {
                    let lasted = until.saturating_sub(span.from);
                    found.ms.push(lasted.div_ceil(1_000_000));
                }
                None => found.unended += 1,
            }
            found.asked += span.asked;
            found.failed += span.failed;
            let room = TOLD.saturating_sub(found.failures.len());
            found.failures.extend(span.failures.iter().take(room).cloned());
        }
        found
    }
}

/// Whether somebody who asked a node that serves was let down. A version that is out of use is none of its business, nor is a
/// context without a key, unless it was `known` to have one for long: whether a refusal was right is judged by the oracle of
/// ciphertexts.
fn has_failed(outcome: &Outcome, known: bool) -> bool {
    match outcome {
        Outcome::Ok(Answer::Opened { right }) => !right,
        Outcome::Ok(_) => false,
        Outcome::Refused { code } => match code.parse::<ErrorCode>() {
            Ok(ErrorCode::KeyVersionDisabled | ErrorCode::KeyVersionDestroyed) => false,
            Ok(ErrorCode::ContextHasNoKey) => known,
            _ => true,
        },
        Outcome::Unknown { .. } => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn begun(at: u64, id: u64, operation: Operation) -> Line {
        Line::Invoked {
            at: at * MS,
            id,
            process: 1,
            operation,
        }
    }

    fn over(at: u64, id: u64, outcome: Outcome) -> Line {
        Line::Completed {
            at: at * MS,
            id,
            index: None,
            stale: false,
            outcome,
        }
    }

    fn change(id: u64) -> Operation {
        Operation::Revoke {
            cn: format!("probe-{id}"),
        }
    }

    fn seal(node: u32) -> Operation {
        Operation::Encrypt {
            context: "c".to_owned(),
            number: 1,
            node,
        }
    }

    fn done() -> Outcome {
        Outcome::Ok(Answer::Done)
    }

    fn refused(code: &str) -> Outcome {
        Outcome::Refused {
            code: code.to_owned(),
        }
    }

    fn kill(at: u64, step: u32, node: u32) -> Line {
        Line::Noted {
            at: at * MS,
            what: mark(step, node),
        }
    }

    fn fired(step: u32, effect: Effect) -> Fired {
        Fired {
            step,
            kind: FaultKind::KillLeader,
            at_ms: 0,
            target: String::new(),
            effect,
            healed_ms: 1,
        }
    }

    fn read(lines: Vec<Line>, fired: &[Fired]) -> FailOvers {
        let mut reading = Reading::default();
        lines.into_iter().for_each(|line| reading.line(line));
        reading.finish(fired)
    }

    #[test]
    fn it_lasts_from_the_last_acknowledgement_to_the_first_one_of_what_was_asked_for_after_the_kill() {
        let lines = vec![
            begun(10, 1, change(1)),
            over(90, 1, done()),
            begun(95, 2, change(2)),
            kill(100, 7, 3),
            // It was asked for before: the dead leader may have made it.
            over(110, 2, done()),
            begun(120, 3, change(3)),
            over(130, 3, refused("no_quorum")),
            begun(2400, 4, change(4)),
            over(2490, 4, done()),
            begun(2500, 5, change(5)),
            over(2501, 5, done()),
        ];
        let found = read(lines, &[fired(7, Effect::Counted)]);
        assert_eq!(found.ms, [2400]);
    }

    #[test]
    fn a_kill_that_does_not_count_is_no_fail_over_and_one_without_an_end_has_no_length() {
        let lines = vec![
            kill(100, 1, 1),
            begun(2_000, 1, change(1)),
            over(2_100, 1, done()),
            kill(5_000, 2, 2),
            // The first attempt of this one was of no use.
            kill(7_000, 3, 3),
            kill(9_000, 3, 3),
        ];
        let none = Effect::NotCounted("it was back".to_owned());
        let all = [
            fired(1, Effect::Counted),
            fired(2, none.clone()),
            fired(3, none),
            fired(3, Effect::Failed("no change was acknowledged".to_owned())),
        ];
        let found = read(lines, &all);
        assert_eq!((found.ms.as_slice(), found.unended), ([2_000].as_slice(), 1));
        assert!(found.to_string().ends_with("; 1 more without an end"), "{found}");
    }

    #[test]
    fn requests_of_the_other_nodes_count_while_it_lasts() {
        let sealed = || {
            Outcome::Ok(Answer::Sealed {
                version: 1,
                ciphertext: String::new(),
            })
        };
        let lines = vec![
            begun(90, 1, seal(1)),
            kill(100, 7, 3),
            // Of the killed one nothing is expected.
            begun(101, 2, seal(3)),
            over(102, 2, refused("unreachable")),
            over(110, 1, sealed()),
            begun(120, 3, seal(1)),
            begun(130, 4, seal(2)),
            begun(140, 5, change(5)),
            over(150, 5, done()),
            // Under way in it, and over later.
            over(160, 3, refused("not_ready")),
            over(
                170,
                4,
                Outcome::Unknown {
                    why: "reset".to_owned(),
                },
            ),
            begun(180, 6, seal(1)),
            over(190, 6, refused("not_ready")),
        ];
        let found = read(lines, &[fired(7, Effect::Counted)]);
        assert_eq!((found.asked, found.failed), (3, 2));
    }

    #[test]
    fn a_version_out_of_use_is_no_failure_and_a_wrong_plaintext_is_one() {
        let has_failed = |outcome: Outcome| super::has_failed(&outcome, true);
        assert!(!has_failed(refused("key_version_destroyed")));
        assert!(has_failed(refused("unreachable")));
        assert!(has_failed(Outcome::Ok(Answer::Opened { right: false })));
        assert!(!has_failed(Outcome::Ok(Answer::Opened { right: true })));
    }

    #[test]
    fn a_context_that_has_a_key_lets_somebody_down_who_is_told_that_it_has_none() {
        let seal_in = |context: &str| Operation::Encrypt {
            context: context.to_owned(),
            number: 1,
            node: 1,
        };
        let none = || refused("context_has_no_key");
        let lines = vec![
            kill(100, 7, 3),
            begun(110, 1, seal_in("chaos-1")),
            begun(110, 2, seal_in("2fa")),
            over(120, 1, none()),
            over(120, 2, none()),
        ];
        let found = read(lines, &[fired(7, Effect::Counted)]);
        assert_eq!((found.asked, found.failed), (2, 1));
    }

    #[test]
    fn a_failure_and_a_fail_over_without_an_end_are_findings() {
        assert!(FailOvers::default().findings().is_empty());
        let lines = vec![
            kill(100, 7, 3),
            begun(110, 1, seal(1)),
            over(120, 1, refused("not_ready")),
        ];
        let failed = [fired(7, Effect::Failed("no change".to_owned()))];
        let found = read(lines, &failed).findings();
        assert!(found.iter().all(|finding| finding.oracle == "failover"));
        let told: Vec<&str> = found.iter().map(|finding| finding.text.as_str()).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].starts_with("1 of 1 encryptions") && told[0].contains("not_ready"),
            "{told:?}"
        );
        assert!(told[1].starts_with("after 1 kills"), "{told:?}");
    }

    #[test]
    fn only_in_runs_of_kills_alone_a_failure_is_a_finding() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::at(root.path()).unwrap();
        let counted = [fired(7, Effect::Counted)];
        folder.write(folder::FIRED, &counted).unwrap();
        let lines = [
            kill(100, 7, 3),
            begun(110, 1, seal(1)),
            over(120, 1, refused("not_ready")),
            begun(130, 2, change(2)),
            over(140, 2, done()),
        ];
        let lines = lines.map(|line| serde_json::to_string(&line).unwrap());
        std::fs::write(folder.file(folder::HISTORY), lines.join("\n")).unwrap();
        for (kinds, wanted) in [
            (vec![FaultKind::KillLeader, FaultKind::KillAll], 1),
            (vec![FaultKind::KillLeader, FaultKind::Delay], 0),
        ] {
            let kinds: BTreeSet<FaultKind> = kinds.into_iter().collect();
            let plan = crate::schedule::plan(7, 1.0, &kinds, 3);
            let found = findings(&folder, &plan, &counted).unwrap();
            assert_eq!(found.len(), wanted, "{kinds:?}");
        }
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let mut all = FailOvers::default();
        assert_eq!(all.percentile(99), None);
        for ms in (1..=200).rev() {
            all.add(&FailOvers {
                ms: vec![ms],
                asked: 2,
                ..FailOvers::default()
            });
        }
        assert_eq!(
            [50, 99, 100].map(|percent| all.percentile(percent)),
            [100, 198, 200].map(Some)
        );
        assert_eq!(all.asked, 400);
        assert!(all.to_string().contains("p50 0.10 s, p99 0.20 s"), "{all}");
    }

    #[test]
    fn a_mark_is_read_as_it_is_written() {
        assert_eq!(marked(&mark(12, 3)), Some((12, 3)));
        assert_eq!(marked("fault 12 begins: kill-leader"), None);
    }
}
