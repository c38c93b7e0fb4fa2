//! Whether a node may be sent requests: a pure judgement over one picture of it. Every reason has a
//! stable code and says what would change it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hsm_core::SlotState;
use raft_store::names::{RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::VersionKey;

use crate::config::{Mode, Staleness};
use crate::consensus::{Gate, HeldBack, ProposeError, Role, View, held_back_by};
use crate::health::{Check, ReadyQuery};

/// What the configuration says about readiness.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Bounds of staleness.
    pub staleness: Staleness,
    /// How the nodes share the work.
    pub mode: Mode,
    /// A leader whose quorum is older is about to be replaced.
    pub election_max: Duration,
    /// Serve after a restart although no quorum answers.
    pub without_quorum: bool,
}

/// A slot of this node.
#[derive(Clone, Debug)]
pub struct Local {
    /// Its state.
    pub state: SlotState,
    /// Why it does not serve, or why keys are missing that nothing is left to try for, for administrators, with where the
    /// remedy stands.
    pub reason: Option<String>,
    /// The token was compared with the state since the start.
    pub synced: bool,
    /// It had everything that the state asked for when the start gate last opened, and has now.
    pub complete: bool,
    /// Versions it has to serve and lacks.
    pub missing_keys: u32,
    /// Steps that may bring one of them and were not tried yet.
    pub untried: u32,
    /// Keys of ended versions that are still in the token, or not known to be gone from it.
    pub destructions: u32,
    /// Versions under which it would have to encrypt and was given no invocation yet, although the cluster has some to
    /// give.
    pub leases: u32,
    /// Versions of which it has used up what it had, and was given no more for a while.
    pub starved: u32,
}

impl Local {
    fn is_ready(&self) -> bool {
        self.state == SlotState::Ready
    }

    fn serves(&self) -> bool {
        self.is_ready() && self.complete && self.leases == 0
    }

    /// A key is missing, and may be here in a moment.
    fn imports(&self) -> bool {
        self.missing_keys > 0 && self.untried > 0
    }

    fn why(&self) -> String {
        if !self.is_ready() {
            // Whoever reaches the health listener is nobody in particular: no labels, serials or paths.
            let state = match &self.state {
                SlotState::Failed { code, .. } => format!("failed ({code})"),
                state => state.name().to_owned(),
            };
            return format!(
                "{state}; the node's log and `hsmctl cluster status` say why (docs/operations.md, \"A slot does not serve\")"
            );
        }
        if !self.synced {
            return match self.reason {
                Some(_) => "the token cannot be compared with the state; the node's log and `hsmctl cluster status` say \
                            why (docs/operations.md, \"A token is damaged or lost\")",
                None => "the token was not compared with the state yet",
            }
            .to_owned();
        }
        if self.destructions > 0 {
            return format!("{} keys of ended versions are being removed", self.destructions);
        }
        if self.complete {
            return format!(
                "{} key versions wait for invocations of the leader, their first or new ones",
                self.leases.saturating_add(self.starved)
            );
        }
        if self.reason.is_some() {
            return format!(
                "{} keys are missing, and nothing is left to try for them; the node's log and `hsmctl cluster status` say \
                 why (docs/operations.md, \"Keys are missing\")",
                self.missing_keys
            );
        }
        format!("{} keys are being imported", self.missing_keys)
    }
}

/// One picture of the node.
pub(super) struct Picture<'a> {
    /// The replicated state.
    pub(super) state: &'a ClusterState,
    /// Its voters.
    pub(super) voters: &'a BTreeSet<RaftId>,
    /// Where this node stands.
    pub(super) view: &'a View,
    /// Its id.
    pub(super) own: Option<RaftId>,
    /// Its slots.
    pub(super) slots: &'a BTreeMap<SlotName, Local>,
    /// Since the start.
    pub(super) uptime: Duration,
    /// It is shutting down.
    pub(super) draining: bool,
    /// The disk is nearly full.
    pub(super) below_reserve: bool,
    /// Its replication key is not the cluster's.
    pub(super) wrong_replication_key: Option<&'a str>,
}

/// Everything readiness depends on.
#[must_use]
pub(super) fn checks(rules: &Rules, picture: &Picture<'_>, query: &ReadyQuery) -> Vec<Check> {
    let Some(own) = picture.own.filter(|_| picture.state.meta().is_some()) else {
        let detail = "belongs to no cluster: run `hsmctl cluster init` or `hsmctl cluster join`";
        return vec![Check::new("cluster", false, detail)];
    };
    let view = picture.view;
    let mut checks = vec![
        Check::new("cluster", true, "belongs to a cluster"),
        check("draining", !picture.draining, "serving", || {
            "the node is shutting down".to_owned()
        }),
        check("consensus", view.stopped.is_none(), "runs", || {
            format!("has stopped: {}", view.stopped.clone().unwrap_or_default())
        }),
        gate(rules, view, query),
        fresh(rules, picture, query),
        check("voter", picture.voters.contains(&own), "this node votes", || {
            not_let_in(picture.state, own)
        }),
        check("disk", !picture.below_reserve, "above the reserve", || {
            "the data directory's file system is below its reserve: free some space".to_owned()
        }),
    ];
    if let Some(why) = picture.wrong_replication_key {
        checks.push(Check::new("replication_key", false, why));
    }
    checks.push(destructions(picture, query));
    if rules.mode == Mode::ActivePassive && !query.stale_ok {
        checks.push(steering(rules, view));
    }
    slots(picture, query, &mut checks);
    checks.extend(invocations(picture.state));
    checks
}

