//! What a request for a new version has to do next, judged from the state alone. The state remembers
//! what each id of a request was answered, so the same request on another leader, after whatever
//! crash, finds the version it made before and never makes a second one.

use hsm_api::ErrorCode;
use raft_store::command::{Conflict, Done, Existing, Origin, Outcome, Refusal, RequestId};
use raft_store::names::{ContextName, SlotName, TransportId};
use raft_store::state::ClusterState;
use raft_store::state::context::{Context, VersionState};
use raft_store::state::requests::Seen;

use crate::admin::call::CallError;

/// Ids one request may use up. More conflicts than that are no coincidence.
pub const MAX_ATTEMPTS: u32 = 256;
/// Longest label. The token takes 255 bytes.
const MAX_LABEL: usize = 128;

/// A request under its identity.
#[derive(Clone, Debug)]
pub struct Asked {
    /// SHA-256 of the principal.
    pub principal: [u8; 32],
    /// The operation.
    pub operation: String,
    /// The `Idempotency-Key`.
    pub key: String,
    /// SHA-256 of what was asked.
    pub body_hash: [u8; 32],
    /// On whose behalf.
    pub origin: Origin,
}

impl Asked {
    /// The id of the n-th attempt. A next attempt is allowed only once the state says that the one
    /// before has made nothing, which no replay can change: so at most one attempt makes something.
    #[must_use]
    pub fn id(&self, attempt: u32) -> RequestId {
        let operation = match attempt {
            0 => self.operation.clone(),
            // No name contains a `#`.
            n => format!("{} #{n}", self.operation),
        };
        RequestId::Client {
            principal: self.principal,
            operation,
            key: self.key.clone(),
        }
    }

    /// Another command of the same request.
    #[must_use]
    pub fn side(&self, step: &str) -> Self {
        Self {
            operation: format!("{} @{step}", self.operation),
            ..self.clone()
        }
    }

    /// The id of another command of the same request, which is attempted once.
    #[must_use]
    pub fn side_id(&self, step: &str) -> RequestId {
        self.side(step).id(0)
    }

    /// The first attempt that was not made yet, or whose outcome `settled` accepts.
    ///
    /// # Errors
    /// What the state refuses for good.
    pub fn attempt<T>(
        &self,
        state: &ClusterState,
        settled: impl FnMut(Done) -> Option<T>,
    ) -> Result<Attempt<T>, CallError> {
        self.attempt_past(state, |_| false, settled)
    }

    /// As [`Asked::attempt`], past refusals that settle nothing either.
    fn attempt_past<T>(
        &self,
        state: &ClusterState,
        is_past: impl Fn(&Refusal) -> bool,
        mut settled: impl FnMut(Done) -> Option<T>,
    ) -> Result<Attempt<T>, CallError> {
        for attempt in 0..MAX_ATTEMPTS {
            match state.requests().look_up(&self.id(attempt), &self.body_hash) {
                Seen::New => return Ok(Attempt::New(attempt)),
                Seen::Repeat(Outcome::Done(done)) => {
                    if let Some(result) = settled(done) {
                        return Ok(Attempt::Settled(result));
                    }
                }
                // The state was another than the proposer saw: nothing was made.
                Seen::Repeat(Outcome::Refused(Refusal::Conflict(why))) if !is_final(&why) => {}
                Seen::Repeat(Outcome::Refused(refusal)) if is_past(&refusal) => {}
                Seen::Repeat(Outcome::Refused(refusal)) => return Err(refusal.into()),
                Seen::Repeat(Outcome::Nothing) => {
                    return Err(CallError::new(
                        ErrorCode::Internal,
                        "a request without an outcome",
                    ));
                }
                Seen::OtherBody => return Err(Refusal::KeyReused.into()),
                Seen::Expired => return Err(Refusal::KeyExpired.into()),
            }
        }
        Err(CallError::new(
            ErrorCode::Conflict,
            "this Idempotency-Key has met too many conflicts; ask again with a new one",
        ))
    }
}

/// Whether a conflict is the answer to a request, rather than a reason to look again: somebody has to do something
/// else first, and a late repeat must not do it for them.
#[must_use]
pub fn is_final(why: &Conflict) -> bool {
    matches!(
        why,
        Conflict::Active { .. } | Conflict::UsedRecently { .. } | Conflict::NotCountedYet { .. }
    )
}

/// See [`Asked::attempt`].
#[derive(Debug, PartialEq, Eq)]
pub enum Attempt<T> {
    /// To be made under this number.
    New(u32),
    /// Done before.
    Settled(T),
}

