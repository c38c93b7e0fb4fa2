//! Scenarios of one test that mostly wait, for elections, time-outs and kills: several of them at once, each on clusters of
//! its own. What measures how quick something is does not belong here, but for bounds that leave seconds
//! (`docs/decisions/005-test-profile.md`).

use std::pin::Pin;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

/// One of them; made by [`scenario`](crate::scenario!).
pub struct Scenario {
    what: &'static str,
    run: Box<dyn FnOnce() -> Running + Send>,
}

/// A scenario on its way.
pub type Running = Pin<Box<dyn Future<Output = Result<()>>>>;

impl Scenario {
    /// What happens, as the path of a function says it, and how to begin it.
    pub fn new(path: &'static str, run: impl FnOnce() -> Running + Send + 'static) -> Self {
        Self {
            what: path.trim_start_matches("crate::"),
            run: Box::new(run),
        }
    }

    async fn run(self) -> Result<()> {
        let begun = Instant::now();
        (self.run)().await.context(self.what)?;
        println!("{}: {:.1?}", self.what, begun.elapsed());
        Ok(())
    }
}

/// The [`Scenario`](crate::lanes::Scenario) that a function is, called by its name.
#[macro_export]
macro_rules! scenario {
    ($run:path) => {
        $crate::lanes::Scenario::new(stringify!($run), || Box::pin($run()))
    };
}

/// Runs lanes beside each other, each on a thread and a runtime of its own, and the scenarios of a lane one after the other.
/// All lanes are run to their ends, whichever fails; of a lane, what follows a failure is not. Scenarios that do not have
/// the word `HSM_SCENARIOS` in their names are left out; it is an error if that leaves none.
pub fn lanes<const N: usize>(lanes: [Vec<Scenario>; N]) -> Result<()> {
    match std::env::var("HSM_SCENARIOS") {
        Ok(word) => run_all(only(lanes, &word)?),
        Err(_) => run_all(lanes),
    }
}

/// Those with a word in their names.
fn only<const N: usize>(mut lanes: [Vec<Scenario>; N], word: &str) -> Result<[Vec<Scenario>; N]> {
    for lane in &mut lanes {
        lane.retain(|scenario| {
            let kept = scenario.what.contains(word);
            if !kept {
                println!("{}: left out", scenario.what);
            }
            kept
        });
    }
    ensure!(
        lanes.iter().any(|lane| !lane.is_empty()),
        "no scenario of this test has {word:?} in its name (HSM_SCENARIOS): nothing was tested"
    );
    Ok(lanes)
}

fn run_all<const N: usize>(lanes: [Vec<Scenario>; N]) -> Result<()> {
    let running = lanes.map(|lane| std::thread::spawn(move || run(lane)));
    let mut failures = Vec::new();
    for lane in running {
        match lane.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failures.push(format!("{error:?}")),
            Err(_) => failures.push("a scenario panicked: see above".to_owned()),
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    bail!("{}", failures.join("\n\n"))
}

fn run(lane: Vec<Scenario>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for scenario in lane {
            scenario.run().await?;
        }
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    static BOTH: Barrier = Barrier::new(2);
    static COUNTED: AtomicU32 = AtomicU32::new(0);

    async fn one_that_fails() -> Result<()> {
        BOTH.wait();
        bail!("as it was told")
    }

    async fn one_that_does_not() -> Result<()> {
        BOTH.wait();
        Ok(())
    }

    async fn counts() -> Result<()> {
        COUNTED.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    #[test]
    fn lanes_run_beside_each_other_and_every_failure_is_told() {
        let told = run_all([
            vec![scenario!(one_that_fails), scenario!(counts)],
            vec![scenario!(one_that_does_not), scenario!(counts)],
        ]);
        let said = told.unwrap_err().to_string();
        assert!(
            said.contains("one_that_fails") && said.contains("as it was told"),
            "{said}"
        );
        assert!(!said.contains("one_that_does_not"), "{said}");
        assert_eq!(COUNTED.load(Ordering::Relaxed), 1);
        run_all([vec![]]).unwrap();
    }

    #[test]
    fn a_word_that_no_scenario_has_is_an_error() {
        let both = || [vec![scenario!(one_that_fails)], vec![scenario!(counts)]];
        let left = only(both(), "fails").unwrap();
        assert_eq!(left.map(|lane| lane.len()), [1, 0]);
        let told = only(both(), "restart").err().unwrap().to_string();
        assert!(
            told.contains("\"restart\"") && told.contains("HSM_SCENARIOS"),
            "{told}"
        );
    }
}
