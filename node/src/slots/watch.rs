//! The watch over one slot: a known-answer test every few seconds while it is open, another attempt
//! now and then while it is not. Whatever hangs in the token hangs on a thread of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_core::{HsmError, SlotState};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use super::entry::SlotEntry;
use super::pin_file::{Look, PinFile};

/// How often the watch looks, at the file of a closed slot's PIN too.
const TICK: Duration = Duration::from_millis(500);
/// Between known-answer tests. A lost token is found after at most this long.
const TEST_EVERY: Duration = Duration::from_secs(3);
/// Between attempts to open a slot; the token's own rules decide whether its PIN is tried. One follows at once when the
/// PIN's file has changed.
const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// What was last said about the slot, so that each change is said once.
struct Told {
    state: (&'static str, &'static str),
    reason: Option<String>,
    test: Option<String>,
}

/// Name and code: a reason may hold figures that change with every look.
fn summary(state: &SlotState) -> (&'static str, &'static str) {
    match state {
        SlotState::Failed { code, .. } => (state.name(), *code),
        _ => (state.name(), ""),
    }
}

/// What a blocking attempt came to.
enum Attempt {
    Test(Option<Result<(), HsmError>>),
    Open(bool),
}

/// Watches until `shutdown`.
pub(super) async fn run(entry: Arc<SlotEntry>, mut shutdown: watch::Receiver<bool>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut told = Told::by_opening(&entry);
    let mut attempt: Option<JoinHandle<Attempt>> = None;
    let mut pause = RETRY_FIRST;
    let mut pin_file = PinFile::of(&entry.config().pin).await;
    let mut due = Instant::now() + if entry.handle().is_some() { TICK } else { pause };
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = shutdown.changed() => return,
        }
        let state = entry.state();
        if told.say_state(&entry, &state) {
            // A hang that has ended waits for a test, and nobody wants to wait for a failure to be sure.
            due = due.min(Instant::now() + if entry.handle().is_some() { TICK } else { pause });
        }
        if let Some(running) = attempt.take_if(|running| running.is_finished()) {
            match running.await {
                Ok(Attempt::Test(tested)) => told.say_test(&entry, tested.as_ref()),
                Ok(Attempt::Open(opened)) => {
                    pause = if opened {
                        RETRY_FIRST
                    } else {
                        (pause * 2).min(RETRY_MOST)
                    };
                }
                Err(error) => {
                    tracing::error!(slot = entry.name().as_str(), %error, "the watch over the slot failed");
                }
            }
            due = Instant::now()
                + if entry.handle().is_some() {
                    TEST_EVERY
                } else {
                    pause
                };
        }
        let pin = if attempt.is_none() && entry.handle().is_none() {
            pin_file.look().await
        } else {
            Look::Same
        };
        if pin == Look::Changed {
            due = Instant::now();
        }
        if attempt.is_none() && pin != Look::Changing && Instant::now() >= due {
            let entry = Arc::clone(&entry);
            attempt = Some(tokio::task::spawn_blocking(move || match entry.handle() {
                Some(_) => Attempt::Test(entry.test()),
                None => Attempt::Open(entry.open().is_ok()),
            }));
        }
    }
}

impl Told {
    /// Opening the slot has said how that went.
    fn by_opening(entry: &SlotEntry) -> Self {
        Self {
            state: summary(&entry.state()),
            reason: entry.reason(),
            test: None,
        }
    }

    /// True if it had changed.
    fn say_state(&mut self, entry: &SlotEntry, state: &SlotState) -> bool {
        let now = summary(state);
        let reason = entry.reason();
        let closed_otherwise = entry.handle().is_none() && reason != self.reason;
        if self.state == now && !closed_otherwise {
            return false;
        }
        let (slot, label) = (entry.name().as_str(), entry.label());
        match &reason {
            Some(reason) => {
                tracing::error!(
                    slot,
                    label,
                    state = now.0,
                    code = now.1,
                    reason,
                    "slot does not serve"
                );
            }
            None => tracing::info!(
                slot,
                label,
                before = self.state.0,
                state = now.0,
                "slot serves again"
            ),
        }
        self.state = now;
        self.reason = reason;
        entry.say_changed();
        true
    }

    /// Failures that fail the slot are said with its state; others would go unseen.
    fn say_test(&mut self, entry: &SlotEntry, tested: Option<&Result<(), HsmError>>) {
        let failure = match tested {
            Some(Err(error)) => Some(error.to_string()),
            _ => None,
        };
        if failure == self.test {
            return;
        }
        if let Some(reason) = &failure {
            tracing::warn!(
                slot = entry.name().as_str(),
                reason,
                "known-answer test did not pass"
            );
            // The key at fault may be lost or quarantined: token and state are to be compared.
            entry.say_changed();
        }
        self.test = failure;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn figures_in_a_reason_are_no_change_of_state() {
        let hung = |reason: &str| SlotState::Failed {
            code: "hung",
            reason: reason.to_owned(),
        };
        assert_eq!(summary(&hung("for 3 s")), summary(&hung("for 4 s")));
        assert_ne!(
            summary(&hung("x")),
            summary(&SlotState::Failed {
                code: "token_error",
                reason: "x".to_owned()
            })
        );
        assert_ne!(summary(&SlotState::Ready), summary(&SlotState::Locked));
    }

    #[test]
    fn what_was_said_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let entry = SlotEntry::new(super::super::open::tests::config("a"), dir.path().to_path_buf());
        let mut told = Told::by_opening(&entry);
        assert_eq!(told.state, ("locked", ""));
        assert!(entry.open().is_err());
        assert!(told.say_state(&entry, &entry.state()));
        assert!(!told.say_state(&entry, &entry.state()));
        assert_eq!(told.state, ("failed", "open_failed"));
        assert_eq!(told.reason, entry.reason());
        told.say_test(&entry, Some(&Err(HsmError::Random("x".to_owned()))));
        assert!(told.test.is_some());
        told.say_test(&entry, None);
        assert!(told.test.is_none());
    }
}
