//! RSA public keys as SubjectPublicKeyInfo (RFC 5280 4.1.2.7, RFC 8017 A.1.1), just enough to
//! publish a node key and to take another node's: strict DER, RSA only, no key too weak to carry
//! a transport key.

use crate::error::HsmError;

/// AlgorithmIdentifier: OID 1.2.840.113549.1.1.1 with NULL parameters.
const RSA_ENCRYPTION: [u8; 15] = [
    0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00,
];

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;

/// Smallest and largest modulus accepted, in bytes: 3072 to 8192 bits.
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 384..=1024;

/// An RSA public key, unsigned and without leading zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RsaPublicKey {
    pub(crate) modulus: Vec<u8>,
    pub(crate) exponent: Vec<u8>,
}

impl RsaPublicKey {
    /// The key as DER.
    pub(crate) fn to_spki(&self) -> Vec<u8> {
        let key = tlv(
            SEQUENCE,
            &[integer(&self.modulus), integer(&self.exponent)].concat(),
        );
        let bits = tlv(BIT_STRING, &[[0_u8].as_slice(), &key].concat());
        tlv(SEQUENCE, &[RSA_ENCRYPTION.as_slice(), &bits].concat())
    }

    /// Reads what [`RsaPublicKey::to_spki`] writes, and nothing else.
    pub(crate) fn from_spki(spki: &[u8]) -> Result<Self, HsmError> {
        let key = parse(spki).ok_or_else(|| refuse("no RSA key in DER (SubjectPublicKeyInfo)"))?;
        if !MODULUS_BYTES.contains(&key.modulus.len()) || key.modulus.first().is_none_or(|byte| *byte < 0x80)
        {
            return Err(refuse("the modulus must have 3072 to 8192 bits, in whole bytes"));
        }
        if key.exponent != crate::templates::RSA_EXPONENT {
            return Err(refuse("the public exponent must be 65537"));
        }
        // One encoding per key: its hash is what operators compare.
        if key.to_spki() != spki {
            return Err(refuse("not in DER"));
        }
        Ok(key)
    }
}

fn refuse(reason: &str) -> HsmError {
    HsmError::Argument {
        what: "public key of the recipient slot",
        reason: reason.to_owned(),
    }
}

fn parse(spki: &[u8]) -> Option<RsaPublicKey> {
    let (body, rest) = take(spki, SEQUENCE)?;
    let bits = body.strip_prefix(RSA_ENCRYPTION.as_slice())?;
    let (bits, after_bits) = take(bits, BIT_STRING)?;
    let (key, after_key) = take(bits.strip_prefix(&[0])?, SEQUENCE)?;
    let (modulus, key) = take(key, INTEGER)?;
    let (exponent, key) = take(key, INTEGER)?;
    let ends = [rest, after_bits, after_key, key];
    ends.iter().all(|rest| rest.is_empty()).then(|| RsaPublicKey {
        modulus: unsigned(modulus).to_vec(),
        exponent: unsigned(exponent).to_vec(),
    })
}

/// Contents of the element at the beginning, and what follows it.
fn take(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = der.split_first()?;
    if *found != tag {
        return None;
    }
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (
            usize::from(u16::from_be_bytes(*rest.first_chunk::<2>()?)),
            rest.get(2..)?,
        ),
        _ => return None,
    };
    rest.split_at_checked(length)
}

fn tlv(tag: u8, contents: &[u8]) -> Vec<u8> {
    // Keys are bounded far below 64 KiB.
    let length = u16::try_from(contents.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut out = vec![tag];
    match length {
        [0, short @ 0..=0x7f] => out.push(short),
        [0, medium] => out.extend([0x81, medium]),
        [high, low] => out.extend([0x82, high, low]),
    }
    out.extend_from_slice(contents);
    out
}

fn integer(value: &[u8]) -> Vec<u8> {
    let value = unsigned(value);
    match value.first() {
        // A leading bit of one would make it negative.
        Some(0x80..) | None => tlv(INTEGER, &[[0_u8].as_slice(), value].concat()),
        Some(_) => tlv(INTEGER, value),
    }
}

/// Without leading zeros.
pub(crate) fn unsigned(value: &[u8]) -> &[u8] {
    let zeros = value.iter().take_while(|byte| **byte == 0).count();
    value.get(zeros..).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> RsaPublicKey {
        let mut modulus = vec![0x5a; 384];
        modulus[0] = 0xc3;
        RsaPublicKey {
            modulus,
            exponent: vec![1, 0, 1],
        }
    }

    #[test]
    fn a_key_round_trips_and_looks_as_openssl_writes_it() {
        let spki = sample().to_spki();
        // 30 82 01 a2, algorithm, 03 82 01 8f 00, 30 82 01 8a, 02 82 01 81 00 c3 …, 02 03 01 00 01
        assert_eq!(spki.len(), 422);
        assert_eq!(spki[..4], [0x30, 0x82, 0x01, 0xa2]);
        assert_eq!(spki[19..33], hex::decode("0382018f003082018a0282018100").unwrap());
        assert!(spki.ends_with(&[0x02, 0x03, 0x01, 0x00, 0x01]));
        assert_eq!(RsaPublicKey::from_spki(&spki).unwrap(), sample());
    }

    #[test]
    fn weak_foreign_and_sloppy_keys_are_refused() {
        let short = RsaPublicKey {
            modulus: vec![0xff; 256],
            ..sample()
        };
        assert!(RsaPublicKey::from_spki(&short.to_spki()).is_err());
        let three = RsaPublicKey {
            exponent: vec![3],
            ..sample()
        };
        assert!(RsaPublicKey::from_spki(&three.to_spki()).is_err());
        let mut trailing = sample().to_spki();
        trailing.push(0);
        assert!(RsaPublicKey::from_spki(&trailing).is_err());
        let mut other = sample().to_spki();
        other[10] ^= 1;
        assert!(RsaPublicKey::from_spki(&other).is_err());
        assert!(RsaPublicKey::from_spki(b"").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes: Vec<u8>) {
            let _ = RsaPublicKey::from_spki(&bytes);
        }
    }
}
