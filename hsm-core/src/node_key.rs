//! The token's own RSA key pair, to which transport keys are wrapped. Its private half never
//! leaves the token and can do nothing but unwrap.

use cryptoki_sys as sys;

use crate::error::HsmError;
use crate::ffi::Obj;
use crate::marshal::Mech;
use crate::spki::{RsaPublicKey, unsigned};
use crate::templates::{self, NODE_KEY_ID, RSA_EXPONENT};
use crate::token::{Found, Token, duplicates};

pub(crate) const WHAT: &str = "node key";
const LABEL: &str = "hsm-node-key";

/// The public key as SubjectPublicKeyInfo; makes the pair if there is none.
///
/// Only the private half is kept: it holds modulus and exponent too, and of one object there is
/// no half.
pub(crate) fn ensure(token: &Token<'_>) -> Result<Vec<u8>, HsmError> {
    match find(token)? {
        Some(public) => Ok(public),
        None => public_key(token, generate(token)?),
    }
}

/// The public key as SubjectPublicKeyInfo; `None` if there is no pair. Changes nothing: a token that
/// is only looked at may be somebody else's.
pub(crate) fn find(token: &Token<'_>) -> Result<Option<Vec<u8>>, HsmError> {
    match token.find(sys::CKO_PRIVATE_KEY, &NODE_KEY_ID)? {
        Found::One(private) => {
            token.verify(private, WHAT, &templates::node_private_held())?;
            public_key(token, private).map(Some)
        }
        Found::None => Ok(None),
        Found::Many(count) => Err(duplicates(WHAT, &NODE_KEY_ID, count)),
    }
}

/// The private half, checked, to unwrap with. Its modulus is read: without one SoftHSM 2.6.1 ends the process in `C_UnwrapKey`,
/// and what a damaged file decrypts to is none.
pub(crate) fn private(token: &Token<'_>) -> Result<Obj, HsmError> {
    let private = token.find_one(sys::CKO_PRIVATE_KEY, &NODE_KEY_ID, WHAT)?;
    token.verify(private, WHAT, &templates::node_private_held())?;
    public_key(token, private)?;
    Ok(private)
}

fn generate(token: &Token<'_>) -> Result<Obj, HsmError> {
    let (public, private) = token.raw.generate_key_pair(
        token.session,
        Mech::RsaKeyPairGen,
        &templates::node_public_generated(),
        &templates::node_private_generated(),
    )?;
    let _public = token.ephemeral(public);
    let private = token.ephemeral(private);
    token.keep(
        private.object(),
        WHAT,
        sys::CKO_PRIVATE_KEY,
        &NODE_KEY_ID,
        LABEL,
        &templates::node_private_held(),
    )
}

fn public_key(token: &Token<'_>, private: Obj) -> Result<Vec<u8>, HsmError> {
    let read = token.read(private, &[sys::CKA_MODULUS, sys::CKA_PUBLIC_EXPONENT])?;
    let modulus = read.first().and_then(Option::as_ref);
    let exponent = read.get(1).and_then(Option::as_ref);
    let Some(modulus) = modulus else {
        return Err(HsmError::Attribute {
            object: WHAT.to_owned(),
            attribute: "CKA_MODULUS".to_owned(),
            expected: "the modulus".to_owned(),
            found: "missing".to_owned(),
        });
    };
    let key = RsaPublicKey {
        modulus: unsigned(modulus).to_vec(),
        // Some tokens do not keep it with the private key; it is the one the key was made with.
        exponent: exponent.map_or_else(|| RSA_EXPONENT.to_vec(), |exponent| unsigned(exponent).to_vec()),
    };
    // Refuses what another node would refuse, here and now.
    RsaPublicKey::from_spki(&key.to_spki()).map(|key| key.to_spki())
}
