//! What is done to the cluster and when: a plan that follows from a seed alone, and what came of carrying it out.
//!
//! Kinds are dealt like cards: every kind that is asked for comes once before any comes again. Of each step every number is
//! drawn, used or not, so that what one kind needs never changes what comes after it.

mod carry;
mod deal;
mod fault;
mod kind;
mod limit;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub(crate) use carry::carry_out;
pub use fault::{Fault, Meanwhile, Shape, Trouble, Victims};
pub use kind::FaultKind;
pub(crate) use limit::Limit;
pub use limit::{Early, Stop};

/// The longest pause before a step where no other is asked for, in milliseconds.
pub const PAUSE_MS: u32 = 2_000;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// From 1.
    pub number: u32,
    /// Before it, after the one before.
    pub pause_ms: u64,
    /// What is done.
    pub fault: Fault,
    /// Until it is undone.
    pub lasts_ms: u64,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// It follows from this.
    pub seed: u64,
    /// Those that break nodes follow each other; those that only make things worse ([`FaultKind::is_weather`]) go on beside
    /// them, in their own order.
    pub steps: Vec<Step>,
    /// What comes after them while the minutes of the run are not over: steps are dealt by an estimate, and real ones may take less.
    /// Each is begun only if there is time left, and is missed by nobody otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Step>,
}

/// Whether a fault had the effect for which it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// It had.
    Counted,
    /// It had not, and why.
    NotCounted(String),
    /// It was carried out, and the cluster has not done what it has to do about it: that is a finding.
    Failed(String),
}

impl Effect {
    /// What the cluster has not done: a finding.
    pub(crate) fn failure(&self) -> Option<&str> {
        match self {
            Self::Failed(what) => Some(what),
            Self::Counted | Self::NotCounted(_) => None,
        }
    }

    /// Why it does not count.
    pub(crate) fn why_not(&self) -> Option<&str> {
        match self {
            Self::NotCounted(why) | Self::Failed(why) => Some(why),
            Self::Counted => None,
        }
    }
}

/// A fault that was carried out. Times are the recorder's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fired {
    /// Number of the step.
    pub step: u32,
    /// Its kind.
    pub kind: FaultKind,
    /// When it began.
    pub at_ms: u64,
    /// What it hit.
    pub target: String,
    /// What came of it.
    pub effect: Effect,
    /// When it was undone, and the nodes ran again.
    pub healed_ms: u64,
}

/// In the place of the time at which a fault was undone: the harness has failed, and nobody knows what is still broken.
const NEVER: u64 = u64::MAX;

impl Fired {
    /// Whether it was undone, as far as the harness knows.
    pub(crate) fn was_undone(&self) -> bool {
        self.healed_ms != NEVER
    }
}

/// Plans a run of so many minutes, and what comes if it takes less. Every kind comes at least once: of many kinds in little time,
/// the run takes longer.
/// Where `nodes` is less than three, nothing that needs a majority without somebody is planned.
#[must_use]
pub fn plan(seed: u64, minutes: f64, kinds: &BTreeSet<FaultKind>, nodes: u32) -> Plan {
    plan_with_pauses(seed, minutes, kinds, nodes, PAUSE_MS)
}

/// As [`plan`], with another longest pause before a step, in milliseconds; the shortest is a quarter of it. The same faults
/// come in the same order, and more of them in the same time.
#[must_use]
pub fn plan_with_pauses(
    seed: u64,
    minutes: f64,
    kinds: &BTreeSet<FaultKind>,
    nodes: u32,
    pause_ms: u32,
) -> Plan {
    deal::deal(seed, minutes, kinds, nodes, pause_ms)
}
