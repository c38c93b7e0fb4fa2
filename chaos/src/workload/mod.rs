//! What clients do while everything breaks: encrypt and decrypt throughout, make and end key versions, change access, repeat
//! themselves. Each operation is written down when it begins and when it is over. Clients are many and slow: two cores carry
//! the nodes too, and what is tried is faults, not load.

pub mod access;
mod blind;
mod clients;
mod data;
mod keys;

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use clients::{Clients, Opened, Sealed};

use crate::cluster::Cluster;
use crate::history::Recorder;
use crate::random::Random;

/// What is encrypted in.
pub const CONTEXTS: [&str; 3] = ["exchange-key", "2fa", "order-key"];
/// Those of them that a playground has made a key in before a run begins. The other one gets its first from the client that ends
/// its versions.
pub(crate) const KEYED: [&str; 2] = [CONTEXTS[0], CONTEXTS[1]];
/// Whose versions are taken out of use, and destroyed long before they are old.
pub(crate) const SHORT_LIVED: &str = "order-key";
/// Placed in every node's configuration, and made only during a run.
pub(crate) const NEW: [&str; 4] = ["chaos-1", "chaos-2", "chaos-3", "chaos-4"];
/// From the word to stop until every client has heard its last answer.
const ENDED: Duration = Duration::from_secs(60);

/// The playground's client that may use a context, by the configuration that every cluster begins with.
#[must_use]
pub fn client_of(context: &str) -> &'static str {
    if context == "2fa" { "2fa-1" } else { "trading-1" }
}

/// A node's configuration for a run: destructions that wait for a second only, and places for contexts that do not exist
/// yet. Where the playground writes another text, what is not found is left as it is.
#[must_use]
pub fn configured(config: &str) -> String {
    let (old, new) = ("[exchange-key, order-key]", NEW.join(", "));
    let placed = format!("[exchange-key, order-key, {new}]");
    let key = |context: &str| format!("    \"{context}\": {{type: aes, mode: shared}}\n");
    let keys: String = ["order-key"]
        .iter()
        .chain(&NEW)
        .map(|context| key(context))
        .collect();
    config
        .replace(old, &placed)
        .replacen(&key("order-key"), &keys, 1)
        .replacen("logging:", "keys: {destroy: {min_wait_seconds: 1}}\nlogging:", 1)
}

/// A client's own part of a workload.
struct Worker {
    clients: Clients,
    process: u32,
    random: Random,
    stopped: watch::Receiver<bool>,
}

impl Worker {
    /// So long, or until all is over: then false.
    async fn pause(&mut self, from_ms: u64, to_ms: u64) -> bool {
        let pause = Duration::from_millis(from_ms + self.random.below(to_ms - from_ms + 1));
        tokio::time::timeout(pause, told(&mut self.stopped))
            .await
            .is_err()
    }

    fn goes_on(&self) -> bool {
        !*self.stopped.borrow()
    }

    /// One of several.
    fn one_of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        let place = self.random.below((all.len() as u64).max(1));
        all.get(usize::try_from(place).ok()?).copied()
    }

    /// A node that runs.
    fn node(&mut self) -> u32 {
        let running = self.clients.running();
        self.one_of(&running).unwrap_or(1)
    }

    /// Once in so many.
    fn once_in(&mut self, many: u64) -> bool {
        self.random.below(many) == 0
    }
}

