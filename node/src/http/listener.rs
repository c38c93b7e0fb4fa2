//! The API's accept loop: bounded connections, of which each gets the newest certificates. Its address is taken before
//! anybody is let in, and at its end nobody whom the kernel has let in is sent away, unless every place is taken.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

use super::brief::BriefPlace;
use super::connection::{Common, Connection};
use super::data_plane::DataPlane;
use super::drain::{DrainSignal, Phase};
use super::places::{Counted, OpenConnections};
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

/// Connections that wait in the kernel until they are accepted; it allows no more than `net.core.somaxconn`.
const BACKLOG: u32 = 1024;
/// At its end a listener lets in whoever was about to be let in, for this long: until the last of three packets of a
/// client that is not on the other side of the earth is here.
const LAST_TO_ARRIVE: Duration = Duration::from_millis(200);

/// An address that is this process's. Connections to it are refused until it is opened.
#[derive(Debug)]
pub struct Reserved {
    key: &'static str,
    address: SocketAddr,
    socket: TcpSocket,
}

impl Reserved {
    /// Takes an address that `key` has set.
    ///
    /// # Errors
    /// [`ListenError`], with the key.
    pub fn new(key: &'static str, address: SocketAddr) -> Result<Self, ListenError> {
        let taken = match bound(address, false) {
            // Connections of the process before this one may still be ending.
            Err(reason) if reason.kind() == std::io::ErrorKind::AddrInUse => bound(address, true),
            taken => taken,
        };
        let socket = taken.map_err(|reason| ListenError::of(key, address, reason))?;
        Ok(Self { key, address, socket })
    }

    /// With the port that the kernel has chosen.
    #[cfg(test)]
    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap_or(self.address)
    }

    /// From now on whoever connects is let in. Only within a runtime of tokio.
    ///
    /// # Errors
    /// [`ListenError`], with the key.
    pub fn open(self) -> Result<TcpListener, ListenError> {
        let Self { key, address, socket } = self;
        // Connections inherit it, and keep the address from nobody when they are ending.
        let reusable = socket.set_reuseaddr(true);
        reusable
            .and_then(|()| socket.listen(BACKLOG))
            .map_err(|reason| ListenError::of(key, address, reason))
    }
}

/// A socket at an address that nobody else is given while it does not listen: Linux lets two share one if both say
/// `SO_REUSEADDR` and none of them listens.
fn bound(address: SocketAddr, beside_old_connections: bool) -> std::io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(beside_old_connections)?;
    socket.bind(address)?;
    socket.set_reuseaddr(false)?;
    Ok(socket)
}

/// Binds an address that `key` has set, and opens it.
///
/// # Errors
/// [`ListenError`], with the key.
#[cfg(test)]
pub(crate) fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    Reserved::new(key, address)?.open()
}

/// Has the kernel pass over every packet that asks for a connection. Its sender repeats it after a second, and is told
/// then that nobody listens here. A listener that is simply closed resets whoever is connected and not accepted yet,
/// and balancers that saw a connection come up do not try another node.
fn let_in_nobody_new(socket: &TcpListener) -> std::io::Result<()> {
    // Instructions of the kernel's classic packet filter (linux/bpf_common.h); it begins at the TCP header, whose flags are
    // byte 13, and of these SYN is bit 1 (RFC 9293 section 3.1).
    const LOAD_BYTE: u16 = 0x30;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    SockRef::from(socket).attach_filter(&[
        SockFilter::new(LOAD_BYTE, 0, 0, 13),
        SockFilter::new(AND, 0, 0, 0b10),
        SockFilter::new(JUMP_IF_EQUAL, 1, 0, 0),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ])
}

/// What the accept loop needs.
pub struct ApiListener {
    /// Made by [`Reserved::open`].
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
    /// Accepts until connections are being closed. `_listening` is from before the address was opened: the shutdown waits
    /// for the last who is let in.
    pub async fn serve(self, _listening: Counted) {
        let common = self.common();
        let mut closing = self.drain.clone();
        loop {
            tokio::select! {
                () = closing.reached(Phase::Closing) => break,
                accepted = self.accept() => self.let_in(&common, accepted),
            }
        }
        self.let_in_the_last(&common, let_in_nobody_new(&self.socket))
            .await;
    }

    /// Those who were on their way when nobody new was to be let in, whatever came of that.
    pub(super) async fn let_in_the_last(&self, common: &Arc<Common>, nobody_new: std::io::Result<()>) {
        if let Err(error) = nobody_new {
            tracing::warn!(%error, "who connects at this moment may be reset");
        }
        let mut last = std::pin::pin!(sleep(LAST_TO_ARRIVE));
        loop {
            tokio::select! {
                // First: nobody who is here already is left to the kernel.
                biased;
                accepted = self.accept() => self.let_in(common, accepted),
                () = last.as_mut() => break,
            }
        }
    }

    pub(super) fn common(&self) -> Arc<Common> {
        Arc::new(Common::new(
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
        ))
    }

    fn let_in(&self, common: &Arc<Common>, accepted: Option<(TcpStream, SocketAddr, BriefPlace)>) {
        let Some((stream, peer, handshake)) = accepted else {
            return;
        };
        let counted = self.open.enter();
        metrics::connections(self.open.count());
        let connection = Connection {
            common: Arc::clone(common),
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
