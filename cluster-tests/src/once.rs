//! Clients of a balancer that send each request once. A connection is opened only for a client that has none: at the
//! beginning, or because it was told, before it sent anything, that the one it had ends. Whatever else happens to a
//! connection, and every answer that is not the right one, is a failure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hsm_api::data::{DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse};
use hsm_api::{Base64, paths};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::client::{Identity, Pki};
use crate::{http1, http2};

/// Between two requests of a client that is busy.
const BUSY: Duration = Duration::from_millis(30);
/// Requests at once of a client that speaks HTTP/2.
const STREAMS: usize = 3;
/// Pauses of those that are idle, in parts of the longest one.
const PARTS: u32 = 4;
/// Failures whose text is kept.
const KEPT: usize = 20;
const CONTEXT: &str = "exchange-key";

/// What has happened so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Requests that were sent.
    pub requests: u64,
    /// Connections that were opened.
    pub connections: u64,
    /// Connections whose end was told before anything was sent on them.
    pub ended: u64,
    /// Requests without the right answer, and connections that broke, or could not be had.
    pub failed: u64,
    /// The first of these.
    pub failures: Vec<String>,
    /// The fewest right answers that a client has had.
    pub fewest: u64,
}

#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    connections: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// Of each client, its right answers.
    answered: Mutex<Vec<Arc<AtomicU64>>>,
}

impl Tally {
    fn client(&self) -> Arc<AtomicU64> {
        let answered = Arc::<AtomicU64>::default();
        let mut all = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::clone(&answered));
        answered
    }

    fn fail(&self, text: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() < KEPT {
            failures.push(text);
        }
    }
}

/// How a client uses its connections.
#[derive(Debug, Clone, Copy)]
enum Habit {
    /// HTTP/1.1, and a connection for each request.
    Fresh,
    /// HTTP/1.1 on one connection, with pauses of this length.
    Kept(Duration),
    /// HTTP/2 on one connection, several requests at once, with pauses of this length.
    Streams(Duration),
}

impl Habit {
    fn pause(self) -> Duration {
        match self {
            Self::Fresh => BUSY,
            Self::Kept(pause) | Self::Streams(pause) => pause,
        }
    }
}

/// Running clients; they stop when dropped.
pub struct Once {
    tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<()>>,
}

