//! The one table that says what a PKCS#11 return code means for the caller, the session, the
//! handle and the slot. Nothing else may interpret a code on the data path: SoftHSM and its
//! successors disagree about several of them.

use std::fmt;

use cryptoki_sys::{self as sys, CK_RV};

use crate::error::CallError;

/// A PKCS#11 return code, printed by name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ckr(pub CK_RV);

macro_rules! names {
    ($value:expr, $($name:ident),+ $(,)?) => {
        match $value {
            $(sys::$name => Some(stringify!($name)),)+
            _ => None,
        }
    };
}

impl Ckr {
    fn name(self) -> Option<&'static str> {
        names!(
            self.0,
            CKR_OK,
            CKR_HOST_MEMORY,
            CKR_SLOT_ID_INVALID,
            CKR_GENERAL_ERROR,
            CKR_FUNCTION_FAILED,
            CKR_ARGUMENTS_BAD,
            CKR_ATTRIBUTE_READ_ONLY,
            CKR_ATTRIBUTE_SENSITIVE,
            CKR_ATTRIBUTE_TYPE_INVALID,
            CKR_ATTRIBUTE_VALUE_INVALID,
            CKR_ACTION_PROHIBITED,
            CKR_DATA_INVALID,
            CKR_DATA_LEN_RANGE,
            CKR_DEVICE_ERROR,
            CKR_DEVICE_MEMORY,
            CKR_DEVICE_REMOVED,
            CKR_ENCRYPTED_DATA_INVALID,
            CKR_ENCRYPTED_DATA_LEN_RANGE,
            CKR_AEAD_DECRYPT_FAILED,
            CKR_FUNCTION_CANCELED,
            CKR_FUNCTION_NOT_SUPPORTED,
            CKR_KEY_HANDLE_INVALID,
            CKR_KEY_SIZE_RANGE,
            CKR_KEY_TYPE_INCONSISTENT,
            CKR_KEY_CHANGED,
            CKR_KEY_FUNCTION_NOT_PERMITTED,
            CKR_KEY_NOT_WRAPPABLE,
            CKR_KEY_UNEXTRACTABLE,
            CKR_MECHANISM_INVALID,
            CKR_MECHANISM_PARAM_INVALID,
            CKR_OBJECT_HANDLE_INVALID,
            CKR_OPERATION_ACTIVE,
            CKR_OPERATION_NOT_INITIALIZED,
            CKR_PIN_INCORRECT,
            CKR_PIN_INVALID,
            CKR_PIN_LEN_RANGE,
            CKR_PIN_EXPIRED,
            CKR_PIN_LOCKED,
            CKR_SESSION_CLOSED,
            CKR_SESSION_COUNT,
            CKR_SESSION_HANDLE_INVALID,
            CKR_SESSION_READ_ONLY,
            CKR_SESSION_EXISTS,
            CKR_TEMPLATE_INCOMPLETE,
            CKR_TEMPLATE_INCONSISTENT,
            CKR_TOKEN_NOT_PRESENT,
            CKR_TOKEN_NOT_RECOGNIZED,
            CKR_TOKEN_WRITE_PROTECTED,
            CKR_UNWRAPPING_KEY_HANDLE_INVALID,
            CKR_USER_ALREADY_LOGGED_IN,
            CKR_USER_NOT_LOGGED_IN,
            CKR_USER_PIN_NOT_INITIALIZED,
            CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
            CKR_WRAPPED_KEY_INVALID,
            CKR_WRAPPED_KEY_LEN_RANGE,
            CKR_WRAPPING_KEY_HANDLE_INVALID,
            CKR_BUFFER_TOO_SMALL,
            CKR_CRYPTOKI_NOT_INITIALIZED,
            CKR_CRYPTOKI_ALREADY_INITIALIZED,
            CKR_MUTEX_BAD,
            CKR_FIPS_SELF_TEST_FAILED,
            CKR_LIBRARY_LOAD_FAILED,
            CKR_TOKEN_RESOURCE_EXCEEDED,
            CKR_OPERATION_CANCEL_FAILED,
        )
    }
}

