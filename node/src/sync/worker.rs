//! One slot's sync: looks into the token, decides, takes the steps, shows what it has. It runs at once
//! when the state or the slot changes, and compares everything from time to time. A slot that hangs
//! holds up nobody but its own worker.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_core::replication::ClusterKey;
use hsm_core::{Slot, SlotState, TOKEN_REPLACED};
use raft_store::names::{RaftId, TransportId};
use raft_store::state::ClusterState;
use tokio::sync::watch;

use super::attempts::Attempts;
use super::board::Board;
use super::decide::{Picture, decide, warning};
use super::held::Held;
use super::plan::{Action, Plan, Problem};
use super::replication_key::Replication;
use super::slot_key::ClusterSigner;
use super::steps::Workbench;
use crate::clock;
use crate::consensus::Consensus;
use crate::leases::Leases;
use crate::slots::SlotEntry;

/// Leadership and slots are looked at this often, whatever happens.
const TICK: Duration = Duration::from_secs(1);
/// Steps between two looks at the state.
const BATCH: usize = 64;
/// Between looks that fail; after a step that failed the token may not be what it was taken for.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);
const LOOK_MOST: Duration = Duration::from_secs(30);
/// Longer than any request that took the old key ring is under way: nobody waits longer than 66 s for a batch of a
/// thousand items.
pub(crate) const RETIRE_AFTER: Duration = Duration::from_secs(75);
/// The leader grants at once; other holders only if it does not.
const GRANT_AFTER: Duration = Duration::from_millis(1500);
const GRANT_STAGGER: Duration = Duration::from_millis(300);

/// See the module.
pub(super) struct Worker {
    pub(super) consensus: Consensus,
    pub(super) entry: Arc<SlotEntry>,
    pub(super) replication: Arc<Replication>,
    pub(super) signer: Option<Arc<ClusterSigner>>,
    pub(super) board: Arc<Board>,
    pub(super) leases: Arc<Leases>,
    pub(super) interval: Duration,
    pub(super) known: Known,
}

/// What a worker remembers between two looks.
pub(super) struct Known {
    pub(super) held: Option<Held>,
    pub(super) attempts: Attempts,
    /// Id of the transport key this node would make.
    pub(super) new_transport: TransportId,
    pub(super) next_look: Instant,
    pub(super) looked: Option<Instant>,
    pub(super) look_trouble: Option<String>,
    /// Problems that were said.
    pub(super) told: BTreeSet<Problem>,
    look_pause: Duration,
    state: (&'static str, &'static str),
}

impl Known {
    pub(super) fn nothing() -> Self {
        Self {
            held: None,
            attempts: Attempts::default(),
            new_transport: TransportId(clock::random_id()),
            next_look: Instant::now(),
            looked: None,
            look_trouble: None,
            told: BTreeSet::new(),
            look_pause: LOOK_AGAIN,
            state: ("", ""),
        }
    }
}

/// How long a new step waits before it is taken first.
fn delay(action: &Action, leader: bool, rank: u32) -> Duration {
    match action {
        Action::Grant(..) if !leader => GRANT_AFTER + GRANT_STAGGER * rank.min(10),
        Action::Retire(_) => RETIRE_AFTER,
        _ => Duration::ZERO,
    }
}

/// This node's place among the nodes: holders of a transport key try one after the other.
fn rank(state: &ClusterState, me: RaftId) -> u32 {
    let before = state.nodes().iter().take_while(|(id, _)| **id < me).count();
    u32::try_from(before).unwrap_or(u32::MAX)
}

