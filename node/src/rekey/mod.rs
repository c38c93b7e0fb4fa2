//! Transport keys and the replication key are replaced in two phases. An administrator asks; from then on the leader
//! takes one step after the other, each decided from the state alone, so that a new leader goes on wherever the old one
//! died. What nodes do in their own tokens, token sync does (`sync`).
//!
//! ```text
//!  transport key:    asked for ─> made and offered ─> every member holds it ─> current ─> every context is rotated
//!                                                    old one: superseded ─> no version needs it ─> destroyed everywhere
//!  replication key:  every node holds both ─> asked for ─> records are sealed anew ─> the former is retired
//! ```

pub mod decide;
pub mod driver;
pub mod holding;
pub mod reseal;

pub use driver::Driver;
