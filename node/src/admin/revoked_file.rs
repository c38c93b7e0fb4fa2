//! `acl.revoked_file` while the node runs. Version 1 looked at it every 30 s, and whoever writes a name into it means it
//! now: any node has the cluster add what stands in its own file. Only ever added: an entry that is taken out, or a
//! file that is deleted, takes nothing back. What cannot be used is said once and passed over: nothing in the
//! file stops a node that has a cluster.

mod pending;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use raft_store::state::access::RevocationKey;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;

use self::pending::Pending;
use super::seed;
use super::seeding::missing;
use crate::config::{ConfigError, parse_revoked, read_revoked};
use crate::rotation::cluster::Cluster;

/// Before what was not added is tried again, and between looks for a cluster to add it to.
const AGAIN: Duration = Duration::from_millis(250);
/// Before a file that has changed is looked at once more, to see whether it stands still.
const SETTLED: Duration = Duration::from_millis(250);
/// Entries that cannot be used, and unknown issuers, that are named one by one.
const NAMED: usize = 20;

/// A revocation and its reason.
pub type Entry = (RevocationKey, String);

/// What stands in the file, as it was read last. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Listed(Arc<ArcSwap<Vec<Entry>>>);

impl Listed {
    /// As of now.
    #[must_use]
    pub fn load(&self) -> Arc<Vec<Entry>> {
        self.0.load_full()
    }

    pub(crate) fn set(&self, entries: Vec<Entry>) {
        self.0.store(Arc::new(entries));
    }
}

impl FromIterator<Entry> for Listed {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        let listed = Self::default();
        listed.set(entries.into_iter().collect());
        listed
    }
}

/// What was found at a look: nothing is done or said twice for the same.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    /// SHA-256 of the text.
    Text([u8; 32]),
    Missing,
    /// The operating system's reason.
    Unreadable(String),
}

impl Seen {
    fn of(read: &std::io::Result<String>) -> Self {
        match read {
            Ok(text) => Self::Text(Sha256::digest(text).into()),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::Missing,
            Err(error) => Self::Unreadable(error.to_string()),
        }
    }
}

/// What a look has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    AsItWas,
    /// It is another than it was, and may be in the middle of being written.
    Unsettled,
    /// What is new in it counts.
    Changed,
}

/// The file. See the module.
#[derive(Clone, Debug)]
pub struct RevokedFile {
    path: PathBuf,
    /// Between looks.
    every: Duration,
    /// The CAs that a serial number without an issuer may be of.
    issuers: Vec<String>,
    listed: Listed,
    seen: Seen,
    /// What was found at the last look, if that was not [`Self::seen`].
    newer: Option<Seen>,
}

impl RevokedFile {
    /// Reads the file for the start of the node. One that is not there lists nothing. What is wrong with it is for
    /// [`super::Seed::check_revoked`] to judge.
    #[must_use]
    pub fn open(path: &Path, every: Duration, issuers: &[String]) -> (Self, Faults) {
        let read = read_revoked(path);
        let seen = Seen::of(&read);
        let usable = match read {
            Ok(text) => Usable::of(&text, path, issuers),
            Err(_) if seen == Seen::Missing => Ok(Usable::default()),
            Err(error) => Err(unreadable(path, &error)),
        };
        let (entries, faults) = match usable {
            Ok(Usable { entries, faults }) => (entries, faults),
            Err(error) => (Vec::new(), Faults::Whole(error)),
        };
        say_foreign(path, &entries, issuers);
        let file = Self {
            path: path.to_owned(),
            every,
            issuers: issuers.to_vec(),
            listed: entries.into_iter().collect(),
            seen,
            newer: None,
        };
        (file, faults)
    }

    /// What stands in it.
    #[must_use]
    pub fn listed(&self) -> Listed {
        self.listed.clone()
    }

    /// What of it is to be added: nothing while another text is there that has not settled. Whoever takes an entry out
    /// and takes its revocation back must not find it revoked again by the text before.
    fn counting(&self) -> Arc<Vec<Entry>> {
        match self.newer {
            Some(_) => Arc::default(),
            None => self.listed.load(),
        }
    }

    /// Its path, if it was not there at the last look.
    #[must_use]
    pub fn missing(&self) -> Option<&Path> {
        (self.seen == Seen::Missing).then_some(self.path.as_path())
    }

    /// Looks at it again. What is new in it counts once it is found twice: half of a name is another name, and whom it
    /// revokes stays revoked. Before there is a cluster a list that is gone still counts: nothing else has it.
    async fn look(&mut self, is_founded: bool) -> Look {
        let Some((seen, read)) = self.read().await else {
            return Look::AsItWas;
        };
        let found_before = self.newer.take();
        if seen == self.seen {
            return Look::AsItWas;
        }
        if found_before.as_ref() != Some(&seen) {
            self.newer = Some(seen);
            return Look::Unsettled;
        }
        match read {
            Ok(text) => self.take(text).await,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::warn!(
                    "configuration: acl.revoked_file: {} is not there any more; what it has said stays revoked",
                    self.path.display()
                );
                if is_founded {
                    self.listed.set(Vec::new());
                }
            }
            Err(error) => tracing::warn!("{}", left_as_it_was(&unreadable(&self.path, &error))),
        }
        self.seen = seen;
        Look::Changed
    }

    async fn read(&self) -> Option<(Seen, std::io::Result<String>)> {
        let path = self.path.clone();
        let read = move || {
            let read = read_revoked(&path);
            (Seen::of(&read), read)
        };
        tokio::task::spawn_blocking(read).await.ok()
    }

    /// Takes what can be used of a new text. A long one is taken apart in a thread that nobody's request waits for.
    async fn take(&self, text: String) {
        let (path, issuers) = (self.path.clone(), self.issuers.clone());
        let usable = tokio::task::spawn_blocking(move || Usable::of(&text, &path, &issuers)).await;
        let Usable { entries, faults } = match usable {
            Ok(Ok(usable)) => usable,
            Ok(Err(error)) => {
                tracing::warn!("{}", left_as_it_was(&error));
                return;
            }
            // The process ends, or says why it does.
            Err(_) => return,
        };
        faults.warn();
        say_foreign(&self.path, &entries, &self.issuers);
        tracing::info!(
            entries = entries.len(),
            useless = faults.useless(),
            "configuration: acl.revoked_file: {} was read again",
            self.path.display()
        );
        self.listed.set(entries);
    }
}