impl Worker {
    /// Works until `shutdown`.
    pub(super) async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut applied = self.consensus.applied();
        loop {
            // Before looking: what is applied from here on wakes this worker again.
            applied.mark_unchanged();
            let pause = self.pass(&shutdown).await;
            tokio::select! {
                changed = applied.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                // The slot, or the test of a key, is not what it was: so may be what the token holds.
                () = self.entry.changed() => self.known.next_look = Instant::now(),
                () = tokio::time::sleep(pause) => {}
                _ = shutdown.changed() => return,
            }
        }
    }

    /// Goes on until nothing is left to do now; says how long there is nothing.
    async fn pass(&mut self, shutdown: &watch::Receiver<bool>) -> Duration {
        loop {
            let now = Instant::now();
            let slot = self.usable_slot(now);
            if let Some(slot) = &slot
                && now >= self.known.next_look
            {
                self.look(slot.clone()).await;
            }
            let published = self.consensus.published();
            let (state, leader) = (&published.state, self.consensus.is_leader());
            let cluster_key = self.cluster_key(state);
            let other_key = state.meta().and_then(|meta| self.replication.other(meta));
            let Some(me) = self.consensus.raft_id() else {
                self.post(&published, 0, &Plan::default());
                return TICK;
            };
            let plan = decide(&Picture {
                state,
                me,
                leader,
                trust: self.signer.as_deref().map(ClusterSigner::trust),
                can_open: cluster_key.is_some(),
                slot: self.entry.name(),
                held: self.known.held.as_ref(),
            });
            let warning = warning(state, self.entry.name());
            let worth_saying: Vec<Problem> = plan.problems.iter().cloned().chain(warning).collect();
            self.say(&worth_saying);
            if plan.disowns()
                && let Some(slot) = &slot
            {
                self.disown(slot.clone()).await;
            }
            self.post(&published, me, &plan);
            let (Some(slot), Some(held)) = (slot, &self.known.held) else {
                return TICK;
            };
            let rank = rank(state, me);
            let first = |action: &Action| delay(action, leader, rank);
            let due = self
                .known
                .attempts
                .due(&plan.actions, Instant::now(), BATCH, first);
            if due.is_empty() {
                return self.pause();
            }
            let bench = Arc::new(Workbench {
                slot,
                name: self.entry.name().clone(),
                state: state.clone(),
                me,
                cluster_key,
                other_key,
                signer: self.signer.clone(),
                node_spki: held.node_spki.clone(),
                new_transport: self.known.new_transport,
                leases: Arc::clone(&self.leases),
            });
            for action in due {
                if *shutdown.borrow() {
                    return TICK;
                }
                self.step(action, &bench).await;
            }
        }
    }

    fn pause(&self) -> Duration {
        let look = self.known.next_look;
        let next = self.known.attempts.next_due().map_or(look, |due| due.min(look));
        next.saturating_duration_since(Instant::now())
            .clamp(Duration::from_millis(10), TICK)
    }

    /// The slot, unless it is closed or a call hangs in it. A change of its state asks for a new look.
    fn usable_slot(&mut self, now: Instant) -> Option<Slot> {
        let state = self.entry.state();
        let code = match &state {
            SlotState::Failed { code, .. } => *code,
            _ => "",
        };
        if self.known.state != (state.name(), code) {
            self.known.state = (state.name(), code);
            self.known.next_look = now;
        }
        let slot = self.entry.handle();
        if slot.is_none() {
            self.known.held = None;
        }
        slot.filter(|_| code != "hung")
    }

    /// Compares from scratch: what the token shows now is what counts.
    async fn look(&mut self, slot: Slot) {
        let before = self.known.held.clone();
        let looked = tokio::task::spawn_blocking(move || Held::look(&slot, before.as_ref())).await;
        let looked = match looked {
            Ok(looked) => looked.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let (now, name) = (Instant::now(), self.entry.name().as_str());
        match looked {
            Ok(held) => {
                if self.known.look_trouble.take().is_some() {
                    tracing::info!(slot = name, "the token can be read again");
                }
                self.known.held = Some(held);
                self.known.looked = Some(now);
                self.known.look_pause = LOOK_AGAIN;
                self.known.next_look = now + self.interval;
            }
            Err(why) => {
                if self.known.look_trouble.as_ref() != Some(&why) {
                    tracing::error!(slot = name, why, "the token cannot be compared with the state");
                    self.known.look_trouble = Some(why);
                }
                self.known.next_look = now + self.known.look_pause;
                self.known.look_pause = (self.known.look_pause * 2).min(LOOK_MOST);
            }
        }
    }

    /// Fails a slot whose token is another one. What was seen in it is kept: it is the reason.
    async fn disown(&self, slot: Slot) {
        if matches!(
            slot.state(),
            SlotState::Failed {
                code: TOKEN_REPLACED,
                ..
            }
        ) {
            return;
        }
        let why = Problem::TokenReplaced.to_string();
        let disowned = tokio::task::spawn_blocking(move || slot.disown(&why)).await;
        let name = self.entry.name().as_str();
        match disowned {
            Ok(Ok(())) => {}
            // The state has changed all the same, which is what keeps the token out of use.
            Ok(Err(error)) => {
                tracing::warn!(slot = name, %error, "session copies of a replaced token remain")
            }
            Err(error) => tracing::warn!(slot = name, %error, "session copies of a replaced token remain"),
        }
    }

    fn cluster_key(&self, state: &ClusterState) -> Option<Arc<ClusterKey>> {
        let (key, wrong) = match self.replication.for_cluster(state.meta()?) {
            Ok(key) => (Some(key), None),
            Err(wrong) => (None, Some(wrong.to_string())),
        };
        self.board.judge_replication_key(wrong);
        key
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{Cluster, ME};
    use super::*;

    #[test]
    fn the_leader_grants_at_once_and_others_one_after_the_other() {
        let mut cluster = Cluster::founded();
        let (second, third) = (cluster.join("hsm-node-2"), cluster.join("hsm-node-3"));
        let grant = Action::Grant(TransportId([1; 16]), third);
        assert_eq!(delay(&grant, true, rank(&cluster.state, second)), Duration::ZERO);
        let waits = [ME, second, third].map(|node| delay(&grant, false, rank(&cluster.state, node)));
        assert!(GRANT_AFTER <= waits[0] && waits[0] < waits[1] && waits[1] < waits[2]);
        assert_eq!(delay(&Action::RegisterSlotKey, false, 9), Duration::ZERO);
    }
}
