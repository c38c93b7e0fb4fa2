//! One connection of the API: a balancer's word, handshake, identity, a place, requests, and an end: idle, not read,
//! certificate's end or revocation, or shutdown. A client that gets no place is told so over HTTP.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::{HeaderValue, Request, Response, header};
use hsm_api::ErrorCode;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::Service;

use super::PeerAddr;
use super::activity::{Activity, Ending, Outgoing, Patience};
use super::brief::BriefPlace;
use super::data_plane::DataPlane;
use super::drain::{DrainSignal, Phase};
use super::linger::{Back, Borrowed};
use super::places::{OpenConnections, Place};
use super::preface::{self, PrefaceError};
use super::problem::ApiError;
use super::respond::TurnedAway;
use super::revocation;
use super::trusted::{TrustedProxies, Via};
use crate::config::Http2;
use crate::identity::{IdentityError, Principal};
use crate::policy::Policy;
use crate::tls::ApiTls;
use crate::{log_budget, metrics};

/// A handshake takes a few milliseconds; whoever needs this long holds a place for nothing. A client that
/// waits for its place waits as long, and one that is turned away has as long to ask and to be told so.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Requests in flight when a certificate ends, or when an idle connection is closed, get this long.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Between two looks at the wall clock, which may be set meanwhile.
const CLOCK_STEP: Duration = Duration::from_secs(60);
/// Largest head of an HTTP/1 request, and largest header list of HTTP/2.
const MAX_HEAD: usize = 32 * 1024;
const MAX_HEADERS: usize = 64;
/// Fixed windows. What they let in is in memory before any budget is asked, on every connection at once.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// What all connections of the listener have in common.
pub(super) struct Common {
    http1: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
    router: Router,
    data: Arc<dyn DataPlane>,
    policies: watch::Receiver<Arc<Policy>>,
    open: OpenConnections,
    patience: Patience,
    proxies: Arc<TrustedProxies>,
}

impl Common {
    pub(super) fn new(
        router: Router,
        data: Arc<dyn DataPlane>,
        policies: watch::Receiver<Arc<Policy>>,
        open: OpenConnections,
        http2: &Http2,
        stalled: Duration,
        proxies: Arc<TrustedProxies>,
    ) -> Self {
        Self {
            http1: http1_connections(http2),
            http2: http2_connections(http2),
            router,
            data,
            policies,
            open,
            patience: Patience {
                idle: http2.idle_timeout,
                stalled,
            },
            proxies,
        }
    }
}

// Two builders of one version each: one that finds out by itself would wait for the first bytes without any limit.

fn http1_connections(http2: &Http2) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(http2.idle_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    builder
}

fn http2_connections(http2: &Http2) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
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

