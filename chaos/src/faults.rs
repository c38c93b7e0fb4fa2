//! Kills: a random node, the leader, or all of them, by SIGKILL, and starts them again.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use hsm_api::client::Retry;

use crate::playground::Playground;
use crate::random::Random;

/// What was killed.
#[derive(Default)]
pub(crate) struct Kills {
    leaders: u32,
    followers: u32,
    whole_clusters: u32,
}

impl Kills {
    /// How many in all.
    pub(crate) fn total(&self) -> u32 {
        self.leaders + self.followers + self.whole_clusters
    }
}

impl fmt::Display for Kills {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "killed {} leaders, {} followers, {} whole clusters",
            self.leaders, self.followers, self.whole_clusters
        )
    }
}

/// Kills by a schedule that follows from its seed.
pub(crate) struct Killer {
    random: Random,
}

impl Killer {
    /// With a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
        }
    }

    /// Kills and restarts until the time is over.
    pub(crate) async fn kill_for(mut self, playground: &Playground, time: Duration) -> Result<Kills> {
        let (start, mut kills) = (Instant::now(), Kills::default());
        while start.elapsed() < time {
            tokio::time::sleep(Duration::from_millis(500 + self.random.below(2500))).await;
            let leader = leader(playground).await;
            let victims: Vec<usize> = match self.random.below(10) {
                0 => (1..=playground.nodes).collect(),
                1..=5 => leader.into_iter().collect(),
                _ => vec![1 + self.random.below(playground.nodes as u64) as usize],
            };
            for node in &victims {
                playground.dev(&["kill", "--node", &node.to_string()])?;
            }
            match victims[..] {
                [] => continue,
                [one] if Some(one) == leader => kills.leaders += 1,
                [_] => kills.followers += 1,
                _ => kills.whole_clusters += 1,
            }
            tokio::time::sleep(Duration::from_millis(self.random.below(4000))).await;
            for node in &victims {
                playground.dev(&["start", "--node", &node.to_string()])?;
            }
            playground.all_ready().await?;
        }
        Ok(kills)
    }
}

/// The node that leads, by its own account.
async fn leader(playground: &Playground) -> Option<usize> {
    for node in 1..=playground.nodes {
        let client = playground.client("admin", &[node], Retry::None).ok()?;
        if let Ok(status) = client.cluster_status().await
            && status
                .leader
                .as_ref()
                .is_some_and(|leader| leader.raft_id == status.raft_id)
        {
            return Some(node);
        }
    }
    None
}
