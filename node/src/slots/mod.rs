//! The node's slots: opens what is configured, judges what may keep the node from starting, and
//! watches over the open ones. A slot's failure is that slot's alone.

mod entry;
mod marker;
mod open;
mod pin_file;
mod uses;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use raft_store::names::SlotName;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;

pub use self::entry::{Probe, SlotEntry};
pub(crate) use self::open::DAMAGED;
use self::open::label_key;
pub use self::open::{OpenFailure, Unlock};
pub use self::uses::{Total, Uses};
use crate::config::{Hsm, Slot as SlotConfig};

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

/// Within this a slot that answers is open, once its module has loaded and opened those before it: a login derives a
/// key from the PIN, a first start makes nothing yet.
const OPEN_WITHIN: Duration = Duration::from_secs(15);

/// All configured slots.
pub struct SlotManager {
    entries: BTreeMap<SlotName, Arc<SlotEntry>>,
}

impl SlotManager {
    /// Opens every slot, v1's single one or many, all at once. Blocks for as long as the slowest token takes, up to
    /// 15 s after the last answer of another one of its module.
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
        let entry = |config: &SlotConfig| Arc::new(SlotEntry::new(config.clone(), dir.clone()));
        let entries: Vec<Arc<SlotEntry>> = hsm.slots.iter().map(entry).collect();
        let outcomes = open_all(&entries, OPEN_WITHIN, SlotEntry::open);
        admit(&entries, outcomes, hsm.legacy)?;
        let named = |entry: Arc<SlotEntry>| (entry.name().clone(), entry);
        let entries = entries.into_iter().map(named).collect();
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

/// An attempt's slot, by its place, and what came of it.
type Answer = (usize, Result<(), OpenFailure>);

/// Opens every slot on a thread of its own, which is left behind if the token hangs: then the node starts
/// without the slot, and takes it when it comes. A module may do one thing after the other, and is loaded first: each
/// answer of one of its slots gives the others `limit` anew.
fn open_all(
    entries: &[Arc<SlotEntry>],
    limit: Duration,
    open: impl Fn(&SlotEntry) -> Result<(), OpenFailure> + Clone + Send + 'static,
) -> Vec<Result<(), OpenFailure>> {
    let (tell, answers) = sync_channel(entries.len());
    for (place, entry) in entries.iter().enumerate() {
        begin(place, entry, &open, &tell);
    }
    drop(tell);
    let mut outcomes: Vec<Option<Result<(), OpenFailure>>> = entries.iter().map(|_| None).collect();
    let began = Instant::now();
    let mut answered: BTreeMap<&Path, Instant> = BTreeMap::new();
    loop {
        let open = entries
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| outcome.is_none());
        let last = open.map(|(entry, _)| answered.get(module(entry)).copied().unwrap_or(began));
        let Some(last) = last.max() else { break };
        let left = (last + limit).saturating_duration_since(Instant::now());
        let Ok((place, outcome)) = answers.recv_timeout(left) else {
            break;
        };
        if let (Some(entry), Some(slot)) = (entries.get(place), outcomes.get_mut(place)) {
            answered.insert(module(entry), Instant::now());
            *slot = Some(outcome);
        }
    }
    let ended = |(entry, outcome): (&Arc<SlotEntry>, Option<_>)| {
        outcome.unwrap_or_else(|| {
            entry.hangs();
            Err(OpenFailure::Hangs)
        })
    };
    entries.iter().zip(outcomes).map(ended).collect()
}

fn module(entry: &SlotEntry) -> &Path {
    &entry.config().pkcs11_lib
}

