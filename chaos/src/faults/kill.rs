//! SIGKILL.
//!
//! Where a quorum is left, or is back, it has to acknowledge a change: after the death of a leader by those who are left, after that of
//! a minority or of all once every node is ready again. Without that, kills that follow each other closely would let a cluster pass
//! that never gets back to work.

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::Leader;

use super::probe::{self, OWED};
use super::{Done, one_of};
use crate::cluster::{Cluster, Committed};
use crate::failover;
use crate::history::Recorder;
use crate::schedule::{Effect, Victims};

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
    // Where the others are no quorum, nobody leads before it is back, and there is no fail-over to be measured.
    let replaced = cluster.tolerated() > 0;
    if let (Victims::Leader, Some(leader), true) = (victims, leader, replaced) {
        recorder.note(&failover::mark(step, leader.node));
    }
    for number in &chosen {
        cluster.hold_down(*number, true);
        killed += usize::from(cluster.node(*number).signal(nix::sys::signal::Signal::SIGKILL)?);
    }
    for number in &chosen {
        cluster.node(*number).wait_gone(OWED).await?;
    }
    let back = async || {
        for number in &chosen {
            cluster.hold_down(*number, false);
        }
        cluster.start_stopped().await.context("after the kill")
    };
    let lasted = tokio::time::sleep(lasts);
    if killed < chosen.len() || chosen.is_empty() {
        lasted.await;
        back().await?;
        return Ok(Done::not_counted(
            target,
            format!("{killed} of {} ran", chosen.len()),
        ));
    }
    match (victims, leader) {
        (Victims::Leader, Some(leader)) if !replaced => {
            lasted.await;
            back().await?;
            let again = cluster.commits_above(leader.term, &[], OWED).await;
            Ok(Done::counted_if(
                again.is_some(),
                format!("{target}, then {again:?}"),
                "nobody has committed in a higher term",
            ))
        }
        (Victims::Leader, Some(leader)) => {
            let others: Vec<u32> = members
                .iter()
                .copied()
                .filter(|one| !chosen.contains(one))
                .collect();
            // It stays down until it has been replaced: back too early, it could be elected again.
            let (other, written, ()) = tokio::join!(
                cluster.commits_above(leader.term, &chosen, OWED),
                probe::write(&others, OWED, cluster, recorder),
                lasted
            );
            back().await?;
            Ok(came(target, other, written?))
        }
        (Victims::Leader | Victims::Follower, None) => {
            lasted.await;
            back().await?;
            Ok(Done::not_counted(target, "nobody led"))
        }
        _ => {
            lasted.await;
            back().await?;
            Ok(Done::counted(target))
        }
    }
}

/// What is owed after a kill once all nodes are ready again: a change, unless it was asked for while they were away.
pub(super) async fn once_all_are_back(
    victims: Victims,
    done: Done,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    if !is_owed(victims, &done) {
        return Ok(done);
    }
    let written = probe::write(&cluster.members(), OWED, cluster, recorder).await?;
    Ok(went_on(done, written))
}

fn is_owed(victims: Victims, done: &Done) -> bool {
    matches!(victims, Victims::Minority | Victims::All) && done.effect == Effect::Counted
}

/// What all have made of the end of so many of them.
fn went_on(done: Done, written: bool) -> Done {
    if written {
        return done;
    }
    let what = format!("no change was acknowledged within {OWED:?} after all were ready again");
    Done::cluster_failed(done.target, &what)
}

/// What the others have made of the end of their leader.
fn came(target: String, other: Option<Committed>, written: bool) -> Done {
    match (other, written) {
        (_, false) => {
            let what = format!("no change was acknowledged within {OWED:?} by those who were left, a quorum");
            Done::cluster_failed(target, &what)
        }
        (Some(other), true) => Done::counted(format!("{target}, then {other:?}")),
        (None, true) => Done::not_counted(
            target,
            "no other node was seen that has committed in a higher term",
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_is_back_from_the_end_of_many_and_takes_no_change_is_a_finding() {
        let killed = || Done::counted("nodes [1, 2, 3]");
        assert_eq!(went_on(killed(), true).effect, Effect::Counted);
        let failed = went_on(killed(), false);
        let failure = failed.effect.failure().unwrap();
        assert!(failure.starts_with("no change was acknowledged"), "{failure}");
        assert_eq!(failed.target, "nodes [1, 2, 3]");
        for (victims, owed) in [
            (Victims::All, true),
            (Victims::Minority, true),
            (Victims::Leader, false),
            (Victims::Follower, false),
        ] {
            assert_eq!(is_owed(victims, &killed()), owed, "{victims:?}");
            // What has had no effect comes again, and what was found first is told.
            assert!(!is_owed(victims, &Done::not_counted("nodes [1]", "0 of 1 ran")));
            assert!(!is_owed(
                victims,
                &Done::cluster_failed("nodes [1]", "it does not start")
            ));
        }
    }

    #[test]
    fn a_leader_that_nobody_replaces_is_a_finding() {
        let other = Some(Committed { node: 2, term: 8 });
        let effect = |other, written| came("nodes [1]".to_owned(), other, written).effect;
        assert_eq!(effect(other, true), Effect::Counted);
        for other in [other, None] {
            let failed = effect(other, false);
            let failure = failed.failure().unwrap();
            assert!(failure.starts_with("no change was acknowledged"), "{failure}");
        }
        // Whoever leads by now was not seen: the next attempt shows more.
        let not = effect(None, true);
        assert!(not != Effect::Counted && not.failure().is_none(), "{not:?}");
    }

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