/// What kind of new version is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The next one of a context that has an active one.
    Rotate,
    /// The next one in the place of this active one, and of no other: whoever was quicker has done it.
    Replace {
        /// The one that is to be replaced.
        active: u32,
    },
    /// The next one, in this slot, where the context's versions are made from then on.
    Move {
        /// The slot.
        to: SlotName,
    },
    /// Any one of a context, the first one too.
    Create {
        /// Its label; the default names context and number, and a place where that is taken.
        label: Option<String>,
        /// Its number, for those who want to be sure of it; there is only the next.
        version: Option<u32>,
    },
}

impl Wish {
    /// Whether a refusal is no answer to this wish: it asks for no label, and the one that it was to get was another
    /// version's by then. The next attempt gets another one.
    pub(super) fn outlives(&self, refusal: &Refusal) -> bool {
        let names_it = matches!(self, Wish::Create { label: Some(_), .. });
        !names_it && matches!(refusal, Refusal::Exists(Existing::Version { .. }))
    }
}

/// A version to be prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// The attempt it is made under.
    pub attempt: u32,
    /// The highest version seen: compare and set.
    pub expected_highest: u32,
    /// Its number.
    pub version: u32,
    /// Its label.
    pub label: String,
    /// The slot that makes it.
    pub slot: SlotName,
    /// The transport key it is wrapped under.
    pub transport_id: TransportId,
}

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// This request has prepared this version: wait until it is active.
    Await(u32),
    /// Another request's version is pending: wait until it is not.
    Hold(u32),
    /// The context is in this slot: propose that its next versions are made in the one that is wished for.
    Move {
        /// The attempt it is made under, of [`Asked::side`] with [`MOVE`].
        attempt: u32,
        /// The slot it is in.
        from: SlotName,
    },
    /// Make a key and propose it.
    Prepare(Draft),
}

/// The command of a request that moves its context; the other one prepares the version.
pub const MOVE: &str = "move";

/// Decides the next step of a request for a new version of `name`.
///
/// # Errors
/// When the request can never be met as it stands.
pub fn plan(state: &ClusterState, name: &ContextName, wish: &Wish, asked: &Asked) -> Result<Step, CallError> {
    // A version that was given up settles nothing: its number is a gap, the wish is open again.
    let made = |done: Done| match done {
        Done::Version { version, .. } => {
            (version_state(state, name, version) != Some(VersionState::Abandoned)).then_some(version)
        }
        _ => None,
    };
    let attempt = match asked.attempt_past(state, |refusal| wish.outlives(refusal), made)? {
        Attempt::Settled(version) => return Ok(Step::Await(version)),
        Attempt::New(attempt) => attempt,
    };
    let context = state.contexts().get(name).ok_or_else(|| unknown_context(name))?;
    let pending = state
        .versions_of(name)
        .find(|(_, version)| version.state == VersionState::Pending);
    if let Some((number, _)) = pending {
        return Ok(Step::Hold(number));
    }
    if let Wish::Move { to } = wish
        && let Some(step) = relocate(state, (name, context), to, asked)?
    {
        return Ok(step);
    }
    let highest = context.highest_version;
    let (label, number) = match wish {
        Wish::Rotate if context.active_version.is_none() => {
            let detail = format!(
                "context {name} has no active version to rotate; make its first one with: \
                 hsmctl create-kek --context {name}"
            );
            return Err(CallError::new(ErrorCode::ContextHasNoKey, detail));
        }
        Wish::Replace { active } if context.active_version != Some(*active) => {
            let detail = format!("version {active} of {name} is not the active one any more");
            return Err(CallError::new(ErrorCode::Conflict, detail));
        }
        Wish::Rotate | Wish::Replace { .. } | Wish::Move { .. } => (None, None),
        Wish::Create { label, version } => (label.as_deref(), *version),
    };
    let version = highest.checked_add(1).ok_or_else(|| {
        CallError::new(
            ErrorCode::Conflict,
            format!("context {name} has no version number left"),
        )
    })?;
    if let Some(number) = number {
        check_number(state, name, version, number)?;
    }
    let transport = state
        .slots()
        .get(&context.slot)
        .and_then(|slot| slot.current_transport());
    let transport = transport.ok_or_else(|| no_transport(&context.slot))?;
    Ok(Step::Prepare(Draft {
        attempt,
        expected_highest: highest,
        version,
        label: label.map_or_else(|| free_label(state, name, version), str::to_owned),
        slot: context.slot.clone(),
        transport_id: transport.id,
    }))
}

