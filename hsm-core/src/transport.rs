//! Transport keys: the one key of a slot under which its KEKs travel. They leave a token only
//! wrapped to another token's node key, and are used only if they are the key that the cluster
//! committed to.

use cryptoki_sys as sys;
use sha2::{Digest, Sha256};

use crate::error::{CallError, HsmError};
use crate::ffi::Obj;
use crate::marshal::Mech;
use crate::names::TransportId;
use crate::node_key;
use crate::profile::OaepHash;
use crate::return_codes::{Ckr, Verdict, classify};
use crate::spki::RsaPublicKey;
use crate::templates::{self, AES_KEY_LEN};
use crate::token::{Found, Token, duplicates};

pub(crate) const WHAT: &str = "transport key";

/// Bytes of a transport key's check, and of every KEK wrapped under one: RFC 3394 adds eight.
pub const CHECK_LEN: usize = AES_KEY_LEN + 8;

/// Makes the transport key, or finds it made. Returns its check.
pub(crate) fn create(token: &Token<'_>, id: TransportId) -> Result<[u8; CHECK_LEN], HsmError> {
    if let Some(held) = find(token, id)? {
        return check_of(token, held);
    }
    let made = token
        .raw
        .generate_key(token.session, Mech::AesKeyGen, &templates::transport_generated())?;
    let made = token.ephemeral(made);
    let check = check_of(token, made.object())?;
    let kept = keep(token, id, made.object())?;
    prove(token, id, kept, &check)?;
    Ok(check)
}

/// The check of the transport key with this id; `None` if the token has none.
pub(crate) fn check(token: &Token<'_>, id: TransportId) -> Result<Option<[u8; CHECK_LEN]>, HsmError> {
    find(token, id)?.map(|held| check_of(token, held)).transpose()
}

/// Wraps the transport key to another node's key: `hash(1) ‖ RSA-OAEP ciphertext`.
///
/// Who the recipient is, and that the committed state says so, is for the caller to know. `anew`: it has rejected one.
pub(crate) fn grant(
    token: &Token<'_>,
    id: TransportId,
    recipient_spki: &[u8],
    anew: bool,
) -> Result<Vec<u8>, HsmError> {
    let key = held(token, id)?;
    wrap_to(token, key, recipient_spki, anew)
}

/// A transport key that was made, and is in no token any more: only those it was granted to can have it.
pub struct OfferedTransportKey {
    /// Its check.
    pub check: [u8; CHECK_LEN],
    /// The key wrapped to each recipient, in their order; or why it could not be.
    pub grants: Vec<Result<Vec<u8>, HsmError>>,
}

/// Makes a transport key as a session object and wraps it to each recipient's node key. Nothing of it stays in this
/// token: whoever is to hold it, this token too, takes it from its grant once the cluster has committed to the check. A
/// node that dies before leaves nothing behind.
pub(crate) fn offer(token: &Token<'_>, recipients: &[Vec<u8>]) -> Result<OfferedTransportKey, HsmError> {
    let made = token
        .raw
        .generate_key(token.session, Mech::AesKeyGen, &templates::transport_generated())?;
    let made = token.ephemeral(made);
    token.verify(made.object(), WHAT, &templates::transport_session())?;
    let check = check_of(token, made.object())?;
    let wrap = |spki: &Vec<u8>| wrap_to(token, made.object(), spki, false);
    let grants = recipients.iter().map(wrap).collect();
    Ok(OfferedTransportKey { check, grants })
}

