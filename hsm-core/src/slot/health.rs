//! The slot's own judgement of its health: the known-answer test finds the *token object* again
//! and decrypts through it and through every copy, because copies go on working when the token
//! is long gone. Nothing else makes a failed slot ready, unless it has no key to be tested with.

use cryptoki::session::SessionState;

use super::shared::Shared;
use super::state::{KAT_FAILED, LOGGED_OUT};
use crate::error::{HsmError, SlotError};
use crate::kat::CheckRecord;
use crate::kek;
use crate::login::Login;
use crate::module::session_state;
use crate::names::KeyUid;
use crate::token::Token;

const FORGOTTEN: &str = "the token has forgotten the login";

/// Runs the test. Failure fails the slot and destroys its copies; success makes it ready and
/// makes the copies again.
///
/// A key that fails its own check record is quarantined besides: the test of another key would
/// otherwise bring it back. One that is quarantined already, or turns out to be there twice, says
/// nothing about the slot.
pub(crate) fn known_answer_test(
    shared: &Shared,
    key_uid: KeyUid,
    version: u32,
    context: &str,
    check_record: &[u8],
) -> Result<(), HsmError> {
    // Neither a wrong record nor a quarantined key says anything about the slot.
    let record = CheckRecord::parse(key_uid, version, context, check_record)?;
    shared.usable(key_uid)?;
    shared.probe("known_answer_test", |token| {
        let outcome = test(shared, token, key_uid, &record);
        match &outcome {
            Ok(()) => {
                shared.note_known(key_uid, version, context, check_record);
                shared.state.proven();
            }
            Err(HsmError::Quarantined { .. }) => shared.note_quarantine(token, key_uid, &outcome),
            Err(error) if error.is_about_health() => {
                if let HsmError::CheckRecord { reason, .. } = error {
                    shared.quarantine(key_uid, reason);
                }
                shared.state.fail(KAT_FAILED, error.to_string());
                shared.drop_all_copies(token);
            }
            Err(_) => {}
        }
        outcome
    })
}

fn test(
    shared: &Shared,
    token: &Token<'_>,
    key_uid: KeyUid,
    record: &CheckRecord<'_>,
) -> Result<(), HsmError> {
    is_there(shared)?;
    ensure_login(shared, token, false)?;
    let held = kek::held(token, key_uid)?;
    record.prove(token, held.object)?;
    shared.load_missing(token);
    shared.control.next_step();
    for copy in shared.copies(key_uid) {
        record.prove(token, copy)?;
    }
    Ok(())
}

/// The test of a slot that has no key yet.
pub(crate) fn check_session(shared: &Shared) -> Result<(), HsmError> {
    shared.probe("check_session", |token| {
        let outcome = is_there(shared).and_then(|()| ensure_login(shared, token, false));
        match &outcome {
            Ok(()) => shared.state.proven(),
            Err(error) => shared.state.fail(KAT_FAILED, error.to_string()),
        }
        outcome
    })
}

/// Logs in again where the token has forgotten the login.
pub(crate) fn log_in(shared: &Shared, retry: bool) -> Result<(), HsmError> {
    shared.control("log_in", |token| ensure_login(shared, token, retry))
}

/// A removed token directory does not show in calls: SoftHSM goes on with what it has in memory.
pub(crate) fn is_there(shared: &Shared) -> Result<(), HsmError> {
    if shared.files.as_ref().is_some_and(|files| !files.are_there()) {
        return Err(HsmError::NotFound {
            what: "directory of token",
            id: shared.token.serial.clone(),
        });
    }
    Ok(())
}

/// An error unless the token knows the login: without one, private objects are only not found, and a
/// token that is only looked at seems empty.
pub(crate) fn require_login(shared: &Shared, token: &Token<'_>) -> Result<(), HsmError> {
    if session_state(token.session)? == SessionState::RwUser {
        return Ok(());
    }
    shared.state.fail(LOGGED_OUT, FORGOTTEN);
    Err(HsmError::Login(FORGOTTEN.to_owned()))
}

/// The session itself is asked: after a logout private objects are only not found, which no return
/// code tells from a key that was lost.
fn ensure_login(shared: &Shared, token: &Token<'_>, retry: bool) -> Result<(), HsmError> {
    if session_state(token.session)? == SessionState::RwUser {
        return Ok(());
    }
    shared.state.fail(LOGGED_OUT, FORGOTTEN);
    // A logout killed every handle of a private object, copies included.
    shared.drop_all_copies(token);
    shared.module.forget_login(&shared.token.serial);
    let login = Login {
        slot: &shared.name,
        module: &shared.module,
        token: &shared.token,
        files: token.files,
        pin: &shared.pin,
        state_dir: &shared.state_dir,
        insecure_pin: shared.insecure_pin,
        retry,
    };
    match login.run(token.session) {
        Ok(()) => Ok(()),
        // The token says that it has not forgotten, and nobody else can have logged in: the lock
        // is ours. The PIN is the one that was right at the start.
        Err(SlotError::PinUnproven { .. }) => {
            shared.module.remember_login(&shared.token.serial, &shared.pin);
            Ok(())
        }
        Err(error) => Err(HsmError::Login(error.to_string())),
    }
}
