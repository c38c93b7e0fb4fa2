//! AES-GCM inside the token: one call per message, lengths checked before it, buffers 32 bytes
//! longer than the input, associated data always. A call that fails because of a length leaves
//! its session unusable, so none may be made.

use cryptoki::session::Session;
use zeroize::Zeroizing;

use crate::envelope::{HEADER_LEN, Header, IV_LEN, TAG_LEN, V1_NONCE_LEN, aad_v1, aad_v2};
use crate::error::{CallError, HsmError};
use crate::ffi::{Obj, Raw};
use crate::profile::IvSource;
use crate::secrets::Plaintext;

/// Room that a token may want beyond input and tag.
const SLACK: usize = 32;

/// Why a message could not be encrypted or decrypted.
pub(crate) enum GcmError {
    /// Shorter than nonce and tag; no call was made.
    TooShort,
    /// The token's answer.
    Call(CallError),
    /// Not a matter of this call.
    Other(HsmError),
}

impl From<CallError> for GcmError {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

/// Session and key of one call.
#[derive(Clone, Copy)]
pub(crate) struct Cipher<'a> {
    pub(crate) raw: &'a Raw,
    pub(crate) session: &'a Session,
    pub(crate) key: Obj,
}

impl Cipher<'_> {
    /// A whole envelope: header, ciphertext, tag. `header.iv` has to be fresh for every call.
    pub(crate) fn seal(
        &self,
        iv_source: IvSource,
        header: &Header,
        aad: &[u8],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, GcmError> {
        if iv_source != IvSource::Host {
            return Err(GcmError::Other(HsmError::NotSupported {
                what: "an IV made by the token".to_owned(),
                by: "this version".to_owned(),
                remedy: "use a module that accepts a 96-bit IV".to_owned(),
            }));
        }
        check_aad(aad)?;
        let mut envelope = Vec::with_capacity(HEADER_LEN + plaintext.len() + SLACK);
        header.encode_into(&mut envelope);
        envelope.resize(HEADER_LEN + plaintext.len() + SLACK, 0);
        let out = envelope.get_mut(HEADER_LEN..).unwrap_or_default();
        let written = self
            .raw
            .gcm_encrypt(self.session, self.key, &header.iv, aad, plaintext, out)?;
        check_length("C_Encrypt", written, plaintext.len() + TAG_LEN)?;
        envelope.truncate(HEADER_LEN + written);
        Ok(envelope)
    }

    /// Opens an envelope whose header the caller has matched with the key.
    pub(crate) fn open_v2(
        &self,
        header: &Header,
        envelope: &[u8],
        context: &str,
        binding_value: &str,
        caller_aad: &[u8],
    ) -> Result<Plaintext, GcmError> {
        let (Some(head), Some(body)) = (envelope.get(..HEADER_LEN), envelope.get(HEADER_LEN..)) else {
            return Err(GcmError::TooShort);
        };
        let aad = aad_v2(head, context, binding_value, caller_aad);
        self.open(&header.iv, &aad, body)
    }

    /// Opens a v1 ciphertext: nonce, ciphertext, tag.
    pub(crate) fn open_v1(
        &self,
        ciphertext: &[u8],
        context: &str,
        binding_value: &str,
    ) -> Result<Plaintext, GcmError> {
        let Some((nonce, body)) = ciphertext.split_first_chunk::<V1_NONCE_LEN>() else {
            return Err(GcmError::TooShort);
        };
        self.open(nonce, &aad_v1(context, binding_value), body)
    }

    /// Opens ciphertext and tag.
    pub(crate) fn open(&self, iv: &[u8; IV_LEN], aad: &[u8], body: &[u8]) -> Result<Plaintext, GcmError> {
        let Some(length) = body.len().checked_sub(TAG_LEN) else {
            return Err(GcmError::TooShort);
        };
        check_aad(aad)?;
        // Wiped whatever happens: a token may write before it finds that the tag is wrong.
        let mut out = Zeroizing::new(vec![0_u8; body.len() + SLACK]);
        let written = self
            .raw
            .gcm_decrypt(self.session, self.key, iv, aad, body, &mut out)?;
        check_length("C_Decrypt", written, length)?;
        out.truncate(written);
        Ok(Plaintext::from(out))
    }
}

/// SoftHSM 2.6.1 reads the first byte of the associated data whether there is one or not.
fn check_aad(aad: &[u8]) -> Result<(), GcmError> {
    if aad.is_empty() {
        return Err(GcmError::Other(HsmError::Argument {
            what: "associated data",
            reason: "must not be empty".to_owned(),
        }));
    }
    Ok(())
}

fn check_length(call: &'static str, written: usize, expected: usize) -> Result<(), GcmError> {
    if written == expected {
        return Ok(());
    }
    Err(GcmError::Other(HsmError::NotSupported {
        what: format!("{call} with a 128-bit tag after the ciphertext ({written} bytes for {expected})"),
        by: "the module".to_owned(),
        remedy: "use a module that implements CKM_AES_GCM as PKCS#11 2.40 describes it".to_owned(),
    }))
}
