//! The headers in which a proxy says whose certificate it has seen (RFC 9440): `Client-Cert`, one byte sequence of a
//! structured field (RFC 8941, section 3.3.5), and `Client-Cert-Chain`, a list of them. Reads bytes only; whether the
//! certificate is any good is decided elsewhere.

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Longest value of `Client-Cert`, and of `Client-Cert-Chain` in all.
pub const MAX_VALUE: usize = 16 * 1024;
/// Most certificates of a chain. A client's has one or two.
pub const MAX_CHAIN: usize = 8;

/// Without its padding, or with bits behind the last byte that are not zero: RFC 8941, section 4.2.7, would not have it
/// refused. What is compared is what comes out.
static BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Why a value is not what RFC 9440 wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No colons around it, or something behind it.
    #[error("is no byte sequence of RFC 8941: write :, the certificate's DER in base64, and : again")]
    NoByteSequence,
    /// Other characters than those of base64, or too few.
    #[error("is no base64 between its colons")]
    NoBase64,
    /// `::`
    #[error("holds no certificate")]
    Empty,
    /// Beyond the bounds.
    #[error("is longer than {MAX_VALUE} bytes, or than {MAX_CHAIN} certificates")]
    TooLong,
}

/// The DER in a value of `Client-Cert`.
///
/// # Errors
/// [`Malformed`].
pub fn certificate(value: &[u8]) -> Result<Vec<u8>, Malformed> {
    if value.len() > MAX_VALUE {
        return Err(Malformed::TooLong);
    }
    let encoded = trimmed(value)
        .strip_prefix(b":")
        .and_then(|rest| rest.strip_suffix(b":"))
        .filter(|encoded| !encoded.contains(&b':'))
        .ok_or(Malformed::NoByteSequence)?;
    let der = BASE64.decode(encoded).map_err(|_| Malformed::NoBase64)?;
    if der.is_empty() {
        return Err(Malformed::Empty);
    }
    Ok(der)
}

/// The DERs in the lines of `Client-Cert-Chain`, of which there may be several (RFC 9440, section 2.3).
///
/// # Errors
/// [`Malformed`], of the first that is.
pub fn chain<'v>(lines: impl Iterator<Item = &'v [u8]>) -> Result<Vec<Vec<u8>>, Malformed> {
    let (mut ders, mut length) = (Vec::new(), 0_usize);
    for line in lines {
        length = length.saturating_add(line.len());
        if length > MAX_VALUE {
            return Err(Malformed::TooLong);
        }
        // No character of base64.
        for member in line.split(|byte| *byte == b',') {
            if ders.len() == MAX_CHAIN {
                return Err(Malformed::TooLong);
            }
            ders.push(certificate(member)?);
        }
    }
    Ok(ders)
}

