//! The way of a key version to its end, on the leader: time passes for the wait before a destruction, and when it is
//! over the destruction begins. What follows, every node does for itself (`sync`). Only time that a leader has seen
//! pass by its monotonic clock counts, and only while a quorum backed it: nobody could have undone it otherwise.

pub mod decide;
pub mod driver;
pub mod waits;

pub use driver::drive;
