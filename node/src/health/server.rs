//! The health listener's thread: plain HTTP/1, a few connections at once, each for one answer.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::watch;

use super::{HealthSource, routes};
use crate::http::brief::{BriefPlace, BriefPlaces};
use crate::http::{ListenError, say_refusals_left_out};
use crate::metrics::{self, Metrics};
use crate::{log_budget, logging};

/// Probes and scrapers are few.
pub(super) const MAX_CONNECTIONS: usize = 128;
/// From accepting a connection to the end of its answer. Whoever takes longer holds one of few places, which
/// probes need.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often samples are moved into histograms, and it is said what the log left out.
const UPKEEP: Duration = Duration::from_secs(5);

/// The running listener. Ends when dropped; a node keeps it until the process ends, so that
/// probes are answered during the whole shutdown.
pub struct HealthServer {
    /// Where it listens.
    pub address: SocketAddr,
    _stop: watch::Sender<()>,
}

/// Binds the address of `server.health_listen`.
///
/// # Errors
/// [`ListenError`], with the key.
pub fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    const KEY: &str = "server.health_listen";
    TcpListener::bind(address).map_err(|reason| ListenError::of(KEY, address, reason))
}

/// Starts the thread.
///
/// # Errors
/// When thread or runtime cannot be made.
pub fn start(
    socket: TcpListener,
    source: Arc<dyn HealthSource>,
    metrics: Option<Metrics>,
) -> std::io::Result<HealthServer> {
    start_with(socket, source, metrics, PATIENCE)
}

pub(super) fn start_with(
    socket: TcpListener,
    source: Arc<dyn HealthSource>,
    metrics: Option<Metrics>,
    patience: Duration,
) -> std::io::Result<HealthServer> {
    let address = socket.local_addr()?;
    socket.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (stop, stopped) = watch::channel(());
    std::thread::Builder::new()
        .name("health".to_owned())
        .spawn(move || {
            runtime.block_on(async move {
                if let Err(error) = serve(socket, source, metrics, patience, stopped).await {
                    tracing::error!(%error, "the health listener has ended");
                }
            });
        })?;
    Ok(HealthServer { address, _stop: stop })
}

async fn serve(
    socket: TcpListener,
    source: Arc<dyn HealthSource>,
    metrics: Option<Metrics>,
    patience: Duration,
    mut stopped: watch::Receiver<()>,
) -> std::io::Result<()> {
    let socket = tokio::net::TcpListener::from_std(socket)?;
    let places = BriefPlaces::new(MAX_CONNECTIONS);
    let mut upkeep = tokio::time::interval(UPKEEP);
    upkeep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        let accepted = tokio::select! {
            // Nothing is ever sent: this ends when the handle is dropped.
            _ = stopped.changed() => return Ok(()),
            _ = upkeep.tick() => {
                keep_up(metrics.as_ref());
                continue;
            }
            accepted = accept(&socket, &places) => accepted,
        };
        let (stream, mut place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a health connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let source = Arc::clone(&source);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let source = Arc::clone(&source);
                async move {
                    let (parts, _) = request.into_parts();
                    Ok::<_, Infallible>(routes::answer(
                        &*source,
                        &parts.method,
                        &parts.uri,
                        &parts.headers,
                    ))
                }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            let ended = tokio::select! {
                () = place.evicted() => None,
                ended = tokio::time::timeout(patience, connection) => ended.ok(),
            };
            match ended {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::debug!(%error, "health connection ended"),
                None => tracing::debug!("health connection took too long"),
            }
        });
    }
}

/// A place first: beyond the limit probes wait in the kernel, until the oldest connection is slow and has ended.
async fn accept(
    socket: &tokio::net::TcpListener,
    places: &BriefPlaces,
) -> std::io::Result<(tokio::net::TcpStream, BriefPlace)> {
    // Never closed.
    let Some(room) = places.room().await else {
        return Err(std::io::ErrorKind::Other.into());
    };
    let (stream, _) = socket.accept().await?;
    Ok((stream, room.begin()))
}

fn keep_up(recorder: Option<&Metrics>) {
    metrics::log_lines_lost(logging::lines_lost(), logging::audit_lines_lost());
    logging::say_lost();
    log_budget::say_suppressed();
    say_refusals_left_out();
    if let Some(recorder) = recorder {
        recorder.upkeep();
    }
}
