//! The slot's own judgement of its health: the known-answer test finds the *token object* again
//! and decrypts through it and through every copy, because copies go on working when the token
//! is long gone. Nothing else makes a failed slot ready, except the end of a hang.

use super::shared::Shared;
use super::state::{KAT_FAILED, LOGGED_OUT};
use crate::error::{HsmError, SlotError};
use crate::kat::CheckRecord;
use crate::kek;
use crate::login::Login;
use crate::names::KeyUid;
use crate::token::Token;

/// Runs the test. Failure fails the slot and destroys its copies; success makes it ready and
/// makes the copies again.
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
    shared.control("known_answer_test", |token| {
        let outcome = test(shared, token, key_uid, &record);
        match &outcome {
            Ok(()) => shared.state.proven(),
            Err(error) if error.is_about_health() => {
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
    if shared.state.is_failed_with(LOGGED_OUT) {
        log_in_again(shared, token)?;
    }
    if shared.files.as_ref().is_some_and(|files| !files.are_there()) {
        return Err(HsmError::NotFound {
            what: "directory of token",
            id: shared.token.serial.clone(),
        });
    }
    let held = kek::held(token, key_uid)?;
    record.prove(token, held)?;
    shared.load_missing(token);
    for copy in shared.copies(key_uid) {
        record.prove(token, copy)?;
    }
    Ok(())
}

/// A logout killed every handle of a private object, copies included.
fn log_in_again(shared: &Shared, token: &Token<'_>) -> Result<(), HsmError> {
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
        retry: false,
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
