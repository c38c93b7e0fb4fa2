//! Load that knows what it may expect: workers of each node encrypt there and decrypt on another, each request
//! sent once, and everything that is not the right answer counts as a failure. A node that a test is about to
//! take away is left out first, so that whatever fails then has failed on a survivor.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use hsm_api::Client;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use tokio::sync::{RwLock, watch};
use tokio::task::JoinHandle;

use crate::playground::Playground;

/// How many workers a node has, and how long each rests between two rounds.
#[derive(Clone, Copy)]
struct Rate {
    workers: usize,
    pause: Duration,
}

const USUAL: Rate = Rate {
    workers: 1,
    pause: Duration::from_millis(60),
};
/// Several times as much, as far as two cores allow.
const HIGH: Rate = Rate {
    workers: 2,
    pause: Duration::from_millis(2),
};
/// Failures whose text is kept.
const KEPT: usize = 20;
const CONTEXT: &str = "exchange-key";

/// What has happened so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Right answers to encrypt.
    pub encrypted: u64,
    /// Right answers to decrypt.
    pub decrypted: u64,
    /// Everything else.
    pub failed: u64,
    /// The first of them.
    pub failures: Vec<String>,
}

#[derive(Default)]
struct Tally {
    encrypted: AtomicU64,
    decrypted: AtomicU64,
    failed: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn fail(&self, text: String) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() < KEPT {
            failures.push(text);
        }
    }
}

/// One node as the load sees it: true while it is left out. Held for reading during every request.
struct Target {
    number: u32,
    client: Client,
    left_out: RwLock<bool>,
}

/// Running load; stops when dropped.
pub struct Load {
    targets: Arc<Vec<Target>>,
    tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts a worker for each of the playground's present nodes.
    pub fn start(playground: &Playground) -> Result<Self> {
        Self::at(USUAL, playground)
    }

    /// Starts several busy workers for each of them.
    pub fn start_high(playground: &Playground) -> Result<Self> {
        Self::at(HIGH, playground)
    }

    fn at(rate: Rate, playground: &Playground) -> Result<Self> {
        let targets: Result<Vec<Target>> = playground
            .nodes()
            .into_iter()
            .map(|node| {
                Ok(Target {
                    number: node.number,
                    client: playground.client_on("trading-1", node.number)?,
                    left_out: RwLock::new(false),
                })
            })
            .collect();
        let targets = Arc::new(targets?);
        let tally = Arc::new(Tally::default());
        let (stop, stopped) = watch::channel(false);
        let workers = (0..targets.len() * rate.workers)
            .map(|number| {
                tokio::spawn(work(
                    number,
                    rate.pause,
                    Arc::clone(&targets),
                    Arc::clone(&tally),
                    stopped.clone(),
                ))
            })
            .collect();
        Ok(Self {
            targets,
            tally,
            stop,
            workers,
        })
    }

    /// Leaves a node out; returns once nothing is on its way to it.
    pub async fn pause(&self, number: u32) {
        self.set(number, true).await;
    }

    /// Takes a node in again.
    pub async fn resume(&self, number: u32) {
        self.set(number, false).await;
    }

    async fn set(&self, number: u32, left_out: bool) {
        if let Some(target) = self.targets.iter().find(|target| target.number == number) {
            *target.left_out.write().await = left_out;
        }
    }

    /// What has happened so far.
    #[must_use]
    pub fn so_far(&self) -> Report {
        Report {
            encrypted: self.tally.encrypted.load(Ordering::Relaxed),
            decrypted: self.tally.decrypted.load(Ordering::Relaxed),
            failed: self.tally.failed.load(Ordering::Relaxed),
            failures: self
                .tally
                .failures
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }

    /// Stops, and says what has happened.
    pub async fn stop(mut self) -> Report {
        self.stop.send_replace(true);
        for worker in self.workers.drain(..) {
            let _ = worker.await;
        }
        self.so_far()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

async fn work(
    number: usize,
    pause: Duration,
    targets: Arc<Vec<Target>>,
    tally: Arc<Tally>,
    stopped: watch::Receiver<bool>,
) {
    let mut count = 0_u64;
    while !*stopped.borrow() {
        count += 1;
        let plaintext = format!("load {number} {count}");
        round(number % targets.len(), &targets, &tally, plaintext.as_bytes()).await;
        tokio::time::sleep(pause).await;
    }
}

/// Encrypts on one node and decrypts on the next that takes part.
async fn round(at: usize, targets: &[Target], tally: &Tally, plaintext: &[u8]) {
    let here = &targets[at];
    let sealed = {
        let left_out = here.left_out.read().await;
        if *left_out {
            return;
        }
        here.client
            .encrypt(&EncryptRequest::new(CONTEXT, plaintext))
            .await
    };
    let sealed = match sealed {
        Ok(sealed) => {
            tally.encrypted.fetch_add(1, Ordering::Relaxed);
            sealed.into_body()
        }
        Err(error) => return tally.fail(format!("encrypt on node {}: {error}", here.number)),
    };
    for step in 1..=targets.len() {
        let there = &targets[(at + step) % targets.len()];
        let left_out = there.left_out.read().await;
        if *left_out {
            continue;
        }
        let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
        match there.client.decrypt(&request).await {
            Ok(opened) if opened.plaintext.as_slice() == plaintext => {
                tally.decrypted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(_) => tally.fail(format!("node {} decrypted to something else", there.number)),
            Err(error) => tally.fail(format!(
                "decrypt on node {} of version {} made on node {}: {error}",
                there.number, sealed.key_version, here.number
            )),
        }
        return;
    }
}
