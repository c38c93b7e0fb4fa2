//! What ends a plan before its last step: its time is over, or the program was told to stop. What is under way then is undone as
//! always, and nothing else is begun.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Effect, FaultKind, Fired, Plan, Step};

/// A step that had no effect is carried out again, so often in all: nobody may have led just then, or a node have had nothing to
/// lose. One that has none even then is missing from the run.
pub(super) const ATTEMPTS: u32 = 4;

/// How often a step of a kind is carried out at most.
pub(super) fn attempts(kind: FaultKind) -> u32 {
    if kind.may_be_repeated() { ATTEMPTS } else { 1 }
}

/// Between two looks at whether it is time.
const LOOK: Duration = Duration::from_millis(100);
/// How much longer than its minutes a plan may take: a fifth of them and a minute. Steps are dealt by what they take on a machine
/// that has nothing else to do.
const MARGIN: Duration = Duration::from_secs(60);

/// Why a plan has ended before its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Early {
    /// Its minutes were over, and the margin: a step of the plan that did not come is missing from the run.
    Time,
    /// The program was told to stop.
    Signal,
}

impl Early {
    /// For people.
    #[must_use]
    pub fn why(self) -> &'static str {
        match self {
            Self::Time => "the time was over",
            Self::Signal => "the run was told to stop",
        }
    }
}

/// How whoever receives signals tells a run to stop.
#[derive(Debug, Default)]
pub struct Stop {
    begun: AtomicBool,
    told: AtomicBool,
}

impl Stop {
    /// From here on there is something to be judged.
    pub fn faults_begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Tells it. Whether it heals, judges and ends by itself: before faults have begun it does not.
    #[must_use]
    pub fn tell(&self) -> bool {
        self.told.store(true, Ordering::Relaxed);
        self.begun.load(Ordering::Relaxed)
    }

    /// Whether it was told.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }
}

