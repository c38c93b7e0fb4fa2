//! The auto-pilot: asks, where it is configured to, that a voter which has been dead for long be removed. A pure decision
//! over state and membership. It never carries a removal out: it proposes what an administrator would, and the membership
//! driver does the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use raft_store::command::{Op, Origin, RemoveNode, RequestId};
use raft_store::names::{NodeName, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::node::NodeStatus;

use super::ProposeError;
use super::shared::Shared;
use crate::admin::views::failure_tolerance;
use crate::clock;

/// Between two looks. Nothing it does is urgent.
const LOOK: Duration = Duration::from_secs(1);
/// After a removal that was refused.
const PAUSE: Duration = Duration::from_secs(30);

/// When a dead voter is removed. Nobody configures it: it never is.
#[derive(Clone, Copy, Debug)]
pub struct Autopilot {
    /// Silence towards the leader, all of it while that one led, after which a voter is taken for dead.
    pub remove_dead_after: Duration,
    /// Voters that are heard and have to remain: whoever wants five has five before a sixth is removed.
    pub min_voters: usize,
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nobody is dead.
    Nobody,
    /// This one goes.
    Remove(RaftId),
    /// This one would, but.
    Keep(RaftId, Reason),
}

/// Why a dead voter is not removed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reason {
    /// It is being sent a snapshot.
    Loading,
    /// The membership is changing: one after the other.
    Changing,
    /// Too few would be left.
    Margin {
        heard: usize,
        left: usize,
        min_voters: usize,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loading => f.write_str("it is loading a snapshot"),
            Self::Changing => f.write_str("another change of the membership is under way"),
            Self::Margin {
                heard,
                left,
                min_voters,
            } => write!(
                f,
                "{heard} of the {left} voters that would be left answer and are up to date, and at least {min_voters} have to be \
                 (cluster.autopilot.min_voters), one more than their majority: join a node in its place first"
            ),
        }
    }
}

/// What the decision looks at besides the state.
struct Picture {
    own: RaftId,
    voters: BTreeSet<RaftId>,
    /// How long each has said nothing to this leader, since it leads.
    silent_for: BTreeMap<RaftId, Duration>,
    /// Who has answered within a few heartbeats and keeps up, this node included.
    heard: BTreeSet<RaftId>,
    loading: BTreeSet<RaftId>,
    joint: bool,
}

/// Which dead voter goes, if any: the one that has been silent for longest, and one at most.
fn decide(state: &ClusterState, raft: &Picture, rules: &Autopilot) -> Verdict {
    let silence = |id: &RaftId| raft.silent_for.get(id).copied().unwrap_or_default();
    let is_member = |id: &RaftId| {
        let node = state.nodes().get(id);
        // One that is asked to leave already is on its way.
        node.is_some_and(|node| node.status == NodeStatus::Member)
    };
    let mut dead: Vec<RaftId> = raft.voters.iter().copied().collect();
    dead.retain(|id| *id != raft.own && is_member(id) && silence(id) >= rules.remove_dead_after);
    dead.sort_by_key(|id| (std::cmp::Reverse(silence(id)), *id));
    let mut kept = Verdict::Nobody;
    for id in dead {
        match why_not(state, raft, rules, id) {
            None => return Verdict::Remove(id),
            Some(reason) if kept == Verdict::Nobody => kept = Verdict::Keep(id, reason),
            Some(_) => {}
        }
    }
    kept
}

fn why_not(state: &ClusterState, raft: &Picture, rules: &Autopilot, id: RaftId) -> Option<Reason> {
    if raft.loading.contains(&id) {
        return Some(Reason::Loading);
    }
    if raft.joint || state.nodes().values().any(|node| node.is_leaving()) {
        return Some(Reason::Changing);
    }
    let left = raft.voters.len() - 1;
    let heard = raft
        .voters
        .intersection(&raft.heard)
        .filter(|heard| **heard != id);
    let heard = heard.count();
    // With a margin: after the removal one more may fail.
    let tolerated = failure_tolerance(left, left - heard);
    (heard < rules.min_voters || tolerated == 0).then_some(Reason::Margin {
        heard,
        left,
        min_voters: rules.min_voters,
    })
}

/// Runs until the runtime ends.
pub(super) async fn drive(shared: Arc<Shared>, rules: Autopilot) {
    let mut told = Verdict::Nobody;
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(picture) = picture(&shared, clock::now()) else {
            told = Verdict::Nobody;
            continue;
        };
        let verdict = decide(&shared.published.load().state, &picture, &rules);
        if let Verdict::Keep(id, reason) = &verdict
            && verdict != told
        {
            let peer = shared.name_of(*id).unwrap_or_default();
            tracing::warn!(peer, raft_id = *id, %reason, "a dead voter is not removed by the auto-pilot");
        }
        if let Verdict::Remove(id) = verdict {
            let silent_for = picture.silent_for.get(&id).copied().unwrap_or_default();
            if let Err(error) = remove(&shared, id, silent_for).await {
                tracing::warn!(%error, raft_id = id, "the auto-pilot could not have a dead voter removed");
                tokio::time::sleep(PAUSE).await;
            }
        }
        told = verdict;
    }
}

