//! Locks of data that is valid between any two statements, so that a panic elsewhere is no reason to stop.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock, whatever became of who had it before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
