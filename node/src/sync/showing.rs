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
use crate::slots::{DAMAGED, Probe};

/// Problems said one by one; with thousands of keys the rest is a number.
const SAID_AT_MOST: usize = 50;
/// Of what keeps keys away, in the reason that the slot is shown with; its log has all of it.
const REASONS_AT_MOST: usize = 3;

/// What keeps keys away where no step is left that has not failed. As long as a grant may come, as to every node that joins, what is
/// missing waits for that.
fn obstacle(problems: &[Problem], failed: &[String]) -> Option<String> {
    let waits = problems
        .iter()
        .any(|problem| matches!(problem, Problem::NoGrant { .. }));
    let passes = |problem: &Problem| waits && matches!(problem, Problem::Missing { .. });
    let problems = problems
        .iter()
        .filter(|problem| problem.keeps_keys_away() && !passes(problem));
    let mut why: Vec<String> = problems.map(ToString::to_string).collect();
    why.extend_from_slice(failed);
    if why.is_empty() {
        return None;
    }
    let more = why.len().saturating_sub(REASONS_AT_MOST);
    why.truncate(REASONS_AT_MOST);
    if more > 0 {
        why.push(format!("{more} more in the node's log"));
    }
    let why = why.join("; ");
    Some(format!("{why} (docs/operations.md, \"Keys are missing\")"))
}

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
        let bringing = self.bringing(&published.state, me, plan);
        let failed: Vec<String> = bringing
            .iter()
            .filter_map(|action| self.failure(action))
            .collect();
        let untried = bringing.len() - failed.len();
        let obstacle = match (held, &self.known.look_trouble) {
            (None, Some(why)) => Some(format!(
                "the token cannot be compared with the state: {why}; {DAMAGED}"
            )),
            (Some(_), _) if plan.missing > 0 && untried == 0 => obstacle(&plan.problems, &failed),
            _ => None,
        };
        let part = Part {
            source,
            sync: SlotSync {
                missing_keys: plan.missing,
                untried: u32::try_from(untried).unwrap_or(u32::MAX),
                destructions_pending: plan.destructions,
                last_full_sync: held.and(self.known.looked),
                problems,
                obstacle,
                compared_at: published.applied.map_or(0, |id| id.index),
                complete_at: None,
                serving,
                gone: Arc::new(held.map(|held| held.gone.clone()).unwrap_or_default()),
            },
        };
        self.board.post(name, part, me, || self.consensus.published());
        self.entry.set_probes(self.probes(&published.state));
    }

    /// Steps that may bring a key that has to be served. A pending version keeps nobody waiting.
    fn bringing<'a>(&self, state: &ClusterState, me: RaftId, plan: &'a Plan) -> Vec<&'a Action> {
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
        plan.actions.iter().filter(|action| brings(action)).collect()
    }

    /// What a step has failed with; `None` if it is still to be tried.
    fn failure(&self, action: &Action) -> Option<String> {
        let why = self.known.attempts.reason(action)?;
        Some(format!("{} of {}: {why}", action.name(), action.subject()))
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::names::TransportId;

    use super::super::testing::context;
    use super::*;

    #[test]
    fn what_keeps_keys_away_is_said_with_the_section_that_helps_and_nothing_else_is() {
        let other = Problem::Unknown {
            what: "object x".to_owned(),
        };
        assert_eq!(obstacle(std::slice::from_ref(&other), &[]), None);
        let missing = Problem::Missing {
            context: context("a"),
            version: 2,
            why: "it is not in this token".to_owned(),
        };
        let no_grant = Problem::NoGrant {
            id: TransportId([1; 16]),
        };
        let failed = ["prove_key of a v1: the token says no", "load_key of b: no"].map(str::to_owned);
        let waiting = [missing.clone(), no_grant];
        assert_eq!(obstacle(&waiting, &[]), None);
        let said = obstacle(&waiting, &failed[..1]).unwrap();
        assert!(
            said.starts_with("prove_key of a v1") && !said.contains("is not in"),
            "{said}"
        );
        let said = obstacle(&[other, missing.clone(), missing], &failed).unwrap();
        assert!(
            said.starts_with("a version 2: it is not in this token; "),
            "{said}"
        );
        assert!(
            said.contains("prove_key of a v1: the token says no; 1 more"),
            "{said}"
        );
        assert!(
            said.ends_with("(docs/operations.md, \"Keys are missing\")") && !said.contains("object x"),
            "{said}"
        );
    }
}