/// What is to be done before a version can be made in another slot; nothing once the context is there.
fn relocate(
    state: &ClusterState,
    (name, context): (&ContextName, &Context),
    to: &SlotName,
    asked: &Asked,
) -> Result<Option<Step>, CallError> {
    let conflict = |detail: String| Err(CallError::new(ErrorCode::Conflict, detail));
    let is_there = context.slot == *to;
    match asked.side(MOVE).attempt(state, Some)? {
        Attempt::Settled(_) if is_there => Ok(None),
        Attempt::Settled(_) => conflict(format!(
            "this request moved context {name} to slot {to}, and another one has moved it to {} since; ask again \
             with a new Idempotency-Key",
            context.slot
        )),
        Attempt::New(attempt) if !is_there => {
            let from = context.slot.clone();
            Ok(Some(Step::Move { attempt, from }))
        }
        // Moved before, by a request that has made no version there.
        Attempt::New(_) if encrypts_elsewhere(state, (name, context)) || !is_begun(state, name, to) => {
            Ok(None)
        }
        Attempt::New(_) => conflict(format!(
            "context {name} is in slot {to} already; for a new version there: hsmctl rotate {name}"
        )),
    }
}

/// Whether a context has a version in a slot that is not over: one that was prepared there, whatever it is by now.
#[must_use]
pub fn is_begun(state: &ClusterState, name: &ContextName, slot: &SlotName) -> bool {
    let mut versions = state.versions_of(name);
    versions.any(|(_, version)| version.slot == *slot && !version.state.is_over())
}

/// Whether the active version is in another slot than the one in which new ones are made.
fn encrypts_elsewhere(state: &ClusterState, (name, context): (&ContextName, &Context)) -> bool {
    let active = context
        .active_version
        .and_then(|number| state.version(name, number));
    active.is_some_and(|active| active.slot != context.slot)
}

fn version_state(state: &ClusterState, name: &ContextName, version: u32) -> Option<VersionState> {
    state.version(name, version).map(|version| version.state)
}

/// The first default label that no version goes by: somebody may have given this one to another context's.
fn free_label(state: &ClusterState, name: &ContextName, version: u32) -> String {
    let plain = format!("kek-{name}-v{version}");
    let mut label = plain.clone();
    for place in 2_u32.. {
        if !state.label_taken(&label) {
            break;
        }
        label = format!("{plain}-{place}");
    }
    label
}

/// Numbers go up one by one; only a version that was given up leaves a gap.
fn check_number(state: &ClusterState, name: &ContextName, next: u32, number: u32) -> Result<(), CallError> {
    if let Some(known) = version_state(state, name, number) {
        let detail = format!("version {number} of {name} exists already ({})", known.as_str());
        return Err(CallError::new(ErrorCode::AlreadyExists, detail));
    }
    if number != next {
        let detail = format!(
            "version {number} of {name} is not the next one, which is {next}; leave the number out, or name that one"
        );
        return Err(CallError::new(ErrorCode::InvalidArgument, detail));
    }
    Ok(())
}

/// Whether a context that is not made yet can get what is wished for as its first version.
///
/// # Errors
/// `invalid_argument` or `already_exists`.
pub fn check_first(state: &ClusterState, name: &ContextName, wish: &Wish) -> Result<(), CallError> {
    let Wish::Create { label, version } = wish else {
        return Err(unknown_context(name));
    };
    if let Some(number) = version {
        check_number(state, name, 1, *number)?;
    }
    match label {
        Some(label) if state.label_taken(label) => Err(CallError::new(
            ErrorCode::AlreadyExists,
            format!("label {label:?} is another version's; no two have one label"),
        )),
        _ => Ok(()),
    }
}

/// Whether a label can be one: what tokens store, and what fits in a log line.
///
/// # Errors
/// `invalid_argument`.
pub fn check_label(label: &str) -> Result<(), CallError> {
    let printable = label.bytes().all(|byte| byte.is_ascii_graphic());
    if printable && (1..=MAX_LABEL).contains(&label.len()) {
        return Ok(());
    }
    let detail = format!("label: use 1 to {MAX_LABEL} printable ASCII characters without spaces");
    Err(CallError::new(ErrorCode::InvalidArgument, detail))
}

/// The answer for a context that does not exist.
#[must_use]
pub fn unknown_context(name: &ContextName) -> CallError {
    CallError::new(ErrorCode::NotFound, format!("context {name} does not exist"))
}

/// The answer while a slot cannot hold keys.
#[must_use]
pub fn no_transport(slot: &SlotName) -> CallError {
    let detail = format!("slot {slot} has no transport key yet: its token must be ready on the leader first");
    CallError::new(ErrorCode::NotReady, detail)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "plan_tests.rs"]
mod tests;
