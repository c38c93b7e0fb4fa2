//! Keys with known bytes in a token, so that ciphertexts made by another library can be opened.
//! Only behind the feature `test-support`, which no release has: a KEK of the service is made in
//! a token and known to nobody.

use crate::error::HsmError;
use crate::kek;
use crate::names::KeyUid;
use crate::slot::Slot;
use crate::templates;

/// Puts an AES-256 key with these bytes into the slot's token, as a KEK with this id and label.
pub fn import_test_key(slot: &Slot, key: &[u8; 32], key_uid: KeyUid, label: &str) -> Result<(), HsmError> {
    slot.test_control(|token| {
        let object = token.raw.create(token.session, &templates::test_kek(key))?;
        let object = token.ephemeral(object);
        kek::keep(token, key_uid, label, object.object()).map(|_| ())
    })
}

/// Makes a second token object with the id of a KEK that is held, as two imports at once would.
pub fn duplicate_kek(slot: &Slot, key_uid: KeyUid) -> Result<(), HsmError> {
    slot.test_control(|token| {
        let held = kek::held(token, key_uid)?;
        let changes = templates::to_token(key_uid.as_bytes(), "duplicate");
        token.raw.copy(token.session, held.object, &changes)?;
        Ok(())
    })
}