/// What is wrong with a file.
#[derive(Debug)]
pub enum Faults {
    /// Some of its entries.
    Entries {
        /// How many.
        useless: usize,
        /// The first of them, each with what to write.
        named: Vec<ConfigError>,
    },
    /// It cannot be read at all.
    Whole(ConfigError),
}

impl Default for Faults {
    fn default() -> Self {
        Self::Entries {
            useless: 0,
            named: Vec::new(),
        }
    }
}

impl Faults {
    fn useless(&self) -> usize {
        match self {
            Self::Entries { useless, .. } => *useless,
            Self::Whole(_) => 0,
        }
    }

    fn add(&mut self, error: ConfigError) {
        if let Self::Entries { useless, named } = self {
            *useless += 1;
            if named.len() < NAMED {
                named.push(error);
            }
        }
    }

    /// Says them, where they stop nothing.
    pub(super) fn warn(&self) {
        match self {
            Self::Entries { named, .. } => {
                for error in named {
                    tracing::warn!("{error}; until then it revokes nobody");
                }
            }
            Self::Whole(error) => tracing::warn!(
                "{error}; what it has said before stays revoked, and the node goes on looking for it"
            ),
        }
    }

    /// The first of them, where it stops the start.
    pub(super) fn into_first(self) -> Option<ConfigError> {
        match self {
            Self::Entries { named, .. } => named.into_iter().next(),
            Self::Whole(error) => Some(error),
        }
    }
}

/// What can be used of a text, and what cannot.
#[derive(Default)]
struct Usable {
    entries: Vec<Entry>,
    faults: Faults,
}

impl Usable {
    fn of(text: &str, path: &Path, issuers: &[String]) -> Result<Self, ConfigError> {
        let mut usable = Self::default();
        for entry in parse_revoked(text, path)? {
            match seed::revoked_by(path, entry, issuers) {
                Ok(revoked) => usable.entries.extend(revoked),
                Err(error) => usable.faults.add(error),
            }
        }
        Ok(usable)
    }
}

/// Says which issuers stand in no file of CAs: what is misspelt revokes nobody.
fn say_foreign(path: &Path, entries: &[Entry], issuers: &[String]) {
    for issuer in seed::foreign_issuers(entries, issuers).into_iter().take(NAMED) {
        tracing::warn!(
            issuer,
            "configuration: acl.revoked_file: {}: names an issuer that is none of the configured client CAs; this is \
             right for an intermediate CA only",
            path.display()
        );
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> ConfigError {
    ConfigError::invalid(
        "acl.revoked_file",
        path.display(),
        format!("cannot be read: {error}"),
        "give a file that this user may read",
    )
}

fn left_as_it_was(error: &ConfigError) -> String {
    format!("{error}; the list is left as it was read before")
}

/// Whether the cluster takes this node's word. It does not of one that has only registered.
fn is_member(cluster: &dyn Cluster) -> bool {
    let published = cluster.published();
    let node = cluster.raft_id().and_then(|id| published.state.nodes().get(&id));
    node.is_some_and(|node| node.is_member())
}

/// Looks at the file and adds what is new in it, until the consensus of this node ends.
pub async fn drive(cluster: Arc<dyn Cluster>, mut file: RevokedFile) {
    let mut ended = cluster.applied();
    let mut pending = Pending::default();
    // It was read a moment ago.
    let mut due = Instant::now() + file.every;
    loop {
        let done = step(&*cluster, &mut file, &mut pending, &mut due).await;
        let pause = if done {
            due
        } else {
            due.min(Instant::now() + AGAIN)
        };
        if tokio::time::timeout_at(pause, end(&mut ended)).await.is_ok() {
            return;
        }
    }
}

/// Looks at the file if that is due, and adds what is new in it. False: it is to be tried again soon.
async fn step(
    cluster: &dyn Cluster,
    file: &mut RevokedFile,
    pending: &mut Pending,
    due: &mut Instant,
) -> bool {
    let now = Instant::now();
    if now >= *due {
        let is_founded = cluster.published().state.meta().is_some();
        let look = file.look(is_founded).await;
        if look == Look::Changed {
            pending.anew(file.missing().is_some());
        }
        let until_next = match look {
            Look::Unsettled => SETTLED,
            Look::AsItWas | Look::Changed => file.every,
        };
        *due = now + until_next;
    }
    pass(cluster, &file.counting(), pending).await
}

/// One attempt. False: it is to be tried again soon.
async fn pass(cluster: &dyn Cluster, listed: &[Entry], pending: &mut Pending) -> bool {
    if listed.is_empty() && pending.entries.is_empty() || pending.is_held() {
        return true;
    }
    // A founder leads before there is a cluster to add to; its own command brings the first ones.
    if !is_member(cluster) {
        return false;
    }
    pending.take(missing(listed, &cluster.published().state));
    pending.entries.is_empty() || pending.add(cluster).await
}

async fn end(applied: &mut watch::Receiver<u64>) {
    while applied.changed().await.is_ok() {}
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "revoked_file_tests.rs"]
mod tests;
