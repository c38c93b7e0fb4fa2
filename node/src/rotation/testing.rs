//! A cluster without Raft for tests: commands are applied to a state at once, nodes acknowledge what
//! they are told to, and leadership is a switch.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hsm_core::replication::ReplicationKey;
use raft_store::command::{Done, Op, Origin, Outcome, RequestId};
use raft_store::names::{RaftId, SlotName};
use raft_store::state::ClusterMeta;
use raft_store::storage::Published;
use tokio::sync::watch;
use zeroize::Zeroizing;

use self::world::admin;
pub(crate) use self::world::{ISSUER, World, context, origin, prepare, slot};
use super::clocks::Clocks;
use super::cluster::{Cluster, Leadership};
use super::keys::{KeyMaker, KeyOrder, NewKey};
use super::plan::Asked;
use super::rotator::ClusterKeys;
use crate::admin::call::CallError;
use crate::consensus::ProposeError;

pub(crate) fn asked(operation: &str, key: &str) -> Asked {
    Asked {
        principal: [3; 32],
        operation: operation.to_owned(),
        key: key.to_owned(),
        body_hash: [4; 32],
        origin: admin(),
    }
}

pub(crate) fn replication_key() -> ReplicationKey {
    ReplicationKey::parse(&"ab".repeat(32)).unwrap()
}

pub(crate) fn cluster_keys() -> ClusterKeys {
    Arc::new(|meta: &ClusterMeta| Ok(Arc::new(replication_key().for_cluster(&meta.cluster_id.0))))
}

/// A clock that shows what those of a new [`World`]'s nodes do.
pub(crate) fn still() -> Arc<Clocks> {
    Arc::new(Clocks::new(Box::new(|| 0)))
}

/// See the module.
pub(crate) struct FakeCluster {
    pub(crate) world: Mutex<World>,
    /// Who acknowledges a version as soon as it is prepared.
    pub(crate) acking: Mutex<BTreeSet<RaftId>>,
    pub(crate) leadership: Mutex<Option<Leadership>>,
    /// Without a leadership of its own: another node leads, and can be reached.
    pub(crate) led_elsewhere: AtomicBool,
    /// Errors for the next proposals, and whether they are applied all the same.
    pub(crate) failures: Mutex<Vec<(ProposeError, bool)>>,
    /// Proposals that succeed before the first of them.
    pub(crate) let_through: Mutex<usize>,
    applied: watch::Sender<u64>,
}

impl FakeCluster {
    pub(crate) fn new(world: World) -> Arc<Self> {
        let applied = watch::channel(world.index).0;
        Arc::new(Self {
            acking: Mutex::new(world.voters.clone()),
            leadership: Mutex::new(Some(Leadership {
                term: 1,
                silent_for: BTreeMap::new(),
                quorum_age: Some(Duration::ZERO),
            })),
            led_elsewhere: AtomicBool::new(false),
            failures: Mutex::new(Vec::new()),
            let_through: Mutex::new(0),
            world: Mutex::new(world),
            applied,
        })
    }

    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.world.lock().unwrap();
        let result = act(&mut world);
        self.applied.send_replace(world.index);
        result
    }

    pub(crate) fn silence(&self, node: RaftId, silent: Duration) {
        if let Some(leadership) = &mut *self.leadership.lock().unwrap() {
            leadership.silent_for.insert(node, silent);
        }
    }

    fn next_failure(&self) -> Option<(ProposeError, bool)> {
        let mut let_through = self.let_through.lock().unwrap();
        if *let_through > 0 {
            *let_through -= 1;
            return None;
        }
        self.failures.lock().unwrap().pop()
    }

    /// Whether anybody leads.
    fn is_led(&self) -> bool {
        self.leadership().is_some() || self.led_elsewhere.load(Ordering::SeqCst)
    }

    /// What the leader does with a proposal, whoever that is.
    fn lead(&self, id: RequestId, body_hash: [u8; 32], origin: Origin, op: Op) -> Result<Done, ProposeError> {
        let failure = self.next_failure();
        if let Some((error, false)) = failure {
            return Err(error);
        }
        let acking = self.acking.lock().unwrap().clone();
        let outcome = self.with(|world| {
            let outcome = world.send(id, body_hash, origin, op);
            let pending: Vec<_> = world.state.pending().map(|(key, _)| key.clone()).collect();
            for key in pending {
                for node in &acking {
                    world.ack(*node, key.context.as_str(), key.version);
                }
            }
            outcome
        });
        if let Some((error, true)) = failure {
            return Err(error);
        }
        match outcome {
            Outcome::Done(done) => Ok(done),
            Outcome::Refused(refusal) => Err(ProposeError::Refused(refusal)),
            Outcome::Nothing => panic!("no outcome"),
        }
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Op) -> bool) -> usize {
        self.with(|world| world.log.iter().filter(|op| wanted(op)).count())
    }
}

