//! Where a node's configuration says something else than the cluster's state. The state rules; what an
//! operator wrote into the file since has to be seen to have no effect. Names only are told.

mod contexts;

use std::fmt;
use std::time::Duration;

use raft_store::state::ClusterState;
use raft_store::state::access::{Acl, RoleEntry};

pub use self::contexts::{Configured, ContextDifferences};
use super::seed::Seed;
use super::seeding::missing;
use crate::consensus::{Consensus, Gate};
use crate::policy::{ROLES, Role, role_name};

/// Between looks; changes of the state are seen at once.
const LOOK: Duration = Duration::from_millis(1000);
/// Most organizational units, or contexts, that a line names.
const SHOWN: usize = 20;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Organizational units of `acl.mappings` with other contexts, or on one side only.
    pub mappings: Vec<String>,
    /// Roles that are bound otherwise.
    pub roles: Vec<&'static str>,
    /// How many revocations of the configuration the state lacks. More in the state is no difference.
    pub revocations: usize,
    /// Of contexts.
    pub contexts: ContextDifferences,
}

impl Differences {
    /// Compares; before there is a cluster nothing differs.
    #[must_use]
    pub fn between(seed: &Seed, state: &ClusterState) -> Self {
        let Some(acl) = state.acl() else {
            return Self::default();
        };
        Self {
            mappings: mappings(&seed.acl, acl),
            roles: roles(&seed.acl.roles, &acl.roles),
            revocations: missing(&seed.revocations.load(), state).len(),
            contexts: ContextDifferences::between(&seed.contexts, state),
        }
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// For metrics: each section of the configuration, and whether it differs.
    #[must_use]
    pub fn sections(&self) -> [(&'static str, bool); 6] {
        [
            ("acl", !self.mappings.is_empty()),
            ("roles", !self.roles.is_empty()),
            ("revocations", self.revocations > 0),
            ("slots", !self.contexts.slots.is_empty()),
            ("bindings", !self.contexts.bindings.is_empty()),
            ("rotation", !self.contexts.rotations.is_empty()),
        ]
    }
}

/// A configuration knows no operations: a unit that the state holds to some of them differs. Nor does it know rules
/// besides, and those are not compared.
fn mappings(ours: &Acl, theirs: &Acl) -> Vec<String> {
    let held = &theirs.operations;
    let (ours, theirs) = (&ours.mappings, &theirs.mappings);
    let here = ours
        .iter()
        .filter(|(ou, contexts)| theirs.get(*ou) != Some(*contexts) || held.contains_key(*ou));
    let there = theirs.iter().filter(|(ou, _)| !ours.contains_key(*ou));
    here.chain(there).map(|(ou, _)| ou.clone()).collect()
}

/// The order of entries means nothing.
fn roles(ours: &[RoleEntry], theirs: &[RoleEntry]) -> Vec<&'static str> {
    let only_in = |one: &[RoleEntry], other: &[RoleEntry], role: Role| {
        one.iter()
            .any(|entry| entry.role == role && !other.contains(entry))
    };
    ROLES
        .into_iter()
        .filter(|role| only_in(ours, theirs, *role) || only_in(theirs, ours, *role))
        .map(role_name)
        .collect()
}

/// The first [`SHOWN`] of these, and how many more there are; `None` if there is none.
fn listed(names: impl ExactSizeIterator<Item = String>) -> Option<String> {
    let more = names.len().saturating_sub(SHOWN);
    let mut shown: Vec<String> = names.take(SHOWN).collect();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    (!shown.is_empty()).then(|| shown.join(", "))
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(units) = listed(self.mappings.iter().map(|ou| format!("{ou:?}"))) {
            parts.push(format!("acl.mappings of {units}"));
        }
        if !self.roles.is_empty() {
            parts.push(format!("roles {}", self.roles.join(", ")));
        }
        if self.revocations > 0 {
            parts.push(format!(
                "{} in acl.revoked_file that are still to be added",
                self.revocations
            ));
        }
        parts.extend(self.contexts.parts());
        f.write_str(&parts.join("; "))
    }
}

/// Tells in the log what differs, at the start and whenever it changes, until the consensus of this node
/// ends.
pub async fn report(consensus: Consensus, seed: Seed) {
    let mut applied = consensus.applied();
    let mut told = Differences::default();
    loop {
        applied.borrow_and_update();
        let view = consensus.view();
        if let Some(now) = look(view.start_gate, &seed, &consensus.published().state)
            && now != told
        {
            tell(&now);
            told = now;
        }
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, applied.changed()).await {
            return;
        }
    }
}

/// `None` while the state may be an old one.
fn look(gate: Gate, seed: &Seed, state: &ClusterState) -> Option<Differences> {
    if !matches!(gate, Gate::Open { .. }) {
        return None;
    }
    Some(Differences {
        // On their way, or a line of their own says why not.
        revocations: 0,
        ..Differences::between(seed, state)
    })
}