/// How long a plan may go on.
#[derive(Debug)]
pub(crate) struct Limit<'a> {
    stop: &'a Stop,
    /// Its minutes are over: of what there is in reserve nothing is begun any more.
    full: Instant,
    /// From then on nothing is begun but what is in `first`.
    until: Instant,
    /// Numbers of the steps that come however late it is, the first one of each kind, and as often as they may be repeated; and
    /// whether they are weather. Those that have had their effect, or have been given up, are gone from it.
    first: Mutex<BTreeMap<u32, bool>>,
    /// The plan has ended by itself: what is left out is so for another reason.
    broken: AtomicBool,
    early: Mutex<Option<Early>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Limit<'a> {
    /// From now on.
    pub(crate) fn begin(stop: &'a Stop, plan: &Plan, minutes: f64) -> Self {
        let mut kinds = BTreeSet::new();
        let first = plan.steps.iter().filter(|step| kinds.insert(step.fault.kind()));
        let first = first.map(|step| (step.number, step.fault.kind().is_weather()));
        let first = Mutex::new(first.collect());
        stop.faults_begin();
        let now = Instant::now();
        Self {
            stop,
            full: now + lasting(minutes),
            until: now + allowed(minutes),
            first,
            broken: AtomicBool::new(false),
            early: Mutex::default(),
        }
    }

    /// Whether its minutes are not over.
    pub(crate) fn in_time(&self) -> bool {
        Instant::now() < self.full
    }

    /// This step begins, or is repeated: those before it in its lane are through.
    pub(crate) fn step_begins(&self, step: &Step) {
        let lane = step.fault.kind().is_weather();
        lock(&self.first).retain(|number, weather| *weather != lane || *number >= step.number);
    }

    /// This one was carried out, for the first time or once more; `stuck` if the cluster has not come back from it.
    pub(crate) fn step_ends(&self, one: &Fired, stuck: bool) {
        if stuck || one.effect.failure().is_some() {
            self.plan_breaks();
        }
        if one.effect == Effect::Counted {
            lock(&self.first).remove(&one.step);
        }
    }

    /// The harness or the cluster has failed, and the plan ends with that.
    pub(crate) fn plan_breaks(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// Goes on until all of this is over, and sets `over` once nothing else is to be begun.
    pub(crate) async fn hold<T>(&self, over: &AtomicBool, lanes: impl Future<Output = T>) -> T {
        let mut lanes = std::pin::pin!(lanes);
        let early = tokio::select! {
            done = &mut lanes => return done,
            early = self.comes() => early,
        };
        *lock(&self.early) = Some(early);
        over.store(true, Ordering::Relaxed);
        lanes.await
    }

    async fn comes(&self) -> Early {
        loop {
            if self.stop.is_told() {
                return Early::Signal;
            }
            if Instant::now() >= self.until && lock(&self.first).is_empty() {
                return Early::Time;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Why steps were left out, if this is the only reason.
    pub(crate) fn early(&self, plan: &Plan, fired: &[Fired]) -> Option<Early> {
        let due = plan.due(fired).steps.len();
        if self.broken.load(Ordering::Relaxed) || plan.carried_out(fired).steps.len() == due {
            return None;
        }
        *lock(&self.early)
    }
}

/// Nothing, of minutes that are no time.
fn lasting(minutes: f64) -> Duration {
    let lasting = Duration::try_from_secs_f64(minutes * 60.0).unwrap_or_default();
    lasting.min(Duration::from_secs(366 * 86_400))
}

/// With the margin.
fn allowed(minutes: f64) -> Duration {
    let planned = lasting(minutes);
    planned + planned / 5 + MARGIN
}

impl Plan {
    /// What a run is asked about: every step, and what there was time for besides.
    pub(crate) fn due(&self, fired: &[Fired]) -> Self {
        let begun: BTreeSet<u32> = fired.iter().map(|one| one.step).collect();
        let more = self.more.iter().filter(|step| begun.contains(&step.number));
        Self {
            seed: self.seed,
            steps: self.steps.iter().chain(more).cloned().collect(),
            more: Vec::new(),
        }
    }

    /// What a verdict asks about. Nobody has to wait for a run that was told to stop; one that has had its time has to have carried
    /// out its plan, but of the reserve only what was not broken off.
    pub(crate) fn asked_about(&self, early: Option<Early>, fired: &[Fired]) -> Self {
        match early {
            None => self.due(fired),
            Some(Early::Signal) => self.carried_out(fired),
            Some(Early::Time) => {
                let carried_out = self.carried_out(fired).steps;
                let more = self.more.iter().filter(|step| carried_out.contains(step));
                Self {
                    seed: self.seed,
                    steps: self.steps.iter().chain(more).cloned().collect(),
                    more: Vec::new(),
                }
            }
        }
    }

    /// What of it was carried out: that is all that a run which was told to stop can be asked about. A step that has had no effect
    /// would have been repeated, had there been time: the last one of each lane is among what was left out, unless it has had all
    /// its attempts.
    pub(crate) fn carried_out(&self, fired: &[Fired]) -> Self {
        let mut done: BTreeSet<u32> = fired.iter().map(|one| one.step).collect();
        for lane in [false, true] {
            let of_lane = |one: &&Fired| one.kind.is_weather() == lane;
            let Some(last) = fired.iter().filter(of_lane).max_by_key(|one| one.step) else {
                continue;
            };
            let tries = fired.iter().filter(|one| one.step == last.step);
            let counts = tries.clone().any(|one| one.effect == Effect::Counted);
            if !counts && tries.count() < attempts(last.kind) as usize {
                done.remove(&last.step);
            }
        }
        let all = self.steps.iter().chain(&self.more);
        let steps = all.filter(|step| done.contains(&step.number));
        Self {
            seed: self.seed,
            steps: steps.cloned().collect(),
            more: Vec::new(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::plan;
    use super::*;

    fn planned() -> Plan {
        let kinds = BTreeSet::from([FaultKind::KillLeader, FaultKind::Pause]);
        plan(7, 5.0, &kinds, 3)
    }

    fn fired(plan: &Plan, count: usize) -> Vec<Fired> {
        let steps = plan.steps.iter().take(count);
        steps
            .map(|step| Fired {
                step: step.number,
                kind: step.fault.kind(),
                at_ms: 0,
                target: String::new(),
                effect: Effect::Counted,
                healed_ms: 1,
            })
            .collect()
    }

    /// Steps one after the other until `over` is set; how many there were.
    async fn steps(limit: &Limit<'_>, plan: &Plan, over: &AtomicBool) -> usize {
        for (done, step) in plan.steps.iter().enumerate() {
            tokio::time::sleep(LOOK / 20).await;
            if over.load(Ordering::Relaxed) {
                return done;
            }
            limit.step_begins(step);
            limit.step_ends(&fired(plan, done + 1)[done], false);
        }
        tokio::time::sleep(4 * LOOK).await;
        plan.steps.len()
    }

    #[tokio::test]
    async fn the_first_of_each_kind_comes_however_late_it_is() {
        let plan = planned();
        let stop = Stop::default();
        let mut limit = Limit::begin(&stop, &plan, 5.0);
        limit.until = Instant::now();
        let over = AtomicBool::new(false);
        let done = limit.hold(&over, steps(&limit, &plan, &over)).await;
        assert!(done >= 2 && done < plan.steps.len(), "{done}");
        assert_eq!(limit.early(&plan, &fired(&plan, done)), Some(Early::Time));
        assert_eq!(
            limit.early(&plan, &fired(&plan, plan.steps.len())),
            None,
            "nothing was left out"
        );
        limit.plan_breaks();
        assert_eq!(
            limit.early(&plan, &fired(&plan, done)),
            None,
            "it ended of a failure"
        );
    }

    #[tokio::test]
    async fn a_plan_that_is_told_to_stop_begins_nothing_more() {
        let plan = planned();
        let stop = Stop::default();
        assert!(!stop.tell(), "nothing has begun");
        let stop = Stop::default();
        let limit = Limit::begin(&stop, &plan, 5.0);
        assert!(stop.tell(), "it ends by itself");
        let over = AtomicBool::new(false);
        let done = limit.hold(&over, steps(&limit, &plan, &over)).await;
        assert!(done < plan.steps.len(), "{done}");
        assert_eq!(limit.early(&plan, &fired(&plan, done)), Some(Early::Signal));
    }

    #[tokio::test]
    async fn a_plan_that_is_in_time_ends_by_itself() {
        let plan = planned();
        let stop = Stop::default();
        let limit = Limit::begin(&stop, &plan, 5.0);
        let over = AtomicBool::new(false);
        let done = limit.hold(&over, steps(&limit, &plan, &over)).await;
        assert_eq!(done, plan.steps.len());
        assert!(!over.load(Ordering::Relaxed));
        assert_eq!(limit.early(&plan, &fired(&plan, 1)), None);
    }

    #[test]
    fn a_plan_may_take_a_fifth_and_a_minute_longer() {
        let seconds = [0.0, 1.0, 60.0].map(|minutes| allowed(minutes).as_secs());
        assert_eq!(seconds, [60, 132, 4_380]);
        assert_eq!(allowed(f64::NAN), MARGIN);
        assert!(allowed(f64::MAX) >= MARGIN);
    }

    #[test]
    fn a_first_step_without_effect_is_waited_for_until_it_is_given_up() {
        let plan = planned();
        let stop = Stop::default();
        let limit = Limit::begin(&stop, &plan, 5.0);
        let waits = || lock(&limit.first).len();
        assert_eq!(waits(), 2);
        let mut one = fired(&plan, 1).remove(0);
        one.effect = Effect::NotCounted("nobody led".to_owned());
        for _ in 0..2 {
            limit.step_begins(&plan.steps[0]);
            limit.step_ends(&one, false);
            assert_eq!(waits(), 2, "it is repeated");
        }
        limit.step_begins(&plan.steps[1]);
        assert_eq!(waits(), 1, "it was given up: it is missing from the run");
        limit.step_ends(&fired(&plan, 2)[1], false);
        assert_eq!(waits(), 0);
        assert!(!limit.broken.load(Ordering::Relaxed));
        one.effect = Effect::Failed("it does not join".to_owned());
        limit.step_ends(&one, false);
        assert!(limit.broken.load(Ordering::Relaxed));
    }

    #[test]
    fn of_what_is_in_reserve_only_what_was_begun_is_missed() {
        let plan = planned();
        assert!(!plan.more.is_empty());
        let mut done = fired(&plan, plan.steps.len());
        assert_eq!(plan.due(&done).steps, plan.steps);
        assert_eq!(plan.due(&[]).steps, plan.steps, "these have to come");
        let stop = Stop::default();
        let mut limit = Limit::begin(&stop, &plan, 5.0);
        assert!(limit.in_time());
        limit.full = Instant::now();
        assert!(!limit.in_time());
        // It was begun, and then the run was told to stop.
        *lock(&limit.early) = Some(Early::Signal);
        assert_eq!(limit.early(&plan, &done), None, "nothing was left out");
        let next = &plan.more[0];
        let mut one = done[0].clone();
        (one.step, one.kind) = (next.number, next.fault.kind());
        one.effect = Effect::NotCounted("nobody led".to_owned());
        done.push(one);
        let due = plan.due(&done);
        assert_eq!(due.steps.last(), Some(next));
        assert_eq!(due.steps.len(), plan.steps.len() + 1);
        assert_eq!(plan.carried_out(&done).steps, plan.steps);
        assert_eq!(limit.early(&plan, &done), Some(Early::Signal));
        assert_eq!(plan.asked_about(None, &done), due);
        assert_eq!(plan.asked_about(Some(Early::Time), &done).steps, plan.steps);
        if let Some(last) = done.last_mut() {
            last.effect = Effect::Counted;
        }
        assert_eq!(plan.carried_out(&done).steps, due.steps);
        assert_eq!(plan.asked_about(Some(Early::Time), &done), due);
        assert_eq!(limit.early(&plan, &done), None);
    }

    #[test]
    fn what_was_carried_out_of_a_plan_is_a_plan() {
        let plan = planned();
        let some = plan.carried_out(&fired(&plan, 3));
        assert_eq!(some.steps, plan.steps[..3]);
        assert!(plan.carried_out(&[]).steps.is_empty());
        // One that was given up is asked about; one that there was no more time for is not.
        let mut without = fired(&plan, 3);
        without[1].effect = Effect::NotCounted("nobody led".to_owned());
        assert_eq!(plan.carried_out(&without).steps.len(), 3);
        without[2].effect = Effect::NotCounted("nobody led".to_owned());
        assert_eq!(plan.carried_out(&without).steps, plan.steps[..2]);
        // Nor would there have been anything else for one that has had all its attempts.
        let last = without[2].clone();
        without.extend((2..ATTEMPTS).map(|_| last.clone()));
        assert_eq!(plan.carried_out(&without).steps, plan.steps[..2]);
        without.push(last.clone());
        assert_eq!(plan.carried_out(&without).steps, plan.steps[..3]);
        let joins = Fired {
            kind: FaultKind::JoinRemove,
            ..last
        };
        assert_eq!(plan.carried_out(&[joins]).steps, plan.steps[2..3], "it has one");
    }
}
