//! What the faults look at: who leads, and whether somebody else has committed since.

use std::time::Duration;

use cluster_tests::{Leader, until};
use hsm_api::admin::{ClusterStatus, JoinTokenRequest, NodeRole};

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

    /// A node other than these that has committed an entry in a term above `term`: it says that it leads, it makes a change,
    /// and says it again in the same term.
    pub(crate) async fn commits_above(&self, term: u64, but: &[u32], within: Duration) -> Option<Committed> {
        let found = until("a commit in a higher term", within, async || {
            let leader = self.leader_now().await?;
            if leader.term <= term || but.contains(&leader.node) {
                return None;
            }
            self.write_on(leader.node).await?;
            let again = self.status(leader.node).await?;
            let same = again.role == NodeRole::Leader && again.term == leader.term;
            same.then_some(Committed {
                node: leader.node,
                term: leader.term,
            })
        });
        found.await.ok()
    }

    /// One committed entry through this node, if it is made in time. Open tokens are limited, so it is one that soon ends.
    pub(crate) async fn write_on(&self, number: u32) -> Option<()> {
        let client = self.playground.client_on("admin", number).ok()?;
        let request = JoinTokenRequest {
            ttl_seconds: Some(1),
            node_id: None,
        };
        let made = tokio::time::timeout(2 * ANSWER, client.create_join_token(&request)).await;
        made.ok()?.ok().map(drop)
    }

    /// A number of a node's metrics, if it answers.
    pub(crate) async fn metric(&self, number: u32, name: &str) -> Option<f64> {
        let node = self.node(number);
        let metrics = tokio::time::timeout(ANSWER, node.metrics()).await.ok()?.ok()?;
        metrics.sum(name)
    }
}
