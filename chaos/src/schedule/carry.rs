//! Carrying out a plan, step by step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;

use super::limit::attempts;
use super::{Effect, Fired, Limit, NEVER, Plan, Step};
use crate::cluster::Cluster;
use crate::history::Recorder;

/// Carries a plan out; every step undoes itself. One that had no effect is repeated, a few times, each after its pause: every attempt
/// is among what was fired, under the number of its step.
///
/// If the cluster does not come back from a fault in time, the plan ends with that one: the cluster is left as it is, and
/// whoever waits for it next finds what is wrong.
///
/// It ends, too, with the first step that the harness could not carry out. That one is among what was fired, without an effect
/// and without an end, and why it failed is said besides. A node that does not start is nothing of the kind: the cluster has
/// failed then, which is the effect of the step. And it ends at its [`Limit`].
///
/// After its steps comes what else there is, for as long as the minutes are not over.
pub(crate) async fn carry_out(
    plan: &Plan,
    cluster: &Cluster,
    recorder: &Recorder,
    limit: &Limit<'_>,
) -> (Vec<Fired>, Vec<anyhow::Error>) {
    let over = AtomicBool::new(false);
    let now = || recorder.elapsed_ms();
    let carry = async |step: &Step| {
        limit.step_begins(step);
        let done = crate::faults::carry_out(step, cluster, recorder).await;
        match &done {
            Ok((one, stuck)) => limit.step_ends(one, stuck.is_some()),
            Err(_) => limit.plan_breaks(),
        }
        done
    };
    let in_time = || limit.in_time();
    let lanes = async {
        tokio::join!(
            lane(plan, false, in_time, &over, now, &carry),
            lane(plan, true, in_time, &over, now, &carry)
        )
    };
    let ((mut fired, failed), (beside, failed_beside)) = limit.hold(&over, lanes).await;
    fired.extend(beside);
    fired.sort_by_key(|fired| (fired.at_ms, fired.step));
    (fired, failed.into_iter().chain(failed_beside).collect())
}

/// The weather of a plan, or all that is none: its steps, and of the others as many as begin in time.
async fn lane(
    plan: &Plan,
    weather: bool,
    in_time: impl Fn() -> bool,
    over: &AtomicBool,
    now: impl Fn() -> u64,
    carry: impl AsyncFn(&Step) -> Result<(Fired, Option<String>)>,
) -> (Vec<Fired>, Option<anyhow::Error>) {
    let is_in_it = |step: &&Step| step.fault.kind().is_weather() == weather;
    let steps: Vec<&Step> = plan.steps.iter().filter(is_in_it).collect();
    let (mut fired, mut failed) = one_after_the_other(&steps, over, &now, &carry).await;
    for step in plan.more.iter().filter(is_in_it) {
        if failed.is_some() || over.load(Ordering::Relaxed) || !in_time() {
            break;
        }
        let (more, why) = one_after_the_other(&[step], over, &now, &carry).await;
        fired.extend(more);
        failed = why;
    }
    (fired, failed)
}

