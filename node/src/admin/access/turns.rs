//! Changes of who may do what are made one after the other on the leader, and each is judged by a state that holds the
//! ones before. The state itself sees whether the certificate of whoever asked is revoked; of the CAs above it, and of the
//! key that a role may be bound to, it knows nothing. So two administrators who take each other's CA, or role, at the same
//! moment would both be let through, and nobody would be left to take it back.

use hsm_api::ErrorCode;
use raft_store::command::RequestId;
use raft_store::state::requests::Seen;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Instant, timeout_at};

use crate::admin::call::CallError;
use crate::consensus::SETTLED_AFTER;
use crate::rotation::Cluster;
use crate::rotation::cluster::catch_up;
use crate::rotation::plan::Asked;

/// See the module.
#[derive(Default)]
pub struct Turns(Mutex<Option<Unsettled>>);

/// A change whose outcome nobody has heard: it may be in this leader's log and not in its state yet.
struct Unsettled {
    term: u64,
    id: RequestId,
    body_hash: [u8; 32],
    /// When it is settled at the latest; none while it is being made. Its entry may be truncated, and this node lead
    /// again: then the state never sees it.
    until: Option<Instant>,
}

impl Unsettled {
    fn is_of(&self, asked: &Asked) -> bool {
        self.id == asked.id(0) && self.body_hash == asked.body_hash
    }

    /// Whether it may still be done by this leader. What was in its log before it began to lead is in the state once it
    /// has caught up.
    fn is_open(&self, cluster: &dyn Cluster) -> bool {
        let same_term = cluster
            .leadership()
            .is_some_and(|leadership| leadership.term == self.term);
        let published = cluster.published();
        let seen = published.state.requests().look_up(&self.id, &self.body_hash);
        let is_over = self.until.is_some_and(|until| Instant::now() >= until);
        same_term && !is_over && matches!(seen, Seen::New)
    }
}

/// The right to make the next change, until it is dropped.
pub struct Turn<'a>(MutexGuard<'a, Option<Unsettled>>);

impl Turns {
    /// Waits for those who came before, and until what they have changed is in this leader's state.
    ///
    /// # Errors
    /// `overloaded` if it is nobody's turn in time, `not_ready` while the outcome of a change before is open, and what
    /// [`catch_up`] gives.
    pub async fn take(
        &self,
        cluster: &dyn Cluster,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Turn<'_>, CallError> {
        let turn = timeout_at(deadline, self.0.lock()).await.map_err(|_| {
            let detail = "other changes of access control and revocations are being made; ask again";
            CallError::new(ErrorCode::Overloaded, detail)
        })?;
        catch_up(cluster, deadline).await?;
        // The same request may be repeated: it is done once.
        let is_open = |before: &Unsettled| !before.is_of(asked) && before.is_open(cluster);
        if turn.as_ref().is_some_and(is_open) {
            let detail = "the outcome of a change of access control or revocations before this one is not known yet; ask \
                          again";
            return Err(CallError::new(ErrorCode::NotReady, detail));
        }
        Ok(Turn(turn))
    }
}

impl Turn<'_> {
    /// To be called before anything is proposed.
    pub fn begin(&mut self, cluster: &dyn Cluster, asked: &Asked) {
        *self.0 = Some(Unsettled {
            term: cluster.leadership().map_or(0, |leadership| leadership.term),
            id: asked.id(0),
            body_hash: asked.body_hash,
            until: None,
        });
    }

    /// How it has ended.
    pub fn end<T>(mut self, cluster: &dyn Cluster, outcome: &Result<T, CallError>) {
        let is_unknown = matches!(outcome, Err(error) if error.code == ErrorCode::OutcomeUnknown);
        if !is_unknown {
            *self.0 = None;
        } else if let (Some(unsettled), Some(leadership)) = (self.0.as_mut(), cluster.leadership()) {
            // It may have been appended in a term that began meanwhile.
            unsettled.term = leadership.term;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(unsettled) = self.0.as_mut() {
            unsettled
                .until
                .get_or_insert_with(|| Instant::now() + SETTLED_AFTER);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "turns_tests.rs"]
mod tests;
