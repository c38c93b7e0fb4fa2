//! Looks at every node again and again while the run goes on: is it ready, can it use what another one has just encrypted, and, by
//! turns, what was encrypted under earlier versions, how far is it, what does its state look like? What it sees it writes down; what that means is judged later.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cluster_tests::{Identity, Node, Pki};
use hsm_api::Client;
use hsm_api::admin::{ClusterStatus, NodeRole};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use tokio::sync::watch as signal;
use tokio::task::{JoinHandle, JoinSet};

use super::{ends, observe};
use crate::cluster::Cluster;
use crate::history::{Held, Probe, Recorder, Sample, Seen, plaintext};
use crate::workload::{CONTEXTS, client_of, told};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(200);
/// A node that is stopped answers nothing; one look must not wait for it for long.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Of a node that does not know a version yet: as docs/errors.md has it.
const AGAIN: Duration = Duration::from_secs(1);
const A_MOMENT: Duration = Duration::from_millis(100);
/// Of so many versions a ciphertext is kept.
const KEPT: usize = 64;
/// Places in [`CONTEXTS`], one for each look: the first one rotates most, and what is wrong with its versions may be over with
/// the next look.
const TURNS: &[usize] = &[0, 1, 0, 2];

/// What was said by all that were asked. Those that are asked while the run ends say nothing.
async fn answers<T: 'static>(mut asked: JoinSet<T>) -> Vec<T> {
    let mut all = Vec::with_capacity(asked.len());
    while let Some(one) = asked.join_next().await {
        match one {
            Ok(answer) => all.push(answer),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {}
        }
    }
    all
}

/// A running watch.
pub struct Watch {
    stop: signal::Sender<bool>,
    looking: JoinHandle<Result<()>>,
    following: JoinHandle<()>,
}

impl Watch {
    /// Ends it.
    ///
    /// # Errors
    /// It has failed, or panicked, before.
    pub async fn stop(self) -> Result<()> {
        self.stop.send_replace(true);
        self.following.await.context("the watch over processes")?;
        self.looking.await.context("the watch")?
    }
}

/// Begins to look. Nodes that join later are looked at too.
pub fn watch(cluster: &Cluster, recorder: &Recorder) -> Watch {
    begin(cluster, recorder, TURNS)
}

/// The same where only the first of [`CONTEXTS`] is used: every look is for it.
pub(crate) fn watch_first(cluster: &Cluster, recorder: &Recorder) -> Watch {
    begin(cluster, recorder, &[0])
}

fn begin(cluster: &Cluster, recorder: &Recorder, turns: &'static [usize]) -> Watch {
    let (stop, mut stopped) = signal::channel(false);
    let (pki, recorder) = (cluster.playground().pki(), recorder.clone());
    // Whoever is not there yet is silent.
    let nodes: Vec<Node> = (1..=cluster.most())
        .map(|number| cluster.playground().node(number))
        .collect();
    let following = tokio::spawn(ends::follow(nodes.clone(), recorder.clone(), stopped.clone()));
    let looking = tokio::spawn(async move {
        let mut look = Look::new(&pki, nodes, recorder, turns)?;
        while !*stopped.borrow() {
            look.once().await;
            // Either way there is nothing else to wait for.
            let _ = tokio::time::timeout(EVERY, told(&mut stopped)).await;
        }
        anyhow::Ok(())
    });
    Watch {
        stop,
        looking,
        following,
    }
}

/// A node as the watch asks it.
#[derive(Clone)]
struct Target {
    node: Node,
    admin: Client,
    /// One for each of [`CONTEXTS`].
    clients: Vec<Client>,
}

struct Look {
    targets: Vec<Target>,
    recorder: Recorder,
    round: usize,
    /// See [`TURNS`].
    turns: &'static [usize],
    /// Of each version one, for as long as it decrypts.
    kept: Vec<Sealed>,
}

/// What is to be decrypted.
#[derive(Clone)]
struct Sealed {
    place: usize,
    made_on: u32,
    version: u32,
    number: u64,
    request: DecryptRequest,
}

