//! From which index on every state has which version of a context: whoever answers from a state of that index may not encrypt
//! under an older one. An hour has a thousand versions and a hundred thousand ciphertexts, so that only those are kept that
//! say more than the ones before them.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

/// Acknowledged versions of a context by the index of the acknowledgement: each is higher than all before it.
#[derive(Debug, Default)]
pub(super) struct Floors(BTreeMap<u64, u32>);

impl Floors {
    /// Every state of this index has this version.
    pub(super) fn push(&mut self, index: u64, version: u32) {
        if self.at(index).is_some_and(|(_, known)| known >= version) {
            return;
        }
        let later = self.0.range((Excluded(index), Unbounded));
        let covered: Vec<u64> = later
            .take_while(|(_, later)| **later <= version)
            .map(|(at, _)| *at)
            .collect();
        for at in covered {
            self.0.remove(&at);
        }
        self.0.insert(index, version);
    }

    /// The highest version that a state of an index has for certain, and since which index.
    pub(super) fn at(&self, index: u64) -> Option<(u64, u32)> {
        let known = self.0.range(..=index).next_back();
        known.map(|(at, version)| (*at, *version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn the_highest_of_all_up_to_an_index_is_found_in_whatever_order_they_come() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let (mut floors, mut all) = (Floors::default(), Vec::new());
            for _ in 0..12 {
                let version = u32::try_from(random.below(8)).unwrap_or_default();
                let index = random.below(20);
                floors.push(index, version);
                all.push((index, version));
                for index in 0..21 {
                    let known = all.iter().filter(|(at, _)| *at <= index);
                    let highest = known.map(|(_, version)| *version).max();
                    let floor = floors.at(index).map(|(_, version)| version);
                    assert_eq!(floor, highest, "seed {seed}: {all:?} at {index}");
                }
            }
        }
    }

    #[test]
    fn what_says_no_more_is_not_kept() {
        let mut floors = Floors::default();
        for (index, version) in [(10, 2), (12, 2), (30, 3), (20, 4), (30, 4), (5, 1)] {
            floors.push(index, version);
        }
        assert_eq!(floors.0, BTreeMap::from([(5, 1), (10, 2), (20, 4)]));
    }
}
