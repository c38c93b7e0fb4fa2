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

impl CodecError {
    /// Whether the bytes name a variant that this release does not know: enums only grow at their end, so a
    /// newer release wrote them. bincode keeps nothing of serde's error but its text.
    pub fn is_unknown_variant(&self) -> bool {
        matches!(&*self.source, bincode::ErrorKind::Custom(text) if text.contains("variant index"))
    }
}

/// Bytes that `value` encodes to, whatever [`encode`] says to that many.
pub fn size<T: Serialize>(value: &T) -> u64 {
    options()
        .with_no_limit()
        .serialized_size(value)
        .unwrap_or(u64::MAX)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Serialize, Deserialize)]
    enum Today {
        Known(u8),
    }

    #[derive(Serialize, Deserialize)]
    enum Tomorrow {
        Known(u8),
        Added(u8),
    }

    #[test]
    fn a_variant_of_a_newer_release_is_told_apart_from_damage() {
        let known = encode(&Tomorrow::Known(1)).unwrap();
        assert!(matches!(decode(&known), Ok(Today::Known(1))));
        let newer = encode(&vec![Tomorrow::Added(1)]).unwrap();
        assert!(decode::<Vec<Today>>(&newer).err().unwrap().is_unknown_variant());
        let longer = [known.as_slice(), &[0]].concat();
        for damaged in [&known[..known.len() - 1], longer.as_slice()] {
            assert!(!decode::<Today>(damaged).err().unwrap().is_unknown_variant());
        }
    }

    #[test]
    fn a_size_is_told_of_what_is_too_large_to_encode() {
        assert_eq!(size(&vec![0u8; 3]), encode(&vec![0u8; 3]).unwrap().len() as u64);
        let large = vec![0u8; MAX_DECODE_BYTES as usize];
        assert!(encode(&large).is_err());
        assert_eq!(size(&large), MAX_DECODE_BYTES + 8);
    }
}