/// Why a connection was closed before its first request.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the connection {0}")]
    Preface(#[from] PrefaceError),
    #[error("TLS handshake failed: {0}")]
    Handshake(#[from] std::io::Error),
    #[error("no handshake within {} seconds", HANDSHAKE.as_secs())]
    TooSlow,
    #[error("too slow, while others waited")]
    Evicted,
    #[error("client certificate refused: {0}")]
    Certificate(#[from] IdentityError),
}

/// A client that has shown who it is.
struct Client {
    stream: TlsStream<Borrowed>,
    back: Back,
    sender: Sender,
}

/// Whose certificate the connection has, and whether it says for others who they are.
#[derive(Clone)]
struct Sender {
    principal: Principal,
    via: Option<Via>,
}

impl Sender {
    /// A proxy is not who asks.
    fn sign(self, request: &mut Request<Incoming>) {
        match self.via {
            Some(via) => drop(request.extensions_mut().insert(via)),
            None => drop(request.extensions_mut().insert(self.principal)),
        }
    }
}

pub(super) struct Connection {
    pub(super) common: Arc<Common>,
    /// Where it comes from; of a balancer's connection, once it has said so, where its client does.
    pub(super) peer: SocketAddr,
    /// Begins with a PROXY header.
    pub(super) is_balancer: bool,
    /// The newest certificates when it was accepted.
    pub(super) tls: Arc<ApiTls>,
    pub(super) drain: DrainSignal,
}

impl Connection {
    pub(super) async fn run(mut self, stream: TcpStream, mut handshake: BriefPlace) {
        let entered = tokio::select! {
            biased;
            () = handshake.evicted() => Err(Refused::Evicted),
            entered = timeout(HANDSHAKE, self.enter(stream)) => entered.unwrap_or(Err(Refused::TooSlow)),
        };
        let client = match entered {
            Ok(client) => client,
            Err(refused) => return self.refuse(&refused),
        };
        match self.place(&client.sender.principal, &mut handshake).await {
            Ok(place) => {
                drop(handshake);
                self.serve(client, place).await;
            }
            // In the handshake's place, and told over HTTP: a bare end of the connection would look like a change
            // whose outcome is unknown.
            Err(refusal) => tokio::select! {
                () = handshake.evicted() => {}
                _ = timeout(HANDSHAKE, self.turn_away(client, refusal)) => {}
            },
        }
    }

    async fn enter(&mut self, mut stream: TcpStream) -> Result<Client, Refused> {
        // Answers are small and must not wait for a full packet.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(peer = %self.peer, %error, "TCP_NODELAY could not be set");
        }
        self.peer = preface::source(&mut stream, self.peer, self.is_balancer).await?;
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls.server));
        let (stream, back) = Borrowed::new(stream);
        let stream = acceptor.accept(stream).await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let principal = self.tls.principal(chain)?;
        let via = self.common.proxies.via(&principal);
        let sender = Sender { principal, via };
        Ok(Client { stream, back, sender })
    }

    fn refuse(&self, refused: &Refused) {
        let peer = self.peer;
        if let Refused::Preface(error) = refused {
            metrics::proxy_protocol_refusal(error.label());
            if tracing::enabled!(tracing::Level::INFO) && log_budget::refused_address(peer.ip()) {
                tracing::info!(%peer, reason = %refused, "connection refused");
            }
            return;
        }
        metrics::handshake_failure();
        if !matches!(refused, Refused::Certificate(_)) {
            tracing::debug!(%peer, reason = %refused, "connection closed");
        } else if tracing::enabled!(tracing::Level::INFO) && log_budget::refusal(None) {
            tracing::info!(%peer, reason = %refused, "connection refused");
        }
    }

    /// A place, or what all requests of the connection are answered.
    async fn place(&self, principal: &Principal, handshake: &mut BriefPlace) -> Result<Place, ApiError> {
        let open = &self.common.open;
        self.common.data.policy().check_certificate(principal)?;
        let Ok(claim) = open.claim(principal) else {
            metrics::connection_refused();
            return Err(ApiError::new(ErrorCode::Overloaded)
                .detail("this client has as many connections open as one may have while few are left")
                .operator(format!(
                    "as many connections as one principal may have: {principal}"
                )));
        };
        // It has done its part.
        handshake.settle();
        match timeout(HANDSHAKE, claim.place()).await {
            Ok(Some(place)) => Ok(place),
            _ => Err(ApiError::new(ErrorCode::Overloaded)
                .detail("this node has as many connections open as it may have")
                .operator("server.limits.max_connections is reached")),
        }
    }

    /// Answers the first request, and whatever came with it, with a refusal; then ends.
    async fn turn_away(&self, client: Client, refusal: ApiError) {
        let Client { stream, back, sender } = client;
        self.refuse_all(stream, sender, refusal).await;
        // Whatever it is still sending must not cost it the refusal.
        back.linger().await;
    }

    async fn refuse_all(&self, stream: TlsStream<Borrowed>, sender: Sender, refusal: ApiError) {
        let (common, peer) = (&self.common, self.peer);
        let is_http2 = is_http2(&stream);
        let builder = if is_http2 { &common.http2 } else { &common.http1 };
        let told = Arc::new(Notify::new());
        let service = {
            let (router, told) = (common.router.clone(), Arc::clone(&told));
            let activity = Activity::begin();
            service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(TurnedAway(refusal.clone()));
                let answer = answer(
                    router.clone(),
                    request,
                    sender.clone(),
                    peer,
                    Arc::clone(&activity),
                );
                let told = Arc::clone(&told);
                async move {
                    let mut response = answer.await?;
                    if !is_http2 {
                        let close = HeaderValue::from_static("close");
                        response.headers_mut().insert(header::CONNECTION, close);
                    }
                    told.notify_one();
                    Ok::<_, Infallible>(response)
                }
            })
        };
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            result = connection.as_mut() => result,
            // The answer has to be on its way: before it there is nothing to go away from.
            () = told.notified() => {
                connection.as_mut().graceful_shutdown();
                connection.as_mut().await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "connection ended");
        }
    }

    async fn serve(self, client: Client, _place: Place) {
        let Client { stream, back, sender } = client;
        if self.answer_all(stream, sender).await {
            back.linger().await;
        }
    }

    /// True if the connection has ended, false if it was cut.
    async fn answer_all(mut self, stream: TlsStream<Borrowed>, sender: Sender) -> bool {
        let peer = self.peer;
        let common = Arc::clone(&self.common);
        let is_http2 = is_http2(&stream);
        let builder = if is_http2 { &common.http2 } else { &common.http1 };
        // Of a proxy's connection the proxy: one of its clients must not end it for the others.
        let who = sender.principal.clone();
        let is_shared = sender.via.is_some();
        let activity = Activity::begin();
        let service = {
            let (router, activity) = (common.router.clone(), Arc::clone(&activity));
            service_fn(move |request: Request<Incoming>| {
                answer(
                    router.clone(),
                    request,
                    sender.clone(),
                    peer,
                    Arc::clone(&activity),
                )
            })
        };
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut closing = self.drain.clone();
        let ended = tokio::select! {
            result = connection.as_mut() => Some(result),
            last_words = expulsion(&common, &who, peer) => {
                connection.as_mut().graceful_shutdown();
                timeout(last_words, connection.as_mut()).await.ok()
            }
            ending = activity.over(common.patience) => match ending {
                // HTTP/2 may have a request on its way, which is told by GOAWAY whether it was taken.
                Ending::Idle => {
                    connection.as_mut().graceful_shutdown();
                    timeout(LAST_WORDS, connection.as_mut()).await.ok()
                }
                Ending::Stalled => {
                    if tracing::enabled!(tracing::Level::INFO) && log_budget::refusal(Some(&who)) {
                        tracing::info!(%peer, client = %who, "connection closed: its answers are not read");
                    }
                    // Of a proxy's clients the others get theirs.
                    if is_shared {
                        connection.as_mut().graceful_shutdown();
                        timeout(LAST_WORDS, connection.as_mut()).await.ok()
                    } else {
                        None
                    }
                }
            },
            // HTTP/2 is told at once (GOAWAY) and finishes what has begun. An idle HTTP/1
            // connection must not be closed: the next request may be on its way. Its answer
            // will say `Connection: close`. In the end it is closed all the same, and a request in hand is not.
            () = closing.reached(Phase::Closing) => {
                if is_http2 {
                    connection.as_mut().graceful_shutdown();
                }
                tokio::select! {
                    result = connection.as_mut() => Some(result),
                    () = self.drain.reached(Phase::Finishing) => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            result = connection.as_mut() => Some(result),
                            // Who does not read his answer keeps no node from ending.
                            _ = activity.over(common.patience) => None,
                            () = self.drain.reached(Phase::Stopped) => None,
                            last_words = expulsion(&common, &who, peer) => {
                                timeout(last_words, connection.as_mut()).await.ok()
                            }
                        }
                    }
                    // Who is revoked meanwhile has nothing to wait for either.
                    last_words = expulsion(&common, &who, peer) => {
                        connection.as_mut().graceful_shutdown();
                        timeout(last_words, connection.as_mut()).await.ok()
                    }
                }
            }
        };
        if let Some(Err(error)) = &ended {
            tracing::debug!(%peer, %error, "connection ended");
        }
        ended.is_some()
    }
}

