//! One configured slot for as long as the process lives: open, or closed with the reason. Whoever
//! holds an entry sees it change; an open slot is never closed again.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use hsm_core::names::KeyUid;
use hsm_core::{HsmError, OnBatchDone, OnDone, OpError, Slot, SlotState, Work};
use raft_store::names::{ContextName, SlotName};
use tokio::sync::Notify;

use super::marker::ReadyMarker;
use super::open::{self, DAMAGED, OpenFailure, Unlock};
use super::uses::{Used, Uses};
use crate::config::Slot as SlotConfig;
use crate::keyring::TokenOps;

/// A key the slot is judged by: proven to be in its token before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The key.
    pub key_uid: KeyUid,
    /// Its context.
    pub context: ContextName,
    /// Its version.
    pub version: u32,
    /// Its committed check record.
    pub check_record: Vec<u8>,
}

/// Why a slot is not open.
struct Closed {
    state: SlotState,
    reason: String,
}

/// See the module.
pub struct SlotEntry {
    config: SlotConfig,
    dir: PathBuf,
    handle: ArcSwapOption<Slot>,
    closed: ArcSwap<Closed>,
    probes: ArcSwap<Vec<Probe>>,
    next_probe: AtomicUsize,
    last_proof: Mutex<Option<Instant>>,
    opening: Mutex<()>,
    changed: Notify,
    uses: Arc<Uses>,
}

impl SlotEntry {
    pub(super) fn new(config: SlotConfig, dir: PathBuf) -> Self {
        let reason = "not opened yet".to_owned();
        Self {
            config,
            dir,
            handle: ArcSwapOption::empty(),
            closed: ArcSwap::from_pointee(Closed {
                state: SlotState::Locked,
                reason,
            }),
            probes: ArcSwap::from_pointee(Vec::new()),
            next_probe: AtomicUsize::new(0),
            last_proof: Mutex::new(None),
            opening: Mutex::new(()),
            changed: Notify::new(),
            uses: Arc::default(),
        }
    }

    /// The slot's name in configuration and cluster.
    pub fn name(&self) -> &SlotName {
        &self.config.name
    }

    /// The configured label of its token.
    pub fn label(&self) -> &str {
        &self.config.label
    }

    /// The contexts the configuration gives it.
    pub fn contexts(&self) -> &[ContextName] {
        &self.config.contexts
    }

    pub(super) fn config(&self) -> &SlotConfig {
        &self.config
    }

    /// The open slot; `None` while it could not be opened.
    pub fn handle(&self) -> Option<Slot> {
        self.handle.load().as_ref().map(|slot| Slot::clone(slot))
    }

    /// Whether it serves.
    pub fn state(&self) -> SlotState {
        match self.handle.load().as_ref() {
            Some(slot) => slot.state(),
            None => self.closed.load().state.clone(),
        }
    }

    /// Why it does not serve, for people; `None` while it does.
    pub fn reason(&self) -> Option<String> {
        match self.handle.load().as_ref() {
            Some(slot) => match slot.state() {
                SlotState::Failed { reason, .. } => Some(reason),
                _ => None,
            },
            None => Some(self.closed.load().reason.clone()),
        }
    }

    /// When the known-answer test last passed.
    pub fn last_proof(&self) -> Option<Instant> {
        *self.last_proof.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a key to test the slot with.
    pub fn has_probes(&self) -> bool {
        !self.probes.load().is_empty()
    }

    /// Sets the keys to test the slot with, in turn.
    pub fn set_probes(&self, probes: Vec<Probe>) {
        if **self.probes.load() != probes {
            self.probes.store(Arc::new(probes));
        }
    }

    /// How often its keys were used since the process began.
    pub fn uses(&self) -> &Uses {
        &self.uses
    }

    /// Waits until something about the slot has changed since the last call. For one waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(super) fn say_changed(&self) {
        self.changed.notify_one();
    }

    pub(super) fn marker(&self) -> ReadyMarker {
        ReadyMarker::of(&self.dir, &self.config.name)
    }

    /// Tries to open the slot by itself.
    pub(super) fn open(&self) -> Result<(), OpenFailure> {
        self.unlock(Unlock::default())
    }

    /// Tries to open the slot; one that is open logs in again where its token has forgotten the login.
    /// Blocks for as long as the token takes, and for an attempt that is under way.
    pub fn unlock(&self, how: Unlock) -> Result<(), OpenFailure> {
        let _one_at_a_time = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        self.attempt(how)
    }

