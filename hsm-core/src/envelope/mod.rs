//! Envelope v2: the self-describing ciphertext of `/encrypt`, and the associated data of v2 and
//! of v1 ciphertexts. Pure bytes: it decides nothing about keys and never sees a plaintext.

mod aad;
mod header;

pub(crate) use aad::put_lp;
pub use aad::{aad_v1, aad_v2};
pub use header::{Binding, HEADER_LEN, Header, IV_LEN, MAGIC, Purpose, SIGNED_HEADER_LEN, TAG_LEN};

/// Length of the nonce that opens a v1 ciphertext: `nonce(12) ‖ ct ‖ tag(16)`, no header.
pub const V1_NONCE_LEN: usize = 12;