impl fmt::Display for Ckr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "CKR 0x{:x}", self.0),
        }
    }
}

impl fmt::Debug for Ckr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What to do after a failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// May work the next time: once more, then report it. Says nothing about the slot's health.
    Retry,
    /// The session carries an operation that cannot be cancelled, or is gone: take another one.
    /// The old one stays open, because objects may belong to it.
    RetireSession,
    /// The handle died, the key perhaps not: find the token object and copy it again.
    FindHandleAgain,
    /// The token forgot the login, and with it every handle of a private object.
    LoginAgain,
    /// The token itself is in trouble; its known-answer test decides when it is over.
    SlotFailed,
    /// The input is wrong. Never counts against the token.
    CallersFault,
    /// The token refuses exactly this and will go on refusing: report it.
    Refused,
}

/// Whether this may be the word of a token in trouble, though [`classify`] gives the caller the fault: SoftHSM 2.6.1 says
/// `CKR_GENERAL_ERROR` to a wrong tag, and every module says it when something is wrong with itself. Whoever blames a ciphertext or
/// a key for it has to see the token decrypt something else first.
#[must_use]
pub fn may_be_the_token(error: &CallError) -> bool {
    error.call == "C_Decrypt" && error.code.0 == sys::CKR_GENERAL_ERROR
}

/// Looks a failed call up in the table.
///
/// On the data path this is right only if lengths were checked before the call: SoftHSM 2.6.1
/// also says `CKR_GENERAL_ERROR` to a ciphertext shorter than the tag.
#[must_use]
pub fn classify(error: &CallError) -> Verdict {
    match error.code.0 {
        // A wrong tag: 2.6.1 says GENERAL_ERROR, 2.7 ENCRYPTED_DATA_INVALID. Only the call that
        // sees the ciphertext: from C_DecryptInit the same code means that the key is unreadable.
        sys::CKR_GENERAL_ERROR if error.call == "C_Decrypt" => Verdict::CallersFault,
        sys::CKR_ENCRYPTED_DATA_INVALID
        | sys::CKR_ENCRYPTED_DATA_LEN_RANGE
        | sys::CKR_AEAD_DECRYPT_FAILED => Verdict::CallersFault,

        sys::CKR_GENERAL_ERROR
        | sys::CKR_FUNCTION_FAILED
        | sys::CKR_FUNCTION_CANCELED
        | sys::CKR_HOST_MEMORY
        | sys::CKR_DEVICE_MEMORY
        | sys::CKR_SESSION_COUNT
        | sys::CKR_TOKEN_RESOURCE_EXCEEDED => Verdict::Retry,

        // BUFFER_TOO_SMALL and ARGUMENTS_BAD leave the operation active; the next call in this
        // session would get OPERATION_ACTIVE.
        sys::CKR_OPERATION_ACTIVE
        | sys::CKR_OPERATION_NOT_INITIALIZED
        | sys::CKR_OPERATION_CANCEL_FAILED
        | sys::CKR_BUFFER_TOO_SMALL
        | sys::CKR_ARGUMENTS_BAD
        | sys::CKR_SESSION_CLOSED
        | sys::CKR_SESSION_HANDLE_INVALID => Verdict::RetireSession,

        sys::CKR_KEY_HANDLE_INVALID
        | sys::CKR_OBJECT_HANDLE_INVALID
        | sys::CKR_WRAPPING_KEY_HANDLE_INVALID
        | sys::CKR_UNWRAPPING_KEY_HANDLE_INVALID
        | sys::CKR_KEY_CHANGED => Verdict::FindHandleAgain,

        sys::CKR_USER_NOT_LOGGED_IN => Verdict::LoginAgain,

        sys::CKR_DEVICE_ERROR
        | sys::CKR_DEVICE_REMOVED
        | sys::CKR_TOKEN_NOT_PRESENT
        | sys::CKR_TOKEN_NOT_RECOGNIZED
        | sys::CKR_SLOT_ID_INVALID
        | sys::CKR_CRYPTOKI_NOT_INITIALIZED
        | sys::CKR_MUTEX_BAD
        | sys::CKR_FIPS_SELF_TEST_FAILED
        | sys::CKR_LIBRARY_LOAD_FAILED => Verdict::SlotFailed,

        _ => Verdict::Refused,
    }
}

