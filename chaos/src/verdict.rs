//! What came of a run. A run passes only if everything that was planned has happened, everything was checked, and nothing was
//! wrong. Whatever was wrong is told first: a run in which a fault has failed, too, has still found it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Value, json};

use crate::oracles::{Finding, Judgement};
use crate::schedule::{Effect, FaultKind, Fired, Plan};

/// What came of a run.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// All that was planned has happened, and nothing was wrong.
    Pass,
    /// The cluster broke a promise.
    Violation(Vec<Finding>),
    /// The run shows nothing, and why.
    Inconclusive(String),
}

impl Verdict {
    /// Of what the oracles say, what was planned and has happened, and whatever else went wrong with the run itself.
    #[must_use]
    pub fn of(judgement: Judgement, plan: &Plan, fired: &[Fired], trouble: &[String]) -> Self {
        let mut reasons = trouble.to_vec();
        match judgement {
            Judgement::Violations(findings) => return Self::Violation(findings),
            Judgement::Inconclusive(why) => reasons.push(why),
            Judgement::Pass => {}
        }
        reasons.extend(missing(plan, fired));
        if reasons.is_empty() {
            Self::Pass
        } else {
            Self::Inconclusive(reasons.join("; "))
        }
    }

    /// 0, 1 or 2.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Violation(_) => 1,
            Self::Inconclusive(_) => 2,
        }
    }

    /// Whether it passed.
    #[must_use]
    pub fn is_pass(&self) -> bool {
        matches!(self, Self::Pass)
    }

    /// What was found wrong.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        match self {
            Self::Violation(findings) => findings,
            Self::Pass | Self::Inconclusive(_) => &[],
        }
    }

    /// How many things were found wrong, with those that are not told one by one.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.findings().iter().map(Finding::stands_for).sum()
    }

    /// As the run's folder keeps it, `verdict.json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Pass => json!({"verdict": "pass"}),
            Self::Violation(findings) => {
                let told: Vec<Value> = findings
                    .iter()
                    .map(|finding| json!({"oracle": finding.oracle, "text": finding.text}))
                    .collect();
                json!({"verdict": "violation", "findings": told})
            }
            Self::Inconclusive(why) => json!({"verdict": "inconclusive", "why": why}),
        }
    }
}

impl fmt::Display for Verdict {
    /// Lines for people, the verdict in the last one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => write!(f, "verdict: pass"),
            Self::Violation(findings) => {
                for finding in findings {
                    writeln!(f, "violation: {}: {}", finding.oracle, finding.text)?;
                }
                write!(f, "verdict: violation")
            }
            Self::Inconclusive(why) => write!(f, "verdict: inconclusive: {why}"),
        }
    }
}

/// How often each kind has happened and had the effect that makes it count.
#[must_use]
pub fn counted(fired: &[Fired]) -> BTreeMap<FaultKind, u32> {
    let mut counts = BTreeMap::new();
    for one in fired {
        if matches!(one.effect, Effect::Counted) {
            *counts.entry(one.kind).or_default() += 1;
        }
    }
    counts
}

/// Of each kind how many that were carried out have had their effect, in lines for people, with the last reason of those that
/// have not.
#[must_use]
pub fn effects(fired: &[Fired]) -> String {
    let (counts, mut out) = (counted(fired), String::new());
    for (kind, carried) in carried_out(fired) {
        let count = counts.get(&kind).copied().unwrap_or_default();
        out.push_str(&format!("{kind}: {count} of {carried} had their effect"));
        if count < carried {
            out.push_str(&format!("; the last of the others: {}", last_reason(fired, kind)));
        }
        out.push('\n');
    }
    out
}

/// How often each kind was carried out, whatever came of it.
fn carried_out(fired: &[Fired]) -> BTreeMap<FaultKind, u32> {
    let mut counts = BTreeMap::new();
    for one in fired {
        *counts.entry(one.kind).or_default() += 1;
    }
    counts
}

/// Why the last one of a kind that has had no effect had none.
fn last_reason(fired: &[Fired], kind: FaultKind) -> &str {
    let mut why = fired.iter().rev().filter(|one| one.kind == kind);
    why.find_map(|one| one.effect.why_not())
        .unwrap_or("it was never carried out")
}

