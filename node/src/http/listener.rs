//! The API's accept loop: bounded connections, of which each gets the newest certificates.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

use super::brief::BriefPlace;
use super::connection::{Common, Connection};
use super::data_plane::DataPlane;
use super::drain::{DrainSignal, Phase};
use super::places::OpenConnections;
use super::trusted::TrustedProxies;
use crate::config::{Http2, Proxies};
use crate::metrics;
use crate::policy::Policy;
use crate::tls::ApiTls;

/// A client that takes no byte of an answer for this long is not waited for.
pub const STALLED: Duration = Duration::from_secs(30);

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else has it.
    #[error("{key}: {address}: is in use by another process; stop that one or choose another port")]
    InUse {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("{key}: {address}: {reason}; choose an address of this machine and a port this user may take")]
    Refused {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The operating system's reason.
        reason: std::io::Error,
    },
}

impl ListenError {
    /// What became of binding an address that `key` has set.
    pub fn of(key: &'static str, address: SocketAddr, reason: std::io::Error) -> Self {
        match reason.kind() {
            std::io::ErrorKind::AddrInUse => Self::InUse { key, address },
            _ => Self::Refused { key, address, reason },
        }
    }
}

/// Binds an address that `key` has set.
///
/// # Errors
/// [`ListenError`], with the key.
pub async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|reason| ListenError::of(key, address, reason))
}

/// What the accept loop needs.
pub struct ApiListener {
    /// Bound by [`bind`].
    pub socket: TcpListener,
    /// Certificates; each handshake takes the newest.
    pub tls: Arc<ArcSwap<ApiTls>>,
    /// Made by [`super::router`].
    pub router: Router,
    /// Knows who is revoked.
    pub data: Arc<dyn DataPlane>,
    /// Its policy, again whenever it changes: connections of who is revoked end.
    pub policies: watch::Receiver<Arc<Policy>>,
    /// Streams and idle time.
    pub http2: Http2,
    /// What stands in front of it.
    pub proxies: Proxies,
    /// How long an answer may wait for its reader; [`STALLED`].
    pub stalled: Duration,
    /// Shutdown.
    pub drain: DrainSignal,
    /// Made with [`crate::config::Limits::max_connections`] or less; the shutdown watches it.
    pub open: OpenConnections,
}

impl ApiListener {
    /// Accepts until only what is in hand is waited for.
    pub async fn serve(self) {
        let common = Arc::new(Common::new(
            self.router.clone(),
            Arc::clone(&self.data),
            self.policies.clone(),
            self.open.clone(),
            &self.http2,
            self.stalled,
            TrustedProxies::new(
                self.proxies.trusted.clone(),
                Arc::clone(&self.tls),
                self.policies.clone(),
                self.open.each(),
            ),
        ));
        let mut closed = self.drain.clone();
        loop {
            let accepted = tokio::select! {
                () = closed.reached(Phase::Finishing) => return,
                accepted = self.accept() => accepted,
            };
            let Some((stream, peer, handshake)) = accepted else {
                continue;
            };
            let counted = self.open.enter();
            metrics::connections(self.open.count());
            let connection = Connection {
                common: Arc::clone(&common),
                peer,
                is_balancer: self.proxies.speaks_proxy_protocol(peer.ip()),
                tls: self.tls.load_full(),
                drain: self.drain.clone(),
            };
            let open = self.open.clone();
            tokio::spawn(async move {
                connection.run(stream, handshake).await;
                drop(counted);
                metrics::connections(open.count());
            });
        }
    }

    /// A place first, then a connection: beyond the limit clients wait in the kernel.
    async fn accept(&self) -> Option<(TcpStream, SocketAddr, BriefPlace)> {
        let room = self.open.room().await?;
        match self.socket.accept().await {
            Ok((stream, peer)) => Some((stream, peer, room.begin())),
            Err(error) => {
                // Out of descriptors, most likely: let some connections end first.
                tracing::warn!(%error, "a connection could not be accepted");
                drop(room);
                sleep(Duration::from_millis(100)).await;
                None
            }
        }
    }
}
