//! The one binary encoding of everything stored or sent between nodes: bincode with fixed-width
//! little-endian integers, an explicit size limit and no trailing bytes.

use bincode::Options;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A command encodes to at most this many bytes; larger changes are split by the proposer.
pub const MAX_COMMAND_BYTES: usize = 64 * 1024;
/// Nothing larger than this is ever decoded.
pub const MAX_DECODE_BYTES: u64 = 4 * 1024 * 1024;

/// Why bytes could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[error("codec: {what}: {source}")]
pub struct CodecError {
    /// The type at hand.
    pub what: &'static str,
    #[source]
    source: bincode::Error,
}

fn options() -> impl Options {
    bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .with_little_endian()
        .with_limit(MAX_DECODE_BYTES)
        .reject_trailing_bytes()
}

/// Encodes `value`; fails when it exceeds [`MAX_DECODE_BYTES`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    options().serialize(value).map_err(|source| CodecError {
        what: std::any::type_name::<T>(),
        source,
    })
}

/// Decodes exactly one value from `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    options().deserialize(bytes).map_err(|source| CodecError {
        what: std::any::type_name::<T>(),
        source,
    })
}
