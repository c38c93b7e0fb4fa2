//! Networks in parts.

use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Leader, until};

use super::probe::{Progress, Quorum};
use super::{Done, one_of};
use crate::cluster::{Cluster, ELECTION, KEEP_LOGS, SNAPSHOT_EVERY};
use crate::history::Recorder;
use crate::schedule::{FaultKind, Shape};

/// Two elections, one of which may end in a split vote, on a busy machine. Whoever leads by then and was not seen to is no
/// failure; a majority has [`super::probe::OWED`] to take a change.
const OVERTAKEN: Duration = Duration::from_secs(20);
/// openraft purges so many entries at a time: `purge_batch_size` in `node/src/consensus/start.rs`.
const PURGED_AT_ONCE: u64 = 64;
/// For entries enough that the log is gone, on a slow disk.
const LEFT_BEHIND: Duration = Duration::from_secs(60);
/// What goes on beside a partition and may keep a snapshot, or a new connection, for longer than it is waited for.
const BAD_LINES: [FaultKind; 4] = [
    FaultKind::Delay,
    FaultKind::Loss,
    FaultKind::ByteRate,
    FaultKind::ClockStep,
];
/// For the snapshot to arrive.
const BROUGHT_BACK: Duration = Duration::from_secs(60);

/// Ways that are cut, each from one to another.
fn ways(shape: &Shape, pick: u32, members: &[u32], leader: u32) -> Vec<(u32, u32)> {
    let others: Vec<u32> = members.iter().copied().filter(|one| *one != leader).collect();
    let first = pick as usize % others.len().max(1);
    let round: Vec<u32> = others
        .iter()
        .cycle()
        .skip(first)
        .take(others.len())
        .copied()
        .collect();
    let minority = members.len().saturating_sub(1) / 2;
    let group: Vec<u32> = match shape {
        Shape::LeaderInMinority => std::iter::once(leader).chain(round).take(minority).collect(),
        Shape::LeaderInMajority => round.into_iter().take(minority).collect(),
        Shape::OneWay { from_leader } => {
            let Some(other) = round.first() else {
                return Vec::new();
            };
            return if *from_leader {
                vec![(leader, *other)]
            } else {
                vec![(*other, leader)]
            };
        }
        Shape::Bridge => {
            // The first is the bridge; the leader is in one half of the rest.
            let Some((_, rest)) = round.split_first() else {
                return Vec::new();
            };
            let (near, far) = rest.split_at(rest.len() / 2);
            let mut half = near.to_vec();
            half.push(leader);
            return both(&half, far);
        }
    };
    let outside: Vec<u32> = members
        .iter()
        .copied()
        .filter(|one| !group.contains(one))
        .collect();
    both(&group, &outside)
}

