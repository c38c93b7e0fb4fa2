//! Where a new key comes from: a slot of this node. The key itself never passes through here, only
//! what its token gives out: the key wrapped under the transport key, and its check record.

use hsm_api::ErrorCode;
use hsm_core::names::{KeyUid, TransportId};
use hsm_core::{GenerateKek, HsmError, Slot, SlotState};
use raft_store::names::{ContextName, SlotName};
use zeroize::Zeroizing;

use crate::admin::call::CallError;

/// A key to be made.
#[derive(Clone, Debug)]
pub struct KeyOrder {
    /// The slot that makes it.
    pub slot: SlotName,
    /// The context it is for.
    pub context: ContextName,
    /// Its version there.
    pub version: u32,
    /// Its `CKA_ID`, fresh and random.
    pub key_uid: KeyUid,
    /// The transport key to wrap it under.
    pub transport_id: TransportId,
}

/// A key that was made, and no longer exists outside these bytes.
pub struct NewKey {
    /// Wrapped under the transport key.
    pub wrapped: Zeroizing<Vec<u8>>,
    /// Its check record.
    pub check_record: Vec<u8>,
}

/// See the module.
pub trait KeyMaker: Send + Sync + 'static {
    /// Whether the slot could make a key now. Must not block.
    ///
    /// # Errors
    /// `slot_locked`, `slot_failed`, or `not_found` for a slot this node does not have.
    fn check(&self, slot: &SlotName) -> Result<(), CallError>;

    /// Makes a key. Blocks on the token.
    ///
    /// # Errors
    /// As [`KeyMaker::check`], and `token_timeout`.
    fn make(&self, order: &KeyOrder) -> Result<NewKey, CallError>;
}

/// A slot as its node holds it.
pub struct HeldSlot {
    /// The open token, if it is open.
    pub handle: Option<Slot>,
    /// Its state.
    pub state: SlotState,
}

/// Finds a slot of this node; `None` for one it is not configured for.
pub type FindSlot = Box<dyn Fn(&SlotName) -> Option<HeldSlot> + Send + Sync>;

/// The tokens of this node.
pub struct TokenKeys {
    find: FindSlot,
}

impl TokenKeys {
    /// Makes keys in the slots that `find` finds.
    #[must_use]
    pub fn new(find: FindSlot) -> Self {
        Self { find }
    }

    fn open(&self, name: &SlotName) -> Result<Slot, CallError> {
        let Some(held) = (self.find)(name) else {
            let detail = format!("slot {name} is not configured on the leader (hsm.slots.{name})");
            return Err(CallError::new(ErrorCode::NotFound, detail));
        };
        match held {
            HeldSlot {
                handle: Some(slot),
                state: SlotState::Ready,
            } => Ok(slot),
            HeldSlot { state, .. } => Err(not_ready(name, &state)),
        }
    }
}

impl KeyMaker for TokenKeys {
    fn check(&self, slot: &SlotName) -> Result<(), CallError> {
        self.open(slot).map(|_| ())
    }

    fn make(&self, order: &KeyOrder) -> Result<NewKey, CallError> {
        let slot = self.open(&order.slot)?;
        let made = slot.generate_kek(&GenerateKek {
            key_uid: order.key_uid,
            version: order.version,
            context: order.context.to_string(),
            transport_id: order.transport_id,
        });
        let made = made.map_err(|error| token_error(&order.slot, &error))?;
        Ok(NewKey {
            wrapped: made.wrapped,
            check_record: made.check_record,
        })
    }
}

fn not_ready(name: &SlotName, state: &SlotState) -> CallError {
    let code = match state {
        SlotState::Locked => ErrorCode::SlotLocked,
        _ => ErrorCode::SlotFailed,
    };
    CallError::new(code, format!("slot {name} is {state} on the leader"))
}

/// What a token's refusal means to an administrator. Errors of tokens carry no secret.
fn token_error(name: &SlotName, error: &HsmError) -> CallError {
    let code = match error {
        HsmError::Busy { .. } => ErrorCode::TokenTimeout,
        // The transport key is on its way into this token.
        HsmError::NotFound { .. } => ErrorCode::NotReady,
        _ => ErrorCode::SlotFailed,
    };
    CallError::new(code, format!("slot {name} on the leader: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn keys(state: Option<SlotState>) -> TokenKeys {
        TokenKeys::new(Box::new(move |_| {
            Some(HeldSlot {
                handle: None,
                state: state.clone()?,
            })
        }))
    }

    fn check(state: Option<SlotState>) -> CallError {
        keys(state).check(&SlotName::new("s").unwrap()).unwrap_err()
    }

    #[test]
    fn a_slot_that_cannot_make_keys_says_which_and_why() {
        assert_eq!(check(None).code, ErrorCode::NotFound);
        assert_eq!(check(Some(SlotState::Locked)).code, ErrorCode::SlotLocked);
        assert_eq!(check(Some(SlotState::Absent)).code, ErrorCode::SlotFailed);
        let failed = SlotState::Failed {
            code: "hung",
            reason: "C_Encrypt hangs".to_owned(),
        };
        let error = check(Some(failed));
        assert_eq!(error.code, ErrorCode::SlotFailed);
        assert_eq!(
            error.detail,
            "slot s is failed: hung: C_Encrypt hangs on the leader"
        );
    }

    #[test]
    fn a_token_that_is_busy_may_be_asked_again() {
        let slot = SlotName::new("s").unwrap();
        let busy = HsmError::Busy {
            slot: "s".to_owned(),
            operation: "generate_kek",
            running: "inventory",
            waited_ms: 5000,
        };
        assert!(token_error(&slot, &busy).code.retryable());
        let missing = HsmError::NotFound {
            what: "transport key",
            id: "aa".to_owned(),
        };
        assert!(token_error(&slot, &missing).code.retryable());
        let other = HsmError::Random("x".to_owned());
        assert_eq!(token_error(&slot, &other).code, ErrorCode::SlotFailed);
    }
}
