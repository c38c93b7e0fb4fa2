//! The load: one client encrypts and decrypts through all nodes, one rotates. What was acknowledged is
//! remembered and checked at the end; what failed or has no answer is only counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use hsm_api::client::{Client, Retry};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use tokio::task::JoinHandle;

use crate::playground::Playground;

const CONTEXT: &str = "exchange-key";
/// Ciphertexts kept for the check; enough to hold some of every version.
const MAX_KEPT: usize = 20_000;

/// What was acknowledged.
#[derive(Default)]
pub(crate) struct History {
    /// Plaintext, ciphertext.
    pub(crate) ciphertexts: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) rotations: u32,
    pub(crate) failures: u32,
    wrong: Vec<String>,
}

/// A running load.
pub(crate) struct Workload {
    stop: Arc<AtomicBool>,
    encrypting: JoinHandle<History>,
    rotating: JoinHandle<(u32, u32)>,
}

impl Workload {
    /// Starts it.
    pub(crate) fn start(playground: &Playground) -> Result<Self> {
        let nodes: Vec<usize> = (1..=playground.nodes).collect();
        let each: Result<Vec<Client>> = nodes
            .iter()
            .map(|node| playground.client("trading-1", &[*node], Retry::None))
            .collect();
        let admin = playground.client("admin", &nodes, Retry::Until(Duration::from_secs(15)))?;
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Self {
            encrypting: tokio::spawn(encrypt(each?, Arc::clone(&stop))),
            rotating: tokio::spawn(rotate(admin, Arc::clone(&stop))),
            stop,
        })
    }

    /// Stops it and returns what was acknowledged.
    pub(crate) async fn stop(self) -> History {
        self.stop.store(true, Ordering::SeqCst);
        let mut history = self.encrypting.await.unwrap_or_default();
        let (rotations, failures) = self.rotating.await.unwrap_or_default();
        history.rotations = rotations;
        history.failures += failures;
        history
    }
}

async fn encrypt(nodes: Vec<Client>, stop: Arc<AtomicBool>) -> History {
    let mut history = History::default();
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
            history.failures += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let ciphertext = answer.into_body().ciphertext.as_slice().to_vec();
        match there
            .decrypt(&DecryptRequest::new(CONTEXT, ciphertext.clone()))
            .await
        {
            Ok(answer) if answer.plaintext.as_slice() == plaintext.as_slice() => {}
            Ok(_) => history
                .wrong
                .push(format!("ciphertext {number} decrypted to something else")),
            Err(_) => history.failures += 1,
        }
        if history.ciphertexts.len() < MAX_KEPT {
            history.ciphertexts.push((plaintext, ciphertext));
        }
    }
    history
}

async fn rotate(admin: Client, stop: Arc<AtomicBool>) -> (u32, u32) {
    let (mut done, mut failed) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        match admin.rotate(CONTEXT, None).await {
            Ok(_) => done += 1,
            Err(_) => failed += 1,
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    (done, failed)
}

impl History {
    /// Decrypts every acknowledged ciphertext on every node; returns what is wrong.
    pub(crate) async fn check(self, playground: &Playground) -> Result<Vec<String>> {
        let mut wrong = self.wrong;
        for node in 1..=playground.nodes {
            let client = playground.client("trading-1", &[node], Retry::None)?;
            for (plaintext, ciphertext) in &self.ciphertexts {
                match client
                    .decrypt(&DecryptRequest::new(CONTEXT, ciphertext.clone()))
                    .await
                {
                    Ok(answer) if answer.plaintext.as_slice() == plaintext.as_slice() => {}
                    Ok(_) => wrong.push(format!("node {node}: {} is another plaintext", text(plaintext))),
                    Err(error) => wrong.push(format!("node {node}: {}: {error}", text(plaintext))),
                }
            }
        }
        Ok(wrong)
    }
}

fn text(plaintext: &[u8]) -> String {
    String::from_utf8_lossy(plaintext).into_owned()
}