/// Until `over` is set, which this sets itself where something goes wrong: what comes next would hide it. Whoever looks at the
/// cluster next finds that it is not ready.
async fn one_after_the_other(
    steps: &[&Step],
    over: &AtomicBool,
    now: impl Fn() -> u64,
    carry: impl AsyncFn(&Step) -> Result<(Fired, Option<String>)>,
) -> (Vec<Fired>, Option<anyhow::Error>) {
    let mut fired = Vec::with_capacity(steps.len());
    for step in steps {
        let kind = step.fault.kind();
        for _ in 0..attempts(kind) {
            // Before a repetition, too: what was missing may be there then.
            tokio::time::sleep(Duration::from_millis(step.pause_ms)).await;
            if over.load(Ordering::Relaxed) {
                return (fired, None);
            }
            let at_ms = now();
            match carry(step).await {
                Ok((one, stuck)) => {
                    let goes_on = stuck.is_none() && one.effect.failure().is_none();
                    let counts = one.effect == Effect::Counted;
                    fired.push(one);
                    if !goes_on {
                        over.store(true, Ordering::Relaxed);
                        return (fired, None);
                    }
                    if counts {
                        break;
                    }
                }
                Err(error) => {
                    over.store(true, Ordering::Relaxed);
                    // It may have broken something that only the end of the run heals.
                    fired.push(Fired {
                        step: step.number,
                        kind,
                        at_ms,
                        target: "unknown".to_owned(),
                        effect: Effect::NotCounted(format!("the harness has failed: {error:#}")),
                        healed_ms: NEVER,
                    });
                    return (fired, Some(error));
                }
            }
        }
    }
    (fired, None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::limit::ATTEMPTS;
    use super::super::{Fault, Meanwhile, Victims};
    use super::*;

    fn step(number: u32) -> Step {
        Step {
            number,
            pause_ms: 0,
            fault: Fault::Kill(Victims::Leader, 0),
            lasts_ms: 0,
        }
    }

    fn fired(step: &Step, effect: Effect) -> Fired {
        Fired {
            step: step.number,
            kind: step.fault.kind(),
            at_ms: 5,
            target: String::new(),
            effect,
            healed_ms: 6,
        }
    }

    #[tokio::test]
    async fn what_was_fired_is_kept_when_the_harness_fails() {
        let steps = [step(1), step(2), step(3)];
        let steps: Vec<&Step> = steps.iter().collect();
        let over = AtomicBool::new(false);
        let carry = async |step: &Step| match step.number {
            2 => anyhow::bail!("no such tool"),
            _ => Ok((fired(step, Effect::Counted), None::<String>)),
        };
        let (done, failed) = one_after_the_other(&steps, &over, || 7, carry).await;
        assert_eq!(failed.unwrap().to_string(), "no such tool");
        assert_eq!(done.len(), 2, "{done:?}");
        assert_eq!((done[0].step, &done[0].effect), (1, &Effect::Counted));
        // It has begun, and nobody knows whether it has ended.
        assert_eq!((done[1].step, done[1].at_ms, done[1].healed_ms), (2, 7, u64::MAX));
        assert!(matches!(&done[1].effect, Effect::NotCounted(why) if why.contains("no such tool")));
        assert!(over.load(Ordering::Relaxed), "what goes on beside it ends, too");
    }

    #[tokio::test]
    async fn a_step_without_effect_is_repeated_until_it_has_one_a_few_times() {
        let joins = Step {
            fault: Fault::JoinRemove {
                meanwhile: Meanwhile::Nothing,
                rotate: false,
                pick: 0,
            },
            ..step(3)
        };
        let steps = [step(1), step(2), joins];
        let steps: Vec<&Step> = steps.iter().collect();
        let over = AtomicBool::new(false);
        let tried = std::sync::atomic::AtomicU32::new(0);
        // The first one has its effect at the third attempt, the others never.
        let carry = async |step: &Step| {
            let counts = step.number == 1 && tried.fetch_add(1, Ordering::Relaxed) == 2;
            let effect = if counts {
                Effect::Counted
            } else {
                Effect::NotCounted("nobody led".to_owned())
            };
            anyhow::Ok((fired(step, effect), None::<String>))
        };
        let (done, failed) = one_after_the_other(&steps, &over, || 0, &carry).await;
        assert!(failed.is_none());
        let attempts = |number| done.iter().filter(|one| one.step == number).count();
        assert_eq!([1, 2, 3].map(attempts), [3, ATTEMPTS as usize, 1]);
        let counted = done.iter().filter(|one| one.effect == Effect::Counted);
        assert_eq!(counted.count(), 1);
    }

    #[tokio::test]
    async fn a_plan_ends_where_the_cluster_does_not_come_back() {
        let steps = [step(1), step(2)];
        let steps: Vec<&Step> = steps.iter().collect();
        let failed = Effect::Failed("it does not join".to_owned());
        assert_eq!(failed.failure(), Some("it does not join"));
        assert_eq!(Effect::NotCounted("nobody led".to_owned()).failure(), None);
        for (effect, stuck, carried) in [
            (Effect::Counted, None, 2),
            (Effect::Counted, Some("not ready"), 1),
            (failed, None, 1),
        ] {
            let over = AtomicBool::new(false);
            let carry =
                async |step: &Step| anyhow::Ok((fired(step, effect.clone()), stuck.map(str::to_owned)));
            let (done, failed) = one_after_the_other(&steps, &over, || 0, &carry).await;
            assert!(failed.is_none());
            assert_eq!(done.len(), carried, "{effect:?} {stuck:?}");
            // The other lane finds that it is over.
            let (beside, _) = one_after_the_other(&steps, &over, || 0, &carry).await;
            assert_eq!(beside.len(), if carried == 2 { 2 } else { 0 });
        }
    }

    #[tokio::test]
    async fn what_else_there_is_comes_while_there_is_time_and_nothing_has_gone_wrong() {
        let delay = |number| Step {
            fault: Fault::Delay {
                delay_ms: 1,
                jitter_ms: 0,
            },
            ..step(number)
        };
        let plan = Plan {
            seed: 7,
            steps: vec![step(1), delay(2)],
            more: vec![step(3), delay(4), step(5), step(6)],
        };
        // There is time for so many looks; this step goes wrong.
        for (looks, wrong, numbers) in [
            (0_u32, 0, vec![1]),
            (2, 0, vec![1, 3, 5]),
            (9, 0, vec![1, 3, 5, 6]),
            (9, 1, vec![1]),
            (9, 3, vec![1, 3]),
        ] {
            let (over, left) = (AtomicBool::new(false), std::cell::Cell::new(looks));
            let in_time = || left.replace(left.get().saturating_sub(1)) > 0;
            let carry = async |step: &Step| {
                let effect = if step.number == wrong {
                    Effect::Failed("it does not join".to_owned())
                } else {
                    Effect::Counted
                };
                anyhow::Ok((fired(step, effect), None::<String>))
            };
            let (done, failed) = lane(&plan, false, in_time, &over, || 0, &carry).await;
            let done: Vec<u32> = done.iter().map(|one| one.step).collect();
            assert_eq!(done, numbers, "{looks} {wrong}");
            assert!(failed.is_none());
        }
        let carry = async |step: &Step| anyhow::Ok((fired(step, Effect::Counted), None::<String>));
        let over = AtomicBool::new(false);
        let (done, _) = lane(&plan, true, || true, &over, || 0, &carry).await;
        assert_eq!(done.iter().map(|one| one.step).collect::<Vec<u32>>(), [2, 4]);
    }
}
