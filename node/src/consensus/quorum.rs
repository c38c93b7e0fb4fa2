//! Whether a cluster goes on without a voter: in numbers, so that whoever is refused sees why.

use std::collections::BTreeSet;
use std::fmt;

use raft_store::names::RaftId;

/// How many of so many voters have to agree.
#[must_use]
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// Why a voter cannot go: there would be no quorum for the change, or none after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtRisk {
    /// Who votes now.
    pub voters: usize,
    /// How many of them answer and keep up, the leader and the one that is to go included.
    pub heard: usize,
    /// Who would vote afterwards.
    pub left: usize,
    /// How many of those answer and keep up.
    pub left_heard: usize,
}

impl fmt::Display for AtRisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (needed, needed_left) = (majority(self.voters), majority(self.left));
        let Self {
            voters,
            heard,
            left,
            left_heard,
        } = self;
        if left_heard < &needed_left {
            return write!(
                f,
                "of {left} voters that would be left {left_heard} answer and are up to date, and {needed_left} are a \
                 majority ({heard} of the {voters} voters of now are)"
            );
        }
        write!(
            f,
            "{heard} of {voters} voters answer and are up to date, and {needed} have to agree to the change ({left_heard} \
             of the {left} that would be left are)"
        )
    }
}

/// Judges a change in which `leaving` stops voting and `joining`, if there is one, begins to. Raft needs a majority of the
/// voters before it and one of those after it (Ongaro 2014, section 4.3), and the cluster the second one from then on.
///
/// # Errors
/// The numbers.
pub fn without(
    voters: &BTreeSet<RaftId>,
    heard: &BTreeSet<RaftId>,
    leaving: RaftId,
    joining: Option<RaftId>,
) -> Result<(), AtRisk> {
    let mut left = voters.clone();
    left.remove(&leaving);
    left.extend(joining);
    let (agree, go_on) = (
        voters.intersection(heard).count(),
        left.intersection(heard).count(),
    );
    if !left.is_empty() && agree >= majority(voters.len()) && go_on >= majority(left.len()) {
        return Ok(());
    }
    Err(AtRisk {
        voters: voters.len(),
        heard: agree,
        left: left.len(),
        left_heard: go_on,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ids(ids: impl IntoIterator<Item = RaftId>) -> BTreeSet<RaftId> {
        ids.into_iter().collect()
    }

    /// Whether node `leaving` of `1..=voters` may go while these are dead.
    fn may_go(voters: RaftId, dead: &[RaftId], leaving: RaftId) -> bool {
        let all = ids(1..=voters);
        let heard = all.difference(&ids(dead.iter().copied())).copied().collect();
        without(&all, &heard, leaving, None).is_ok()
    }

    #[test]
    fn a_voter_goes_if_the_others_are_a_quorum_before_and_after() {
        assert!(may_go(3, &[], 3));
        assert!(may_go(3, &[3], 3), "a dead one is what removal is for");
        assert!(!may_go(3, &[3], 2), "of the two that are left one is dead");
        assert!(may_go(5, &[5], 4));
        assert!(may_go(5, &[4, 5], 5));
        assert!(may_go(5, &[5], 5));
        assert!(!may_go(5, &[4, 5], 3), "2 of 4");
        assert!(may_go(2, &[], 2));
        assert!(!may_go(2, &[2], 2), "nobody agrees to the change");
        assert!(!may_go(1, &[], 1), "nobody is left");
        // The one that leaves is needed for the change, and is there.
        assert!(may_go(4, &[4], 4));
        assert!(may_go(4, &[4], 3));
        assert!(!may_go(4, &[3, 4], 3));
    }

    #[test]
    fn a_replaced_voter_is_made_up_for_by_its_successor() {
        let (voters, heard) = (ids([1, 2, 3]), ids([1, 2, 9]));
        assert!(without(&voters, &heard, 3, Some(9)).is_ok());
        assert!(
            without(&voters, &heard, 2, Some(9)).is_ok(),
            "1 and 9 of 1, 3 and 9"
        );
        assert!(without(&voters, &ids([1, 2]), 2, Some(9)).is_err());
        assert!(without(&ids([1]), &ids([1, 9]), 1, Some(9)).is_ok());
    }

    #[test]
    fn a_refusal_says_the_numbers() {
        let why = without(&ids([1, 2, 3]), &ids([1, 2]), 2, None).unwrap_err();
        let text = why.to_string();
        assert!(
            text.starts_with(
                "of 2 voters that would be left 1 answer and are up to date, and 2 are a majority"
            ),
            "{text}"
        );
        let text = without(&ids([1, 2]), &ids([1]), 2, None).unwrap_err().to_string();
        assert!(
            text.starts_with("1 of 2 voters answer and are up to date, and 2 have to agree"),
            "{text}"
        );
    }
}