fn begin(
    place: usize,
    entry: &Arc<SlotEntry>,
    open: &(impl Fn(&SlotEntry) -> Result<(), OpenFailure> + Clone + Send + 'static),
    answers: &SyncSender<Answer>,
) {
    let (opening, open_it, tell) = (Arc::clone(entry), open.clone(), answers.clone());
    let started = std::thread::Builder::new()
        .name(format!("open-{}", entry.name()))
        .spawn(move || {
            // Nobody waits any longer, if nobody takes it.
            let _ = tell.send((place, open_it(&opening)));
        });
    if let Err(error) = started {
        tracing::error!(slot = entry.name().as_str(), %error, "no thread to open the slot on");
        let _ = answers.send((place, open(entry)));
    }
}

/// The token that the slot has, or that it could not have because another slot of this process does.
fn serial(entry: &SlotEntry, outcome: &Result<(), OpenFailure>) -> Option<String> {
    if let Some(slot) = entry.handle() {
        return Some(slot.serial().to_owned());
    }
    let failure = outcome.as_ref().err()?;
    failure.owned_here().map(str::to_owned)
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

/// Judges the slots together, and then each by itself: of two that are one token the one that came second says only
/// that its token is in use, and which one that is depends on how quick they were.
fn admit(
    entries: &[Arc<SlotEntry>],
    outcomes: Vec<Result<(), OpenFailure>>,
    legacy: bool,
) -> Result<(), SlotStartError> {
    let mut earlier = Vec::with_capacity(entries.len());
    for (entry, outcome) in entries.iter().zip(&outcomes) {
        let serial = serial(entry, outcome);
        refuse_same_token(&earlier, entry, serial.as_deref(), legacy)?;
        earlier.push((Arc::clone(entry), serial));
    }
    for (entry, outcome) in entries.iter().zip(outcomes) {
        if let Err(failure) = outcome {
            judge(entry, &failure, legacy)?;
        }
    }
    Ok(())
}

/// A slot that was ready here may fail alone; one that never was keeps the node from starting.
fn judge(entry: &SlotEntry, failure: &OpenFailure, legacy: bool) -> Result<(), SlotStartError> {
    let marker = entry.marker();
    match marker.read() {
        Ok(Some(_)) => {
            let (key, value) = failure.blame(entry.config(), legacy);
            tracing::error!(
                slot = entry.name().as_str(),
                state = entry.state().name(),
                key,
                value,
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

/// Refuses a token that an earlier slot has too, or wants: which of them would import a key is undefined.
fn refuse_same_token(
    earlier: &[(Arc<SlotEntry>, Option<String>)],
    entry: &SlotEntry,
    serial: Option<&str>,
    legacy: bool,
) -> Result<(), SlotStartError> {
    let Some(serial) = serial else { return Ok(()) };
    let same = |(other, held): &&(Arc<SlotEntry>, Option<String>)| {
        let config = (entry.config(), other.config());
        let alike = config.0.pkcs11_lib == config.1.pkcs11_lib || config.0.label == config.1.label;
        // Tokens of different makers may have one serial number.
        held.as_deref() == Some(serial) && alike
    };
    match earlier.iter().find(same) {
        None => Ok(()),
        Some((other, _)) => Err(SlotStartError {
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
    use std::sync::{Barrier, Mutex};

    use hsm_core::{HsmError, SlotError};

    use super::*;

    fn hsm(names: &[&str]) -> Hsm {
        Hsm::of(names.iter().map(|name| open::tests::config(name)).collect(), [])
    }

    fn entries(names: &[&str]) -> Vec<Arc<SlotEntry>> {
        let entry = |name: &&str| SlotEntry::new(open::tests::config(name), "/nonexistent".into());
        names.iter().map(entry).map(Arc::new).collect()
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn slots_are_opened_at_the_same_time() {
        let all_there = Arc::new(Barrier::new(3));
        let open = move |_: &SlotEntry| {
            all_there.wait();
            Ok(())
        };
        let outcomes = open_all(&entries(&["a", "b", "c"]), LONG, open);
        assert!(outcomes.iter().all(Result::is_ok) && outcomes.len() == 3);
    }

    #[test]
    fn a_module_that_opens_one_slot_after_the_other_has_the_time_of_each() {
        let turn = Arc::new(Mutex::new(()));
        // Of a slot's time most is left for a machine that stands still.
        let limit = Duration::from_millis(3000);
        let open = move |_: &SlotEntry| {
            let _turn = turn.lock().unwrap();
            std::thread::sleep(limit / 5);
            Ok(())
        };
        let began = Instant::now();
        let outcomes = open_all(&entries(&["a", "b", "c", "d", "e", "f"]), limit, open);
        assert!(outcomes.iter().all(Result::is_ok), "after {:?}", began.elapsed());
        assert!(began.elapsed() > limit, "they were opened at once");
    }

    #[test]
    fn slots_that_hang_cost_the_start_the_time_of_one_and_the_others_nothing() {
        let entries = entries(&["a", "b", "d", "e", "c"]);
        let (gate, limit) = (Arc::new(Barrier::new(5)), Duration::from_millis(1500));
        let hung = Arc::clone(&gate);
        let open = move |entry: &SlotEntry| {
            if entry.name().as_str() != "c" {
                hung.wait();
            }
            Ok(())
        };
        let began = Instant::now();
        let outcomes = open_all(&entries, limit, open);
        // One after the other they would cost four times as much.
        assert!(began.elapsed() < 3 * limit, "{:?}", began.elapsed());
        let (last, hung) = outcomes.split_last().unwrap();
        assert!(last.is_ok() && hung.len() == 4);
        assert!(
            hung.iter()
                .all(|outcome| matches!(outcome, Err(OpenFailure::Hangs)))
        );
        assert!(entries[0].reason().unwrap().contains("hangs"));
        gate.wait();
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
    fn a_token_of_two_slots_is_named_with_both_whichever_of_them_has_it() {
        let entries = entries(&["a", "b", "c"]);
        let owned = |serial: &str| {
            let error = HsmError::Owned {
                serial: serial.to_owned(),
                holder: "this process".to_owned(),
                lock: "/tokens/1.hsm-owner".to_owned(),
            };
            let slot = "of no interest".to_owned();
            Err(OpenFailure::Slot(SlotError::Hsm { slot, error }))
        };
        // None of them was ready before: each by itself would keep the node from starting.
        let refused = admit(&entries, vec![owned("1"), Ok(()), owned("1")], false);
        assert_eq!(
            refused.unwrap_err().to_string(),
            "config: hsm.slots.c.label: slot-c: is token 1, which hsm.slots.a has already; give each slot a token of \
             its own"
        );
        let refused = admit(&entries, vec![owned("1"), Ok(()), owned("2")], false).unwrap_err();
        assert!(refused.problem.contains("owned by this process"), "{refused}");
        assert_eq!(refused.key, "hsm.slots.a.label");
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