async fn answer(
    mut router: Router,
    mut request: Request<Incoming>,
    sender: Sender,
    peer: SocketAddr,
    activity: Arc<Activity>,
) -> Result<Response<Outgoing>, Infallible> {
    let _asked = activity.ask();
    sender.sign(&mut request);
    request.extensions_mut().insert(PeerAddr(peer));
    // A router is always ready.
    let response = router.call(request).await?;
    Ok(response.map(|body| Outgoing::new(body, &activity)))
}

fn is_http2(stream: &TlsStream<Borrowed>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(&b"h2"[..])
}

/// Ends when a client may not go on, because its certificate has ended or is revoked; says how long what is in hand
/// gets.
async fn expulsion(common: &Common, who: &Principal, peer: SocketAddr) -> Duration {
    tokio::select! {
        () = certificate_end(who.ends()) => {
            tracing::info!(%peer, "connection closed: the client's certificate, or one above it, has ended");
            LAST_WORDS
        }
        // At once, if it was while the client waited for its place.
        () = revocation::revoked(common.policies.clone(), who) => {
            if tracing::enabled!(tracing::Level::INFO) && log_budget::refusal(Some(who)) {
                tracing::info!(%peer, client = %who, "connection closed: the client's certificate is revoked");
            }
            revocation::LAST_WORDS
        }
    }
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
