//! Idle connections to peers, by address. Lazily filled and bounded; a connection is taken out for a call
//! and put back only if the call ended well.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use raft_store::names::RaftId;

use super::connection::{CallFailure, Connection};
use super::shared::Shared;
use super::wire::{Request, Response};

/// Idle connections kept per peer.
const IDLE: usize = 4;

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    idle: Mutex<BTreeMap<(RaftId, String), Vec<Connection>>>,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(RaftId, String), Vec<Connection>>> {
        self.idle
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take(&self, target: RaftId, address: &str) -> Option<Connection> {
        self.lock().get_mut(&(target, address.to_string()))?.pop()
    }

    fn put(&self, target: RaftId, address: &str, connection: Connection) {
        let mut idle = self.lock();
        let kept = idle.entry((target, address.to_string())).or_default();
        if kept.len() < IDLE {
            kept.push(connection);
        }
    }
}

impl Shared {
    /// A fresh or idle connection to a member.
    pub(super) async fn connect(&self, target: RaftId, address: &str) -> Result<Connection, CallFailure> {
        if let Some(connection) = self.pool.take(target, address) {
            return Ok(connection);
        }
        self.dial(target, address).await
    }

    async fn dial(&self, target: RaftId, address: &str) -> Result<Connection, CallFailure> {
        let control = self.control.get();
        let published = self.published.load_full();
        let dialled = Connection::to_member(&self.options, address, target, &control, &published).await;
        if let Err(CallFailure::Away { reason, .. }) = &dialled {
            self.poison_if_meant(reason);
        }
        dialled
    }

    /// One request to a member. An idle connection may have been closed by the peer meanwhile, so a
    /// request that is safe to send twice is sent once more on a fresh one.
    pub(super) async fn call(
        &self,
        target: RaftId,
        address: &str,
        request: &Request,
        within: Duration,
    ) -> Result<Response, CallFailure> {
        if let Some(mut idle) = self.pool.take(target, address)
            && let Ok(answer) = idle.call(request, within).await
        {
            self.pool.put(target, address, idle);
            return Ok(answer);
        }
        let mut fresh = self.dial(target, address).await?;
        let answer = fresh.call(request, within).await?;
        self.pool.put(target, address, fresh);
        Ok(answer)
    }
}
