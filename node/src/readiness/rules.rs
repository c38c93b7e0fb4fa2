//! The policy in force, as requests read it, from the first request after a change was applied. Access control is made
//! anew when it has changed; revocations are read where the state keeps them, so that one more costs no request
//! anything, however many there are.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use raft_store::storage::Published;

use crate::admin::authorise::rules;
use crate::admin::revoked_file::Entry;
use crate::admin::seed::Seed;
use crate::policy::{Policy, Revocations};

struct Known {
    /// Keeps the rows alive that `policy` was made of, so that their addresses stay theirs.
    published: Arc<Published>,
    /// What stood in the node's own file of revocations.
    listed: Arc<Vec<Entry>>,
    policy: Arc<Policy>,
}

/// See the module.
pub(super) struct PolicyCache {
    known: ArcSwapOption<Known>,
    seed: Seed,
}

impl PolicyCache {
    /// `seed` is what the node's configuration has to say.
    pub(super) fn new(seed: Seed) -> Self {
        Self {
            known: ArcSwapOption::empty(),
            seed,
        }
    }

    /// The policy of a state.
    pub(super) fn of(&self, published: Arc<Published>) -> Arc<Policy> {
        let known = self.known.load();
        if let Some(known) = known.as_ref()
            && same(&known.published, &published)
            && self.is_as_listed(known)
        {
            return Arc::clone(&known.policy);
        }
        let listed = self.seed.revocations.load();
        let revocations = published.state.revocations();
        let policy = match known
            .as_ref()
            .filter(|known| same_acl(&known.published, &published))
        {
            Some(known) => known.policy.with_revocations(Revocations::of_state(revocations)),
            None => rules(&published.state, &self.seed),
        };
        let policy = Arc::new(policy);
        // A slower thread may put an older one back; the next request sees that it is.
        self.known.store(Some(Arc::new(Known {
            published,
            listed,
            policy: Arc::clone(&policy),
        })));
        policy
    }

    /// Before there is a cluster the node's own file says who is revoked, and it is read again while the node runs.
    fn is_as_listed(&self, known: &Known) -> bool {
        known.published.state.acl().is_some() || Arc::ptr_eq(&known.listed, &self.seed.revocations.load())
    }
}

/// Whether two states have the same rules. Rows are replaced, never changed in place. That there are as many
/// revocations says nothing: one may be taken back, and another added.
pub(super) fn same(a: &Published, b: &Published) -> bool {
    let neither = a.state.acl().is_none() && b.state.acl().is_none();
    (neither || same_acl(a, b)) && a.state.revocations().is_clone_of(b.state.revocations())
}