/// Codes that mean "some of the attributes are not there" (PKCS#11 2.40, `C_GetAttributeValue`).
pub(crate) fn accept_partial(outcome: Result<(), CallError>) -> Result<(), CallError> {
    match outcome {
        Err(error)
            if [
                sys::CKR_ATTRIBUTE_SENSITIVE,
                sys::CKR_ATTRIBUTE_TYPE_INVALID,
                sys::CKR_BUFFER_TOO_SMALL,
            ]
            .contains(&error.code.0) =>
        {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn verdict(call: &'static str, code: CK_RV) -> Verdict {
        classify(&CallError {
            call,
            code: Ckr(code),
        })
    }

    #[test]
    fn a_wrong_tag_is_the_callers_fault_in_every_softhsm() {
        assert_eq!(
            verdict("C_Decrypt", sys::CKR_GENERAL_ERROR),
            Verdict::CallersFault
        );
        assert_eq!(
            verdict("C_Decrypt", sys::CKR_ENCRYPTED_DATA_INVALID),
            Verdict::CallersFault
        );
        assert_eq!(
            verdict("C_Decrypt", sys::CKR_AEAD_DECRYPT_FAILED),
            Verdict::CallersFault
        );
    }

    #[test]
    fn a_general_error_elsewhere_is_nobodys_fault_yet() {
        for call in ["C_DecryptInit", "C_EncryptInit", "C_Encrypt", "C_UnwrapKey"] {
            assert_eq!(verdict(call, sys::CKR_GENERAL_ERROR), Verdict::Retry, "{call}");
        }
    }

    #[test]
    fn what_leaves_an_operation_active_costs_the_session() {
        for code in [
            sys::CKR_OPERATION_ACTIVE,
            sys::CKR_BUFFER_TOO_SMALL,
            sys::CKR_ARGUMENTS_BAD,
        ] {
            assert_eq!(verdict("C_EncryptInit", code), Verdict::RetireSession);
        }
    }

    #[test]
    fn handles_logins_and_devices_are_told_apart() {
        assert_eq!(
            verdict("C_EncryptInit", sys::CKR_KEY_HANDLE_INVALID),
            Verdict::FindHandleAgain
        );
        assert_eq!(
            verdict("C_EncryptInit", sys::CKR_USER_NOT_LOGGED_IN),
            Verdict::LoginAgain
        );
        assert_eq!(
            verdict("C_EncryptInit", sys::CKR_DEVICE_REMOVED),
            Verdict::SlotFailed
        );
        assert_eq!(
            verdict("C_EncryptInit", sys::CKR_DEVICE_ERROR),
            Verdict::SlotFailed
        );
    }

    #[test]
    fn a_refusal_neither_repeats_nor_fails_the_slot() {
        assert_eq!(
            verdict("C_EncryptInit", sys::CKR_KEY_FUNCTION_NOT_PERMITTED),
            Verdict::Refused
        );
        assert_eq!(
            verdict("C_CreateObject", sys::CKR_TEMPLATE_INCONSISTENT),
            Verdict::Refused
        );
        assert_eq!(
            verdict("C_Encrypt", sys::CKR_VENDOR_DEFINED + 5),
            Verdict::Refused
        );
    }

    #[test]
    fn codes_print_by_name() {
        assert_eq!(Ckr(sys::CKR_GENERAL_ERROR).to_string(), "CKR_GENERAL_ERROR");
        assert_eq!(Ckr(0x8000_0001).to_string(), "CKR 0x80000001");
        let error = CallError {
            call: "C_Login",
            code: Ckr(sys::CKR_PIN_INCORRECT),
        };
        assert_eq!(error.to_string(), "C_Login returned CKR_PIN_INCORRECT");
    }
}