/// What was planned and has not happened: steps that were not carried out, and those that have had no effect, however often they
/// were repeated.
fn missing(plan: &Plan, fired: &[Fired]) -> Vec<String> {
    let mut reasons = Vec::new();
    let done: BTreeSet<u32> = fired.iter().map(|one| one.step).collect();
    let undone: Vec<String> = plan
        .steps
        .iter()
        .filter(|step| !done.contains(&step.number))
        .map(|step| format!("{} ({})", step.number, step.fault.kind()))
        .collect();
    if !undone.is_empty() {
        reasons.push(format!("steps that were not carried out: {}", undone.join(", ")));
    }
    let had_effect: BTreeSet<u32> = fired
        .iter()
        .filter(|one| matches!(one.effect, Effect::Counted))
        .map(|one| one.step)
        .collect();
    let planned: BTreeSet<FaultKind> = plan.steps.iter().map(|step| step.fault.kind()).collect();
    for kind in planned {
        let of_kind = plan.steps.iter().filter(|step| step.fault.kind() == kind);
        let all: Vec<u32> = of_kind.map(|step| step.number).collect();
        let without = all.iter().filter(|number| !had_effect.contains(*number));
        let without: Vec<String> = without.map(ToString::to_string).collect();
        let why = || last_reason(fired, kind);
        if without.len() == all.len() {
            reasons.push(format!("no {kind} has had its effect: {}", why()));
        } else if !without.is_empty() {
            reasons.push(format!(
                "{} of {} {kind} have had no effect (steps {}): {}",
                without.len(),
                all.len(),
                without.join(", "),
                why()
            ));
        }
    }
    if plan.steps.is_empty() {
        reasons.push("no fault was planned: nothing was tried".to_owned());
    }
    reasons
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::schedule::plan;

    fn planned() -> Plan {
        let kinds = BTreeSet::from([FaultKind::KillLeader, FaultKind::Pause]);
        plan(7, 0.5, &kinds, 3)
    }

    fn all_fired(plan: &Plan) -> Vec<Fired> {
        plan.steps
            .iter()
            .map(|step| Fired {
                step: step.number,
                kind: step.fault.kind(),
                at_ms: 0,
                target: "hsm-node-1".to_owned(),
                effect: Effect::Counted,
                healed_ms: 1,
            })
            .collect()
    }

    #[test]
    fn a_run_passes_only_if_every_planned_fault_has_had_its_effect() {
        let plan = planned();
        let all = all_fired(&plan);
        assert!(Verdict::of(Judgement::Pass, &plan, &all, &[]).is_pass());

        let mut without = all.clone();
        without.pop();
        let verdict = Verdict::of(Judgement::Pass, &plan, &without, &[]);
        assert_eq!(verdict.exit_code(), 2, "{verdict}");
        assert!(verdict.to_string().contains("were not carried out"), "{verdict}");

        let mut powerless = all;
        for one in &mut powerless {
            if one.kind == FaultKind::KillLeader {
                one.effect = Effect::NotCounted("nobody led".to_owned());
            }
        }
        let verdict = Verdict::of(Judgement::Pass, &plan, &powerless, &[]);
        assert_eq!(verdict.exit_code(), 2, "{verdict}");
        assert!(
            verdict
                .to_string()
                .contains("no kill-leader has had its effect: nobody led"),
            "{verdict}"
        );
    }

    #[test]
    fn every_step_has_to_have_its_effect_at_some_attempt_and_how_many_had_is_said() {
        let plan = plan(7, 5.0, &BTreeSet::from([FaultKind::KillLeader]), 3);
        let mut fired = all_fired(&plan);
        let all = fired.len();
        assert!(all >= 12, "{all}");
        fired[3].effect = Effect::NotCounted("nobody led".to_owned());
        let said = Verdict::of(Judgement::Pass, &plan, &fired, &[]);
        assert_eq!(said.exit_code(), 2, "{said}");
        let one = format!("1 of {all} kill-leader have had no effect (steps 4): nobody led");
        assert!(said.to_string().contains(&one), "{said}");
        // It was repeated, and had it then.
        let mut again = fired[3].clone();
        again.effect = Effect::Counted;
        fired.push(again);
        let said = Verdict::of(Judgement::Pass, &plan, &fired, &[]);
        assert!(said.is_pass(), "{said}");
        let of = format!("kill-leader: {all} of {} had their effect", all + 1);
        assert!(effects(&fired).starts_with(&of), "{}", effects(&fired));
        assert_eq!(
            effects(&all_fired(&plan)),
            format!("kill-leader: {all} of {all} had their effect\n")
        );
    }

    #[test]
    fn what_was_found_wrong_is_told_whatever_else_failed() {
        let plan = planned();
        let finding = Finding {
            oracle: "versions",
            text: "two active".to_owned(),
        };
        let trouble = ["a node did not start".to_owned()];
        let verdict = Verdict::of(Judgement::Violations(vec![finding]), &plan, &[], &trouble);
        assert_eq!(verdict.exit_code(), 1);
        assert_eq!(
            verdict.to_string(),
            "violation: versions: two active\nverdict: violation"
        );
        let verdict = Verdict::of(Judgement::Pass, &plan, &all_fired(&plan), &trouble);
        assert_eq!(verdict.exit_code(), 2);
    }
}
