//! Who holds how much of what all principals share. Nobody gets more than a part of it, so that one that asks
//! for everything starves nobody. Whoever holds nothing is forgotten: what is remembered is bounded by what
//! there is to hold.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::identity::Principal;

/// Who shares an allowance: [`Principal::account`].
#[derive(Clone)]
pub(super) struct Account(Principal);

impl Account {
    pub(super) fn of(principal: &Principal) -> Self {
        Self(principal.clone())
    }

    fn name(&self) -> (&str, Option<&str>, &str) {
        self.0.account()
    }
}

impl PartialEq for Account {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Account {}

impl Hash for Account {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

/// Why there is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// All of it is taken.
    Everybody,
    /// The principal holds as much as one may.
    Principal,
}

/// Something that principals share, in units of any kind.
pub(super) struct Shares {
    total: usize,
    /// The most that one principal may hold.
    most: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    sum: usize,
    by: HashMap<Account, usize>,
}

impl Shares {
    pub(super) fn new(total: usize, most: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            most,
            held: Mutex::default(),
        })
    }

    /// A share of a principal with nothing in it yet.
    pub(super) fn open(self: &Arc<Self>, principal: &Principal) -> Share {
        Share {
            of: Arc::clone(self),
            account: Account::of(principal),
            amount: 0,
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one holder has taken. Given back when dropped.
pub(super) struct Share {
    of: Arc<Shares>,
    account: Account,
    amount: usize,
}

impl Share {
    /// Takes more.
    pub(super) fn take(&mut self, more: usize) -> Result<(), Full> {
        if more == 0 {
            return Ok(());
        }
        let mut held = self.of.held();
        let own = held.by.get(&self.account).copied().unwrap_or(0);
        let (own, sum) = (own.saturating_add(more), held.sum.saturating_add(more));
        if own > self.of.most {
            return Err(Full::Principal);
        }
        if sum > self.of.total {
            return Err(Full::Everybody);
        }
        held.sum = sum;
        held.by.insert(self.account.clone(), own);
        self.amount += more;
        Ok(())
    }

    /// Takes more than anybody's part, of what would be left unused otherwise.
    pub(super) fn take_beyond(&mut self, more: usize) {
        let mut held = self.of.held();
        held.sum = held.sum.saturating_add(more);
        let own = held.by.entry(self.account.clone()).or_default();
        *own = own.saturating_add(more);
        self.amount += more;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.amount == 0 {
            return;
        }
        let mut held = self.of.held();
        held.sum = held.sum.saturating_sub(self.amount);
        let left = held
            .by
            .get(&self.account)
            .map_or(0, |own| own.saturating_sub(self.amount));
        if left == 0 {
            held.by.remove(&self.account);
        } else {
            held.by.insert(self.account.clone(), left);
        }
    }
}

#[cfg(test)]
impl Shares {
    /// What all hold together, and how many principals that is.
    pub(super) fn taken(&self) -> (usize, usize) {
        let held = self.held();
        (held.sum, held.by.len())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::http::tests::fake::principal;
    use crate::identity::Identity;

    fn take(shares: &Arc<Shares>, principal: &Principal, amount: usize) -> Result<Share, Full> {
        let mut share = shares.open(principal);
        share.take(amount).map(|()| share)
    }

    #[test]
    fn a_principal_that_has_its_part_leaves_the_others_theirs() {
        let shares = Shares::new(10, 4);
        let (a, b) = (principal("a", None), principal("b", None));
        let _first = take(&shares, &a, 3).unwrap();
        let _second = take(&shares, &a, 1).unwrap();
        assert_eq!(take(&shares, &a, 1).err(), Some(Full::Principal));
        assert!(take(&shares, &b, 4).is_ok());
    }

    #[test]
    fn there_is_no_more_than_there_is() {
        let shares = Shares::new(5, 4);
        let _a = take(&shares, &principal("a", None), 4).unwrap();
        let b = principal("b", None);
        assert_eq!(take(&shares, &b, 2).err(), Some(Full::Everybody));
        assert!(take(&shares, &b, 1).is_ok());
        assert_eq!(
            take(&shares, &b, usize::MAX).err(),
            Some(Full::Principal),
            "the sum went round"
        );
    }

    #[test]
    fn what_was_taken_bit_by_bit_comes_back_at_once() {
        let shares = Shares::new(10, 10);
        let mut share = shares.open(&principal("a", None));
        for _ in 0..5 {
            share.take(2).unwrap();
        }
        assert_eq!(share.take(1), Err(Full::Principal));
        assert_eq!(shares.taken(), (10, 1));
        drop(share);
        assert_eq!(shares.taken(), (0, 0));
    }

    #[test]
    fn what_was_taken_beyond_a_part_counts_and_comes_back() {
        let shares = Shares::new(10, 2);
        let a = principal("a", None);
        let mut beyond = take(&shares, &a, 2).unwrap();
        beyond.take_beyond(3);
        assert_eq!(shares.taken(), (5, 1));
        assert_eq!(take(&shares, &a, 1).err(), Some(Full::Principal));
        drop(beyond);
        assert_eq!(shares.taken(), (0, 0));
    }

    #[test]
    fn whoever_holds_nothing_is_forgotten() {
        let shares = Shares::new(10, 4);
        for n in 0..100 {
            let principal = principal(&n.to_string(), None);
            drop(take(&shares, &principal, 4).unwrap());
            let mut empty = shares.open(&principal);
            empty.take(0).unwrap();
        }
        assert_eq!(shares.taken(), (0, 0));
    }

    #[test]
    fn a_renewed_certificate_is_the_same_account_and_another_issuers_is_not() {
        let old = principal("a", Some("Trading"));
        let other = |change: fn(&mut Identity)| {
            let mut identity = (*old).clone();
            change(&mut identity);
            Account::of(&Principal::new(identity))
        };
        let own = Account::of(&old);
        assert!(own == other(|identity| identity.fingerprint = [9; 32]));
        assert!(own != other(|identity| identity.issuer_dn = "CN=Other".to_owned()));
        assert!(own != other(|identity| identity.ou = None));
        assert!(own != other(|identity| identity.cn = "b".to_owned()));
    }
}
