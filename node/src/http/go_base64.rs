//! Base64 as Go's `encoding/base64` reads and writes it, for v1's clients. Plaintexts pass through here: what is
//! copied is wiped.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

/// Go's `base64.StdEncoding`: standard alphabet, padding required, unused bits not looked at.
const GO_STANDARD: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical)
        .with_decode_allow_trailing_bits(true),
);

/// Decodes as Go does: carriage returns and line feeds are skipped, anywhere.
pub(super) fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if !text.contains(['\r', '\n']) {
        return decode_all(text.as_bytes());
    }
    let mut compact = Zeroizing::new(Vec::with_capacity(text.len()));
    compact.extend(text.bytes().filter(|byte| !matches!(byte, b'\r' | b'\n')));
    decode_all(&compact)
}

fn decode_all(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    // Its full size at once, so that growing leaves no copy behind.
    let mut out = Zeroizing::new(vec![0_u8; base64::decoded_len_estimate(text.len())]);
    let length = GO_STANDARD.decode_slice(text, &mut out).ok()?;
    out.truncate(length);
    Some(out)
}

/// Length of what [`encode_into`] appends; `None` for what fits into no memory.
pub(super) fn encoded_len(bytes: &[u8]) -> Option<usize> {
    base64::encoded_len(bytes.len(), true)
}

/// Appends to a buffer that has room for it.
pub(super) fn encode_into(out: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    let start = out.len();
    out.resize(start + encoded_len(bytes)?, 0);
    GO_STANDARD.encode_slice(bytes, out.get_mut(start..)?).ok()?;
    Some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn base64_is_read_as_go_reads_it() {
        for (text, expected) in [
            ("", Some("")),
            ("YQ==", Some("a")),
            ("YWI=", Some("ab")),
            ("YWJj", Some("abc")),
            ("YW\r\nJj\n", Some("abc")),
            ("Y\nQ=\r=", Some("a")),
            // Unused bits set: Go's StdEncoding is not strict.
            ("YR==", Some("a")),
            ("YQ", None),
            ("YQ=", None),
            ("YQ===", None),
            ("YQ==YQ==", None),
            ("Y Q==", None),
            ("YQ==\t", None),
            ("-_-_", None),
            ("a", None),
            ("====", None),
        ] {
            let decoded = decode(text);
            assert_eq!(
                decoded.as_ref().map(|bytes| bytes.as_slice()),
                expected.map(str::as_bytes),
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(bytes: Vec<u8>) {
            let mut text = Vec::with_capacity(encoded_len(&bytes).unwrap());
            encode_into(&mut text, &bytes).unwrap();
            prop_assert_eq!(text.len(), encoded_len(&bytes).unwrap());
            let decoded = decode(std::str::from_utf8(&text).unwrap()).unwrap();
            prop_assert_eq!(decoded.as_slice(), bytes.as_slice());
        }

        #[test]
        fn no_text_makes_the_decoder_panic(text: String) {
            let _ = decode(&text);
        }
    }
}
