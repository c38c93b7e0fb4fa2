//! What is being waited for, drawn on standard error, and only where that is a terminal: standard output has the
//! result, and a log has no use for a line that changes. Nothing is drawn for what takes less than a second.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Shorter waits are not worth a line.
const QUIET: Duration = Duration::from_secs(1);
/// Between two pictures of the spinner.
const TICK: Duration = Duration::from_millis(120);

/// A line about what is going on; gone once this is dropped. While it is there, nothing else may write to standard
/// error.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Of something that takes an unknown time.
    pub(crate) fn of(what: &str) -> Self {
        Self::drawn(|| {
            let bar = ProgressBar::new_spinner()
                .with_style(style("{spinner} {msg}  {elapsed_precise}"))
                .with_message(what.to_owned());
            bar.enable_steady_tick(TICK);
            bar
        })
    }

    /// Of something in `steps` steps.
    pub(crate) fn of_steps(what: &str, steps: usize) -> Self {
        Self::drawn(|| {
            let steps = u64::try_from(steps).unwrap_or(u64::MAX);
            let bar = ProgressBar::new(steps)
                .with_style(style("{msg}  {bar:24}  {pos} of {len}  {elapsed_precise}"))
                .with_message(what.to_owned());
            bar.enable_steady_tick(TICK);
            bar
        })
    }

    /// One step is done.
    pub(crate) fn step(&self) {
        self.0.inc(1);
    }

    /// Elsewhere than on a terminal it is not even made: it would have a thread of its own.
    fn drawn(make: impl FnOnce() -> ProgressBar) -> Self {
        Self(if std::io::stderr().is_terminal() {
            make()
        } else {
            ProgressBar::hidden()
        })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The templates stand above; one that is wrong costs its looks.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Waits, and shows for what if that takes longer than a second.
pub(crate) async fn patiently<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(QUIET) => {}
    }
    let _progress = Progress::of(what);
    work.await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_understood() {
        for template in [
            "{spinner} {msg}  {elapsed_precise}",
            "{msg}  {bar:24}  {pos} of {len}  {elapsed_precise}",
        ] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[tokio::test]
    async fn waiting_gives_what_was_waited_for() {
        assert_eq!(patiently("nothing", async { 7 }).await, 7);
        let slow = async {
            tokio::time::sleep(QUIET + TICK).await;
            8
        };
        assert_eq!(patiently("a moment", slow).await, 8);
    }
}