fn wrap_to(token: &Token<'_>, key: Obj, recipient_spki: &[u8], anew: bool) -> Result<Vec<u8>, HsmError> {
    let recipient = RsaPublicKey::from_spki(recipient_spki)?;
    let template = templates::recipient(&recipient.modulus, &recipient.exponent);
    let public = token.ephemeral(token.raw.create(token.session, &template)?);
    let mut refusal = None;
    for hash in hashes(token.profile.oaep_hashes, anew) {
        match token
            .raw
            .wrap(token.session, Mech::RsaOaep(hash), public.object(), key)
        {
            Ok(wrapped) => {
                let mut blob = vec![hash_byte(hash)];
                blob.extend_from_slice(&wrapped);
                return Ok(blob);
            }
            Err(error) if is_parameter_refusal(&error) => refusal = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(refusal.map_or_else(|| unsupported_hash(token, "any hash"), HsmError::from))
}

/// In which order hashes are tried. Nobody knows which ones the recipient's module knows: the strongest first, and for
/// one that has rejected a grant SHA-1, which they all know.
fn hashes(known: &[OaepHash], anew: bool) -> Vec<OaepHash> {
    let mut hashes = known.to_vec();
    if anew {
        hashes.reverse();
    }
    hashes
}

/// Takes a transport key that was wrapped to this token, if it is the committed one.
pub(crate) fn accept(
    token: &Token<'_>,
    id: TransportId,
    blob: &[u8],
    expected_check: &[u8; CHECK_LEN],
) -> Result<(), HsmError> {
    if let Some(held) = find(token, id)? {
        return prove(token, id, held, expected_check);
    }
    let Some((hash, wrapped)) = blob.split_first() else {
        return Err(HsmError::Argument {
            what: "grant",
            reason: "empty".to_owned(),
        });
    };
    let hash = match *hash {
        1 => OaepHash::Sha1,
        2 => OaepHash::Sha256,
        other => {
            return Err(HsmError::Argument {
                what: "grant",
                reason: format!("unknown hash {other}"),
            });
        }
    };
    // Of the grant, not of the token: whoever can use another hash has to make another one.
    if !token.profile.oaep_hashes.contains(&hash) {
        return Err(HsmError::Argument {
            what: "grant",
            reason: unsupported_hash(token, hash_name(hash)).to_string(),
        });
    }
    let node_key = node_key::private(token)?;
    let unwrapped = token
        .raw
        .unwrap(
            token.session,
            Mech::RsaOaep(hash),
            node_key,
            wrapped,
            &templates::transport_session(),
        )
        .map_err(|error| not_opened(error, "grant", "this token's node key does not open it; it was made for another key: the slot's registered public key and the one in this token must be the same"))?;
    let unwrapped = token.ephemeral(unwrapped);
    token.verify(unwrapped.object(), WHAT, &templates::transport_session())?;
    // OAEP proves nothing about the sender: anyone with the public key can send a key of his own.
    // Nor that what came is a key: some modules say so only when it is used.
    let check = check_with(token, unwrapped.object(), |error| {
        not_opened(error, "grant", "what it holds is no transport key")
    })?;
    compare(id, &check, expected_check)?;
    let kept = keep(token, id, unwrapped.object())?;
    prove(token, id, kept, expected_check)
}

/// Destroys a transport key whose generation has ended. KEKs under it cannot be imported again.
pub(crate) fn destroy(token: &Token<'_>, id: TransportId) -> Result<usize, HsmError> {
    let found = token.find_all(sys::CKO_SECRET_KEY, id.as_bytes())?;
    token.destroy_all(&found)?;
    if !token.find_all(sys::CKO_SECRET_KEY, id.as_bytes())?.is_empty() {
        return Err(HsmError::Quarantined {
            what: WHAT,
            id: id.to_string(),
            reason: "the token says it destroyed the object and still finds it".to_owned(),
        });
    }
    Ok(found.len())
}

/// The transport key, to wrap and unwrap with, its attributes checked: a planted one without the
/// unwrap template must not be used.
pub(crate) fn held(token: &Token<'_>, id: TransportId) -> Result<Obj, HsmError> {
    find(token, id)?.ok_or_else(|| HsmError::NotFound {
        what: WHAT,
        id: id.to_string(),
    })
}

/// `C_WrapKey(T, a key made from a public constant)`. AES key wrap is deterministic, so this
/// names T without giving anything away: it is one known plaintext of a cipher made for keys.
pub(crate) fn check_of(token: &Token<'_>, transport: Obj) -> Result<[u8; CHECK_LEN], HsmError> {
    check_with(token, transport, HsmError::from)
}

/// As [`check_of`]; `refused` says what it means that `transport` wraps nothing.
fn check_with(
    token: &Token<'_>,
    transport: Obj,
    refused: impl FnOnce(CallError) -> HsmError,
) -> Result<[u8; CHECK_LEN], HsmError> {
    let known = token
        .raw
        .create(token.session, &templates::known_key(&check_constant()))?;
    let known = token.ephemeral(known);
    let wrapped = token
        .raw
        .wrap(token.session, Mech::AesKeyWrap, transport, known.object())
        .map_err(refused)?;
    wrapped.as_slice().try_into().map_err(|_| HsmError::NotSupported {
        what: format!(
            "CKM_AES_KEY_WRAP as in RFC 3394 ({} bytes for a 256-bit key)",
            wrapped.len()
        ),
        by: token.profile.library.clone(),
        remedy: "use a module whose key wrap adds exactly eight bytes".to_owned(),
    })
}

fn check_constant() -> [u8; AES_KEY_LEN] {
    Sha256::digest(b"hsm/transport-check/v1\0").into()
}

fn find(token: &Token<'_>, id: TransportId) -> Result<Option<Obj>, HsmError> {
    match token.find(sys::CKO_SECRET_KEY, id.as_bytes())? {
        Found::None => Ok(None),
        Found::Many(count) => Err(duplicates(WHAT, id.as_bytes(), count)),
        Found::One(held) => {
            token.verify(
                held,
                &format!("{WHAT} {id}"),
                &templates::transport_held(id.as_bytes()),
            )?;
            Ok(Some(held))
        }
    }
}

fn keep(token: &Token<'_>, id: TransportId, object: Obj) -> Result<Obj, HsmError> {
    let label = format!("transport-{}", hex::encode(&id.as_bytes()[..4]));
    token.keep(
        object,
        WHAT,
        sys::CKO_SECRET_KEY,
        id.as_bytes(),
        &label,
        &templates::transport_held(id.as_bytes()),
    )
}

fn prove(
    token: &Token<'_>,
    id: TransportId,
    transport: Obj,
    expected: &[u8; CHECK_LEN],
) -> Result<(), HsmError> {
    compare(id, &check_of(token, transport)?, expected)
}

fn compare(id: TransportId, found: &[u8; CHECK_LEN], expected: &[u8; CHECK_LEN]) -> Result<(), HsmError> {
    if found == expected {
        Ok(())
    } else {
        Err(HsmError::TransportCheck { id: id.to_string() })
    }
}

fn hash_byte(hash: OaepHash) -> u8 {
    match hash {
        OaepHash::Sha1 => 1,
        OaepHash::Sha256 => 2,
    }
}

fn hash_name(hash: OaepHash) -> &'static str {
    match hash {
        OaepHash::Sha1 => "RSA-OAEP with SHA-1",
        OaepHash::Sha256 => "RSA-OAEP with SHA-256",
    }
}

fn unsupported_hash(token: &Token<'_>, what: &str) -> HsmError {
    HsmError::NotSupported {
        what: what.to_owned(),
        by: token.profile.library.clone(),
        remedy: "the granting node has to use a hash that this module supports".to_owned(),
    }
}

/// An unwrapping that failed because of what was unwrapped, unless the code says that session or
/// token are in trouble. SoftHSM says GENERAL_ERROR to a wrong key and to garbage alike.
pub(crate) fn not_opened(error: CallError, what: &'static str, reason: &str) -> HsmError {
    match classify(&error) {
        Verdict::Retry | Verdict::CallersFault | Verdict::Refused => HsmError::Argument {
            what,
            reason: format!("{reason} ({error})"),
        },
        _ => error.into(),
    }
}

/// How modules say that they do not know a hash: SoftHSM 2.6.1 says ARGUMENTS_BAD.
fn is_parameter_refusal(error: &CallError) -> bool {
    let Ckr(code) = error.code;
    [
        sys::CKR_ARGUMENTS_BAD,
        sys::CKR_MECHANISM_PARAM_INVALID,
        sys::CKR_MECHANISM_INVALID,
    ]
    .contains(&code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_rejected_a_grant_gets_one_with_the_hash_that_every_module_knows() {
        let known = [OaepHash::Sha256, OaepHash::Sha1];
        assert_eq!(hashes(&known, false), known);
        assert_eq!(hashes(&known, true), [OaepHash::Sha1, OaepHash::Sha256]);
        assert_eq!(hashes(&[OaepHash::Sha1], true), [OaepHash::Sha1]);
    }
}
