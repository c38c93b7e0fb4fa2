//! A node to be judged, whole until a test spoils it.

use std::collections::BTreeMap;
use std::time::Duration;

use hsm_core::SlotState;
use raft_store::command::{Op, ReportNode};
use raft_store::names::{RaftId, SlotName};
use raft_store::state::node::{NodeReport, SlotReport};

use super::super::{Local, Picture, Rules, checks};
use crate::config::{Mode, Staleness};
use crate::consensus::{Gate, Role, View};
use crate::health::{Check, ReadyQuery};
use crate::rotation::testing::{World, slot};

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn rules() -> Rules {
    Rules {
        staleness: Staleness {
            ready: 5000 * MS,
            encrypt: 60_000 * MS,
            decrypt: 300_000 * MS,
        },
        mode: Mode::ActiveActive,
        election_max: 1200 * MS,
        without_quorum: false,
    }
}

pub(super) fn serving() -> Local {
    Local {
        state: SlotState::Ready,
        reason: None,
        synced: true,
        complete: true,
        missing_keys: 0,
        untried: 0,
        destructions: 0,
        leases: 0,
        starved: 0,
    }
}

pub(super) fn locked() -> Local {
    Local {
        state: SlotState::Locked,
        reason: Some("the token labelled 7 has no PIN".to_owned()),
        complete: false,
        ..serving()
    }
}

/// Node 1 of three, a follower that lacks nothing.
pub(super) struct Node {
    pub(super) own: RaftId,
    pub(super) world: World,
    pub(super) rules: Rules,
    pub(super) view: View,
    pub(super) slots: BTreeMap<SlotName, Local>,
    pub(super) uptime: Duration,
    pub(super) draining: bool,
    pub(super) below_reserve: bool,
    pub(super) wrong_key: Option<&'static str>,
}

impl Node {
    pub(super) fn new() -> Self {
        Self {
            own: 1,
            world: World::new(3),
            rules: rules(),
            view: View {
                role: Role::Follower,
                term: 1,
                leader: Some(2),
                last_log: 9,
                committed: 9,
                applied: 9,
                snapshot: 0,
                quorum_ack_age: None,
                staleness: Some(200 * MS),
                start_gate: Gate::Open { since: 1 },
                silent: std::collections::BTreeSet::new(),
                heard: std::collections::BTreeSet::new(),
                peers: BTreeMap::new(),
                proposals_pending: 0,
                proposals_timed_out: 0,
                leader_changes: 0,
                stopped: None,
            },
            slots: BTreeMap::from([(slot("s"), serving())]),
            uptime: 1000 * MS,
            draining: false,
            below_reserve: false,
            wrong_key: None,
        }
    }

    pub(super) fn ask(&self, query: &ReadyQuery) -> Vec<Check> {
        let picture = Picture {
            state: &self.world.state,
            voters: &self.world.voters,
            view: &self.view,
            own: Some(self.own),
            slots: &self.slots,
            uptime: self.uptime,
            draining: self.draining,
            below_reserve: self.below_reserve,
            wrong_replication_key: self.wrong_key,
        };
        checks(&self.rules, &picture, query)
    }

    pub(super) fn failing(&self, query: &ReadyQuery) -> Vec<String> {
        let failed = self.ask(query).into_iter().filter(|check| !check.ok);
        failed.map(|check| check.code.into_owned()).collect()
    }

    pub(super) fn not_ready(&self) -> Vec<String> {
        self.failing(&ReadyQuery::default())
    }

    pub(super) fn not_stale_ok(&self) -> Vec<String> {
        self.failing(&ReadyQuery {
            slot: None,
            stale_ok: true,
        })
    }

    pub(super) fn slot(&mut self, name: &str, local: Local) {
        self.slots.insert(slot(name), local);
    }

    /// Another member reports a slot.
    pub(super) fn report(&mut self, node: RaftId, name: &str, serving: bool) {
        let incarnation = self.world.state.nodes().get(&node).unwrap().incarnation;
        let known = self
            .world
            .state
            .reports()
            .get(&node)
            .map_or(0, |report| report.seq);
        let state = if serving { "ready" } else { "failed" };
        let report = NodeReport {
            seq: known + 1,
            boot: raft_store::names::Boot([0; 16]),
            incarnation,
            clock: 0,
            durable_index: 1,
            proven_at: None,
            feature_level: 1,
            slots: BTreeMap::from([(
                slot(name),
                SlotReport {
                    serving,
                    state: state.to_owned(),
                    missing_keys: 0,
                },
            )]),
            uses: BTreeMap::new(),
        };
        self.world
            .ok_as(node, Op::ReportNode(ReportNode { node, report }));
    }

    pub(super) fn other(&self) -> RaftId {
        self.world.voters.iter().copied().max().unwrap()
    }
}