impl Look {
    fn new(pki: &Pki, nodes: Vec<Node>, recorder: Recorder, turns: &'static [usize]) -> Result<Self> {
        let admin = pki.identity("admin")?;
        let mut targets = Vec::new();
        for node in nodes {
            let client = |who: &Identity| pki.client_waiting(PATIENCE, true, Some(who), &[node.endpoint()]);
            let clients = CONTEXTS
                .iter()
                .map(|context| client(&pki.identity(client_of(context))?));
            targets.push(Target {
                admin: client(&admin)?,
                clients: clients.collect::<Result<_>>()?,
                node,
            });
        }
        Ok(Self {
            targets,
            recorder,
            round: 0,
            turns,
            kept: Vec::new(),
        })
    }

    async fn once(&mut self) {
        self.round += 1;
        let began = self.recorder.now();
        let known = self.recorder.highest_index();
        let ready = self.ready().await;
        let sealed = self.seal(&ready).await;
        let older = self.older(&ready);
        if let Some(sealed) = &sealed {
            self.keep(sealed);
        }
        let at = self.recorder.now();
        let mut asked = JoinSet::new();
        for (target, (pid, was_ready)) in self.targets.iter().cloned().zip(ready) {
            let (recorder, sealed) = (self.recorder.clone(), sealed.clone());
            let meant = older.as_ref().filter(|(node, _)| *node == target.node.number);
            let older = meant.map(|(_, older)| older.clone());
            asked.spawn(async move {
                let asked_for = (sealed.as_ref(), older.as_ref());
                see(&target, pid, was_ready, asked_for, &recorder).await
            });
        }
        let mut nodes = answers(asked).await;
        nodes.sort_by_key(|seen| seen.node);
        if let Some((_, older)) = &older
            && nodes.iter().any(|seen| is_out_of_use(&seen.older))
        {
            self.kept
                .retain(|kept| (kept.place, kept.version) != (older.place, older.version));
        }
        let probe = |sealed: Sealed| Probe {
            context: CONTEXTS[sealed.place].to_owned(),
            version: sealed.version,
            made_on: sealed.made_on,
            at,
        };
        self.recorder.sample(Sample {
            began,
            known,
            probe: sealed.map(probe),
            older: older.map(|(_, older)| probe(older)),
            nodes,
        });
    }

    /// What is beyond [`KEPT`] takes the place of any other.
    fn keep(&mut self, sealed: &Sealed) {
        let is_it = |kept: &Sealed| (kept.place, kept.version) == (sealed.place, sealed.version);
        if self.kept.iter().any(is_it) {
            return;
        }
        if self.kept.len() >= KEPT {
            self.kept.swap_remove(self.round % KEPT);
        }
        self.kept.push(sealed.clone());
    }

    /// A ciphertext of a version that was replaced, and who is asked for it: one of the nodes that are ready. Both by turns.
    fn older(&self, ready: &[(Option<i32>, bool)]) -> Option<(u32, Sealed)> {
        let is_replaced = |one: &&Sealed| {
            let mut kept = self.kept.iter();
            kept.any(|other| other.place == one.place && other.version > one.version)
        };
        let older: Vec<&Sealed> = self.kept.iter().filter(is_replaced).collect();
        let all = self.targets.iter().zip(ready);
        let ready: Vec<u32> = all
            .filter(|(_, (_, ready))| *ready)
            .map(|(target, _)| target.node.number)
            .collect();
        let node = ready.get(self.round % ready.len().max(1))?;
        let sealed = older.get(self.round / ready.len() % older.len().max(1))?;
        Some((*node, (*sealed).clone()))
    }

    /// Of each node its process, and whether it is ready; of all at once, because one that is stopped answers late.
    async fn ready(&self) -> Vec<(Option<i32>, bool)> {
        let mut asked = JoinSet::new();
        for (place, target) in self.targets.iter().enumerate() {
            let node = target.node.clone();
            asked.spawn(async move {
                let pid = node.pid();
                (place, pid, pid.is_some() && node.is_ready().await)
            });
        }
        let mut ready = answers(asked).await;
        ready.sort_unstable();
        ready.into_iter().map(|(_, pid, ready)| (pid, ready)).collect()
    }

