//! Leases of AES-GCM invocations. Under one key with random 96-bit nonces there must be fewer than 2^32 of them in the
//! whole cluster (NIST SP 800-38D, 8.3), and nobody can ask the others before each. So nodes are given invocations in
//! advance, and what was ever given counts as used, whatever becomes of the node.
//!
//! ```text
//!          begin   leases of the nodes                          ceiling     limit
//!  leased  ├──┼─────────────────────────────────────────┤·········│··········│
//!           the check record, and what was counted       left,      never
//!           before there were leases                     in parts   given out
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::table::{Row, RowKind};
use crate::names::{Boot, RaftId};

/// Invocations under one key: the bound of NIST SP 800-38D, and of every context's policy.
pub const MAX_INVOCATIONS: u64 = 1 << 32;
/// The smallest lease that a node asks for, where the limit is not small itself.
const USUAL_LEASE: u64 = 1 << 16;

/// How much of a limit is given out at most. A second attempt after a token's failure is not counted, because what
/// failed gave nothing away; the tenth that is left is for that too.
pub fn ceiling(limit: u64) -> u64 {
    limit.min(MAX_INVOCATIONS) * 9 / 10
}

/// The smallest lease that is worth an entry in the log.
pub fn smallest(limit: u64) -> u64 {
    (limit / 64).clamp(1, USUAL_LEASE)
}

/// The largest lease that one request is given: a node that asks for more would leave too little for the others.
pub fn largest(limit: u64) -> u64 {
    (limit.min(MAX_INVOCATIONS) / 16).max(1)
}

/// The largest lease that one of so many members is given. If each of them had one, three quarters would be left: what
/// nodes are given before anybody encrypts makes no version due.
pub fn largest_among(limit: u64, members: u64) -> u64 {
    let part = ceiling(limit) / members.max(1).saturating_mul(4);
    largest(limit).min(part).max(1)
}

/// What a node was given of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLease {
    /// The run of its process that it was given to. Another run begins with nothing.
    pub boot: Boot,
    /// All that this run was given.
    pub given: u64,
}

/// What was given out of a version, under the version's key. It stays when the version is retired or destroyed; the
/// nodes' part of it does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionLease {
    /// Every invocation that was ever given out. It never gets less: not when a node crashes, nor when it is removed.
    pub leased: u64,
    /// Some node was given less than it asked for: it is time for a new version.
    pub short: bool,
    /// What each node's last run was given.
    pub nodes: BTreeMap<RaftId, NodeLease>,
}

/// A node asks for invocations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) node: RaftId,
    pub(crate) boot: Boot,
    /// What it has seen that it was given: a repeat, or whoever knows something else, gets nothing.
    pub(crate) seen: u64,
    pub(crate) count: u64,
}

impl VersionLease {
    /// Of a version with so many encryptions that were counted before there were leases. Its check record is one more.
    pub(crate) fn begin(encryptions: u64) -> Self {
        Self {
            leased: encryptions.saturating_add(1),
            short: false,
            nodes: BTreeMap::new(),
        }
    }

    /// What a run of a node was given.
    pub fn given(&self, node: RaftId, boot: Boot) -> u64 {
        let known = self.nodes.get(&node).filter(|known| known.boot == boot);
        known.map_or(0, |known| known.given)
    }

    /// What can still be given out.
    pub fn left(&self, limit: u64) -> u64 {
        ceiling(limit).saturating_sub(self.leased)
    }

    /// Whether the version is to be replaced.
    pub fn is_due(&self, limit: u64) -> bool {
        self.short || self.left(limit) == 0
    }

    /// Gives a node what it asks for, or one of `members` equal parts of what is left, if that is less: so that each
    /// of them still gets some, in smaller and smaller leases, and in the end none. Nobody gets more at once than
    /// [`largest_among`] them.
    pub(crate) fn give(&mut self, ask: Ask, limit: u64, members: u64) {
        let before = self.given(ask.node, ask.boot);
        if before != ask.seen || ask.count == 0 {
            return;
        }
        let asked = ask.count.min(largest_among(limit, members));
        let given = asked.min(self.left(limit) / members.max(1));
        self.short |= given < asked;
        if given == 0 {
            return;
        }
        self.leased = self.leased.saturating_add(given);
        let lease = NodeLease {
            boot: ask.boot,
            given: before.saturating_add(given),
        };
        self.nodes.insert(ask.node, lease);
    }
}

impl Row for VersionLease {
    const KIND: RowKind = RowKind::Lease;
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Boot = Boot([1; 16]);
    const LATER: Boot = Boot([2; 16]);

    fn ask(node: RaftId, boot: Boot, seen: u64, count: u64) -> Ask {
        Ask {
            node,
            boot,
            seen,
            count,
        }
    }