    /// As [`Self::unlock`], but does not wait for an attempt that is under way: with a token that hangs, each
    /// call would hold a thread for good.
    pub fn try_unlock(&self, how: Unlock) -> Result<(), OpenFailure> {
        let _one_at_a_time = match self.opening.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(OpenFailure::UnderWay),
        };
        self.attempt(how)
    }

    fn attempt(&self, how: Unlock) -> Result<(), OpenFailure> {
        if let Some(slot) = self.handle() {
            return slot.log_in(how.retry).map_err(OpenFailure::Login);
        }
        match open::open(&self.config, &self.dir, how) {
            Ok(slot) => {
                self.remember_ready(&slot);
                self.handle.store(Some(Arc::new(slot)));
                self.say_changed();
                Ok(())
            }
            Err(failure) => {
                let (state, reason) = (failure.state(), self.reason_of(&failure));
                self.closed.store(Arc::new(Closed { state, reason }));
                Err(failure)
            }
        }
    }

    /// The failure, with the remedy if the token was open here before. Of one that never was the failure itself says what
    /// may be configured wrongly.
    fn reason_of(&self, failure: &OpenFailure) -> String {
        let was_open = || matches!(self.marker().read(), Ok(Some(_)));
        if failure.may_be_damage() && was_open() {
            return format!("{failure}; {DAMAGED}");
        }
        failure.to_string()
    }

    /// Notes the first token of the slot. Another one that comes later is told each time: whether it is
    /// the slot's is for its keys to prove.
    fn remember_ready(&self, slot: &Slot) {
        let (name, marker) = (self.name().as_str(), self.marker());
        if let Ok(Some(serial)) = marker.read()
            && !serial.is_empty()
        {
            if serial != slot.serial() {
                tracing::error!(
                    slot = name,
                    before = serial,
                    now = slot.serial(),
                    "another token than before has this slot's label; it is of use only with the slot's keys"
                );
            }
            return;
        }
        // Without the marker a failure would refuse the next start, which is loud enough.
        if let Err(error) = marker.write(slot.serial()) {
            let path = marker.path().display();
            tracing::error!(slot = name, %path, %error, "cannot note that the slot was ready");
        }
    }

    /// One known-answer test with the next key; of a slot that has none yet, a look at its session.
    /// `None` if the slot is not open.
    pub(super) fn test(&self) -> Option<Result<(), HsmError>> {
        let slot = self.handle()?;
        let probes = self.probes.load_full();
        let turn = self.next_probe.fetch_add(1, Ordering::Relaxed);
        let probe = turn.checked_rem(probes.len()).and_then(|place| probes.get(place));
        let Some(probe) = probe else {
            return Some(slot.check_session());
        };
        let tested = slot.known_answer_test(
            probe.key_uid,
            probe.version,
            probe.context.as_str(),
            &probe.check_record,
        );
        if tested.is_ok() {
            *self.last_proof.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        Some(tested)
    }

    /// What is said while an attempt to open the slot does not come back. The attempt goes on, and
    /// replaces it.
    pub(super) fn hangs(&self) {
        let reason = format!(
            "opening it has not come back yet: its token or module hangs; restart the node, and {DAMAGED}"
        );
        self.closed.store(Arc::new(Closed {
            state: SlotState::Failed {
                code: "hung",
                reason: reason.clone(),
            },
            reason,
        }));
    }

    fn open_slot(&self) -> Result<Arc<Slot>, OpError> {
        self.handle
            .load_full()
            .ok_or_else(|| OpError::SlotNotReady(self.state()))
    }
}

impl TokenOps for SlotEntry {
    fn state(&self) -> SlotState {
        SlotEntry::state(self)
    }

    fn run(&self, work: Work, until: Instant, done: OnDone) -> Result<(), OpError> {
        let (uses, used) = (Arc::clone(&self.uses), Used::by(&work));
        let counted: OnDone = Box::new(move |outcome| {
            if outcome.is_ok() {
                uses.count(used);
            }
            done(outcome);
        });
        self.open_slot()?.run(work, Some(until), counted)
    }

    fn run_batch(&self, works: Vec<Work>, until: Instant, done: OnBatchDone) -> Result<(), OpError> {
        let uses = Arc::clone(&self.uses);
        let used: Vec<Used> = works.iter().map(Used::by).collect();
        let counted: OnBatchDone = Box::new(move |outcomes| {
            let done_ones = outcomes.iter().zip(used).filter(|(outcome, _)| outcome.is_ok());
            done_ones.for_each(|(_, used)| uses.count(used));
            done(outcomes);
        });
        self.open_slot()?.run_batch(works, Some(until), counted)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::slots::open::tests::config;

    #[test]
    fn a_slot_that_could_not_be_opened_refuses_with_its_state_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let entry = SlotEntry::new(config("a"), dir.path().to_path_buf());
        assert!(entry.open().is_err());
        assert!(entry.handle().is_none());
        assert_eq!(entry.state().name(), "failed");
        assert!(entry.reason().unwrap().contains("/nonexistent/libhsm.so"));
        assert!(matches!(
            entry.open_slot(),
            Err(OpError::SlotNotReady(SlotState::Failed { .. }))
        ));
        assert!(entry.test().is_none() && entry.last_proof().is_none());
        entry.hangs();
        let reason = entry.reason().unwrap();
        assert!(reason.contains("hangs") && reason.contains(DAMAGED), "{reason}");
    }

    #[test]
    fn a_token_that_was_open_here_and_is_not_found_any_more_has_its_remedy_in_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let entry = SlotEntry::new(config("a"), dir.path().to_path_buf());
        let absent = OpenFailure::Slot(hsm_core::SlotError::TokenNotFound {
            slot: "a".to_owned(),
            label: "slot-a".to_owned(),
            found: "no token".to_owned(),
        });
        assert!(!entry.reason_of(&absent).contains(DAMAGED));
        entry.marker().write("77").unwrap();
        assert!(entry.reason_of(&absent).ends_with(DAMAGED));
        assert!(!entry.reason_of(&OpenFailure::UnderWay).contains(DAMAGED));
    }

    #[test]
    fn nobody_waits_for_an_attempt_that_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let entry = SlotEntry::new(config("a"), dir.path().to_path_buf());
        let under_way = entry.opening.lock().unwrap();
        let refused = entry.try_unlock(Unlock::default());
        assert!(matches!(refused, Err(OpenFailure::UnderWay)));
        drop(under_way);
        let refused = entry.try_unlock(Unlock::default());
        assert!(matches!(refused, Err(OpenFailure::Module(_))));
    }
}
