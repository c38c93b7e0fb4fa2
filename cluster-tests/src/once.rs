//! Clients of a balancer that send each request once. A connection is opened only for a client that has none: at the
//! beginning, or because it was told, before it sent anything, that the one it had ends. Whatever else happens to a
//! connection, and every answer that is not the right one, is a failure.

mod wish;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::wish::{Sealed, Wish};
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
/// Items of a batch, and their least length: some hundred KB, more than a connection takes at once.
const ITEMS: usize = 8;
const ITEM_LENGTH: usize = 24 * 1024;

/// What has happened so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Requests that were sent.
    pub requests: u64,
    /// Connections that were opened.
    pub connections: u64,
    /// Connections whose end was told before anything was sent on them.
    pub ended: u64,
    /// Those among them that have spoken HTTP/2: each has ended with GOAWAY, which is the only good end.
    pub goaways: u64,
    /// The fewest such ends that a client has seen of those that keep a connection to a node.
    pub fewest_ended: u64,
    /// Requests without the right answer, and connections that broke, or could not be had.
    pub failed: u64,
    /// The first of these.
    pub failures: Vec<String>,
    /// The fewest turns that a client has had, in each of which all that it asked was answered well.
    pub fewest: u64,
}

/// Where clients connect to.
#[derive(Debug, Clone, Copy)]
pub struct Balancer {
    /// For people.
    pub name: &'static str,
    /// Of this machine.
    pub port: u16,
    /// A connection to it is one to a node.
    pub passes_through: bool,
}

/// Of one client.
#[derive(Default)]
struct Counts {
    turns: AtomicU64,
    ended: AtomicU64,
    /// It keeps a connection to a node.
    keeps_one: bool,
}

#[derive(Default)]
struct Tally {
    requests: AtomicU64,
    connections: AtomicU64,
    ended: AtomicU64,
    goaways: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
    clients: Mutex<Vec<Arc<Counts>>>,
}

impl Tally {
    fn client(&self, keeps_one: bool) -> Arc<Counts> {
        let counts = Arc::new(Counts {
            keeps_one,
            ..Counts::default()
        });
        let mut all = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::clone(&counts));
        counts
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
    /// HTTP/1.1 on one connection, batches with pauses of this length.
    Batches(Duration),
}

