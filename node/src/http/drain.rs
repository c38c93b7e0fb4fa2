//! Shutting down without failing a request: first say so, then let connections end, then cut.
//! Phases only ever go forward.

use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::Drain;

/// How far a shutdown is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No shutdown.
    Serving,
    /// Not ready any more, still accepting: balancers get time to notice.
    Notice,
    /// Nobody new is let in, and each answer closes its connection; idle connections are kept, because a request may
    /// be on its way on one of them.
    Closing,
    /// Connections at rest end: only requests in hand are waited for.
    Finishing,
    /// Everything ends.
    Stopped,
}

/// Announces a shutdown's phases.
#[derive(Debug)]
pub struct DrainControl {
    phase: watch::Sender<Phase>,
}

/// Sees a shutdown's phases. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DrainSignal {
    phase: watch::Receiver<Phase>,
}

impl Default for DrainControl {
    fn default() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Serving),
        }
    }
}

impl DrainControl {
    /// For everybody who has to know.
    #[must_use]
    pub fn signal(&self) -> DrainSignal {
        DrainSignal {
            phase: self.phase.subscribe(),
        }
    }

    /// Goes on to a phase; never back.
    pub fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = to > *phase;
            if forward {
                *phase = to;
            }
            forward
        });
    }

    /// The whole shutdown of a listener: notice, closing until no connection is left or its time has passed, then
    /// the same with what is in hand, stop. Whoever gives the notice before, to do something first, has it last for
    /// longer.
    pub async fn run(&self, times: Drain, open: &super::OpenConnections) {
        self.advance(Phase::Notice);
        tokio::time::sleep(times.notice).await;
        self.advance(Phase::Closing);
        if timeout(times.timeout, open.none_left()).await.is_err() {
            self.advance(Phase::Finishing);
            if timeout(times.finish, open.none_left()).await.is_err() {
                tracing::warn!(
                    open = open.count(),
                    "requests were still in hand when the time to drain was over: they are cut"
                );
            }
        }
        self.advance(Phase::Stopped);
    }
}

impl DrainSignal {
    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// True from the first notice on: not ready.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Notice
    }

    /// Waits until a phase is reached. If whoever announces is gone, that is the end too.
    pub async fn reached(&mut self, phase: Phase) {
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward() {
        let control = DrainControl::default();
        let mut signal = control.signal();
        assert!(!signal.is_draining());
        control.advance(Phase::Closing);
        control.advance(Phase::Notice);
        assert_eq!(signal.phase(), Phase::Closing);
        control.advance(Phase::Finishing);
        control.advance(Phase::Closing);
        assert_eq!(signal.phase(), Phase::Finishing);
        signal.reached(Phase::Notice).await;
        drop(control);
        signal.reached(Phase::Stopped).await;
    }
}