fn both(these: &[u32], those: &[u32]) -> Vec<(u32, u32)> {
    let pairs = these.iter().flat_map(|a| those.iter().map(move |b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

/// Who is on the other side than the leader: of a cluster whose leader is in the minority, a majority.
fn across(ways: &[(u32, u32)], leader: u32) -> Vec<u32> {
    let from_leader = ways.iter().filter(|(from, _)| *from == leader);
    from_leader.map(|(_, to)| *to).collect()
}

pub(super) async fn carry_out(
    (shape, pick): (&Shape, u32),
    lasts: Duration,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(Done::not_counted("nobody", "nobody led"));
    };
    let ways = ways(shape, pick, &cluster.members(), leader.node);
    let what = format!("{shape:?} of {leader:?}: {ways:?}");
    for (from, to) in &ways {
        cluster.links().cut_one_way(*from, *to)?;
    }
    let seen = async {
        match shape {
            Shape::LeaderInMinority => {
                let but = [leader.node];
                cluster
                    .commits_above(leader.term, &but, OVERTAKEN)
                    .await
                    .is_some()
            }
            _ => is_felt(&ways, leader, cluster).await,
        }
    };
    let majority = Quorum::of(across(&ways, leader.node), cluster);
    let progress = async {
        match shape {
            Shape::LeaderInMinority => majority.change(cluster, recorder).await,
            // In the other shapes some may be without a quorum, which is what they are there for.
            _ => Ok(Progress::Unsure),
        }
    };
    let (seen, progress, ()) = tokio::join!(seen, progress, tokio::time::sleep(lasts));
    cluster.links().heal()?;
    let why_not = match shape {
        Shape::LeaderInMinority => "no other node has committed in a higher term",
        _ => "nobody missed anybody for as long as an election takes",
    };
    Ok(progress?.or(Done::counted_if(seen, what, why_not)))
}

/// Whether somebody at an end of what is cut has heard of no quorum for longer than an election may wait, or the term has
/// changed, or the leader misses somebody.
async fn is_felt(ways: &[(u32, u32)], leader: Leader, cluster: &Cluster) -> bool {
    let felt = until("somebody who misses the others", OVERTAKEN, async || {
        for (from, to) in ways {
            for number in [*from, *to] {
                let Some(status) = cluster.status(number).await else {
                    continue;
                };
                let stale = status
                    .staleness_ms
                    .is_some_and(|age| u128::from(age) > ELECTION.as_millis());
                if stale || status.term > leader.term || !status.silent_voters.is_empty() {
                    return Some(());
                }
            }
        }
        None
    });
    felt.await.is_ok()
}

async fn index(cluster: &Cluster, number: u32, name: &str) -> Option<u64> {
    // An index, as the metrics give it.
    cluster.metric(number, name).await.map(|value| value as u64)
}

/// Cuts one node off until the others have purged the log that it would need, and mends that.
pub(super) async fn until_snapshot(pick: u32, cluster: &Cluster) -> Result<Done> {
    let Some(leader) = cluster.leader_soon().await else {
        return Ok(Done::not_counted("nobody", "nobody led"));
    };
    let others: Vec<u32> = cluster
        .members()
        .into_iter()
        .filter(|one| *one != leader.node)
        .collect();
    let alone = one_of(&others, pick).context("nobody but the leader")?;
    let what = format!("node {alone}, leader {leader:?}");
    let left = leave_behind(alone, cluster).await;
    let all = Quorum::of(cluster.members(), cluster);
    cluster.links().heal()?;
    let last = match left? {
        Ok(last) => last,
        Err(why) => return Ok(Done::not_counted(what, why)),
    };
    let brought = until("a snapshot", BROUGHT_BACK, async || {
        (index(cluster, alone, "hsm_raft_snapshot_index").await? > last).then_some(())
    });
    let brought = brought.await.is_ok();
    let now = index(cluster, alone, "hsm_raft_last_log_index").await;
    let heard_nothing = now.is_some_and(|now| now <= last);
    let could_hear = all.has_run(cluster) && !BAD_LINES.iter().any(|kind| cluster.tries(*kind));
    Ok(brought_back(what, brought, heard_nothing && could_hear))
}

/// A node that has got entries after all, or gets its snapshot over bad lines, is waited for after the step; at the end of the run
/// it has to be there. One that got nothing at all over good ones was forgotten.
fn brought_back(what: String, brought: bool, forgotten: bool) -> Done {
    if !brought && forgotten {
        let failure = format!(
            "{BROUGHT_BACK:?} after its links were mended it was sent neither a snapshot nor an entry"
        );
        return Done::cluster_failed(what, &failure);
    }
    Done::counted_if(brought, what, "it was sent no snapshot")
}

/// Cuts one node off until the others have purged the log that it would need. Whatever comes of it, the links are to be healed
/// then. The last index that it has, or why it is not left behind.
pub(super) async fn leave_behind(alone: u32, cluster: &Cluster) -> Result<Result<u64, &'static str>> {
    cluster.links().separate(&[alone])?;
    let Some(last) = index(cluster, alone, "hsm_raft_last_log_index").await else {
        return Ok(Err("it does not say how far its log goes"));
    };
    let behind = last + KEEP_LOGS + PURGED_AT_ONCE + 2;
    let there: Vec<u32> = cluster
        .members()
        .into_iter()
        .filter(|one| *one != alone)
        .collect();
    let clocks = cluster.right_clocks().await;
    let left = until("snapshots of the others", LEFT_BEHIND, async || {
        let leader = cluster.leader_now().await?;
        for _ in 0..SNAPSHOT_EVERY {
            cluster.write_on(leader.node).await?;
        }
        for number in &there {
            if index(cluster, *number, "hsm_raft_snapshot_index").await? < behind {
                return None;
            }
        }
        Some(())
    });
    let left = left.await.is_ok();
    drop(clocks);
    Ok(left
        .then_some(last)
        .ok_or("the others still have the log that it needs"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::schedule::Effect;

    const FIVE: [u32; 5] = [1, 2, 3, 4, 5];

    /// Who still reaches whom, both ways.
    fn linked(ways: &[(u32, u32)], a: u32, b: u32) -> bool {
        !ways.contains(&(a, b)) && !ways.contains(&(b, a))
    }

    #[test]
    fn a_leader_in_the_minority_has_no_quorum_and_the_rest_has_one() {
        for (members, beside) in [(&FIVE[..3], 0), (&FIVE[..], 1)] {
            for pick in 0..10 {
                let ways = ways(&Shape::LeaderInMinority, pick, members, 2);
                let with_leader = members.iter().filter(|one| **one != 2 && linked(&ways, 2, **one));
                assert_eq!(with_leader.count(), beside, "{ways:?}");
                let across = across(&ways, 2);
                assert!(across.len() > members.len() / 2, "{ways:?}");
                for (one, other) in across.iter().zip(across.iter().skip(1)) {
                    assert!(linked(&ways, *one, *other), "{ways:?}");
                }
            }
        }
    }

    #[test]
    fn a_leader_in_the_majority_keeps_it() {
        for pick in 0..10 {
            let ways = ways(&Shape::LeaderInMajority, pick, &FIVE, 2);
            let with_leader = FIVE.iter().filter(|one| **one != 2 && linked(&ways, 2, **one));
            assert_eq!(with_leader.count(), 2, "{ways:?}");
        }
    }

    #[test]
    fn a_node_that_is_sent_nothing_over_good_lines_is_a_finding() {
        let effect = |brought, forgotten| brought_back("node 3".to_owned(), brought, forgotten).effect;
        assert_eq!(effect(true, false), Effect::Counted);
        let failed = effect(false, true);
        assert!(failed.failure().unwrap().contains("neither a snapshot"));
        assert_eq!(
            effect(false, false),
            Effect::NotCounted("it was sent no snapshot".to_owned())
        );
    }

    #[test]
    fn one_way_is_one_way() {
        let from = ways(&Shape::OneWay { from_leader: true }, 4, &FIVE, 2);
        assert!(from.len() == 1 && from[0].0 == 2, "{from:?}");
        let to = ways(&Shape::OneWay { from_leader: false }, 4, &FIVE, 2);
        assert!(to.len() == 1 && to[0].1 == 2, "{to:?}");
    }

    #[test]
    fn a_bridge_reaches_all_and_the_halves_do_not_reach_each_other() {
        for members in [&FIVE[..3], &FIVE[..]] {
            for pick in 0..10 {
                let ways = ways(&Shape::Bridge, pick, members, 2);
                let cut: BTreeSet<u32> = ways.iter().map(|(from, _)| *from).collect();
                assert_eq!(cut.len(), members.len() - 1, "{ways:?}");
                assert!(cut.contains(&2), "{ways:?}");
                assert_eq!(ways.len(), 2 * ((members.len() - 1) / 2).pow(2), "{ways:?}");
            }
        }
    }
}