impl Habit {
    fn pause(self) -> Duration {
        match self {
            Self::Fresh => BUSY,
            Self::Kept(pause) | Self::Streams(pause) | Self::Batches(pause) => pause,
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
    /// Starts clients of each of these balancers. `idle` is the longest time for which one of them keeps a connection
    /// without a request.
    pub fn start(pki: &Pki, balancers: &[Balancer], idle: Duration) -> Result<Self> {
        let tally = Arc::<Tally>::default();
        let (stop, stopped) = watch::channel(false);
        let mut habits = vec![Habit::Fresh, Habit::Kept(BUSY), Habit::Streams(BUSY)];
        for part in 1..=PARTS {
            habits.push(Habit::Kept(idle * part / PARTS));
        }
        habits.extend([
            Habit::Streams(idle / 2),
            Habit::Streams(idle),
            Habit::Batches(idle / 2),
        ]);
        let mut clients = Vec::new();
        for balancer in balancers {
            for habit in &habits {
                let keeps_one = balancer.passes_through && !matches!(habit, Habit::Fresh);
                let client = Client {
                    name: format!("{}, {habit:?}", balancer.name),
                    habit: *habit,
                    pki: pki.clone(),
                    who: pki.identity("trading-1")?,
                    port: balancer.port,
                    began: Instant::now(),
                    sealed: Vec::new(),
                    count: 0,
                    counts: tally.client(keeps_one),
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
        let clients = &self.tally.clients;
        let clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
        let keeping = clients.iter().filter(|counts| counts.keeps_one);
        let failures = &self.tally.failures;
        Report {
            requests: read(&self.tally.requests),
            connections: read(&self.tally.connections),
            ended: read(&self.tally.ended),
            goaways: read(&self.tally.goaways),
            fewest_ended: keeping
                .map(|counts| read(&counts.ended))
                .min()
                .unwrap_or_default(),
            failed: read(&self.tally.failed),
            failures: failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            fewest: clients
                .iter()
                .map(|counts| read(&counts.turns))
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
                let said = wish::right(Some(answer.status()?), &answer.body)?;
                let closes = answer
                    .header("connection")
                    .is_some_and(|value| value.eq_ignore_ascii_case("close"));
                Ok((vec![said], !closes))
            }
            Self::Two(connection) => {
                let sent: Vec<Vec<u8>> = bodies.iter().map(|body| body.to_string().into_bytes()).collect();
                let answers = connection.ask(path, &sent).await?;
                let read = |answer: &http2::Whole| wish::right(answer.status, &answer.body);
                let answers: Result<Vec<Value>> = answers.iter().map(read).collect();
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
    sealed: Vec<Sealed>,
    count: u64,
    counts: Arc<Counts>,
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
                self.ended();
            }
        }
    }

    fn ended(&self) {
        self.tally.ended.fetch_add(1, Ordering::Relaxed);
        self.counts.ended.fetch_add(1, Ordering::Relaxed);
        if matches!(self.habit, Habit::Streams(_)) {
            self.tally.goaways.fetch_add(1, Ordering::Relaxed);
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
                Habit::Fresh | Habit::Kept(_) | Habit::Batches(_) => {
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
        let wishes = self.wishes();
        let goes_on = self.ask(&mut wire, wishes).await?;
        if !goes_on {
            self.ended();
        }
        let keeps = goes_on && !matches!(self.habit, Habit::Fresh);
        Ok(keeps.then_some(wire))
    }

    /// To encrypt, then, of a batch, to bring that under the newest version, then to decrypt it.
    fn wishes(&mut self) -> Vec<Wish> {
        let sealed = std::mem::take(&mut self.sealed);
        if !sealed.is_empty() {
            let is_batch = matches!(self.habit, Habit::Batches(_));
            let next = |sealed: Sealed| match is_batch && !sealed.is_rewrapped {
                true => Wish::Rewrap(sealed),
                false => Wish::Decrypt(sealed),
            };
            return sealed.into_iter().map(next).collect();
        }
        let (at_once, length) = match self.habit {
            Habit::Fresh | Habit::Kept(_) => (1, 0),
            Habit::Streams(_) => (STREAMS, 0),
            Habit::Batches(_) => (ITEMS, ITEM_LENGTH),
        };
        let mut wishes = Vec::new();
        for _ in 0..at_once {
            self.count += 1;
            if matches!(self.habit, Habit::Fresh) && self.count.is_multiple_of(2) {
                wishes.push(Wish::DataKey);
                continue;
            }
            let plaintext = format!("{} {} {}", self.name, self.count, "x".repeat(length));
            wishes.push(Wish::Encrypt(plaintext.into_bytes()));
        }
        wishes
    }

    /// All of them at once; whether there is a next time.
    async fn ask(&mut self, wire: &mut Wire, wishes: Vec<Wish>) -> Result<bool> {
        let path = wishes.first().context("nothing to ask")?.path();
        let mut bodies = wishes.iter().map(Wish::body).collect::<Result<Vec<Value>>>()?;
        let is_batch = matches!(self.habit, Habit::Batches(_));
        if is_batch {
            bodies = vec![json!({ "batch": bodies })];
        }
        let sent = u64::try_from(bodies.len())?;
        self.tally.requests.fetch_add(sent, Ordering::Relaxed);
        let (mut answers, goes_on) = wire.ask(path, &bodies).await.context(path)?;
        if is_batch {
            answers = wish::items(answers.pop().context("no answer")?)?;
        }
        ensure!(
            answers.len() == wishes.len(),
            "{} answers to {} requests",
            answers.len(),
            wishes.len()
        );
        for (wish, answer) in wishes.into_iter().zip(answers) {
            self.sealed.extend(wish.granted(answer)?);
        }
        self.counts.turns.fetch_add(1, Ordering::Relaxed);
        Ok(goes_on)
    }
}