    #[test]
    fn a_tenth_of_the_limit_is_never_given_out_and_a_small_limit_has_small_leases() {
        assert_eq!(ceiling(MAX_INVOCATIONS), 3_865_470_566);
        assert_eq!(
            ceiling(u64::MAX),
            ceiling(MAX_INVOCATIONS),
            "no policy goes beyond it"
        );
        assert_eq!(
            (smallest(MAX_INVOCATIONS), largest(MAX_INVOCATIONS)),
            (1 << 16, 1 << 28)
        );
        assert_eq!((ceiling(2000), smallest(2000), largest(2000)), (1800, 31, 125));
        assert_eq!((ceiling(0), smallest(0), largest(0)), (0, 1, 1));
        let among = |members| largest_among(2000, members);
        assert_eq!([0, 1, 3, 4, 9, 1000].map(among), [125, 125, 125, 112, 50, 1]);
    }

    #[test]
    fn the_first_leases_of_many_members_make_no_version_due() {
        for members in [1, 3, 4, 9, 30, 100] {
            let mut lease = VersionLease::begin(0);
            for node in 1..=members {
                lease.give(ask(node, BOOT, 0, u64::MAX), 2000, members);
                assert!(lease.given(node, BOOT) > 0, "{node} of {members}");
            }
            assert!(!lease.is_due(2000), "{members}: {lease:?}");
            assert!(
                lease.leased <= 1 + ceiling(2000) / 4,
                "{members}: {}",
                lease.leased
            );
            // What is asked for beyond that still ends in one that is due.
            let mut rounds = 0;
            while !lease.is_due(2000) {
                let node = 1 + rounds % members;
                lease.give(ask(node, BOOT, lease.given(node, BOOT), u64::MAX), 2000, members);
                rounds += 1;
                assert!(rounds < 4000, "{members}: {}", lease.leased);
            }
        }
    }

    #[test]
    fn what_a_run_was_given_adds_up_and_another_run_begins_with_nothing() {
        let mut lease = VersionLease::begin(10);
        assert_eq!(lease.leased, 11, "the check record is one");
        lease.give(ask(1, BOOT, 0, 100), 2000, 3);
        lease.give(ask(1, BOOT, 100, 50), 2000, 3);
        assert_eq!((lease.given(1, BOOT), lease.leased), (150, 161));
        lease.give(ask(1, LATER, 0, 20), 2000, 3);
        assert_eq!((lease.given(1, BOOT), lease.given(1, LATER)), (0, 20));
        assert_eq!(lease.leased, 181, "what the run before had counts as used");
        // A request of that run that was under way until now takes nothing from the books either.
        lease.give(ask(1, BOOT, 150, 20), 2000, 3);
        assert_eq!((lease.given(1, LATER), lease.leased), (20, 181));
    }

    #[test]
    fn a_repeat_is_given_nothing() {
        let mut lease = VersionLease::begin(0);
        lease.give(ask(1, BOOT, 0, 100), 2000, 1);
        let after = lease.clone();
        for (seen, count) in [(0, 100), (99, 1), (101, 1), (100, 0)] {
            lease.give(ask(1, BOOT, seen, count), 2000, 1);
            assert_eq!(lease, after, "{seen} {count}");
        }
    }

    #[test]
    fn when_little_is_left_leases_shrink_and_end_and_the_version_is_due_from_the_first_of_them() {
        let mut lease = VersionLease::begin(0);
        let (mut given, mut rounds) = (Vec::new(), 0);
        while lease.left(2000) >= 3 {
            let node = rounds % 3;
            let seen = lease.given(node, BOOT);
            let (was_due, before) = (lease.is_due(2000), lease.leased);
            lease.give(ask(node, BOOT, seen, u64::MAX), 2000, 3);
            given.push(lease.leased - before);
            assert!(!was_due || lease.is_due(2000), "it does not go back");
            rounds += 1;
        }
        assert!(given.windows(2).all(|pair| pair[1] <= pair[0]), "{given:?}");
        assert_eq!(given[0], 125);
        let whole = given.iter().filter(|given| **given == 125).count();
        assert_eq!(whole, 12, "1799 in leases of 125, while three more fit");
        assert!(lease.is_due(2000) && lease.leased <= 1800);
        let spent = lease.clone();
        lease.give(ask(1, BOOT, lease.given(1, BOOT), 1), 2000, 3);
        assert_eq!(lease, spent);
    }

    #[test]
    fn a_version_that_was_used_up_before_there_were_leases_is_due_at_once() {
        let mut lease = VersionLease::begin(u64::MAX);
        assert!(lease.is_due(MAX_INVOCATIONS));
        lease.give(ask(1, BOOT, 0, 1), MAX_INVOCATIONS, 1);
        assert_eq!(lease.given(1, BOOT), 0);
        assert!(lease.short);
    }
}
