//! The policy in force, as requests read it: rebuilt only when access control or revocations have
//! changed, in force with the first request after they were applied.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use raft_store::storage::Published;

use crate::admin::authorise::rules;
use crate::admin::seed::Seed;
use crate::policy::Policy;

struct Known {
    /// Keeps the rows alive that `policy` was made of, so that their addresses stay theirs.
    published: Arc<Published>,
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
        {
            return Arc::clone(&known.policy);
        }
        let policy = Arc::new(rules(&published.state, &self.seed));
        // A slower thread may put an older one back; the next request sees that it is.
        self.known.store(Some(Arc::new(Known {
            published,
            policy: Arc::clone(&policy),
        })));
        policy
    }
}

/// Whether two states have the same rules. Rows are replaced, never changed in place. That there are as many
/// revocations says nothing: one may be taken back, and another added.
pub(super) fn same(a: &Published, b: &Published) -> bool {
    let rows = match (a.state.acl(), b.state.acl()) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (None, None) => true,
        _ => false,
    };
    rows && a.state.revocations().is_clone_of(b.state.revocations())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{AddRevocations, Op, RemoveRevocations};
    use raft_store::state::access::RevocationKey;

    use super::*;
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

    #[test]
    fn what_does_not_change_is_not_made_again() {
        let cache = PolicyCache::new(seed());
        let mut world = World::new(1);
        let before = cache.of(Arc::new(world.published()));
        world.prepare("c");
        let after = cache.of(Arc::new(world.published()));
        assert!(Arc::ptr_eq(&before, &after));
        assert_eq!(after.roles.len(), 3);
    }

    #[test]
    fn before_there_is_a_cluster_the_seed_rules() {
        let cache = PolicyCache::new(Seed {
            revocations: vec![(RevocationKey::CommonName("gone".to_owned()), String::new())],
            ..seed()
        });
        let none = Arc::new(Published::default());
        let before = cache.of(Arc::clone(&none));
        assert_eq!((before.revocations.len(), before.roles.len()), (1, 0));
        assert!(Arc::ptr_eq(&before, &cache.of(none)));
        let after = cache.of(Arc::new(World::new(1).published()));
        assert_eq!((after.revocations.len(), after.roles.len()), (0, 3));
    }

    #[test]
    fn roles_of_an_issuer_that_this_node_does_not_know_are_left_out() {
        let cache = PolicyCache::new(Seed::default());
        assert!(cache.of(Arc::new(World::new(1).published())).roles.is_empty());
    }
}
