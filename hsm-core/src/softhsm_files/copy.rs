//! How the copy of a `token.object` lies on disk: with a digest, so that one that was damaged never replaces anything.
//!
//! ```text
//! contents of token.object
//! SHA-256 of them, the first 16 bytes
//! magic "HSMCOPY1"
//! ```
//!
//! An earlier release wrote the contents alone; such a copy is of use until it is made anew.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::durable;
use crate::error::HsmError;

const MAGIC: [u8; 8] = *b"HSMCOPY1";
const DIGEST: usize = 16;

fn digest(contents: &[u8]) -> [u8; DIGEST] {
    let mut first = [0; DIGEST];
    first.copy_from_slice(&Sha256::digest(contents)[..DIGEST]);
    first
}

/// Contents as they are written.
pub(super) fn pack(contents: &[u8]) -> Vec<u8> {
    [contents, &digest(contents), &MAGIC].concat()
}

/// The contents of what was written; `None` if they are not what they were. What has no end of ours is taken as it is:
/// the copy of an earlier release, or one that was cut off or whose end was damaged, which reads like no `token.object`.
pub(super) fn unpack(stored: &[u8]) -> Option<Vec<u8>> {
    let Some((rest, &MAGIC)) = stored.split_last_chunk::<8>() else {
        return Some(stored.to_vec());
    };
    let (contents, written) = rest.split_last_chunk::<DIGEST>()?;
    (digest(contents) == *written).then(|| contents.to_vec())
}

/// The copy at this path; `None` if there is none, or none that can be trusted.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>, HsmError> {
    Ok(durable::read(path)?.and_then(|stored| unpack(&stored)))
}
