//! The node's slots: opens what is configured, judges what may keep the node from starting, and
//! watches over the open ones. A slot's failure is that slot's alone.

mod entry;
mod marker;
mod open;
mod uses;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use raft_store::names::SlotName;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

pub use self::entry::{Probe, SlotEntry};
use self::open::label_key;
pub use self::open::{OpenFailure, Unlock};
pub use self::uses::{Total, Uses};
use crate::config::Hsm;

/// Why the node does not start: a slot that was never ready here cannot be opened, or two slots are one.
#[derive(Debug, thiserror::Error)]
#[error("config: {key}: {value}: {problem}")]
pub struct SlotStartError {
    /// The configuration key to correct.
    pub key: String,
    /// Its value; never a secret.
    pub value: String,
    /// What is wrong, with the remedy.
    pub problem: String,
    /// A restart only helps once a PIN has changed: a supervisor must not try in a loop.
    pub about_pin: bool,
}

/// Within this every slot that answers is open: a login derives a key from the PIN, a first start makes
/// nothing yet.
const OPEN_WITHIN: Duration = Duration::from_secs(15);

/// All configured slots.
pub struct SlotManager {
    entries: BTreeMap<SlotName, Arc<SlotEntry>>,
}

impl SlotManager {
    /// Opens every slot, v1's single one or many. Blocks for as long as the tokens take.
    ///
    /// # Errors
    /// For a slot this store never saw ready, whatever keeps it from opening; always, two slots that
    /// are one token. A slot that was ready before starts closed, loudly, and is tried again.
    pub fn open(hsm: &Hsm, data_dir: &Path) -> Result<Arc<Self>, SlotStartError> {
        let dir = marker::make_dir(data_dir).map_err(|error| SlotStartError {
            key: "data_dir".to_owned(),
            value: data_dir.display().to_string(),
            problem: format!("the folder of slot markers cannot be made: {error}; make it writable"),
            about_pin: false,
        })?;
        let mut entries: BTreeMap<SlotName, Arc<SlotEntry>> = BTreeMap::new();
        for config in &hsm.slots {
            let entry = Arc::new(SlotEntry::new(config.clone(), dir.clone()));
            if let Err(failure) = open_in_time(&entry, OPEN_WITHIN) {
                refuse_same_token(&entries, &entry, failure.owned_here(), hsm.legacy)?;
                judge(&entry, &failure, hsm.legacy)?;
            }
            if let Some(slot) = entry.handle() {
                refuse_same_token(&entries, &entry, Some(slot.serial()), hsm.legacy)?;
            }
            entries.insert(config.name.clone(), entry);
        }
        Ok(Arc::new(Self { entries }))
    }

    /// All slots, in the order of their names.
    pub fn entries(&self) -> impl Iterator<Item = &Arc<SlotEntry>> {
        self.entries.values()
    }

    /// The slot of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<SlotEntry>> {
        self.entries.get(name)
    }

    /// The names of all slots.
    pub fn names(&self) -> Vec<SlotName> {
        self.entries.keys().cloned().collect()
    }

    /// SHA-256 of each slot's own public key, for people to compare at join; the reason where the
    /// token cannot say. Makes the key pair where there is none yet, which takes seconds. Blocks.
    pub fn fingerprints(&self) -> Vec<(SlotName, Result<[u8; 32], String>)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.clone(), fingerprint(entry)))
            .collect()
    }

    /// Starts the watch over every slot: known-answer tests, and new attempts for closed ones. Ends
    /// with `shutdown`.
    pub fn watch(&self, shutdown: &tokio::sync::watch::Receiver<bool>) -> Vec<JoinHandle<()>> {
        let start = |entry: &Arc<SlotEntry>| tokio::spawn(watch::run(Arc::clone(entry), shutdown.clone()));
        self.entries.values().map(start).collect()
    }
}

/// Opens a slot on a thread of its own, which is left behind if the token hangs: then the node starts
/// without the slot, and takes it when it comes.
fn open_in_time(entry: &Arc<SlotEntry>, limit: Duration) -> Result<(), OpenFailure> {
    let (opened, outcome) = sync_channel(1);
    let opening = Arc::clone(entry);
    let started = std::thread::Builder::new()
        .name(format!("open-{}", entry.name()))
        .spawn(move || opened.send(opening.open()));
    if let Err(error) = started {
        tracing::error!(slot = entry.name().as_str(), %error, "no thread to open the slot on");
        return entry.open();
    }
    match outcome.recv_timeout(limit) {
        Ok(outcome) => outcome,
        Err(_) => {
            entry.hangs();
            Err(OpenFailure::Hangs)
        }
    }
}