#[async_trait]
impl Cluster for FakeCluster {
    fn published(&self) -> Arc<Published> {
        Arc::new(self.world.lock().unwrap().published())
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn leadership(&self) -> Option<Leadership> {
        self.leadership.lock().unwrap().clone()
    }

    fn raft_id(&self) -> Option<RaftId> {
        Some(1)
    }

    /// Everybody but whom a test has silenced.
    fn heard(&self) -> BTreeSet<RaftId> {
        let Some(leadership) = self.leadership() else {
            return BTreeSet::new();
        };
        let mut heard = self.with(|world| {
            world
                .state
                .nodes()
                .iter()
                .map(|(id, _)| *id)
                .collect::<BTreeSet<_>>()
        });
        heard.retain(|id| !leadership.silent_for.contains_key(id));
        heard
    }

    /// Leads no more; whoever is asked for does, or node 2.
    async fn transfer(&self, to: Option<RaftId>) -> Result<RaftId, CallError> {
        *self.leadership.lock().unwrap() = None;
        self.led_elsewhere.store(true, Ordering::SeqCst);
        Ok(to.unwrap_or(2))
    }

    async fn propose(
        &self,
        id: RequestId,
        body_hash: [u8; 32],
        origin: Origin,
        op: Op,
    ) -> Result<Done, ProposeError> {
        if self.leadership().is_none() {
            return Err(ProposeError::NotLeader { leader: None });
        }
        self.lead(id, body_hash, origin, op)
    }

    async fn propose_as_leader(&self, op: Op) -> Result<Done, ProposeError> {
        let nonce = crate::clock::random_id();
        self.propose(RequestId::Node { node: 1, nonce }, [0; 32], Origin::Node(1), op)
            .await
    }

    async fn propose_as_node(&self, op: Op) -> Result<Done, ProposeError> {
        if !self.is_led() {
            return Err(ProposeError::NotLeader { leader: None });
        }
        let nonce = crate::clock::random_id();
        self.lead(RequestId::Node { node: 1, nonce }, [0; 32], Origin::Node(1), op)
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        if !self.is_led() {
            return Err(ProposeError::NotLeader { leader: None });
        }
        Ok(self.with(|world| world.index))
    }
}

/// A token that makes keys of nothing.
#[derive(Default)]
pub(crate) struct FakeKeys {
    pub(crate) made: AtomicUsize,
    pub(crate) refuse: Mutex<Option<CallError>>,
}

impl KeyMaker for FakeKeys {
    fn check(&self, _: &SlotName) -> Result<(), CallError> {
        self.refuse.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn make(&self, _: &KeyOrder) -> Result<NewKey, CallError> {
        self.made.fetch_add(1, Ordering::SeqCst);
        Ok(NewKey {
            wrapped: Zeroizing::new(vec![8; 40]),
            check_record: vec![9; 128],
        })
    }
}