fn tell(differences: &Differences) {
    if differences.is_empty() {
        tracing::info!("configuration: acl, roles, revoked_file and contexts agree with the cluster again");
    } else {
        tracing::warn!(
            "configuration: differs from the cluster's state, which rules: {differences}; acl and roles in \
             the configuration have no effect after `cluster init` (see `hsmctl acl get` and `acl set`), and slot, \
             binding and rotation of a context none after it was created (`hsmctl key move` moves it to another slot)"
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use raft_store::command::{AddRevocations, Op};
    use raft_store::names::{ContextName, SlotName};
    use raft_store::state::access::RevocationKey;

    use super::*;
    use crate::metrics::CONFIG_SECTIONS;
    use crate::rotation::testing::World;

    /// Of a node whose configuration founded `world`.
    fn founders(world: &World) -> Seed {
        Seed {
            acl: world.state.acl().unwrap().clone(),
            ..Seed::default()
        }
    }

    fn acl(mappings: &[(&str, &[&str])]) -> Acl {
        let contexts = |names: &[&str]| -> BTreeSet<ContextName> {
            names.iter().map(|name| ContextName::new(name).unwrap()).collect()
        };
        let mappings: BTreeMap<_, _> = mappings
            .iter()
            .map(|(ou, names)| ((*ou).to_owned(), contexts(names)))
            .collect();
        Acl {
            mappings,
            ..Acl::default()
        }
    }

    #[test]
    fn the_founder_agrees_and_before_a_cluster_so_does_everybody() {
        let world = World::new(1);
        let mut seed = founders(&world);
        assert!(Differences::between(&seed, &world.state).is_empty());
        seed.acl.roles.reverse();
        assert!(Differences::between(&seed, &world.state).is_empty());
        seed.acl = acl(&[("Trading", &["c"])]);
        assert!(Differences::between(&seed, &ClusterState::default()).is_empty());
        assert!(!Differences::between(&seed, &world.state).is_empty());
    }

    #[test]
    fn every_section_is_in_the_metrics_and_differs_by_itself() {
        let none = Differences::default().sections();
        assert_eq!(none, CONFIG_SECTIONS.map(|section| (section, false)));
        let context = ContextName::new("c").unwrap();
        let moved = Differences {
            contexts: ContextDifferences {
                slots: vec![(context, SlotName::new("s").unwrap())],
                ..ContextDifferences::default()
            },
            ..Differences::default()
        };
        let differs = moved.sections().into_iter().filter(|(_, differs)| *differs);
        assert_eq!(differs.collect::<Vec<_>>(), [("slots", true)]);
    }

    #[test]
    fn units_that_are_new_gone_or_changed_are_named() {
        let state = acl(&[("Same", &["a"]), ("Changed", &["a"]), ("Gone", &["a"])]);
        let ours = acl(&[("Same", &["a"]), ("Changed", &["a", "b"]), ("New", &[])]);
        assert_eq!(mappings(&ours, &state), ["Changed", "New", "Gone"]);
        assert_eq!(mappings(&state, &ours), ["Changed", "Gone", "New"]);
        assert!(mappings(&ours, &ours).is_empty());
        let mut held = ours.clone();
        held.operations.insert("New".to_owned(), BTreeSet::new());
        assert_eq!(mappings(&ours, &held), ["New"]);
    }

    #[test]
    fn roles_that_are_new_gone_or_changed_are_named() {
        let world = World::new(1);
        let theirs = world.state.acl().unwrap().roles.clone();
        assert_eq!(roles(&[], &theirs), ["admin", "operator", "auditor"]);
        let mut ours = theirs.clone();
        ours[0].issuer = "CN=Another CA".to_owned();
        assert_eq!(roles(&ours, &theirs), ["admin"]);
        ours = theirs.clone();
        ours.remove(2);
        assert_eq!(roles(&ours, &theirs), ["auditor"]);
        ours = theirs.clone();
        let mut second = ours[1].clone();
        second.ou = Some("Night".to_owned());
        ours.push(second);
        assert_eq!(roles(&ours, &theirs), ["operator"]);
    }

    #[test]
    fn only_revocations_that_the_state_lacks_differ() {
        let key = |cn: &str| (RevocationKey::CommonName(cn.to_owned()), String::new());
        let mut world = World::new(1);
        world.ok(Op::AddRevocations(AddRevocations {
            revocations: vec![key("a"), key("b")],
        }));
        let mut seed = founders(&world);
        seed.revocations = [key("a")].into_iter().collect();
        assert!(Differences::between(&seed, &world.state).is_empty());
        seed.revocations = [key("a"), key("c")].into_iter().collect();
        assert_eq!(Differences::between(&seed, &world.state).revocations, 1);
    }

    #[test]
    fn nothing_is_said_of_an_old_state_nor_of_revocations_on_their_way() {
        let world = World::new(1);
        let mut seed = founders(&world);
        let revoked = (RevocationKey::CommonName("a".to_owned()), String::new());
        seed.revocations = [revoked].into_iter().collect();
        assert_eq!(look(Gate::NoLeaderSeen, &seed, &world.state), None);
        assert!(
            look(Gate::Open { since: 1 }, &seed, &world.state)
                .unwrap()
                .is_empty()
        );
        seed.acl = acl(&[("Trading", &["c"])]);
        assert!(
            !look(Gate::Open { since: 1 }, &seed, &world.state)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_line_names_what_differs_and_stays_one_line() {
        let differences = Differences {
            mappings: vec!["Trading".to_owned(), "A\nB".to_owned()],
            roles: vec!["admin", "auditor"],
            revocations: 3,
            contexts: ContextDifferences {
                rotations: vec![ContextName::new("2fa").unwrap()],
                ..ContextDifferences::default()
            },
        };
        assert_eq!(
            differences.to_string(),
            "acl.mappings of \"Trading\", \"A\\nB\"; roles admin, auditor; 3 in acl.revoked_file that \
             are still to be added; rotation or retention of 2fa"
        );
        let many = Differences {
            mappings: (0..SHOWN + 5).map(|i| i.to_string()).collect(),
            ..Differences::default()
        };
        let text = many.to_string();
        assert!(text.ends_with("\"19\", 5 more"), "{text}");
    }
}