fn fingerprint(entry: &SlotEntry) -> Result<[u8; 32], String> {
    let Some(slot) = entry.handle() else {
        return Err(entry.reason().unwrap_or_default());
    };
    match slot.node_key() {
        Ok(spki) => Ok(Sha256::digest(&spki).into()),
        Err(error) => Err(error.to_string()),
    }
}

/// A slot that was ready here may fail alone; one that never was keeps the node from starting.
fn judge(entry: &SlotEntry, failure: &OpenFailure, legacy: bool) -> Result<(), SlotStartError> {
    let marker = entry.marker();
    match marker.read() {
        Ok(Some(_)) => {
            tracing::error!(
                slot = entry.name().as_str(),
                state = entry.state().name(),
                reason = %failure,
                "slot does not open; the node starts without it and goes on trying"
            );
            Ok(())
        }
        Ok(None) => {
            let (key, value) = failure.blame(entry.config(), legacy);
            // Errors of secrets begin with the key already.
            let problem = failure.to_string();
            let problem = problem
                .strip_prefix(&format!("{key}: "))
                .unwrap_or(&problem)
                .to_owned();
            Err(SlotStartError {
                key,
                value,
                problem,
                about_pin: failure.is_about_pin(),
            })
        }
        Err(error) => Err(SlotStartError {
            key: "data_dir".to_owned(),
            value: marker.path().display().to_string(),
            problem: format!("cannot be read: {error}; make it readable"),
            about_pin: false,
        }),
    }
}

/// Refuses a token that another slot has: which of them would import a key is undefined.
fn refuse_same_token(
    entries: &BTreeMap<SlotName, Arc<SlotEntry>>,
    entry: &SlotEntry,
    serial: Option<&str>,
    legacy: bool,
) -> Result<(), SlotStartError> {
    let Some(serial) = serial else { return Ok(()) };
    let same = |other: &&Arc<SlotEntry>| {
        other.handle().is_some_and(|slot| {
            let config = (entry.config(), other.config());
            let alike = config.0.pkcs11_lib == config.1.pkcs11_lib || config.0.label == config.1.label;
            // Tokens of different makers may have one serial number.
            slot.serial() == serial && alike
        })
    };
    match entries.values().find(same) {
        None => Ok(()),
        Some(other) => Err(SlotStartError {
            key: label_key(entry.config(), legacy),
            value: entry.label().to_owned(),
            problem: format!(
                "is token {serial}, which hsm.slots.{} has already; give each slot a token of its own",
                other.name()
            ),
            about_pin: false,
        }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn hsm(names: &[&str]) -> Hsm {
        Hsm {
            slots: names.iter().map(|name| open::tests::config(name)).collect(),
            bindings: BTreeMap::new(),
            max_versions: 3,
            cleanup_after_days: 30,
            legacy: false,
        }
    }

    #[test]
    fn a_slot_that_was_never_ready_keeps_the_node_from_starting() {
        let data = tempfile::tempdir().unwrap();
        let error = SlotManager::open(&hsm(&["a"]), data.path())
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.starts_with("config: hsm.slots.a.pkcs11_lib: /nonexistent/libhsm.so: "),
            "{error}"
        );
    }

    #[test]
    fn a_slot_that_was_ready_before_starts_failed_and_the_node_is_up() {
        let data = tempfile::tempdir().unwrap();
        let dir = marker::make_dir(data.path()).unwrap();
        for name in ["a", "b"] {
            marker::ReadyMarker::of(&dir, &SlotName::new(name).unwrap())
                .write("1")
                .unwrap();
        }
        let slots = SlotManager::open(&hsm(&["a", "b"]), data.path()).ok().unwrap();
        assert_eq!(slots.names().len(), 2);
        let entry = slots.get("a").unwrap();
        assert_eq!(entry.state().name(), "failed");
        assert!(slots.fingerprints().iter().all(|(_, print)| print.is_err()));
    }

    #[test]
    fn one_slot_that_was_ready_does_not_excuse_another_that_never_was() {
        let data = tempfile::tempdir().unwrap();
        let dir = marker::make_dir(data.path()).unwrap();
        marker::ReadyMarker::of(&dir, &SlotName::new("a").unwrap())
            .write("1")
            .unwrap();
        let error = SlotManager::open(&hsm(&["a", "b"]), data.path()).err().unwrap();
        assert!(error.key.starts_with("hsm.slots.b."), "{error}");
    }
}
