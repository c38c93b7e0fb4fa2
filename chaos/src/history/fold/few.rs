//! Lists that stay short however much goes wrong in a run: what is beyond them is counted.

/// Of a kind of trouble, as many are told one by one.
const FEW: usize = 100;
/// Of what a fault may explain, as many are held against the faults one by one.
const MOMENTS: usize = 4096;

/// The first of many.
#[derive(Debug, Clone)]
pub struct Few<T> {
    /// Those.
    pub first: Vec<T>,
    /// How many there are in all.
    pub total: u64,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self {
            first: Vec::new(),
            total: 0,
        }
    }
}

impl<T> Few<T> {
    pub(crate) fn push(&mut self, one: T) {
        self.total += 1;
        if self.first.len() < FEW {
            self.first.push(one);
        }
    }
}

/// Something that is wrong unless somebody has broken that node then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// When, in nanoseconds since the run began.
    pub at: u64,
    /// Which node.
    pub node: u32,
    /// What is wrong.
    pub text: String,
}

/// Moments, as many as can be judged one by one.
#[derive(Debug, Clone, Default)]
pub struct Moments {
    /// Those.
    pub kept: Vec<Moment>,
    /// How many there were besides.
    pub more: u64,
}

impl Moments {
    pub(crate) fn push(&mut self, moment: Moment) {
        if self.kept.len() < MOMENTS {
            self.kept.push(moment);
        } else {
            self.more += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_a_list_is_counted() {
        let (mut few, mut moments) = (Few::default(), Moments::default());
        for at in 0..5000 {
            few.push(at);
            let text = String::new();
            moments.push(Moment { at, node: 1, text });
        }
        assert_eq!((few.first.len(), few.total), (FEW, 5000));
        assert_eq!(
            (moments.kept.len(), moments.more),
            (MOMENTS, 5000 - MOMENTS as u64)
        );
    }
}