/// What this node knows while it leads; nothing while it does not, or is about to stop.
fn picture(shared: &Shared, now: Instant) -> Option<Picture> {
    let own = shared.raft.get()?.id;
    if !shared.is_leader() || shared.draining.load(Ordering::SeqCst) || shared.gate.shut_by().is_some() {
        return None;
    }
    let sample = shared.metrics()?;
    let config = &sample.metrics.membership_config;
    let voters: BTreeSet<RaftId> = config.voter_ids().collect();
    let (answers, leads_since) = (shared.peers.load(), shared.leads_since.load());
    let leads_since = leads_since.as_deref().copied()?;
    let silence = |id: &RaftId| {
        let last = answers
            .get(id)
            .copied()
            .map_or(leads_since, |at| at.max(leads_since));
        now.saturating_duration_since(last)
    };
    let silent_for = voters
        .iter()
        .filter(|id| **id != own)
        .map(|id| (*id, silence(id)));
    let silent_for = silent_for.collect();
    Some(Picture {
        own,
        voters,
        silent_for,
        heard: shared.heard(),
        loading: shared.loading.peers(now),
        joint: config.membership().get_joint_config().len() > 1,
    })
}

/// Asks for a removal as an administrator does. The one place where the auto-pilot changes anything.
async fn remove(shared: &Arc<Shared>, id: RaftId, silent_for: Duration) -> Result<(), ProposeError> {
    let own = shared.raft.get().ok_or(ProposeError::Uninitialised)?.id;
    let peer = shared.name_of(id).unwrap_or_default();
    let nonce = clock::random_id();
    let successor: Option<NodeName> = None;
    // Never a key that is nowhere else: that one somebody has to answer for.
    let op = Op::RemoveNode(RemoveNode {
        node: id,
        successor,
        lose_keys: false,
    });
    let request = RequestId::Node { node: own, nonce };
    shared.propose(request, [0; 32], Origin::Node(own), op).await?;
    tracing::warn!(
        target: "audit",
        epoch = crate::logging::epoch(), peer, raft_id = id, silent_s = silent_for.as_secs(),
        "the auto-pilot removes a voter that is dead"
    );
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use openraft::error::ReplicationClosed;
    use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
    use openraft::raft::SnapshotResponse;
    use raft_store::{MemberNode, Snapshot, SnapshotFile, SnapshotMeta, Vote};

    use super::super::network::Network;
    use super::super::test_world::{self, WITHIN, until};
    use super::super::wire::{Request, Response};
    use super::*;
    use crate::rotation::testing::World;

    const AFTER: Duration = Duration::from_secs(600);
    const RULES: Autopilot = Autopilot {
        remove_dead_after: AFTER,
        min_voters: 3,
    };

    /// Voters 1 to `voters`, led by the first, of which these are dead.
    fn of(voters: u64, dead: &[usize]) -> (World, Picture, Vec<RaftId>) {
        let world = World::new(voters);
        let ids: Vec<RaftId> = world.voters.iter().copied().collect();
        let is_dead = |id: &RaftId| dead.iter().any(|at| ids[*at] == *id);
        let silence = |id: &RaftId| if is_dead(id) { AFTER } else { Duration::ZERO };
        let picture = Picture {
            own: ids[0],
            voters: world.voters.clone(),
            silent_for: ids.iter().map(|id| (*id, silence(id))).collect(),
            heard: ids.iter().copied().filter(|id| !is_dead(id)).collect(),
            loading: BTreeSet::new(),
            joint: false,
        };
        (world, picture, ids)
    }

    fn verdict(world: &World, picture: &Picture) -> Verdict {
        decide(&world.state, picture, &RULES)
    }

    fn margin(heard: usize, left: usize) -> Reason {
        Reason::Margin {
            heard,
            left,
            min_voters: 3,
        }
    }

    #[test]
    fn a_dead_voter_goes_once_another_one_has_joined_in_its_place() {
        let (world, picture, ids) = of(3, &[2]);
        assert_eq!(verdict(&world, &picture), Verdict::Keep(ids[2], margin(2, 2)));
        let (world, picture, ids) = of(4, &[2]);
        assert_eq!(verdict(&world, &picture), Verdict::Remove(ids[2]));
    }

    #[test]
    fn nobody_goes_while_one_more_failure_would_take_the_quorum() {
        let (world, picture, ids) = of(5, &[3, 4]);
        assert_eq!(verdict(&world, &picture), Verdict::Keep(ids[3], margin(3, 4)));
        let (world, picture, ids) = of(6, &[4, 5]);
        assert_eq!(
            verdict(&world, &picture),
            Verdict::Remove(ids[4]),
            "4 of 5, and one of them may fail"
        );
        let (world, picture, ids) = of(5, &[4]);
        assert_eq!(verdict(&world, &picture), Verdict::Remove(ids[4]));
        let five = Autopilot {
            min_voters: 5,
            ..RULES
        };
        assert!(matches!(
            decide(&world.state, &picture, &five),
            Verdict::Keep(_, Reason::Margin { min_voters: 5, .. })
        ));
    }

    #[test]
    fn whoever_loads_a_snapshot_or_was_silent_for_less_stays() {
        let (world, mut picture, ids) = of(4, &[2]);
        picture.loading.insert(ids[2]);
        assert_eq!(verdict(&world, &picture), Verdict::Keep(ids[2], Reason::Loading));
        picture.loading.clear();
        let before = AFTER.saturating_sub(Duration::from_millis(1));
        picture.silent_for.insert(ids[2], before);
        assert_eq!(verdict(&world, &picture), Verdict::Nobody);
    }

    /// What a leader knows of who loads comes from the connection that the snapshot is sent on.
    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn a_voter_that_is_sent_a_snapshot_goes_only_once_that_has_ended() {
        let world = test_world::World::new("loader").await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let id = world.register(&address).await;
        world.admitted(id).await;
        let vote = Vote::new_committed(1, 1);
        let (installs, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        let (begun, holds) = (Arc::clone(&installs), Arc::clone(&held));
        world.answering(listener, id, move |request| match request {
            Request::SnapshotBegin { .. } | Request::SnapshotChunk(_) => Response::More,
            Request::SnapshotEnd => {
                begun.store(true, Ordering::SeqCst);
                tokio::task::block_in_place(|| {
                    while holds.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                });
                Response::Snapshot(SnapshotResponse::new(vote))
            }
            _ => Response::Failed("no part of this test".into()),
        });
        let shared = Arc::clone(&world.node.shared);
        // It votes, has been silent for as long as it takes, and of the others enough are heard.
        let verdict = || {
            let mut picture = picture(&shared, clock::now())?;
            picture.voters.extend([id, id + 1, id + 2, id + 3]);
            picture.heard.extend([id + 1, id + 2, id + 3]);
            picture.silent_for.insert(id, AFTER);
            Some(decide(&shared.published.load().state, &picture, &RULES))
        };
        until("a dead voter", || verdict() == Some(Verdict::Remove(id))).await;

        let file = world.dir.path().join("snapshot");
        std::fs::write(&file, b"bytes").unwrap();
        let member = MemberNode {
            name: world.hello(id).name,
            cluster_address: address,
        };
        let network = Arc::clone(&shared);
        let mut client = Network { shared: network }.new_client(id, &member).await;
        let sending = tokio::spawn(async move {
            let snapshot = Snapshot {
                meta: SnapshotMeta::default(),
                snapshot: Box::new(SnapshotFile { path: file }),
            };
            let never = std::future::pending::<ReplicationClosed>();
            let option = RPCOption::new(WITHIN);
            let sent = client.full_snapshot(vote, snapshot, never, option).await;
            sent.map(drop).map_err(|error| format!("{error:?}"))
        });
        until("the peer to install it", || installs.load(Ordering::SeqCst)).await;
        assert_eq!(verdict(), Some(Verdict::Keep(id, Reason::Loading)));
        held.store(false, Ordering::SeqCst);
        sending.await.unwrap().unwrap();
        assert_eq!(verdict(), Some(Verdict::Remove(id)));
        // Between an attempt that has failed and the next one it loads on.
        drop(shared.loading.begin(id));
        assert_eq!(verdict(), Some(Verdict::Keep(id, Reason::Loading)));
        assert!(!world.is_ended());
    }

    #[test]
    fn the_longest_dead_goes_first_and_one_after_the_other() {
        let (mut world, mut picture, ids) = of(7, &[4, 5]);
        picture.silent_for.insert(ids[5], AFTER * 2);
        assert_eq!(verdict(&world, &picture), Verdict::Remove(ids[5]));
        // One that has to stay keeps no other one.
        picture.loading.insert(ids[5]);
        assert_eq!(verdict(&world, &picture), Verdict::Remove(ids[4]));
        picture.loading.clear();
        world.ok(Op::RemoveNode(RemoveNode {
            node: ids[5],
            successor: None,
            lose_keys: false,
        }));
        assert_eq!(verdict(&world, &picture), Verdict::Keep(ids[4], Reason::Changing));
    }

    #[test]
    fn nobody_goes_while_the_membership_changes_and_the_leader_never() {
        let (world, mut picture, ids) = of(4, &[2]);
        picture.joint = true;
        assert_eq!(verdict(&world, &picture), Verdict::Keep(ids[2], Reason::Changing));
        picture.joint = false;
        picture.own = ids[2];
        assert_eq!(verdict(&world, &picture), Verdict::Nobody);
    }
}
