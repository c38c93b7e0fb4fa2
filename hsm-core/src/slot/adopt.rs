//! A slot's control operations on keys that version 1 made.

use super::{Slot, health};
use crate::adopt::{self, AdoptKek, DestroyedAdopted};
use crate::error::HsmError;
use crate::kek;

impl Slot {
    /// Sees whether the one key of this label, which version 1 made, can be adopted; where there are several, of this
    /// `CKA_ID`. Changes nothing.
    pub fn examine_v1_key(&self, label: &str, id: Option<&[u8]>) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("examine_v1_key", |token| {
            health::require_login(shared, token)?;
            adopt::examine(token, label, id)
        })
    }

    /// As [`Slot::examine_v1_key`], and makes the check record of the version that the key is to be. It costs the key
    /// one encryption, and leaves nothing in the token.
    pub fn v1_check_record(&self, kek: &AdoptKek, id: Option<&[u8]>) -> Result<Vec<u8>, HsmError> {
        let shared = &self.0.shared;
        shared.control("v1_check_record", |token| {
            health::require_login(shared, token)?;
            adopt::record(token, kek, id)
        })
    }

    /// Makes a copy of a key of version 1 under its id, which decrypts and does nothing else, if the committed check
    /// record proves that it is that key. Proven and on disk when this returns; doing it again changes nothing. The
    /// original is left as it is. `replace` as in [`crate::ImportKek::replace`].
    pub fn adopt_kek(&self, kek: &AdoptKek, check_record: &[u8], replace: bool) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("adopt_kek", |token| {
            if replace {
                shared.drop_copies(token, kek.key_uid);
            } else {
                shared.usable(kek.key_uid)?;
            }
            let outcome = adopt::adopt(token, kek, check_record, replace);
            shared.note_quarantine(token, kek.key_uid, &outcome);
            if outcome.is_ok() {
                shared.note_known(kek.key_uid, kek.version, &kek.context, check_record);
                if replace {
                    shared.end_quarantine(kek.key_uid);
                }
            }
            outcome
        })
    }

    /// Proves the copy that [`Slot::adopt_kek`] has made. One that is not there is not found, and not made.
    pub fn prove_adopted_kek(&self, kek: &AdoptKek, check_record: &[u8]) -> Result<(), HsmError> {
        let shared = &self.0.shared;
        shared.control("prove_adopted_kek", |token| {
            shared.usable(kek.key_uid)?;
            let outcome = adopt::prove(token, kek, check_record);
            shared.note_quarantine(token, kek.key_uid, &outcome);
            if outcome.is_ok() {
                shared.note_known(kek.key_uid, kek.version, &kek.context, check_record);
            }
            outcome
        })
    }

    /// Gives an adopted key back to version 1: destroys session copies and every object of its id, and returns how many
    /// those were; but only once the check record has proven that version 1's own object is in this token. Without that
    /// `None`: the copy may be the only key there is, and it is kept, out of use.
    pub fn release_adopted_kek(
        &self,
        kek: &AdoptKek,
        check_record: &[u8],
    ) -> Result<Option<usize>, HsmError> {
        let shared = &self.0.shared;
        shared.control("release_adopted_kek", |token| {
            health::is_there(shared)?;
            health::require_login(shared, token)?;
            shared.want(kek.key_uid, None);
            shared.drop_copies(token, kek.key_uid);
            if !adopt::has_original(token, kek, check_record)? {
                return Ok(None);
            }
            kek::destroy_copies(token, kek.key_uid)?;
            let destroyed = kek::destroy(token, kek.key_uid)?;
            shared.end_quarantine(kek.key_uid);
            shared.forget_known(kek.key_uid);
            Ok(Some(destroyed))
        })
    }

    /// Destroys an adopted key: session copies, every object of its id, and version 1's own object, if the check
    /// record proves that the object of that label is this key. Otherwise as [`Slot::destroy_kek`].
    pub fn destroy_adopted_kek(
        &self,
        kek: &AdoptKek,
        check_record: &[u8],
    ) -> Result<DestroyedAdopted, HsmError> {
        let shared = &self.0.shared;
        shared.control("destroy_adopted_kek", |token| {
            health::is_there(shared)?;
            health::require_login(shared, token)?;
            shared.want(kek.key_uid, None);
            shared.drop_copies(token, kek.key_uid);
            kek::destroy_copies(token, kek.key_uid)?;
            // The original first: as long as our own copy is there, it is seen that something is left to do.
            let (originals, others) = adopt::destroy_originals(token, kek, check_record)?;
            let copies = kek::destroy(token, kek.key_uid)?;
            shared.end_quarantine(kek.key_uid);
            shared.forget_known(kek.key_uid);
            Ok(DestroyedAdopted {
                copies,
                originals,
                others,
            })
        })
    }
}