impl Once {
    /// Starts clients of each of these balancers, by name and port. `idle` is the longest time for which one of them keeps
    /// a connection without a request.
    pub fn start(pki: &Pki, balancers: &[(&'static str, u16)], idle: Duration) -> Result<Self> {
        let tally = Arc::<Tally>::default();
        let (stop, stopped) = watch::channel(false);
        let mut habits = vec![Habit::Fresh, Habit::Kept(BUSY), Habit::Streams(BUSY)];
        for part in 1..=PARTS {
            habits.push(Habit::Kept(idle * part / PARTS));
        }
        habits.extend([Habit::Streams(idle / 2), Habit::Streams(idle)]);
        let mut clients = Vec::new();
        for (balancer, port) in balancers {
            for habit in &habits {
                let client = Client {
                    name: format!("{balancer}, {habit:?}"),
                    habit: *habit,
                    pki: pki.clone(),
                    who: pki.identity("trading-1")?,
                    port: *port,
                    began: Instant::now(),
                    sealed: Vec::new(),
                    count: 0,
                    answered: tally.client(),
                    tally: Arc::clone(&tally),
                };
                clients.push(tokio::spawn(client.work(stopped.clone())));
            }
        }
        Ok(Self { tally, stop, clients })
    }

    /// What has happened so far.
    #[must_use]
    pub fn so_far(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let answered = &self.tally.answered;
        let answered = answered.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = &self.tally.failures;
        Report {
            requests: read(&self.tally.requests),
            connections: read(&self.tally.connections),
            ended: read(&self.tally.ended),
            failed: read(&self.tally.failed),
            failures: failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            fewest: answered
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .min()
                .unwrap_or_default(),
        }
    }

    /// Stops once all that was sent is answered, and says what has happened.
    pub async fn stop(mut self) -> Report {
        self.stop.send_replace(true);
        for client in self.clients.drain(..) {
            if let Err(error) = client.await {
                self.tally.fail(format!("a client has panicked: {error}"));
            }
        }
        self.so_far()
    }
}

impl Drop for Once {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// A connection.
enum Wire {
    One(http1::Connection),
    Two(http2::Connection),
}

impl Wire {
    /// Lets time pass; nothing, if the other side has ended the connection.
    async fn rest(self, time: Duration) -> Result<Option<Self>> {
        match self {
            Self::One(mut connection) => Ok(connection.rest(time).await?.then_some(Self::One(connection))),
            Self::Two(mut connection) => {
                connection.rest(time).await?;
                Ok((!connection.is_ending()).then_some(Self::Two(connection)))
            }
        }
    }

    /// Sends these requests, and says what they were answered, and whether there is a next time.
    async fn ask(&mut self, path: &str, bodies: &[Value]) -> Result<(Vec<Value>, bool)> {
        match self {
            Self::One(connection) => {
                let body = bodies.first().context("nothing to ask")?;
                let answer = connection.ask("POST", path, &[], body).await?;
                ensure!(
                    answer.status()? == 200,
                    "{} {:?}",
                    answer.start,
                    String::from_utf8_lossy(&answer.body)
                );
                let closes = answer
                    .header("connection")
                    .is_some_and(|value| value.eq_ignore_ascii_case("close"));
                Ok((vec![answer.json()?], !closes))
            }
            Self::Two(connection) => {
                let sent: Vec<Vec<u8>> = bodies.iter().map(|body| body.to_string().into_bytes()).collect();
                let answers = connection.ask(path, &sent).await?;
                let read = |answer: http2::Whole| -> Result<Value> {
                    let text = String::from_utf8_lossy(&answer.body);
                    ensure!(answer.status == Some(200), "{:?} {text:?}", answer.status);
                    Ok(serde_json::from_slice(&answer.body)?)
                };
                let answers: Result<Vec<Value>> = answers.into_iter().map(read).collect();
                Ok((answers?, !connection.is_ending()))
            }
        }
    }
}

struct Client {
    name: String,
    habit: Habit,
    pki: Pki,
    who: Identity,
    port: u16,
    began: Instant,
    /// What it has encrypted, and decrypts next.
    sealed: Vec<(String, Base64)>,
    count: u64,
    answered: Arc<AtomicU64>,
    tally: Arc<Tally>,
}

impl Client {
    async fn work(mut self, mut stopped: watch::Receiver<bool>) {
        let mut wire = None;
        while !*stopped.borrow() {
            wire = match self.turn(wire.take()).await {
                Ok(wire) => wire,
                Err(error) => self.broken(&error),
            };
            let pause = self.habit.pause();
            let held = wire.take();
            let had_one = held.is_some();
            let rested = async move {
                match held {
                    Some(wire) => wire.rest(pause).await,
                    None => {
                        tokio::time::sleep(pause).await;
                        Ok(None)
                    }
                }
            };
            let rested = tokio::select! {
                rested = rested => rested,
                _ = stopped.changed() => return,
            };
            wire = match rested {
                Ok(wire) => wire,
                Err(error) => self.broken(&error),
            };
            if had_one && wire.is_none() {
                self.tally.ended.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn broken(&self, error: &anyhow::Error) -> Option<Wire> {
        let when = self.began.elapsed();
        self.tally
            .fail(format!("{} after {when:.1?}: {error:#}", self.name));
        None
    }

    async fn open(&self) -> Result<Wire> {
        self.tally.connections.fetch_add(1, Ordering::Relaxed);
        let opened = async {
            match self.habit {
                Habit::Fresh | Habit::Kept(_) => {
                    let opened = http1::Connection::open(&self.pki, self.port, &self.who).await;
                    opened.map(Wire::One)
                }
                Habit::Streams(_) => {
                    let opened = http2::Connection::open(&self.pki, self.port, &self.who).await;
                    opened.map(Wire::Two)
                }
            }
        };
        opened.await.context("no connection")
    }

    /// Encrypts, or decrypts what it has encrypted; gives the connection that it has afterwards.
    async fn turn(&mut self, wire: Option<Wire>) -> Result<Option<Wire>> {
        let mut wire = match wire {
            Some(wire) => wire,
            None => self.open().await?,
        };
        let sealed = std::mem::take(&mut self.sealed);
        let goes_on = if sealed.is_empty() {
            self.encrypt(&mut wire).await?
        } else {
            self.decrypt(&mut wire, sealed).await?
        };
        if !goes_on {
            self.tally.ended.fetch_add(1, Ordering::Relaxed);
        }
        let keeps = goes_on && !matches!(self.habit, Habit::Fresh);
        Ok(keeps.then_some(wire))
    }

    async fn encrypt(&mut self, wire: &mut Wire) -> Result<bool> {
        let at_once = match self.habit {
            Habit::Streams(_) => STREAMS,
            Habit::Fresh | Habit::Kept(_) => 1,
        };
        let mut plaintexts = Vec::new();
        let mut bodies = Vec::new();
        for _ in 0..at_once {
            self.count += 1;
            let plaintext = format!("{} {}", self.name, self.count);
            let request = EncryptRequest::new(CONTEXT, plaintext.as_bytes());
            bodies.push(serde_json::to_value(&request)?);
            plaintexts.push(plaintext);
        }
        let (answers, goes_on) = self.ask(wire, paths::ENCRYPT, &bodies).await?;
        for (plaintext, answer) in plaintexts.into_iter().zip(answers) {
            let answer: EncryptResponse = serde_json::from_value(answer)?;
            self.sealed.push((plaintext, answer.ciphertext));
        }
        Ok(goes_on)
    }

    async fn decrypt(&mut self, wire: &mut Wire, sealed: Vec<(String, Base64)>) -> Result<bool> {
        let mut bodies = Vec::new();
        for (_, ciphertext) in &sealed {
            let request = DecryptRequest::new(CONTEXT, ciphertext.clone());
            bodies.push(serde_json::to_value(&request)?);
        }
        let (answers, goes_on) = self.ask(wire, paths::DECRYPT, &bodies).await?;
        for ((plaintext, _), answer) in sealed.iter().zip(answers) {
            let answer: DecryptResponse = serde_json::from_value(answer)?;
            ensure!(
                answer.plaintext.as_slice() == plaintext.as_bytes(),
                "{plaintext:?} was decrypted to something else"
            );
        }
        Ok(goes_on)
    }

    async fn ask(&self, wire: &mut Wire, path: &str, bodies: &[Value]) -> Result<(Vec<Value>, bool)> {
        let sent = u64::try_from(bodies.len())?;
        self.tally.requests.fetch_add(sent, Ordering::Relaxed);
        let answered = wire.ask(path, bodies).await.context(path.to_owned())?;
        self.answered.fetch_add(sent, Ordering::Relaxed);
        Ok(answered)
    }
}
