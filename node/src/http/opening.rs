//! A ciphertext that a request gives, and what a slot is to open it with. Whatever does not open is the caller's
//! fault unless the node knows better.

use hsm_api::ErrorCode;
use hsm_core::{Ciphertext, DecryptJob, DecryptV1Job};

use super::asking::{Asking, Bound};
use super::data_plane::AboveKnown;
use super::go_base64;
use super::job::usable;
use super::json::Text;
use super::problem::ApiError;
use super::resolve::{Resolution, Wanted, held, resolve};
use crate::config::ContextName;
use crate::keyring::{ContextKeys, ReadableKey};

/// What the caller has sent, decoded.
pub(super) struct Given<'a> {
    ciphertext: Vec<u8>,
    key_id: &'a str,
    aad: Vec<u8>,
}

impl<'a> Given<'a> {
    pub(super) fn read(
        ciphertext: &Text<'_>,
        key_id: &'a Text<'_>,
        aad: &Text<'_>,
    ) -> Result<Self, ApiError> {
        let decoded = go_base64::decode(ciphertext.as_str());
        let mut ciphertext = decoded.ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Ciphertext))?;
        Ok(Self {
            // No secret: it need not be wiped.
            ciphertext: std::mem::take(&mut *ciphertext),
            key_id: key_id.as_str(),
            aad: decode_aad(aad)?,
        })
    }
}

/// The caller's associated data.
pub(super) fn decode_aad(text: &Text<'_>) -> Result<Vec<u8>, ApiError> {
    match go_base64::decode(text.as_str()) {
        Some(mut aad) => Ok(std::mem::take(&mut *aad)),
        None => Err(ApiError::new(ErrorCode::InvalidBase64Aad)),
    }
}

/// What can be done with it.
pub(super) enum Opening<'k> {
    /// A slot opens it with this version.
    Known(Ciphertext, &'k ReadableKey),
    /// It names a version that this node does not know.
    Above(u32),
}

/// Finds the key. `bound` is whom the ciphertext was made for, and `may_use` says which other contexts the caller
/// may hear of.
pub(super) fn opening<'k>(
    asking: &Asking<'_>,
    (name, keys): (&ContextName, &'k ContextKeys),
    given: Given<'_>,
    wanted: Wanted,
    bound: Bound<'_>,
    may_use: impl Fn(&ContextName) -> bool,
) -> Result<Opening<'k>, ApiError> {
    let Given {
        ciphertext,
        key_id,
        aad,
    } = given;
    let resolution = resolve(&asking.ring, keys, &ciphertext, key_id, wanted, may_use)?;
    let (ciphertext, key) = match resolution {
        Resolution::AboveKnown(version) => return Ok(Opening::Above(version)),
        // The header is authenticated: its own binding decides, whatever the context's is now.
        Resolution::V2(header) => {
            let key = held(keys, &header.key_uid)?;
            usable(&key.slot)?;
            let job = DecryptJob {
                binding_value: bound.value(header.binding),
                header,
                ciphertext,
                context: name.to_arc(),
                aad,
            };
            (Ciphertext::V2(job), key)
        }
        Resolution::V1(key_uid) => {
            let key = held(keys, &key_uid)?;
            usable(&key.slot)?;
            // v1 had no associated data of the caller's; ignoring it would call it authenticated.
            if !aad.is_empty() {
                return Err(ApiError::new(ErrorCode::AuthenticationFailed)
                    .detail("a v1 ciphertext carries no aad of the caller's"));
            }
            let job = DecryptV1Job {
                key_uid,
                ciphertext,
                context: name.to_arc(),
                binding_value: bound.value(keys.binding),
            };
            (Ciphertext::V1(job), key)
        }
    };
    Ok(Opening::Known(ciphertext, key))
}

/// What a ciphertext of a version that this node does not know is answered.
pub(super) fn above_known(answer: AboveKnown, version: u32) -> ApiError {
    match answer {
        AboveKnown::OnItsWay => ApiError::new(ErrorCode::KeyVersionNotReady)
            .detail(format!("version {version} is on its way to this node")),
        AboveKnown::Unknown => {
            ApiError::new(ErrorCode::UnknownKeyVersion).operator(format!("version {version}"))
        }
        AboveKnown::Busy => ApiError::new(ErrorCode::Overloaded)
            .operator("too many ciphertexts of unknown versions wait for the leader's word"),
        AboveKnown::NoQuorum => ApiError::new(ErrorCode::NoQuorum).detail(
            "the ciphertext names a version this node does not know, and no quorum can say \
             whether it exists",
        ),
    }
}
