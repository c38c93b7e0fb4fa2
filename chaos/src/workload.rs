//! The load: one client encrypts and decrypts through all nodes, one rotates. What was acknowledged is
//! remembered and checked, at once on another node and at the end on all; what failed or has no answer is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use hsm_api::client::{Client, Retry};
use hsm_api::data::EncryptRequest;
use tokio::task::JoinHandle;

use crate::history::{CONTEXT, History, Sealed, open};
use crate::playground::Playground;

/// What came of rotating.
#[derive(Default)]
struct Rotations {
    /// Versions whose rotation was acknowledged, in that order.
    made: Vec<u32>,
    failed: u64,
}

/// A running load.
pub(crate) struct Workload {
    stop: Arc<AtomicBool>,
    encrypting: JoinHandle<History>,
    rotating: JoinHandle<Rotations>,
}

impl Workload {
    /// Starts it.
    pub(crate) fn start(playground: &Playground, seed: u64) -> Result<Self> {
        let nodes: Vec<usize> = (1..=playground.nodes).collect();
        let each: Result<Vec<Client>> = nodes
            .iter()
            .map(|node| playground.client("trading-1", &[*node], Retry::None))
            .collect();
        let admin = playground.client("admin", &nodes, Retry::Until(Duration::from_secs(15)))?;
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Self {
            encrypting: tokio::spawn(encrypt(each?, History::new(seed), Arc::clone(&stop))),
            rotating: tokio::spawn(rotate(admin, Arc::clone(&stop))),
            stop,
        })
    }

    /// Stops it and returns what was acknowledged. A part of the load that has broken tells nothing of the cluster.
    pub(crate) async fn stop(self) -> Result<History> {
        self.stop.store(true, Ordering::SeqCst);
        let mut history = self.encrypting.await.context("the encrypting load")?;
        let rotations = self.rotating.await.context("the rotating load")?;
        for version in rotations.made {
            history.rotated(version);
        }
        history.failed(rotations.failed);
        Ok(history)
    }
}

/// Between two encryptions of a worker: faults, not load, are what is tried, and two cores carry the nodes too.
const PACE: Duration = Duration::from_millis(10);

async fn encrypt(nodes: Vec<Client>, mut history: History, stop: Arc<AtomicBool>) -> History {
    let mut number = 0usize;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let plaintext = format!("plaintext {number}").into_bytes();
        let here = &nodes[number % nodes.len()];
        let there = &nodes[(number + 1) % nodes.len()];
        let Ok(answer) = here
            .encrypt(&EncryptRequest::new(CONTEXT, plaintext.clone()))
            .await
        else {
            history.failed(1);
            tokio::time::sleep(PACE).await;
            continue;
        };
        let answer = answer.into_body();
        let sealed = Sealed {
            plaintext,
            version: answer.key_version,
            ciphertext: answer.ciphertext,
        };
        let what = format!("ciphertext {number} of version {}", sealed.version);
        history.opened(&what, open(there, &sealed).await);
        history.encrypted(sealed);
        tokio::time::sleep(PACE).await;
    }
    history
}

async fn rotate(admin: Client, stop: Arc<AtomicBool>) -> Rotations {
    let mut rotations = Rotations::default();
    while !stop.load(Ordering::SeqCst) {
        match admin.rotate(CONTEXT, None).await {
            Ok(answer) => rotations.made.push(answer.version),
            Err(_) => rotations.failed += 1,
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    rotations
}
