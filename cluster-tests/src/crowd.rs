//! A crowd of clients on one node: thousands of connections over TLS that each carry one HTTP/1.1 request at a time, at
//! rest, as fast as they are answered, or on a schedule that does not ask how the node is. It has a thread of its
//! own, so that it takes one core at most, and counts every answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::{Identity, Pki};
use crate::node::Node;
use crate::wait::until;

/// An answer that takes longer is none.
pub const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// Handshakes at once: far fewer than a node has places for, and so many that it never waits for one.
const OPENING: usize = 64;
/// Descriptors of the test itself, and of a node beside its clients: what `docs/operations.md` says.
const SPARE: u64 = 1024;
/// Faults whose text is kept.
const KEPT: usize = 20;
const BODY: &str = r#"{"context":"exchange-key","plaintext":"b25lIG9mIHRoZSBjcm93ZA=="}"#;

/// What the crowd does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// Nobody asks.
    Rest,
    /// Everybody asks once. Each round has a number of its own.
    Round(u32),
    /// The first `senders` ask again as soon as they are answered.
    Closed {
        /// How many.
        senders: usize,
    },
    /// The first `senders` ask so often together. One whose answer is late asks again as soon as it has it.
    Offered {
        /// How many.
        senders: usize,
        /// Requests a second, of all of them.
        per_second: f64,
    },
}

/// What has been answered so far.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// 200, with a ciphertext.
    pub served: u64,
    /// 429, with the time to come back.
    pub limited: u64,
    /// 503, with the time to come back.
    pub shed: u64,
    /// Everything else: other answers, none in time, connections that ended.
    pub faults: u64,
    /// The first of them.
    pub texts: Vec<String>,
    /// The longest that anybody has waited.
    pub slowest: Duration,
}

impl Answers {
    /// All answers that may be.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.served + self.limited + self.shed
    }
}

#[derive(Default)]
struct Tally {
    open: AtomicUsize,
    served: AtomicU64,
    limited: AtomicU64,
    shed: AtomicU64,
    faults: AtomicU64,
    texts: Mutex<Vec<String>>,
    slowest_micros: AtomicU64,
}

impl Tally {
    fn fault(&self, text: String) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() < KEPT {
            texts.push(text);
        }
    }
}

/// A running crowd. Its connections end when it is dropped.
pub struct Crowd {
    paces: Option<watch::Sender<Pace>>,
    tally: Arc<Tally>,
    connections: usize,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    /// Opens so many connections to a node's API, shared out among these identities. Each asks once and is at rest
    /// then.
    pub fn start(node: &Node, pki: &Pki, identities: &[Identity], connections: usize) -> Result<Self> {
        make_room(connections)?;
        let connectors = identities
            .iter()
            .map(|identity| connector(pki, identity))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!connectors.is_empty(), "a crowd of nobody");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (paces, followed) = watch::channel(Pace::Rest);
        let tally = Arc::new(Tally::default());
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, node.api_port));
        let everybody = {
            let tally = Arc::clone(&tally);
            async move {
                let gate = Arc::new(Semaphore::new(OPENING));
                let mut clients = JoinSet::new();
                for (number, tls) in (0..connections).zip(connectors.iter().cycle()) {
                    let client = Client {
                        number,
                        address,
                        tls: tls.clone(),
                        gate: Arc::clone(&gate),
                        tally: Arc::clone(&tally),
                    };
                    clients.spawn(client.run(followed.clone()));
                }
                drop(followed);
                clients.join_all().await;
            }
        };
        let thread = std::thread::Builder::new()
            .name("crowd".to_owned())
            .spawn(move || runtime.block_on(everybody))?;
        Ok(Self {
            paces: Some(paces),
            tally,
            connections,
            thread: Some(thread),
        })
    }

    /// Until all connections are open, and each has been answered once.
    pub async fn all_open(&self, limit: Duration) -> Result<()> {
        let opened = until("the crowd", limit, async || {
            let open = self.open();
            (open == self.connections || self.answers().faults > 0).then_some(open)
        });
        let opened = opened
            .await
            .with_context(|| format!("{} are open", self.open()))?;
        ensure!(opened == self.connections, "{:#?}", self.answers());
        Ok(())
    }

    /// How many connections are open and have been answered.
    #[must_use]
    pub fn open(&self) -> usize {
        self.tally.open.load(Ordering::Relaxed)
    }

    /// From now on.
    pub fn pace(&self, pace: Pace) {
        if let Some(paces) = &self.paces {
            paces.send_replace(pace);
        }
    }

    /// What has been answered so far.
    #[must_use]
    pub fn answers(&self) -> Answers {
        let Tally {
            served,
            limited,
            shed,
            faults,
            texts,
            slowest_micros,
            ..
        } = &*self.tally;
        Answers {
            served: served.load(Ordering::Relaxed),
            limited: limited.load(Ordering::Relaxed),
            shed: shed.load(Ordering::Relaxed),
            faults: faults.load(Ordering::Relaxed),
            texts: texts.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            slowest: Duration::from_micros(slowest_micros.load(Ordering::Relaxed)),
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // Whoever waits for an answer waits for it first, within its limit.
        self.paces = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Each connection is a descriptor of this process, and one of the node's, which has the same hard limit.
fn make_room(connections: usize) -> Result<()> {
    let needed = u64::try_from(connections)?.saturating_add(SPARE);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        hard >= needed,
        "{connections} connections need {needed} file descriptors, and the hard limit is {hard}: raise it (ulimit -Hn)"
    );
    if soft < needed {
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard)?;
    }
    Ok(())
}