/// Whether two states have the same access control, and have one.
fn same_acl(a: &Published, b: &Published) -> bool {
    let both = a.state.acl().zip(b.state.acl());
    both.is_some_and(|(a, b)| std::ptr::eq(a, b))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{AddRevocations, Op, RemoveRevocations};
    use raft_store::state::access::RevocationKey;

    use super::*;
    use crate::admin::revoked_file::Listed;
    use crate::identity::{Identity, Principal};
    use crate::rotation::testing::{ISSUER, World};

    fn seed() -> Seed {
        Seed {
            issuers: vec![ISSUER.to_owned()],
            ..Seed::default()
        }
    }

    #[test]
    fn a_revocation_is_in_force_with_the_next_request() {
        let cache = PolicyCache::new(seed());
        let mut world = World::new(1);
        let before = cache.of(Arc::new(world.published()));
        world.ok(Op::AddRevocations(AddRevocations {
            revocations: vec![(RevocationKey::CommonName("gone".to_owned()), String::new())],
        }));
        let after = cache.of(Arc::new(world.published()));
        assert_eq!((before.revocations.len(), after.revocations.len()), (0, 1));
    }

    #[test]
    fn one_revocation_in_the_place_of_another_is_seen() {
        let cache = PolicyCache::new(seed());
        let mut world = World::new(1);
        let by_cn = |cn: &str| RevocationKey::CommonName(cn.to_owned());
        let add = |cn: &str| {
            Op::AddRevocations(AddRevocations {
                revocations: vec![(by_cn(cn), String::new())],
            })
        };
        world.ok(add("a"));
        let before = cache.of(Arc::new(world.published()));
        world.ok(Op::RemoveRevocations(RemoveRevocations {
            revocations: vec![by_cn("a")],
        }));
        world.ok(add("b"));
        let after = cache.of(Arc::new(world.published()));
        assert_eq!((before.revocations.len(), after.revocations.len()), (1, 1));
        assert!(!Arc::ptr_eq(&before, &after));
    }

    /// A revocation must not cost the requests that come with it a look at all others.
    #[test]
    fn one_more_revocation_among_many_is_in_force_and_nothing_is_made_anew() {
        let cache = PolicyCache::new(seed());
        let mut world = World::new(1);
        let by_cn = |number: usize| RevocationKey::CommonName(format!("cn-{number}"));
        let add = |numbers: std::ops::Range<usize>| {
            let revocations = numbers.map(|number| (by_cn(number), String::new()));
            Op::AddRevocations(AddRevocations {
                revocations: revocations.collect(),
            })
        };
        world.ok(add(0..2_000));
        let before = cache.of(Arc::new(world.published()));
        world.ok(add(2_000..2_001));
        let after = cache.of(Arc::new(world.published()));
        assert_eq!(
            (before.revocations.len(), after.revocations.len()),
            (2_000, 2_001)
        );
        assert!(
            std::ptr::eq(before.roles(), after.roles()),
            "access control was made anew"
        );
        let called = |number: usize| {
            let RevocationKey::CommonName(cn) = by_cn(number) else {
                panic!()
            };
            Principal::new(Identity {
                cn,
                ou: None,
                sans: Vec::new(),
                serial: "1".to_owned(),
                issuer_dn: ISSUER.to_owned(),
                fingerprint: [1; 32],
                spki_sha256: [2; 32],
                not_after: i64::MAX,
            })
        };
        for (number, revoked) in [(0, true), (2_000, true), (2_001, false)] {
            assert_eq!(after.revocations.contains(&called(number)), revoked, "{number}");
            assert_eq!(
                before.revocations.contains(&called(number)),
                number == 0,
                "{number}"
            );
        }
    }

    #[test]
    fn what_does_not_change_is_not_made_again() {
        let cache = PolicyCache::new(seed());
        let mut world = World::new(1);
        let before = cache.of(Arc::new(world.published()));
        world.prepare("c");
        let after = cache.of(Arc::new(world.published()));
        assert!(Arc::ptr_eq(&before, &after));
        assert_eq!(after.roles().len(), 3);
    }

    #[test]
    fn before_there_is_a_cluster_the_seed_rules() {
        let by_cn = |cn: &str| (RevocationKey::CommonName(cn.to_owned()), String::new());
        let listed: Listed = [by_cn("gone")].into_iter().collect();
        let cache = PolicyCache::new(Seed {
            revocations: listed.clone(),
            ..seed()
        });
        let none = Arc::new(Published::default());
        let before = cache.of(Arc::clone(&none));
        assert_eq!((before.revocations.len(), before.roles().len()), (1, 0));
        assert!(Arc::ptr_eq(&before, &cache.of(Arc::clone(&none))));
        // Its file is read while it waits for a cluster.
        listed.set(vec![by_cn("gone"), by_cn("lost")]);
        assert_eq!(cache.of(none).revocations.len(), 2);
        let after = cache.of(Arc::new(World::new(1).published()));
        assert_eq!((after.revocations.len(), after.roles().len()), (0, 3));
    }

    #[test]
    fn roles_of_an_issuer_that_this_node_does_not_know_are_left_out() {
        let cache = PolicyCache::new(Seed::default());
        assert!(cache.of(Arc::new(World::new(1).published())).roles().is_empty());
    }
}
