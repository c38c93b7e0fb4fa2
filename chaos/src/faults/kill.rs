//! SIGKILL.

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::Leader;

use super::{Done, one_of, probe};
use crate::cluster::Cluster;
use crate::failover;
use crate::history::Recorder;
use crate::schedule::Victims;

/// An election, its repetition after a split vote, and as much again for a machine that is busy.
const OVERTAKEN: Duration = Duration::from_secs(30);
/// For a change before the kill; the one before may have left the cluster without a leader.
const BEFORE: Duration = Duration::from_secs(5);

fn choose(
    victims: Victims,
    pick: u32,
    members: &[u32],
    tolerated: usize,
    leader: Option<Leader>,
) -> Vec<u32> {
    let leader = leader.map(|leader| leader.node);
    match victims {
        Victims::Leader => leader.or_else(|| one_of(members, pick)).into_iter().collect(),
        Victims::Follower => {
            let others: Vec<u32> = members
                .iter()
                .copied()
                .filter(|one| Some(*one) != leader)
                .collect();
            one_of(&others, pick).into_iter().collect()
        }
        Victims::Minority => {
            let first = pick as usize % members.len().max(1);
            members
                .iter()
                .cycle()
                .skip(first)
                .take(tolerated)
                .copied()
                .collect()
        }
        Victims::All => members.to_vec(),
    }
}

pub(super) async fn carry_out(
    (victims, pick): (Victims, u32),
    step: u32,
    lasts: Duration,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let members = cluster.members();
    if victims == Victims::Leader {
        // From when on there is none is measured from the last one that was.
        probe::write(&members, BEFORE, cluster, recorder).await?;
    }
    let leader = cluster.leader_soon().await;
    let chosen = choose(victims, pick, &members, cluster.tolerated(), leader);
    let target = format!("nodes {chosen:?}, leader {leader:?}");
    let mut killed = 0;
    if let (Victims::Leader, Some(leader)) = (victims, leader) {
        recorder.note(&failover::mark(step, leader.node));
    }
    for number in &chosen {
        cluster.hold_down(*number, true);
        killed += usize::from(cluster.node(*number).signal(nix::sys::signal::Signal::SIGKILL)?);
    }
    for number in &chosen {
        cluster.node(*number).wait_gone(OVERTAKEN).await?;
    }
    let back = async {
        tokio::time::sleep(lasts).await;
        for number in &chosen {
            cluster.hold_down(*number, false);
        }
        cluster.start_stopped().await.context("after the kill")
    };
    if killed < chosen.len() || chosen.is_empty() {
        back.await?;
        return Ok(Done::not_counted(
            target,
            format!("{killed} of {} ran", chosen.len()),
        ));
    }
    match (victims, leader) {
        (Victims::Leader, Some(leader)) => {
            let others: Vec<u32> = members
                .iter()
                .copied()
                .filter(|one| !chosen.contains(one))
                .collect();
            let (other, back, written) = tokio::join!(
                cluster.commits_above(leader.term, &[], OVERTAKEN),
                back,
                probe::write(&others, OVERTAKEN, cluster, recorder)
            );
            back?;
            written?;
            match other {
                Some(other) if chosen.contains(&other.node) => {
                    let why = format!("it was back before anybody else led: {other:?}");
                    Ok(Done::not_counted(target, why))
                }
                Some(other) => Ok(Done::counted(format!("{target}, then {other:?}"))),
                None => Ok(Done::not_counted(
                    target,
                    "no other node has committed in a higher term",
                )),
            }
        }
        (Victims::Leader | Victims::Follower, None) => {
            back.await?;
            Ok(Done::not_counted(target, "nobody led"))
        }
        _ => {
            back.await?;
            Ok(Done::counted(target))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn victims_are_who_they_are_called() {
        let leader = Some(Leader { node: 3, term: 1 });
        let five = [1, 2, 3, 4, 6];
        for pick in 0..20 {
            let choose = |victims| choose(victims, pick, &five, 2, leader);
            assert_eq!(choose(Victims::Leader), [3]);
            assert!(!choose(Victims::Follower).contains(&3));
            let minority = choose(Victims::Minority);
            assert!(minority.len() == 2 && minority[0] != minority[1], "{minority:?}");
            assert_eq!(choose(Victims::All), five);
        }
        assert!(choose(Victims::Minority, 1, &[1], 0, leader).is_empty());
    }
}
