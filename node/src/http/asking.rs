//! A request of the data plane on its way to a slot: who asks, what an operation makes of the members, and what is
//! still to be done when the token has answered.

use std::sync::Arc;

use axum::http::Extensions;
use hsm_api::{ErrorCode, StateIndex};
use hsm_core::envelope::Binding;
use hsm_core::{Output, Reseal, Work};

use super::job::usable;
use super::json::{Member, Text};
use super::named::Named;
use super::problem::ApiError;
use super::reply::{Sealed, Success};
use super::resolve::held;
use super::service::ApiState;
use crate::config::ContextName;
use crate::identity::Principal;
use crate::keyring::{ActiveKey, ContextKeys, KeyRing, KeySlot};
use crate::metrics;
use crate::policy::{Denial, Op, Policy};

/// An operation of the data plane: what it reads of a request, or of an item of a batch, and what it makes of it.
pub(super) trait Operation<const N: usize> {
    const OP: Op;
    const PATH: &'static str;
    /// The text that v1 has for a fault of the service on this route.
    const V1_FAILED: &'static str;
    /// What it reads. The first one is the context, which may stand once for a whole batch.
    const MEMBERS: [Member; N];

    /// Decides everything but what only the token can say. What is refused under a known context is counted here.
    fn prepare(asking: &Asking<'_>, members: &[Text<'_>; N]) -> Result<Step, ApiError>;
}

/// Who asks, and the snapshots that everything in one request is decided by.
pub(super) struct Asking<'a> {
    pub(super) state: &'a ApiState,
    pub(super) principal: &'a Principal,
    /// The request's id, its trace and its sender.
    pub(super) request: &'a Extensions,
    /// How new both snapshots are at least.
    pub(super) index: StateIndex,
    pub(super) policy: Arc<Policy>,
    pub(super) ring: Arc<KeyRing>,
}

impl<'a> Asking<'a> {
    pub(super) fn new(state: &'a ApiState, principal: &'a Principal, request: &'a Extensions) -> Self {
        // Before the snapshots: they may be newer than it, never older.
        let index = state.data().index();
        Self {
            state,
            principal,
            request,
            index,
            policy: state.data().policy(),
            ring: state.data().keyring(),
        }
    }

    /// The answer is the same for a foreign context and for one that nobody has. The audit is told which it was.
    pub(super) fn authorise(&self, context: &str, op: Op) -> Result<(), ApiError> {
        let Err(denial) = self.policy.authorise(self.principal, context, op) else {
            return Ok(());
        };
        let is_about_it = matches!(denial, Denial::Context { .. });
        let reason = denial.to_string();
        let error = ApiError::from(denial);
        Err(match self.ring.context(context) {
            _ if !is_about_it => error,
            Some((name, _)) => error.about(name.as_str()),
            None => error.operator(format!("{reason}: this node knows no such context")),
        })
    }

    /// The keys of a context that the caller may use.
    pub(super) fn keys(&self, context: &str) -> Result<(&ContextName, &ContextKeys), ApiError> {
        let known = self.ring.context(context);
        known.ok_or_else(|| ApiError::new(ErrorCode::ContextHasNoKey))
    }
}

/// The version that encrypts. Whether it can do so here is another question: [`ready`].
pub(super) fn active(keys: &ContextKeys) -> Result<&ActiveKey, ApiError> {
    let active = keys.active.as_ref();
    active.ok_or_else(|| ApiError::new(ErrorCode::ContextHasNoKey))
}

/// Refuses where the slot does not serve, or its token lacks the key that encrypts.
pub(super) fn ready(keys: &ContextKeys, active: &ActiveKey) -> Result<(), ApiError> {
    usable(&active.slot)?;
    held(keys, &active.key_uid).map(|_| ())
}

/// Takes one invocation of the version that encrypts: the last thing before its slot is asked. It is used, whatever the
/// token answers.
pub(super) fn invocation(active: &ActiveKey) -> Result<(), ApiError> {
    if active.meter.take() {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::InvocationsExhausted).detail(format!(
        "this node may encrypt under version {} no more until it is given more invocations, or the key is rotated",
        active.version
    )))
}

/// Whom a ciphertext is bound to, by the names in a certificate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound<'a> {
    /// First OU, or empty.
    pub(super) ou: &'a str,
    /// Last CN, or empty.
    pub(super) cn: &'a str,
}

