//! Kills: a random node, the leader, or all of them, by SIGKILL, and starts them again.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use hsm_api::client::Retry;

use crate::playground::Playground;
use crate::random::Random;

/// What was killed.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Kills {
    leaders: u32,
    followers: u32,
    /// While no node said that it leads.
    unknown: u32,
    whole_clusters: u32,
}

impl Kills {
    /// How many in all.
    pub(crate) fn total(&self) -> u32 {
        self.leaders + self.followers + self.unknown + self.whole_clusters
    }

    fn count(&mut self, victims: &[usize], leader: Option<usize>) {
        match (victims, leader) {
            ([one], Some(leader)) if *one == leader => self.leaders += 1,
            ([_], Some(_)) => self.followers += 1,
            ([_], None) => self.unknown += 1,
            _ => self.whole_clusters += 1,
        }
    }
}

impl fmt::Display for Kills {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "killed {} leaders, {} followers, {} nodes while nobody led, {} whole clusters",
            self.leaders, self.followers, self.unknown, self.whole_clusters
        )
    }
}

/// Who is killed.
#[derive(Debug, PartialEq, Eq)]
enum Victim {
    All,
    /// Whoever leads then; this one if nobody does.
    Leader {
        otherwise: usize,
    },
    Node(usize),
}

impl Victim {
    fn nodes(&self, all: usize, leader: Option<usize>) -> Vec<usize> {
        match self {
            Self::All => (1..=all).collect(),
            Self::Leader { otherwise } => vec![leader.unwrap_or(*otherwise)],
            Self::Node(node) => vec![*node],
        }
    }
}

/// One kill.
#[derive(Debug, PartialEq, Eq)]
struct Round {
    /// Before it.
    pause: Duration,
    victim: Victim,
    /// Until the victims are started again.
    down: Duration,
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

    /// The next kill. Each of its numbers is drawn, used or not: what happens to the cluster must not change what
    /// comes.
    fn draw(&mut self, nodes: usize) -> Round {
        let pause = Duration::from_millis(500 + self.random.below(2500));
        let kind = self.random.below(10);
        let node = 1 + usize::try_from(self.random.below(nodes as u64)).unwrap_or_default();
        let down = Duration::from_millis(self.random.below(4000));
        let victim = match kind {
            0 => Victim::All,
            1..=5 => Victim::Leader { otherwise: node },
            _ => Victim::Node(node),
        };
        Round { pause, victim, down }
    }

    /// Kills and restarts until the time is over.
    pub(crate) async fn kill_for(mut self, playground: &Playground, time: Duration) -> Result<Kills> {
        let (start, mut kills) = (Instant::now(), Kills::default());
        while start.elapsed() < time {
            let round = self.draw(playground.nodes);
            tokio::time::sleep(round.pause).await;
            let leader = leader(playground).await;
            let victims = round.victim.nodes(playground.nodes, leader);
            for node in &victims {
                playground.dev(&["kill", "--node", &node.to_string()])?;
            }
            kills.count(&victims, leader);
            tokio::time::sleep(round.down).await;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_follows_from_the_seed_alone() {
        let schedule = |seed| {
            let mut killer = Killer::new(seed);
            (0..100).map(|_| killer.draw(3)).collect::<Vec<_>>()
        };
        assert_eq!(schedule(7), schedule(7));
        assert_ne!(schedule(7), schedule(8));
        let kinds = schedule(7);
        let some = |wanted: fn(&Victim) -> bool| kinds.iter().any(|round| wanted(&round.victim));
        assert!(some(|victim| matches!(victim, Victim::All)));
        assert!(some(|victim| matches!(victim, Victim::Leader { .. })));
        assert!(some(|victim| matches!(victim, Victim::Node(_))));
    }

    #[test]
    fn whoever_is_killed_while_nobody_leads_is_no_follower() {
        let leader = Victim::Leader { otherwise: 3 };
        assert_eq!(leader.nodes(3, Some(1)), [1]);
        assert_eq!(leader.nodes(3, None), [3]);
        assert_eq!(Victim::All.nodes(3, None), [1, 2, 3]);
        let mut kills = Kills::default();
        kills.count(&[1], Some(1));
        kills.count(&[2], Some(1));
        kills.count(&[3], None);
        kills.count(&[1, 2, 3], Some(1));
        let expected = Kills {
            leaders: 1,
            followers: 1,
            unknown: 1,
            whole_clusters: 1,
        };
        assert_eq!(kills, expected);
        assert_eq!(kills.total(), 4);
    }
}
