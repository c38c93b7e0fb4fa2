//! Durable storage of log, vote and replicated state.
//!
//! sled keeps the rows; a small control file beside it makes lost writes visible; snapshots are plain
//! files. Nothing is acknowledged before it is on disk, and a store that lost anything does not open.
//!
//! ```text
//! <data>/lock            exclusive lock of the directory
//! <data>/control         identity, vote, last durable log id (see `control`); `control.new` while being made
//! <data>/sled/db …       tree `log`: entries, vote, purged; trees `state-N`: rows; tree `meta`: the pointer, which
//!                        names the state tree in force
//! <data>/sled.new/       sled while it is written anew; `sled.old` the one before, until it is removed (see `swap`)
//! <data>/snapshots/      complete snapshots, `.partial` while being written
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

mod compact;
mod control;
mod error;
mod frame;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod handle;
mod log;
mod machine;
mod open;
mod recover;
mod recover_quorum;
mod rows;
#[cfg(feature = "simulation")]
mod simulated;
mod sled_watch;
mod snapshot;
mod swap;
mod writer;

pub use compact::Compacted;
pub use control::{Control, Poison};
pub use error::{OpenError, StoreFailure};
pub use handle::ControlHandle;
pub use log::LogStore;
pub use machine::{Published, StateMachine};
pub use open::{Opened, Store, StoreOptions};
pub use recover_quorum::{Outlook, RecoverError, Recovered};
pub use rows::BarrierHook;
#[cfg(feature = "simulation")]
pub use simulated::{Lie, SimulatedDisk};
pub use sled_watch::{LogHookTaken, install_log_hook, install_panic_hook};
pub use snapshot::SnapshotReceiver;

/// Figures of a running store, for metrics. Asks the file system, of which it takes microseconds.
#[derive(Debug, Clone, Default)]
pub struct StoreFigures {
    /// Bytes of the sled files.
    pub sled_bytes: u64,
    /// Bytes of the rows in them that there are: several times less than `sled_bytes`, because sled cleans up late.
    pub live_bytes: u64,
    /// Durability barriers passed since the start.
    pub barriers: u64,
    /// Bytes free on the data directory's file system.
    pub free_bytes: u64,
    /// Whether free space is below the reserve (256 MiB or 5 %), or unknown.
    pub below_reserve: bool,
    /// Whether it is below a quarter of the reserve (64 MiB), or unknown.
    pub below_last: bool,
}

/// Takes a mutex whose data is valid between any two statements, so that a panic elsewhere is no reason to stop.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