impl<'a> Bound<'a> {
    pub(super) fn to(principal: &'a Principal) -> Self {
        Self {
            ou: principal.ou.as_deref().unwrap_or_default(),
            cn: principal.cn.as_str(),
        }
    }

    /// The first OU, the CN, or nothing.
    pub(super) fn value(self, binding: Binding) -> Arc<str> {
        Arc::from(match binding {
            Binding::None => "",
            Binding::Shared => self.ou,
            Binding::Private => self.cn,
        })
    }
}

/// What an operation has come to.
#[expect(
    clippy::large_enum_variant,
    reason = "it is taken apart at once; a box would cost every request more"
)]
pub(super) enum Step {
    /// A slot is to be asked.
    Run(Task),
    /// The ciphertext names a version that this node does not know: the leader is to be asked, and either way it
    /// cannot be opened now.
    Ask {
        context: ContextName,
        version: u32,
        ending: Ending,
    },
}

/// What a slot is to be asked for.
pub(super) struct Task {
    pub(super) slot: KeySlot,
    pub(super) work: Work,
    /// What another slot is to be asked for then: of a rewrap from one to the other.
    pub(super) onward: Option<Onward>,
    pub(super) ending: Ending,
}

impl Task {
    pub(super) fn new(slot: &KeySlot, work: Work, ending: Ending) -> Self {
        Self {
            slot: slot.clone(),
            work,
            onward: None,
            ending,
        }
    }
}

/// A rewrap's second part, in the slot of the key that encrypts.
pub(super) struct Onward {
    pub(super) slot: KeySlot,
    pub(super) reseal: Reseal,
}

impl Onward {
    /// What that slot is to be asked for, of what the first one has given.
    pub(super) fn with(self, opened: Output) -> Result<(KeySlot, Work), ApiError> {
        match opened {
            Output::Plaintext(plaintext) => Ok((self.slot, self.reseal.seal(plaintext))),
            Output::Envelope(_) | Output::DataKey { .. } => {
                Err(ApiError::internal("an opened ciphertext gave no plaintext"))
            }
        }
    }
}

/// What is to be done when the outcome is known.
pub(super) struct Ending {
    pub(super) context: Arc<str>,
    /// What the new ciphertext is under, if there is one.
    pub(super) under: Option<ActiveKey>,
    /// Of a rewrap for others: its line in the audit.
    pub(super) named: Option<Box<Named>>,
}

impl Ending {
    /// No token was called to encrypt: the slot has not taken the job, or had no time to begin it, or what is to be
    /// encrypted was not opened.
    pub(super) fn not_encrypted(&self) {
        if let Some(active) = &self.under {
            active.meter.give_back();
        }
    }

    /// Counts the outcome, records what has to be, and makes an answer of it.
    pub(super) fn close(
        self,
        asking: &Asking<'_>,
        op: Op,
        outcome: Result<Output, ApiError>,
    ) -> Result<Success, ApiError> {
        count(op, self.context, outcome.is_ok());
        if let Some(named) = self.named {
            named.record(asking, outcome.as_ref().err());
        }
        success(outcome?, self.under)
    }
}

/// Counts an operation under a known context.
pub(super) fn count(op: Op, context: Arc<str>, ok: bool) {
    match op {
        Op::Encrypt => metrics::encryption(context, ok),
        Op::Decrypt => metrics::decryption(context, ok),
        Op::Rewrap => metrics::rewrapping(context, ok),
        Op::DataKey => metrics::data_key(context, ok),
    }
}

fn success(output: Output, under: Option<ActiveKey>) -> Result<Success, ApiError> {
    let sealed = |ciphertext: Vec<u8>| {
        let under = under.ok_or_else(|| ApiError::internal("a ciphertext under no key version"))?;
        Ok::<_, ApiError>(Sealed {
            ciphertext,
            key_id: under.key_id,
            version: under.version,
        })
    };
    Ok(match output {
        Output::Plaintext(plaintext) => Success {
            sealed: None,
            plaintext: Some(plaintext),
        },
        Output::Envelope(envelope) => Success {
            sealed: Some(sealed(envelope)?),
            plaintext: None,
        },
        Output::DataKey { envelope, plaintext } => Success {
            sealed: Some(sealed(envelope)?),
            plaintext,
        },
    })
}
