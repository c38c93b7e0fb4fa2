//! Leaders are killed again and again: another takes over in time, and nothing acknowledged is lost.

use std::time::{Duration, Instant};

use crate::cluster::*;

/// One change that is asked for while nobody leads.
const ATTEMPT: Duration = Duration::from_secs(3);

/// Kills in one run; `CONSENSUS_KILLS` sets another number. The hundred of every run are in cluster-tests, with tokens
/// and load.
fn kills() -> usize {
    std::env::var("CONSENSUS_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(5)
}

#[test]
fn killed_leaders_are_replaced_in_time_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::new(3, 0);
    let (mut acknowledged, mut times, mut number) = (Vec::new(), Vec::new(), 0);
    for kill in 0..kills() {
        let leader = cluster.leader();
        let term = cluster.stand(leader).unwrap().term;
        for _ in 0..5 {
            number += 1;
            if cluster.node(leader).ask(&format!("put k{number}"), SHORT).is_ok() {
                acknowledged.push(format!("k{number}"));
            }
        }
        cluster.kill(leader);
        let dead = Instant::now();
        // The kill counts only once another node has committed in a higher term.
        loop {
            assert!(dead.elapsed() < LONG, "kill {kill}: no new leader");
            let survivors: Vec<usize> = cluster.nodes.keys().copied().collect();
            number += 1;
            let put = format!("put k{number}");
            let committed = survivors
                .into_iter()
                .find_map(|node| cluster.node(node).ask(&put, ATTEMPT).ok());
            if let Some(new_term) = committed.and_then(|text| text.parse::<u64>().ok()) {
                assert!(
                    new_term > term,
                    "kill {kill}: committed in term {new_term}, the dead leader had {term}"
                );
                acknowledged.push(format!("k{number}"));
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        times.push(dead.elapsed());
        cluster.start(leader);
        let last = cluster
            .stand(cluster.nodes.keys().copied().find(|n| *n != leader).unwrap())
            .unwrap()
            .applied;
        cluster.wait("the killed node catches up", LONG, |c| {
            c.stand(leader)
                .is_some_and(|stand| stand.gate_open && stand.applied >= last)
        });
    }
    let state = cluster.converge();
    let lost: Vec<_> = acknowledged.iter().filter(|key| !state.contains(key)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    times.sort();
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).saturating_sub(1)];
    println!(
        "{} leader kills: writes back p50 {:?}, p99 {:?}, max {:?}; {} acknowledged, 0 lost",
        times.len(),
        at(50),
        at(99),
        at(100),
        acknowledged.len()
    );
    // The 99th percentile of a hundred is in cluster-tests: of five, one may have met a machine that stood still.
    assert!(at(50) <= Duration::from_secs(4), "p50 {:?}", at(50));
}

pub(crate) fn a_whole_cluster_killed_at_once_comes_back_with_everything_acknowledged() {
    let mut cluster = Cluster::new(3, 0);
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let leader = cluster.leader();
        for number in 0..20 {
            let key = format!("r{round}k{number}");
            if cluster.node(leader).ask(&format!("put {key}"), SHORT).is_ok() {
                acknowledged.push(key);
            }
        }
        cluster.kill_all();
        for node in 0..3 {
            cluster.start(node);
        }
        cluster.leader();
    }
    let state = cluster.converge();
    assert!(acknowledged.len() >= 50 && acknowledged.iter().all(|key| state.contains(key)));
}

pub(crate) fn a_node_that_missed_more_than_the_log_keeps_catches_up_by_snapshot() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    let away = (leader + 1) % 3;
    cluster.kill(away);
    for number in 0..600 {
        let key = format!("k{number}");
        if cluster.node(leader).ask(&format!("put {key}"), SHORT).is_err() {
            cluster.put(&key);
        }
    }
    cluster.start(away);
    let state = cluster.converge();
    assert_eq!(state.len(), 600);
}