fn check(code: &'static str, ok: bool, good: &str, bad: impl FnOnce() -> String) -> Check {
    Check::new(code, ok, if ok { good.to_owned() } else { bad() })
}

/// What keeps a node that is joining from voting. Of what it has yet to remove `destructions` says how much; no context is
/// named here.
fn not_let_in(state: &ClusterState, own: RaftId) -> String {
    if state.nodes().get(&own).is_some_and(|node| node.is_leaving()) {
        return "this node leaves the cluster, and votes no more".to_owned();
    }
    let mut why = "this node does not vote yet: it has to prove every key first".to_owned();
    for reason in held_back_by(state, own) {
        if !matches!(reason, HeldBack::OwesDestruction { .. }) {
            why.push_str("; ");
            why.push_str(&reason.to_string());
        }
    }
    why
}

/// The start gate: whoever starts, or heard of no quorum for too long, must catch up with one first.
fn gate(rules: &Rules, view: &View, query: &ReadyQuery) -> Check {
    match view.start_gate {
        Gate::Open { .. } => Check::new("start_gate", true, "open"),
        Gate::NoLeaderSeen if rules.without_quorum && query.stale_ok => Check::new(
            "start_gate",
            true,
            "closed, and serve_after_restart_without_quorum is set",
        ),
        Gate::NoLeaderSeen => Check::new(
            "start_gate",
            false,
            "no quorum-backed leader was heard since the start",
        ),
        Gate::CatchingUp { target } => {
            let detail = format!("applied index {} of {target}", view.applied);
            Check::new("start_gate", false, detail)
        }
        Gate::OlderCopy { node } => {
            let detail = ProposeError::OlderCopy { node }.to_string();
            Check::new("start_gate", false, detail)
        }
        Gate::EpochEnded { epoch } => {
            let detail = ProposeError::EpochEnded { epoch }.to_string();
            Check::new("start_gate", false, detail)
        }
    }
}

/// How stale the node is; a node that may serve without a quorum counts from its start.
#[must_use]
pub(super) fn staleness(rules: &Rules, known: Option<Duration>, uptime: Duration) -> Option<Duration> {
    known.or_else(|| rules.without_quorum.then_some(uptime))
}

fn fresh(rules: &Rules, picture: &Picture<'_>, query: &ReadyQuery) -> Check {
    let bounds = &rules.staleness;
    let (age, bound) = if query.stale_ok {
        let age = staleness(rules, picture.view.staleness, picture.uptime);
        (age, bounds.encrypt.max(bounds.decrypt))
    } else {
        (picture.view.staleness, bounds.ready)
    };
    let bound_ms = bound.as_millis();
    match age {
        None => Check::new(
            "fresh",
            false,
            "no leader with a quorum was heard since the start",
        ),
        Some(age) => {
            let detail = format!(
                "a quorum was heard of {} ms ago; the bound is {bound_ms} ms",
                age.as_millis()
            );
            Check::new("fresh", age <= bound, detail)
        }
    }
}

/// What was destroyed while this node was away, or is being destroyed, leaves its tokens before it is sent requests.
/// A slot that is not open can be asked nothing; whether that keeps the node from being ready, its own line says.
fn destructions(picture: &Picture<'_>, query: &ReadyQuery) -> Check {
    let asked_for = |name: &SlotName| query.slot.as_ref().is_none_or(|slot| slot == name.as_str());
    let open = picture
        .slots
        .iter()
        .filter(|(name, local)| asked_for(name) && local.is_ready());
    let keys: u32 = open.map(|(_, local)| local.destructions).sum();
    check(
        "destructions",
        keys == 0,
        "no key of an ended version is left here",
        || format!("{keys} keys of ended versions are not known to be gone from the tokens yet"),
    )
}

/// Active-passive: the balancer is steered to the leader, and to anybody while there is none.
fn steering(rules: &Rules, view: &View) -> Check {
    match (view.role, view.leader) {
        (Role::Leader, _) => {
            let backed = view.quorum_ack_age.is_some_and(|age| age < rules.election_max);
            check("leader", backed, "this node leads", || {
                "this leader has lost its quorum".to_owned()
            })
        }
        (_, None) => Check::new("leader", true, "no leader is known; standbys answer"),
        (_, Some(_)) => Check::new("leader", false, "a standby: the leader answers"),
    }
}

