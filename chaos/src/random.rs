//! A small generator whose whole sequence follows from a seed (xorshift64*), so that a schedule can be
//! repeated. Never for secrets.

/// See the module.
pub(crate) struct Random(u64);

impl Random {
    /// From a seed; zero would stand still, so it is moved.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}