    /// Encrypts on one of the nodes that are ready, and after a round of contexts on another one.
    async fn seal(&self, ready: &[(Option<i32>, bool)]) -> Option<Sealed> {
        let all = self.targets.iter().zip(ready);
        let ready: Vec<&Target> = all
            .filter(|(_, (_, ready))| *ready)
            .map(|(target, _)| target)
            .collect();
        let place = self.turns[self.round % self.turns.len()];
        let target = ready.get(self.round / self.turns.len() % ready.len().max(1))?;
        let number = self.recorder.number();
        let text = plaintext(self.recorder.marker(), number);
        let request = EncryptRequest::new(CONTEXTS[place], text.into_bytes());
        let answer = target.clients[place].encrypt(&request).await.ok()?;
        // One that has lost the others may go on with what was active then.
        (!answer.meta.stale).then(|| Sealed {
            place,
            made_on: target.node.number,
            version: answer.key_version,
            number,
            request: DecryptRequest::new(CONTEXTS[place], answer.ciphertext.clone()),
        })
    }
}

async fn see(
    target: &Target,
    pid: Option<i32>,
    was_ready: bool,
    (sealed, older): (Option<&Sealed>, Option<&Sealed>),
    recorder: &Recorder,
) -> Seen {
    let sealed = sealed.filter(|sealed| pid.is_some() && sealed.made_on != target.node.number);
    // Both at once: a look is to be short.
    let (held, older) = tokio::join!(
        held(target, sealed, recorder.marker()),
        held(target, older, recorder.marker())
    );
    let status = match pid {
        Some(_) => target
            .admin
            .cluster_status()
            .await
            .ok()
            .map(hsm_api::client::Answer::into_body),
        None => None,
    };
    // In this order: the index is not newer than the readiness that it is held against.
    let is_ready = was_ready && target.node.is_ready().await;
    let digest = match pid {
        Some(_) => observe::digest(&target.node).await,
        None => None,
    };
    if let Some(status) = &status {
        recorder.saw_index(status.applied_index);
    }
    // What another process says is not this one's.
    let same = target.node.pid() == pid;
    let status = status.filter(|_| same);
    Seen {
        node: target.node.number,
        pid,
        ready: is_ready && same,
        index: status.as_ref().map(|status| status.applied_index),
        held,
        older,
        digest,
        term: status.as_ref().map(|status| status.term),
        leads: status.as_ref().is_some_and(leads),
    }
}

fn leads(status: &ClusterStatus) -> bool {
    status.role == NodeRole::Leader
}

/// Whether this says that nobody decrypts it any more.
fn is_out_of_use(held: &Held) -> bool {
    let gone = [
        "key_version_disabled",
        "key_version_destroyed",
        "unknown_key_version",
    ];
    matches!(held, Held::Refused { code } if gone.contains(&code.as_str()))
}

/// A node may hear of a version a moment after it holds its key, and says so: it is asked again before it is believed.
async fn held(target: &Target, sealed: Option<&Sealed>, marker: &str) -> Held {
    let Some(sealed) = sealed else {
        return Held::NotAsked;
    };
    let asked = Instant::now();
    let mut said = ask(target, sealed, marker).await;
    while matches!(&said, Held::Refused { code } if code == "key_version_not_ready")
        && asked.elapsed() < AGAIN
    {
        tokio::time::sleep(A_MOMENT).await;
        said = ask(target, sealed, marker).await;
    }
    said
}

async fn ask(target: &Target, sealed: &Sealed, marker: &str) -> Held {
    match target.clients[sealed.place].decrypt(&sealed.request).await {
        Ok(answer) if answer.plaintext.as_slice() == plaintext(marker, sealed.number).as_bytes() => {
            Held::Opened
        }
        Ok(_) => Held::Wrong,
        Err(error) => match error.api() {
            Some(refusal) if !refusal.code_text.is_empty() => Held::Refused {
                code: refusal.code_text.clone(),
            },
            _ => Held::Silent,
        },
    }
}
