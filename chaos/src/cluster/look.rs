//! What the faults look at: who leads, and whether somebody else has committed since.

use std::time::Duration;

use cluster_tests::{Leader, until};
use hsm_api::admin::{ClusterStatus, JoinTokenRequest, NodeRole};
use tokio::sync::MutexGuard;

use super::{Cluster, ELECTION};

/// A node that is stopped or cut off does not answer, and others are to be asked too.
const ANSWER: Duration = Duration::from_millis(1500);

/// A node that has committed an entry of its own term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Its number.
    pub node: u32,
    /// The term.
    pub term: u64,
}

impl Cluster {
    /// What a node says of itself, if it answers at once.
    pub(crate) async fn status(&self, number: u32) -> Option<ClusterStatus> {
        tokio::time::timeout(ANSWER, self.playground.status(number))
            .await
            .ok()
            .flatten()
    }

    /// Who leads now, by its own account and with a quorum.
    pub async fn leader_now(&self) -> Option<Leader> {
        let mut best: Option<Leader> = None;
        for number in self.members() {
            let Some(status) = self.status(number).await else {
                continue;
            };
            let fresh = status
                .quorum_ack_age_ms
                .is_none_or(|age| u128::from(age) < ELECTION.as_millis());
            if status.role == NodeRole::Leader && fresh && best.is_none_or(|best| best.term < status.term) {
                best = Some(Leader {
                    node: number,
                    term: status.term,
                });
            }
        }
        best
    }

    /// Who leads, if somebody does within a while: a fault that needs a leader waits for the election of the one before.
    pub(crate) async fn leader_soon(&self) -> Option<Leader> {
        let found = until("a leader", 10 * ELECTION, async || self.leader_now().await);
        found.await.ok()
    }

    /// A node other than these that has committed an entry in a term above `term`. The last entry of a leader is of its own
    /// term, because it begins that with one: when it calls that committed, it has committed in its term.
    pub(crate) async fn commits_above(&self, term: u64, but: &[u32], within: Duration) -> Option<Committed> {
        let mut first: Option<(Leader, u64)> = None;
        let found = until("a commit in a higher term", within, async || {
            let leader = self.leader_now().await?;
            if leader.term <= term || but.contains(&leader.node) {
                return None;
            }
            let status = self.status(leader.node).await?;
            if status.role != NodeRole::Leader || status.term != leader.term {
                return None;
            }
            let (seen, last) = *first.get_or_insert((leader, status.last_log_index));
            if seen != leader {
                first = Some((leader, status.last_log_index));
                return None;
            }
            (status.committed_index >= last).then_some(Committed {
                node: leader.node,
                term: leader.term,
            })
        });
        found.await.ok()
    }

    /// One committed entry through this node, if it is made in time. Open tokens are limited, so it is one that soon ends; who
    /// calls this holds [`Cluster::right_clocks`], because one that was made by a wrong clock would stay for as long as that
    /// was wrong by.
    pub(crate) async fn write_on(&self, number: u32) -> Option<()> {
        let client = self.playground.client_on("admin", number).ok()?;
        let request = JoinTokenRequest {
            ttl_seconds: Some(1),
            node_id: None,
        };
        let made = tokio::time::timeout(2 * ANSWER, client.create_join_token(&request)).await;
        made.ok()?.ok().map(drop)
    }

    /// While this is held no clock is moved.
    pub(crate) async fn right_clocks(&self) -> MutexGuard<'_, ()> {
        self.clocks.lock().await
    }

    /// A number of a node's metrics, if it answers.
    pub(crate) async fn metric(&self, number: u32, name: &str) -> Option<f64> {
        let node = self.node(number);
        let metrics = tokio::time::timeout(ANSWER, node.metrics()).await.ok()?.ok()?;
        metrics.sum(name)
    }
}
