//! Taking a worker's steps: the blocking half on a thread of its own, then the proposal. A failure is
//! said once for each reason and tried again later.

use std::sync::Arc;
use std::time::Instant;

use raft_store::command::Op;
use raft_store::names::TransportId;

use super::plan::Action;
use super::steps::{Outcome, StepError, Workbench};
use super::worker::{LOOK_AGAIN, Worker};
use crate::clock;
use crate::consensus::ProposeError;

/// Failures before the one after which a node rejects its grant: whatever the token itself has is over by then.
const REJECT_AFTER: u32 = 3;

impl Worker {
    pub(super) async fn step(&mut self, action: Action, bench: &Arc<Workbench>) {
        let (at, work) = (Arc::clone(bench), action.clone());
        let taken = match tokio::task::spawn_blocking(move || at.take(&work)).await {
            Ok(taken) => taken,
            Err(error) => Err(StepError::Abnormal(error.to_string())),
        };
        let Outcome { effect, proposal } = match taken {
            Ok(outcome) => outcome,
            Err(error) => {
                let look = Instant::now() + LOOK_AGAIN;
                self.known.next_look = self.known.next_look.min(look);
                let mut reason = error.to_string();
                if error.is_of_grant()
                    && let Some(rejected) = self.reject_grant(&action, bench).await
                {
                    reason = format!("{reason}; {rejected}");
                }
                return self.failed(&action, &reason, error.is_security(), false);
            }
        };
        if let Some(held) = &mut self.known.held {
            held.apply(effect);
        }
        if let Some(op) = proposal
            && let Err(error) = self.propose(op).await
        {
            return self.failed(&action, &error.to_string(), false, is_passing(&error));
        }
        if self.known.attempts.succeeded(&action, Instant::now()) {
            let (slot, step, of) = (self.entry.name().as_str(), action.name(), action.subject());
            tracing::info!(slot, step, of, "token sync: step done after all");
        }
    }

    /// Has a grant taken back that has failed again and again. Says what came of it, if that was tried.
    async fn reject_grant(&mut self, action: &Action, bench: &Workbench) -> Option<String> {
        let Action::AcceptTransport(id) = action else {
            return None;
        };
        if self.known.attempts.failures(action) < REJECT_AFTER {
            return None;
        }
        let op = bench.rejection(*id)?;
        let granted_by = bench.granter(*id);
        let outcome = match self.propose(op).await {
            Ok(()) => {
                let slot = self.entry.name().as_str();
                tracing::warn!(
                    target: "audit", epoch = crate::logging::epoch(), slot, transport = %id, granted_by,
                    "a grant that cannot be opened is rejected; another holder has to grant the transport key"
                );
                "the grant is rejected".to_owned()
            }
            Err(error) => format!("it is not rejected: {error}"),
        };
        Some(outcome)
    }

    async fn propose(&mut self, op: Op) -> Result<(), ProposeError> {
        match op {
            Op::AddTransportKey(_) | Op::OfferTransportKey(_) => {
                let done = self.consensus.propose_as_leader(op).await;
                // Whatever became of it is in the state; the next one is another key. After an unknown
                // outcome the same one is proposed again, so that no second key is left in the token.
                if matches!(done, Ok(_) | Err(ProposeError::Refused(_))) {
                    self.known.new_transport = TransportId(clock::random_id());
                }
                done.map(|_| ())
            }
            Op::LeaseInvocations(_) | Op::AckVersions(_) => {
                failpoint(|| fail::fail_point!("rotation::before_ack")).await;
                self.consensus.propose_as_node(op).await?;
                failpoint(|| fail::fail_point!("rotation::after_ack")).await;
                Ok(())
            }
            op => self.consensus.propose_as_node(op).await.map(|_| ()),
        }
    }

    fn failed(&mut self, action: &Action, reason: &str, security: bool, passing: bool) {
        if !self.known.attempts.failed(action, Instant::now(), reason) {
            return;
        }
        let (slot, step, of) = (self.entry.name().as_str(), action.name(), action.subject());
        if security {
            tracing::error!(target: "audit", epoch = crate::logging::epoch(), slot, step, of, reason, "token sync refuses");
        } else if passing {
            tracing::info!(slot, step, of, reason, "token sync: step waits");
        } else {
            tracing::warn!(
                slot,
                step,
                of,
                reason,
                "token sync: step failed; it is tried again"
            );
        }
    }
}

/// While leaders change and nodes stop, this is what proposals come to.
fn is_passing(error: &ProposeError) -> bool {
    use ProposeError::{Busy, Draining, NoQuorum, NotLeader, Uninitialised, Unknown};
    matches!(
        error,
        NotLeader { .. } | NoQuorum | Unknown | Busy | Draining | Uninitialised
    )
}

/// A failpoint may wait: never on a thread that has others to serve.
async fn failpoint(point: fn()) {
    if cfg!(feature = "failpoints") {
        let _ = tokio::task::spawn_blocking(point).await;
    }
}
