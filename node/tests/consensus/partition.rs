//! Links are cut: who may accept, who knows that it is stale, who must not serve.

use std::time::{Duration, Instant};

use crate::cluster::*;

pub(crate) fn an_isolated_leader_refuses_and_its_log_does_not_grow() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    let before = cluster.stand(leader).unwrap().last_log;
    cluster.isolate(&[leader], true);
    let (start, mut refused, mut unknown) = (Instant::now(), 0, 0);
    while start.elapsed() < Duration::from_secs(10) {
        match cluster.node(leader).ask("put isolated", Duration::from_secs(8)) {
            Ok(_) => panic!("committed without a quorum"),
            Err(why) if why.contains("no quorum") => refused += 1,
            Err(_) => unknown += 1,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let grown = cluster.stand(leader).unwrap().last_log - before;
    assert!(refused > 50, "{refused} refused, {unknown} unknown");
    assert!(grown < 100, "the log grew by {grown} entries");
    assert!(
        cluster.stand(leader).unwrap().staleness_ms > 5000,
        "it knows that it is stale"
    );
    cluster.isolate(&[leader], false);
    cluster.converge();
}

pub(crate) fn a_leader_and_one_follower_of_five_cut_off_together_are_both_stale() {
    let mut cluster = Cluster::new(5, 0);
    let leader = cluster.leader();
    let follower = (leader + 1) % 5;
    cluster.wait("both fresh", LONG, |c| {
        [leader, follower]
            .iter()
            .all(|n| c.stand(*n).is_some_and(|s| (0..2000).contains(&s.staleness_ms)))
    });
    cluster.isolate(&[leader, follower], true);
    // Frames of the isolated leader still reach its follower: they carry the leader's own age, without which it would be
    // fresh for good.
    cluster.wait("both stale", Duration::from_secs(20), |c| {
        [leader, follower]
            .iter()
            .all(|n| c.stand(*n).is_some_and(|s| s.staleness_ms > 5000))
    });
    let rest: Vec<usize> = (0..5).filter(|n| *n != leader && *n != follower).collect();
    cluster.wait("the majority goes on", LONG, |c| {
        rest.iter().any(|n| c.node(*n).ask("put majority", SHORT).is_ok())
    });
    cluster.isolate(&[leader, follower], false);
    cluster.converge();
}

pub(crate) fn a_node_restarted_in_isolation_never_passes_the_start_gate() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    cluster.put("k1");
    let alone = (leader + 1) % 3;
    cluster.isolate(&[alone], true);
    cluster.kill(alone);
    cluster.start(alone);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        let stand = cluster.stand(alone).unwrap();
        assert!(!stand.gate_open && stand.staleness_ms < 0, "{stand:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.isolate(&[alone], false);
    cluster.wait("the gate opens after healing", LONG, |c| {
        c.stand(alone).is_some_and(|s| s.gate_open)
    });
}

/// A follower that was cut off stands for election all the time, and needs a snapshot when it is back: its higher
/// vote and the wish to send it one reach the busy leader together.
pub(crate) fn a_leader_under_load_outlives_the_return_of_followers_that_lack_more_than_its_log() {
    let mut cluster = Cluster::new(3, 0);
    for round in 0..3 {
        let leader = cluster.leader();
        let away = (leader + 1 + round % 2) % 3;
        cluster.isolate(&[away], true);
        let before = cluster.stand(leader).unwrap().last_log;
        for node in 0..3 {
            let flood = format!("flood 10000 r{round}n{node}");
            cluster.node(node).ask(&flood, SHORT).unwrap();
        }
        // More than a leader keeps of its log once it has a snapshot.
        cluster.wait("a longer log", LONG, |c| {
            c.stand(leader).is_none_or(|stand| stand.last_log > before + 400)
        });
        cluster.isolate(&[away], false);
        cluster.wait("the one that was away", LONG, |c| {
            let stands: Vec<_> = (0..3).filter_map(|node| c.stand(node)).collect();
            stands.len() < 3 || stands[away].last_log > before + 400
        });
        for node in 0..3 {
            assert!(
                cluster.stand(node).is_some(),
                "round {round}: node {node} has ended"
            );
        }
    }
    cluster.converge();
}