/// Without white space around it.
fn trimmed(value: &[u8]) -> &[u8] {
    let is_text = |byte: &u8| !matches!(byte, b' ' | b'\t');
    let start = value.iter().position(is_text).unwrap_or(value.len());
    let end = value.iter().rposition(is_text).map_or(start, |last| last + 1);
    value.get(start..end).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use base64::engine::general_purpose::STANDARD;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// As a proxy writes it.
    pub(in crate::http) fn encode(der: &[u8]) -> String {
        format!(":{}:", STANDARD.encode(der))
    }

    fn chain_of(lines: &[&str]) -> Result<Vec<Vec<u8>>, Malformed> {
        chain(lines.iter().map(|line| line.as_bytes()))
    }

    /// The examples of RFC 9440, appendix A, begin and end so.
    #[test]
    fn a_byte_sequence_is_base64_between_colons() {
        assert_eq!(certificate(b":MIIB:"), Ok(vec![0x30, 0x82, 0x01]));
        assert_eq!(certificate(b" :MIIB: "), Ok(vec![0x30, 0x82, 0x01]));
        // Padding may be left out, and bits behind the last byte do not count.
        for encoded in [&b":MII=:"[..], b":MII:", b":MIJ:"] {
            assert_eq!(certificate(encoded), Ok(vec![0x30, 0x82]));
        }
    }

    #[test]
    fn what_proxies_send_instead_is_refused() {
        for (value, problem) in [
            ("", Malformed::NoByteSequence),
            (":", Malformed::NoByteSequence),
            ("MIIB", Malformed::NoByteSequence),
            (":MIIB", Malformed::NoByteSequence),
            (":MIIB:;a=1", Malformed::NoByteSequence),
            (":MIIB:, :MIIB:", Malformed::NoByteSequence),
            ("\":MIIB:\"", Malformed::NoByteSequence),
            // nginx's $ssl_client_escaped_cert.
            ("-----BEGIN%20CERTIFICATE-----%0AMIIB", Malformed::NoByteSequence),
            ("::", Malformed::Empty),
            (":MI IB:", Malformed::NoBase64),
            (":MI-B:", Malformed::NoBase64),
            (":M:", Malformed::NoBase64),
            (":MIIB==MIIB:", Malformed::NoBase64),
        ] {
            assert_eq!(certificate(value.as_bytes()), Err(problem), "{value:?}");
        }
    }

    #[test]
    fn a_certificate_is_taken_up_to_16_kib() {
        let value = |digits: usize| format!(":{}:", "M".repeat(digits));
        assert!(certificate(value(MAX_VALUE - 4).as_bytes()).is_ok());
        assert_eq!(certificate(value(MAX_VALUE).as_bytes()), Err(Malformed::TooLong));
    }

    #[test]
    fn a_chain_is_a_list_over_one_line_or_several() {
        let both = Ok(vec![b"a".to_vec(), b"b".to_vec()]);
        assert_eq!(chain_of(&[":YQ==:, :Yg==:"]), both);
        assert_eq!(chain_of(&[":YQ==: \t,:Yg==:"]), both);
        assert_eq!(chain_of(&[":YQ==:", ":Yg==:"]), both);
        assert_eq!(chain_of(&[]), Ok(Vec::new()));
        for lines in [
            &[":YQ==:,"][..],
            &[",:YQ==:"],
            &[""],
            &[":YQ==:", ""],
            &[":YQ==: :Yg==:"],
        ] {
            assert_eq!(chain_of(lines), Err(Malformed::NoByteSequence), "{lines:?}");
        }
        let long = vec![":YQ==:"; MAX_CHAIN];
        assert_eq!(chain_of(&long).unwrap().len(), MAX_CHAIN);
        assert_eq!(chain_of(&[&long[..], &long].concat()), Err(Malformed::TooLong));
        let wide = format!(":{}:", "M".repeat(MAX_VALUE / 2));
        assert_eq!(chain_of(&[wide.as_str(), wide.as_str()]), Err(Malformed::TooLong));
    }

    proptest! {
        #[test]
        fn what_a_proxy_writes_is_what_is_read(ders in vec(vec(any::<u8>(), 1..400), 1..=MAX_CHAIN)) {
            prop_assert_eq!(certificate(encode(&ders[0]).as_bytes()), Ok(ders[0].clone()));
            let lines: Vec<String> = ders.iter().map(|der| encode(der)).collect();
            prop_assert_eq!(chain(lines.iter().map(|line| line.as_bytes())), Ok(ders.clone()));
            let line = lines.join(", ");
            prop_assert_eq!(chain([line.as_bytes()].into_iter()), Ok(ders));
        }

        #[test]
        fn no_part_of_a_value_is_a_value(der in vec(any::<u8>(), 1..400)) {
            let whole = encode(&der);
            for length in 0..whole.len() {
                prop_assert!(certificate(&whole.as_bytes()[..length]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..600), text in "[:,A-Za-z0-9+/= ]{0,200}") {
            let _ = certificate(&bytes);
            let _ = certificate(text.as_bytes());
            let _ = chain([&bytes[..], text.as_bytes()].into_iter());
        }
    }
}
