//! What a worker shows: what its slot can serve, for the key ring, and the status, the keys its slot is judged by,
//! and each problem once.

use std::collections::BTreeSet;
use std::sync::Arc;

use raft_store::names::{KeyUid, RaftId};
use raft_store::state::ClusterState;
use raft_store::state::context::VersionKey;
use raft_store::storage::Published;

use super::board::Part;
use super::convert::to_token_key;
use super::held::Held;
use super::plan::{Action, Plan, Problem};
use super::ring::Source;
use super::status::SlotSync;
use super::wanted::{is_served, versions};
use super::worker::Worker;
use crate::slots::Probe;

/// Problems said one by one; with thousands of keys the rest is a number.
const SAID_AT_MOST: usize = 50;

impl Worker {
    /// Shows what this slot has: first of all steps, so that nothing is acknowledged that the key ring
    /// does not have yet.
    pub(super) fn post(&self, published: &Published, me: RaftId, plan: &Plan) {
        let name = self.entry.name();
        let held = self.known.held.as_ref();
        let serving = Arc::new(held.map(Held::serving).unwrap_or_default());
        let source = match (held, self.entry.handle()) {
            _ if plan.disowns() => Source::Closed,
            (Some(_), _) => Source::Token(Arc::clone(&serving)),
            (None, Some(_)) => Source::Unseen,
            (None, None) => Source::Closed,
        };
        let mut problems: Vec<String> = plan.problems.iter().map(ToString::to_string).collect();
        problems.extend(self.known.look_trouble.clone());
        problems.truncate(SAID_AT_MOST);
        let untried = self.untried(&published.state, me, plan);
        let part = Part {
            source,
            sync: SlotSync {
                missing_keys: plan.missing,
                untried,
                destructions_pending: plan.destructions,
                last_full_sync: held.and(self.known.looked),
                problems,
                compared_at: published.applied.map_or(0, |id| id.index),
                complete_at: None,
                serving,
                gone: Arc::new(held.map(|held| held.gone.clone()).unwrap_or_default()),
            },
        };
        self.board.post(name, part, me, || self.consensus.published());
        self.entry.set_probes(self.probes(&published.state));
    }

    /// Steps that may bring a key that has to be served, and have not failed yet. A pending version keeps nobody waiting.
    fn untried(&self, state: &ClusterState, me: RaftId, plan: &Plan) -> u32 {
        let in_slot = versions(state, self.entry.name()).into_iter();
        let served = in_slot.filter(|(_, version)| is_served(version, me));
        let served: BTreeSet<KeyUid> = served.map(|(_, version)| version.key_uid).collect();
        let uid_of = |key: &VersionKey| state.version(&key.context, key.version).map(|v| v.key_uid);
        let brings = |action: &Action| match action {
            Action::AcceptTransport(_) => true,
            Action::Prove(key) | Action::Import { key, .. } | Action::Adopt { key, .. } => {
                uid_of(key).is_some_and(|uid| served.contains(&uid))
            }
            Action::Load(uid, _) => served.contains(uid),
            _ => false,
        };
        let steps = plan.actions.iter();
        let untried = steps.filter(|action| brings(action) && self.known.attempts.failures(action) == 0);
        u32::try_from(untried.count()).unwrap_or(u32::MAX)
    }

    /// The keys the slot can be judged by: proven here, and still wanted.
    fn probes(&self, state: &ClusterState) -> Vec<Probe> {
        let Some(held) = &self.known.held else {
            return Vec::new();
        };
        let readable = versions(state, self.entry.name())
            .into_iter()
            .filter(|(_, v)| v.state.is_readable());
        let probe = readable.filter_map(|(key, version)| {
            let kek = held.keks.get(&version.key_uid)?;
            let check_record = version.check_record()?;
            (kek.proven && kek.problem.is_none()).then(|| Probe {
                key_uid: to_token_key(version.key_uid),
                context: key.context,
                version: key.version,
                check_record: check_record.to_vec(),
            })
        });
        probe.collect()
    }

    /// Says each problem once, and once when it is gone.
    pub(super) fn say(&mut self, problems: &[Problem]) {
        let now: BTreeSet<Problem> = problems.iter().cloned().collect();
        let slot = self.entry.name().as_str();
        let new: Vec<&Problem> = now.difference(&self.known.told).collect();
        for problem in new.iter().take(SAID_AT_MOST) {
            if problem.is_security() {
                tracing::error!(target: "audit", epoch = crate::logging::epoch(), slot, %problem, "token sync refuses");
            } else if problem.is_passing() {
                tracing::info!(slot, %problem, "token sync");
            } else {
                tracing::warn!(slot, %problem, "token sync");
            }
        }
        if new.len() > SAID_AT_MOST {
            tracing::warn!(
                slot,
                more = new.len() - SAID_AT_MOST,
                "token sync: more of the same"
            );
        }
        for problem in self.known.told.difference(&now).take(SAID_AT_MOST) {
            tracing::info!(slot, %problem, "token sync: no longer");
        }
        self.known.told = now;
    }
}
