//! The associated data of v2 and v1 ciphertexts: what binds a ciphertext to its context and
//! principal. Every variable field has a length before it, so that no two sets of fields give
//! the same bytes.

use sha2::{Digest, Sha256};

use super::header::SIGNED_HEADER_LEN;

/// Keeps these bytes apart from every other use of the same keys.
const DOMAIN_V2: &[u8] = b"hsm/env/v2\0";

/// Appends `field` behind its length (u32, big-endian).
pub(crate) fn put_lp(out: &mut Vec<u8>, field: &[u8]) {
    // Bodies and names are bounded far below 4 GiB; the bytes follow in full in any case.
    let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(field);
}

/// Associated data of a v2 ciphertext:
///
/// ```text
/// "hsm/env/v2\0" ‖ lp(header[0..28]) ‖ lp(context) ‖ lp(X) ‖ lp(caller's aad)
/// ```
///
/// `header` is the encoded header; bytes from 28 on (the IV, or even the whole ciphertext) are
/// ignored, see [`Header`](super::Header). `x` is the first OU, the CN or empty, by the
/// header's binding. There is no cluster id in it: data outlives clusters.
#[must_use]
pub fn aad_v2(header: &[u8], context: &str, x: &str, caller: &[u8]) -> Vec<u8> {
    let signed = &header[..header.len().min(SIGNED_HEADER_LEN)];
    let length = signed.len() + context.len() + x.len() + caller.len();
    let mut out = Vec::with_capacity(DOMAIN_V2.len() + 4 * size_of::<u32>() + length);
    out.extend_from_slice(DOMAIN_V2);
    put_lp(&mut out, signed);
    put_lp(&mut out, context.as_bytes());
    put_lp(&mut out, x.as_bytes());
    put_lp(&mut out, caller);
    out
}

/// Associated data of a v1 ciphertext: `SHA-256(context ‖ 0x00 ‖ X)`, X being the first OU for
/// `mode: shared` and the CN for `mode: private`.
#[must_use]
pub fn aad_v1(context: &str, x: &str) -> [u8; 32] {
    Sha256::new()
        .chain_update(context.as_bytes())
        .chain_update([0_u8])
        .chain_update(x.as_bytes())
        .finalize()
        .into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{Binding, Header, Purpose};
    use crate::names::KeyUid;

    fn header() -> Vec<u8> {
        Header {
            purpose: Purpose::Data,
            binding: Binding::Private,
            key_uid: KeyUid::from_bytes(*b"0123456789abcdef"),
            version: 7,
            iv: *b"nonce-123456",
        }
        .encode()
    }

    /// Made with Python's struct module; a change here closes ciphertexts already stored.
    #[test]
    fn the_golden_v2_bytes_stand() {
        assert_eq!(
            hex::encode(aad_v2(&header(), "exchange-key", "trading-1", b"order 42")),
            concat!(
                "68736d2f656e762f7632000000001cf54853320101020c30313233343536373839616263",
                "646566000000070000000c65786368616e67652d6b65790000000974726164696e672d31",
                "000000086f72646572203432",
            )
        );
    }

    /// Made with Python's hashlib, as the v1 service computes it.
    #[test]
    fn the_golden_v1_digest_stands() {
        assert_eq!(
            hex::encode(aad_v1("exchange-key", "Trading")),
            "fc86400a275c2b59f339a0dddd4e61112e7aedfc7278a0d1a94b8c276c636003"
        );
    }

    #[test]
    fn the_iv_is_not_part_of_the_associated_data() {
        let whole = header();
        assert_eq!(
            aad_v2(&whole, "c", "x", b""),
            aad_v2(&whole[..SIGNED_HEADER_LEN], "c", "x", b"")
        );
    }

    /// The bytes AES-256-GCM makes of a known envelope (key `00 01 … 1f`), by another library.
    #[test]
    fn a_golden_envelope_opens() {
        use aes_gcm::aead::{Aead, Payload};
        use aes_gcm::{Aes256Gcm, KeyInit};

        let envelope = hex::decode(concat!(
            "f54853320101020c30313233343536373839616263646566000000076e6f6e63652d3132",
            "33343536e18c6ae5f9f2ff2bdefe6267687e9da9efb5594f032a3b61a44ffaf02fd6cd01",
        ))
        .unwrap();
        let (header, offset) = Header::parse(&envelope).unwrap();
        let key: [u8; 32] = std::array::from_fn(|i| i as u8);
        let aad = aad_v2(&envelope[..offset], "exchange-key", "trading-1", b"order 42");
        let plaintext = Aes256Gcm::new_from_slice(&key)
            .unwrap()
            .decrypt(
                (&header.iv).into(),
                Payload {
                    msg: &envelope[offset..],
                    aad: &aad,
                },
            )
            .unwrap();
        assert_eq!(plaintext, b"golden plaintext");
    }

    proptest! {
        #[test]
        fn moving_bytes_between_fields_changes_the_associated_data(
            context in "[a-z]{1,8}", x in "[a-z]{1,8}", caller in "[a-z]{1,8}",
        ) {
            let real = aad_v2(&header(), &context, &x, caller.as_bytes());
            prop_assert_ne!(&real, &aad_v2(&header(), &format!("{context}{x}"), "", caller.as_bytes()));
            prop_assert_ne!(&real, &aad_v2(&header(), &context, &format!("{x}{caller}"), b""));
            prop_assert_ne!(&real, &aad_v2(&header()[..27], &context, &x, caller.as_bytes()));
        }
    }
}
