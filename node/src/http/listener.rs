//! The API's accept loop: TLS handshakes with a time-out, one identity per connection, bounded
//! connections, and an end for each of them: idle, certificate's end, or shutdown.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower::Service;

use super::PeerAddr;
use super::drain::{DrainSignal, Phase};
use crate::config::{Http2, Limits};
use crate::identity::Principal;
use crate::metrics;
use crate::tls::ApiTls;

/// A handshake takes a few milliseconds; whoever needs this long holds a place for nothing.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Requests in flight when a certificate ends get this long.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Between two looks at the wall clock, which may be set meanwhile.
const CLOCK_STEP: Duration = Duration::from_secs(60);
/// Largest head of an HTTP/1 request, and largest header list of HTTP/2.
const MAX_HEAD: usize = 32 * 1024;
const MAX_HEADERS: usize = 64;
/// Fixed windows: a stream gets a whole small request, a connection a few of them.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const KEEP_ALIVE: Duration = Duration::from_secs(30);

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

/// Binds an address that `key` has set.
///
/// # Errors
/// [`ListenError`], with the key.
pub async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|reason| match reason.kind() {
            std::io::ErrorKind::AddrInUse => ListenError::InUse { key, address },
            _ => ListenError::Refused { key, address, reason },
        })
}

/// Counts connections by the places they take.
#[derive(Clone)]
pub struct OpenConnections {
    places: Arc<Semaphore>,
    // Not what the semaphore says: one place is always held by the accept loop that waits.
    open: Arc<AtomicUsize>,
}

/// Counts one connection until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl OpenConnections {
    /// With room for `max`.
    #[must_use]
    pub fn new(max: usize) -> Self {
        let max = max.min(Semaphore::MAX_PERMITS);
        Self {
            places: Arc::new(Semaphore::new(max)),
            open: Arc::default(),
        }
    }

    /// How many are open.
    #[must_use]
    pub fn count(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Counted {
        self.open.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(&self.open))
    }

    /// Waits until none is left. Looks now and then: this is the last thing a process does.
    pub async fn none_left(&self) {
        while self.count() > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What the accept loop needs.
pub struct ApiListener {
    /// Bound by [`bind`].
    pub socket: TcpListener,
    /// Certificates; each handshake takes the newest.
    pub tls: Arc<ArcSwap<ApiTls>>,
    /// Made by [`super::router`].
    pub router: Router,
    /// Streams and idle time.
    pub http2: Http2,
    /// Shutdown.
    pub drain: DrainSignal,
    /// Made with [`Limits::max_connections`]; the shutdown watches it.
    pub open: OpenConnections,
}

impl ApiListener {
    /// Room for as many connections as configured.
    #[must_use]
    pub fn room(limits: &Limits) -> OpenConnections {
        OpenConnections::new(limits.max_connections)
    }

    /// Accepts until the shutdown's last phase.
    pub async fn serve(mut self) {
        let builder = Arc::new(connections(&self.http2));
        let mut stopped = self.drain.clone();
        loop {
            let accepted = tokio::select! {
                () = stopped.reached(Phase::Stopped) => return,
                accepted = self.accept() => accepted,
            };
            let Some((stream, peer, place)) = accepted else {
                continue;
            };
            let counted = self.open.enter();
            metrics::connections(self.open.count());
            let connection = Connection {
                peer,
                tls: self.tls.load_full(),
                router: self.router.clone(),
                drain: self.drain.clone(),
                builder: Arc::clone(&builder),
            };
            let open = self.open.clone();
            tokio::spawn(async move {
                connection.run(stream).await;
                drop((place, counted));
                metrics::connections(open.count());
            });
        }
    }

    /// A place first, then a connection: beyond the limit clients wait in the kernel.
    async fn accept(&mut self) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let place = Arc::clone(&self.open.places).acquire_owned().await.ok()?;
        match self.socket.accept().await {
            Ok((stream, peer)) => Some((stream, peer, place)),
            Err(error) => {
                // Out of descriptors, most likely: let some connections end first.
                tracing::warn!(%error, "a connection could not be accepted");
                drop(place);
                sleep(Duration::from_millis(100)).await;
                None
            }
        }
    }
}

fn connections(http2: &Http2) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(http2.idle_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(http2.max_concurrent_streams)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(KEEP_ALIVE);
    builder
}

struct Connection {
    peer: SocketAddr,
    tls: Arc<ApiTls>,
    router: Router,
    drain: DrainSignal,
    builder: Arc<auto::Builder<TokioExecutor>>,
}

impl Connection {
    async fn run(mut self, stream: TcpStream) {
        let peer = self.peer;
        // Answers are small and must not wait for a full packet.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "TCP_NODELAY could not be set");
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls.server));
        let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                metrics::handshake_failure();
                tracing::debug!(%peer, %error, "TLS handshake failed");
                return;
            }
            Err(_) => {
                metrics::handshake_failure();
                tracing::debug!(%peer, "TLS handshake took too long");
                return;
            }
        };
        let session = stream.get_ref().1;
        let is_http2 = session.alpn_protocol() == Some(&b"h2"[..]);
        let chain = session.peer_certificates().unwrap_or_default();
        let principal = match self.tls.principal(chain) {
            Ok(principal) => principal,
            Err(error) => {
                metrics::handshake_failure();
                tracing::info!(%peer, %error, "client certificate refused");
                return;
            }
        };
        let not_after = principal.not_after;
        let router = self.router.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            answer(router.clone(), request, principal.clone(), peer)
        });
        let builder = Arc::clone(&self.builder);
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut closing = self.drain.clone();
        let ended = tokio::select! {
            result = connection.as_mut() => Some(result),
            () = certificate_end(not_after) => {
                tracing::info!(%peer, "connection closed: the client's certificate has ended");
                connection.as_mut().graceful_shutdown();
                timeout(LAST_WORDS, connection.as_mut()).await.ok()
            }
            // HTTP/2 is told at once (GOAWAY) and finishes what has begun. An idle HTTP/1
            // connection must not be closed: the next request may be on its way. Its answer
            // will say `Connection: close`.
            () = closing.reached(Phase::Closing) => {
                if is_http2 {
                    connection.as_mut().graceful_shutdown();
                }
                tokio::select! {
                    result = connection.as_mut() => Some(result),
                    () = self.drain.reached(Phase::Stopped) => None,
                }
            }
        };
        if let Some(Err(error)) = ended {
            tracing::debug!(%peer, %error, "connection ended");
        }
    }
}

async fn answer(
    mut router: Router,
    mut request: Request<Incoming>,
    principal: Principal,
    peer: SocketAddr,
) -> Result<Response<Body>, Infallible> {
    request.extensions_mut().insert(principal);
    request.extensions_mut().insert(PeerAddr(peer));
    // A router is always ready.
    router.call(request).await
}

/// Ends when the wall clock reaches a certificate's end.
async fn certificate_end(not_after: i64) {
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let end = Duration::from_secs(u64::try_from(not_after).unwrap_or(0));
        match end.checked_sub(now) {
            Some(left) if !left.is_zero() => sleep(left.min(CLOCK_STEP)).await,
            _ => return,
        }
    }
}