/// What this node must serve: what is asked for, or else every slot that a fresh member serves and that this node has to
/// have, and every open one it has not compared with the state or cleaned up yet, still brings keys into for the first time,
/// or has every key of and no first lease for. Invocations that are used up count only where the leader serves, see
/// [`leader_serves`]. Of a key that is lost nobody claims any: waiting for them would be waiting for ever. A slot that holds nothing any more may be taken out of
/// one node's configuration after the other's. One that this node has to have and does not is named in any case; where
/// nobody serves it, it keeps a node only from being ready that is alone, because then nobody else is asked.
fn slots(picture: &Picture<'_>, query: &ReadyQuery, checks: &mut Vec<Check>) {
    let mut served = served(picture);
    let needed = picture.state.slots_needed_by(picture.own);
    served.retain(|name| needed.contains(*name) || picture.slots.contains_key(*name));
    let leader_has_all = query.slot.is_some() || served.iter().all(|name| leader_serves(picture, name));
    let by_leader = |name: &str| leader_has_all && leader_serves(picture, name);
    let names: BTreeSet<&str> = match &query.slot {
        Some(name) => BTreeSet::from([name.as_str()]),
        None => served
            .iter()
            .copied()
            .chain(picture.slots.keys().map(SlotName::as_str))
            .chain(needed.iter().map(SlotName::as_str))
            .collect(),
    };
    let alone = picture.state.members() <= 1;
    for name in names {
        let code = format!("slot:{name}");
        let wanted = query.slot.is_some() || served.contains(name);
        checks.push(match picture.slots.get(name) {
            None if needed.contains(name) => {
                let why = "not configured on this node (hsm.slots), and key versions are in it or are to be made there";
                if wanted || alone {
                    Check::new(code, false, why)
                } else {
                    Check::new(code, true, format!("served by no node: {why}"))
                }
            }
            None => Check::new(code, false, "not configured on this node (hsm.slots)"),
            Some(local) if local.serves() && local.starved == 0 => Check::new(code, true, "serving"),
            Some(local) if local.serves() && !by_leader(name) => {
                let detail = format!("serving, and nobody is known to do better: {}", local.why());
                Check::new(code, true, detail)
            }
            Some(local) => {
                let waits = local.complete && local.leases > 0;
                let open_points = !local.synced || local.imports() || local.destructions > 0 || waits;
                let unfinished = local.is_ready() && open_points;
                let why = local.why();
                if wanted || unfinished {
                    Check::new(code, false, why)
                } else {
                    Check::new(code, true, format!("served by no node: {why}"))
                }
            }
        });
    }
}

/// Says that keys are being used up. It keeps nobody from being ready, because no other node is given more of them. A node
/// that is given none while there are some has a slot that does not serve. No context is named: whoever asks here is
/// nobody in particular.
fn invocations(state: &ClusterState) -> Option<Check> {
    let (mut few, mut none) = (0_u32, 0_u32);
    for (name, context) in state.contexts().iter() {
        let Some(version) = context.active_version else {
            continue;
        };
        let key = VersionKey {
            context: name.clone(),
            version,
        };
        if state.lease_part(&key) == 0 {
            none += 1;
        } else if state.leases().get(&key).is_some_and(|lease| lease.short) {
            few += 1;
        }
    }
    let detail = format!(
        "active key versions with few invocations left: {few}, with none to be given: {none}; they are to be rotated, \
         `hsmctl key usage` shows which"
    );
    (few + none > 0).then(|| Check::new("invocations", true, detail))
}

/// Whether another node leads, and reports that it serves this slot. Only then a node that gets no invocations sends its
/// requests elsewhere. The leader itself never does: where it gets none either, nobody gets any, and if all of them went,
/// nobody would decrypt. Its word is the only one to be relied on here: a node whose claims do not come through cannot
/// take back what it reported either.
fn leader_serves(picture: &Picture<'_>, slot: &str) -> bool {
    let leader = picture.view.leader.filter(|id| picture.own != Some(*id));
    let report = leader.and_then(|id| picture.state.reports().get(&id));
    report.is_some_and(|report| report.slots.get(slot).is_some_and(|slot| slot.serving))
}

/// Slots that members report as served, leaving out members that the leader has not heard from lately.
fn served<'a>(picture: &Picture<'a>) -> BTreeSet<&'a str> {
    let fresh = |id: RaftId| picture.own == Some(id) || !picture.view.silent.contains(&id);
    let member = |id: &RaftId| picture.state.nodes().get(id).is_some_and(|node| node.is_member());
    let reports = picture
        .state
        .reports()
        .iter()
        .filter(|(id, _)| member(id) && fresh(**id));
    let slots = reports.flat_map(|(_, report)| report.slots.iter());
    slots
        .filter(|(_, slot)| slot.serving)
        .map(|(name, _)| name.as_str())
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "judge_tests.rs"]
mod tests;