/// Until somebody says that it is over.
pub(crate) async fn told(stopped: &mut watch::Receiver<bool>) {
    // Whoever would say so is gone, if this fails.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Running clients.
pub struct Workload {
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Workload {
    /// Starts all clients. What they do follows from the seed and from what they are answered.
    ///
    /// # Errors
    /// Certificates of the playground that cannot be read.
    pub async fn start(cluster: &Cluster, seed: u64, recorder: &Recorder) -> Result<Self> {
        let clients = Clients::of(cluster, recorder)?;
        let (stop, stopped) = watch::channel(false);
        let mut workload = Self {
            stop,
            clients: JoinSet::new(),
        };
        let worker = |process: u32| Worker {
            clients: clients.clone(),
            process,
            random: Random::new(seed.wrapping_mul(1000).wrapping_add(process.into())),
            stopped: stopped.clone(),
        };
        let running = &mut workload.clients;
        running.spawn(data::work(worker(1)));
        running.spawn(data::work(worker(2)));
        running.spawn(keys::rotate(worker(10), CONTEXTS[0], 6_000));
        running.spawn(keys::rotate(worker(11), CONTEXTS[0], 14_000));
        running.spawn(keys::rotate(worker(12), CONTEXTS[1], 10_000));
        running.spawn(keys::read(worker(13), CONTEXTS[0]));
        running.spawn(keys::read(worker(14), CONTEXTS[1]));
        running.spawn(keys::live(worker(15), SHORT_LIVED));
        running.spawn(keys::create(worker(17)));
        running.spawn(keys::trim(worker(16)));
        running.spawn(access::change(worker(20)));
        running.spawn(access::change(worker(21)));
        running.spawn(access::revoke(worker(22)));
        running.spawn(blind::repeat(worker(30), CONTEXTS[0]));
        Ok(workload)
    }

    /// Stops them; returns when each has heard its last answer.
    ///
    /// # Errors
    /// A client that has panicked, has ended before, or does not end: what it would have found is not known.
    pub async fn stop(mut self) -> Result<()> {
        // Nobody has told it to.
        let early = self.clients.try_join_next();
        self.stop.send_replace(true);
        let ended = async {
            while let Some(ended) = self.clients.join_next().await {
                ended.map_err(|error| anyhow!("a client: {error}"))?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(ENDED, ended)
            .await
            .with_context(|| format!("clients still wait after {ENDED:?}"))??;
        let Some(early) = early else { return Ok(()) };
        early.map_err(|error| anyhow!("a client: {error}"))?;
        bail!("a client has ended before it was told to")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_ends_before_it_is_told_to_is_trouble() {
        for early in [false, true] {
            let (stop, mut stopped) = watch::channel(false);
            let mut clients = JoinSet::new();
            clients.spawn(async move { told(&mut stopped).await });
            if early {
                let silent = clients.spawn(async {});
                while !silent.is_finished() {
                    tokio::task::yield_now().await;
                }
            }
            let ended = Workload { stop, clients }.stop().await;
            assert_eq!(ended.is_err(), early, "{ended:?}");
        }
    }

    #[test]
    fn a_playgrounds_configuration_gets_the_shortest_wait_and_places_for_new_contexts() {
        let before = "\
hsm:
  slots:
    \"exchange\": {label: slot-exchange, contexts: [exchange-key, order-key]}
  keys:
    \"order-key\": {type: aes, mode: shared}
    \"2fa\": {type: aes, mode: private}
acl:
  mappings:
    Trading: [exchange-key, order-key]
logging: {level: info}
";
        let after = "\
hsm:
  slots:
    \"exchange\": {label: slot-exchange, contexts: [exchange-key, order-key, chaos-1, chaos-2, chaos-3, chaos-4]}
  keys:
    \"order-key\": {type: aes, mode: shared}
    \"chaos-1\": {type: aes, mode: shared}
    \"chaos-2\": {type: aes, mode: shared}
    \"chaos-3\": {type: aes, mode: shared}
    \"chaos-4\": {type: aes, mode: shared}
    \"2fa\": {type: aes, mode: private}
acl:
  mappings:
    Trading: [exchange-key, order-key, chaos-1, chaos-2, chaos-3, chaos-4]
keys: {destroy: {min_wait_seconds: 1}}
logging: {level: info}
";
        assert_eq!(configured(before), after);
    }

    #[test]
    fn every_context_has_its_client() {
        let clients: Vec<&str> = CONTEXTS.iter().map(|context| client_of(context)).collect();
        assert_eq!(clients, ["trading-1", "2fa-1", "trading-1"]);
        assert!(CONTEXTS.contains(&SHORT_LIVED));
        assert!(!KEYED.contains(&SHORT_LIVED), "its first key is made in a run");
    }
}