fn connector(pki: &Pki, identity: &Identity) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.dir().join("ca.crt"))?)?;
    let chain = vec![CertificateDer::from_pem_slice(identity.cert.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

struct Client {
    number: usize,
    address: SocketAddr,
    tls: TlsConnector,
    gate: Arc<Semaphore>,
    tally: Arc<Tally>,
}

impl Client {
    async fn run(self, paces: watch::Receiver<Pace>) {
        let mut connection = match self.enter().await {
            Ok(connection) => connection,
            Err(error) => return self.tally.fault(format!("connection {}: {error:#}", self.number)),
        };
        self.tally.open.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = self.follow(&mut connection, paces).await {
            self.tally.fault(format!("connection {}: {error:#}", self.number));
        }
        self.tally.open.fetch_sub(1, Ordering::Relaxed);
    }

    async fn enter(&self) -> Result<Connection> {
        let _turn = self.gate.acquire().await?;
        let opened = timeout(ANSWERED_WITHIN, Connection::open(self.address, &self.tls));
        let mut connection = opened.await.context("no handshake in time")??;
        self.ask(&mut connection).await?;
        Ok(connection)
    }

    async fn follow(&self, connection: &mut Connection, mut paces: watch::Receiver<Pace>) -> Result<()> {
        let mut last_round = None;
        loop {
            let pace = *paces.borrow_and_update();
            match pace {
                Pace::Round(round) if last_round != Some(round) => {
                    last_round = Some(round);
                    self.ask(connection).await?;
                    continue;
                }
                Pace::Closed { senders } if self.number < senders => {
                    while matches!(paces.has_changed(), Ok(false)) {
                        self.ask(connection).await?;
                    }
                }
                Pace::Offered { senders, per_second } if self.number < senders => {
                    self.keep_on(connection, &mut paces, senders, per_second).await?;
                }
                _ => {}
            }
            // The end of the crowd.
            if paces.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    /// Asks when it is due, until the pace changes. Those of the crowd are due one after the other.
    async fn keep_on(
        &self,
        connection: &mut Connection,
        paces: &mut watch::Receiver<Pace>,
        senders: usize,
        per_second: f64,
    ) -> Result<()> {
        let every = Duration::from_secs_f64(senders as f64 / per_second);
        let mut due = Instant::now() + every.mul_f64(self.number as f64 / senders as f64);
        while matches!(paces.has_changed(), Ok(false)) {
            if due > Instant::now() && timeout_at(due, changed(paces)).await.is_ok() {
                break;
            }
            self.ask(connection).await?;
            due = (due + every).max(Instant::now());
        }
        Ok(())
    }

    async fn ask(&self, connection: &mut Connection) -> Result<()> {
        let tally = &self.tally;
        let asked = Instant::now();
        let answer = timeout(ANSWERED_WITHIN, connection.exchange()).await;
        let answer = answer.with_context(|| format!("no answer within {ANSWERED_WITHIN:?}"))??;
        let micros = u64::try_from(asked.elapsed().as_micros())?;
        tally.slowest_micros.fetch_max(micros, Ordering::Relaxed);
        let counter = match (answer.status, answer.comes_back) {
            (200, _) if answer.has_ciphertext => &tally.served,
            (429, true) => &tally.limited,
            (503, true) => &tally.shed,
            _ => {
                tally.fault(format!("connection {}: {answer:?}", self.number));
                return Ok(());
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Waits for another pace, and leaves it to be seen.
async fn changed(paces: &mut watch::Receiver<Pace>) {
    if paces.changed().await.is_ok() {
        paces.mark_changed();
    }
}

/// What there is to know of an answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// `Retry-After` says when.
    comes_back: bool,
    has_ciphertext: bool,
    #[allow(dead_code, reason = "for whoever reads a fault")]
    text: String,
}

struct Connection {
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr, tls: &TlsConnector) -> Result<Self> {
        let stream = TcpStream::connect(address).await.context("connect")?;
        stream.set_nodelay(true)?;
        let name = ServerName::from(address.ip());
        Ok(Self {
            stream: tls.connect(name, stream).await.context("handshake")?,
            buffer: Vec::with_capacity(2048),
        })
    }

    async fn exchange(&mut self) -> Result<Answer> {
        let length = BODY.len();
        let request = format!(
            "POST /encrypt HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
             \r\n{BODY}"
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.stream.flush().await?;
        self.buffer.clear();
        let head = loop {
            let end = self.buffer.windows(4).position(|four| four == b"\r\n\r\n");
            match end {
                Some(end) => break end + 4,
                None => self.more().await?,
            }
        };
        let text = String::from_utf8_lossy(&self.buffer[..head]).into_owned();
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (found, value) = line.split_once(':')?;
                found.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let status = text.get(9..12).context("no status")?.parse()?;
        let seconds = field("retry-after").and_then(|text| text.parse::<u32>().ok());
        let length: usize = field("content-length")
            .with_context(|| format!("no length: {text}"))?
            .parse()?;
        while self.buffer.len() < head + length {
            self.more().await?;
        }
        ensure!(self.buffer.len() == head + length, "more than one answer");
        let body = String::from_utf8_lossy(&self.buffer[head..]);
        Ok(Answer {
            status,
            comes_back: seconds.is_some_and(|seconds| seconds >= 1),
            has_ciphertext: body.contains(r#""ciphertext":""#),
            text: if status == 200 {
                String::new()
            } else {
                body.into_owned()
            },
        })
    }

    async fn more(&mut self) -> Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            bail!("the connection was closed");
        }
        Ok(())
    }
}
