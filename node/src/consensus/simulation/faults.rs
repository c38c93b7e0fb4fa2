//! What disturbs a simulated cluster, by a schedule that follows from the seed: power cuts of one node, of some and of all,
//! cuts in the middle of a write and right after a vote; links that are cut both ways or one way, or held; slow disks; a
//! network that is slow or loses messages.

use std::collections::BTreeMap;
use std::time::Duration;

use super::chance::Chance;
use super::cluster::Cluster;

/// Every kind of fault, as it is counted.
pub(super) const KINDS: [&str; 10] = [
    "power cut",
    "power cut after a vote",
    "power cut at a write",
    "power cut of all",
    "node cut off",
    "link cut one way",
    "link held",
    "slow disk",
    "messages lost",
    "slow network",
];

/// What ends a disturbance.
enum Mend {
    /// Links in both directions, between two nodes each.
    Repair(Vec<(usize, usize)>),
    Release(usize, usize),
    FastDisk(usize),
    Lossless,
    Near,
}

/// See the module.
pub(super) struct Faults {
    next: Duration,
    mends: Vec<(Duration, Mend, Vec<usize>)>,
    votes: Vec<Option<raft_store::Vote>>,
    /// How often each kind was made, for whoever reads the run.
    pub(super) made: BTreeMap<&'static str, u64>,
}

impl Faults {
    pub(super) fn new(nodes: usize, from: Duration) -> Self {
        Self {
            next: from,
            mends: Vec::new(),
            votes: vec![None; nodes],
            made: BTreeMap::new(),
        }
    }

    /// Before or after a step: ends what is over, and begins what is due.
    pub(super) fn step(&mut self, cluster: &mut Cluster, chance: &mut Chance) {
        let now = cluster.now();
        let (over, going) = std::mem::take(&mut self.mends)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        self.mends = going;
        for (_, mend, _) in over {
            apply(cluster, &mend);
        }
        self.lose_power(cluster, chance);
        if now >= self.next {
            self.begin(cluster, chance);
            self.next = now + chance.millis(200, 2500);
        }
        self.note(cluster);
    }

    /// Who is disturbed now.
    fn note(&self, cluster: &mut Cluster) {
        let now = cluster.now();
        let hit = self.mends.iter().flat_map(|(.., nodes)| nodes);
        let down: Vec<usize> = cluster.down.keys().copied().collect();
        for node in hit.copied().chain(down) {
            cluster.oracle.disturbed[node] = now;
        }
    }

    /// Ends everything.
    pub(super) fn mend(&mut self, cluster: &mut Cluster) {
        self.note(cluster);
        for (_, mend, _) in std::mem::take(&mut self.mends) {
            apply(cluster, &mend);
        }
        let now = cluster.now();
        for node in 0..cluster.nodes.len() {
            // Of those whose power was still to go it stays, unless it has gone just now.
            cluster.nodes[node].disk.cut_after(u64::MAX);
            if cluster.nodes[node].disk.is_off() && !cluster.down.contains_key(&node) {
                cluster.crash(node, now, &mut Chance::new(0));
            }
        }
        for at in cluster.down.values_mut() {
            *at = now;
        }
    }

    fn count(&mut self, kind: &'static str) {
        *self.made.entry(kind).or_default() += 1;
    }

    /// Whoever's power went at a write, and now and then whoever has just acknowledged a vote.
    fn lose_power(&mut self, cluster: &mut Cluster, chance: &mut Chance) {
        for node in 0..cluster.nodes.len() {
            if cluster.down.contains_key(&node) {
                continue;
            }
            let vote = cluster.nodes[node].vote();
            let has_voted = vote.is_some() && vote != self.votes[node];
            self.votes[node] = vote.or(self.votes[node]);
            let kind = if cluster.nodes[node].disk.is_off() {
                "power cut at a write"
            } else if has_voted && chance.one_in(16) {
                "power cut after a vote"
            } else {
                continue;
            };
            self.count(kind);
            let back = cluster.now() + chance.millis(100, 4000);
            cluster.crash(node, back, chance);
        }
    }

    fn begin(&mut self, cluster: &mut Cluster, chance: &mut Chance) {
        let count = cluster.nodes.len();
        let (node, now) = (chance.index(count), cluster.now());
        let is_up = !cluster.down.contains_key(&node);
        match chance.below(12) {
            0 | 1 if is_up => {
                self.count("power cut");
                // Past `fence_after` now and then.
                let longest = if chance.one_in(3) { 14_000 } else { 2_000 };
                let back = now + chance.millis(50, longest);
                cluster.crash(node, back, chance);
            }
            2 | 3 if is_up => cluster.nodes[node].disk.cut_after(chance.below(40)),
            4 => {
                self.count("power cut of all");
                for node in 0..count {
                    if !cluster.down.contains_key(&node) {
                        let back = now + chance.millis(50, 1500);
                        cluster.crash(node, back, chance);
                    }
                }
            }
            5 | 6 => {
                self.count("node cut off");
                let links: Vec<_> = (0..count)
                    .filter(|other| *other != node)
                    .map(|other| (node, other))
                    .collect();
                for (a, b) in &links {
                    cluster.sim.partition(cluster.name(*a), cluster.name(*b));
                }
                let longest = if chance.one_in(3) { 12_000 } else { 3_000 };
                let until = now + chance.millis(200, longest);
                self.mends
                    .push((until, Mend::Repair(links), (0..count).collect()));
            }
            7 => {
                self.count("link cut one way");
                let other = (node + 1 + chance.index(count - 1)) % count;
                cluster
                    .sim
                    .partition_oneway(cluster.name(node), cluster.name(other));
                let until = now + chance.millis(200, 5_000);
                let mend = Mend::Repair(vec![(node, other)]);
                self.mends.push((until, mend, vec![node, other]));
            }
            8 => {
                self.count("link held");
                let other = (node + 1 + chance.index(count - 1)) % count;
                cluster.sim.hold(cluster.name(node), cluster.name(other));
                let until = now + chance.millis(100, 3_000);
                self.mends
                    .push((until, Mend::Release(node, other), vec![node, other]));
            }
            9 => {
                self.count("slow disk");
                cluster.nodes[node].disk.set_write_time(chance.millis(20, 400));
                let until = now + chance.millis(500, 4_000);
                self.mends.push((until, Mend::FastDisk(node), vec![node]));
            }
            10 => {
                self.count("messages lost");
                // Few: nothing is sent again here, so a connection that loses a message is dead, and its other end does not hear
                // of it before it has been idle for long.
                cluster.sim.set_fail_rate(0.003);
                let until = now + chance.millis(500, 2_000);
                self.mends.push((until, Mend::Lossless, (0..count).collect()));
            }
            11 => {
                self.count("slow network");
                cluster.sim.set_max_message_latency(chance.millis(50, 250));
                let until = now + chance.millis(500, 3_000);
                self.mends.push((until, Mend::Near, (0..count).collect()));
            }
            _ => {}
        }
    }
}

fn apply(cluster: &mut Cluster, mend: &Mend) {
    match mend {
        Mend::Repair(links) => {
            for (a, b) in links {
                cluster.sim.repair(cluster.name(*a), cluster.name(*b));
            }
        }
        Mend::Release(a, b) => cluster.sim.release(cluster.name(*a), cluster.name(*b)),
        Mend::FastDisk(node) => cluster.nodes[*node].disk.set_write_time(Duration::ZERO),
        Mend::Lossless => cluster.sim.set_fail_rate(0.0),
        Mend::Near => cluster.sim.set_max_message_latency(Duration::from_millis(20)),
    }
}
