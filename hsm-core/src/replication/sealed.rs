//! Sealed keys: a KEK as it travels through the replicated state, wrapped by its slot's
//! transport key inside the token and sealed again under the replication key, bound to the one
//! key version it is for.

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{ClusterKey, NONCE_LEN, SealError, TAG_LEN, TrkId, open, seal};
use crate::envelope::put_lp;
use crate::names::{KeyUid, TransportId};

const WHAT: &str = "sealed key";
const MAGIC: [u8; 4] = *b"HSK1";
const DOMAIN: &[u8] = b"hsm/sealed/v1\0";

/// `wrap_mech` of RFC 3394 key wrap: the number PKCS#11 gives `CKM_AES_KEY_WRAP`.
pub const WRAP_AES_KEY_WRAP: u16 = 0x2109;

/// What a sealed key is for. Everything in it is authenticated: a record opens only for the
/// cluster, slot, context, version, key, transport key and check record it was sealed for.
#[derive(Clone, Copy)]
pub struct SealedKeyContext<'a> {
    /// Id of the cluster.
    pub cluster_id: [u8; 16],
    /// Name of the slot.
    pub slot: &'a str,
    /// Name of the context.
    pub context: &'a str,
    /// Version of the context.
    pub version: u32,
    /// `CKA_ID` of the key.
    pub key_uid: KeyUid,
    /// The transport key it is wrapped under.
    pub transport_id: TransportId,
    /// The check record kept beside it.
    pub check_record: &'a [u8],
}

impl SealedKeyContext<'_> {
    /// ```text
    /// "hsm/sealed/v1\0" ‖ lp(cluster id) ‖ lp(slot) ‖ lp(context) ‖ version(u32 BE) ‖ key_uid(16)
    ///   ‖ transport_id(16) ‖ trk_id(8) ‖ wrap_mech(u16 BE) ‖ SHA-256(check record)
    /// ```
    fn aad(&self, trk_id: TrkId) -> Vec<u8> {
        let mut out = Vec::with_capacity(160 + self.slot.len() + self.context.len());
        out.extend_from_slice(DOMAIN);
        put_lp(&mut out, &self.cluster_id);
        put_lp(&mut out, self.slot.as_bytes());
        put_lp(&mut out, self.context.as_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(self.key_uid.as_bytes());
        out.extend_from_slice(self.transport_id.as_bytes());
        out.extend_from_slice(&trk_id);
        out.extend_from_slice(&WRAP_AES_KEY_WRAP.to_be_bytes());
        out.extend_from_slice(&Sha256::digest(self.check_record));
        out
    }
}

/// What a sealed key says of itself, readable without the replication key. At rest:
///
/// ```text
/// offset  bytes  field
///      0      4  magic         48 53 4B 31 ("HSK1")
///      4      8  trk_id        which replication key sealed it
///     12     16  transport_id  which transport key wrapped it
///     28      2  wrap_mech     u16, big-endian; 0x2109 = AES key wrap (RFC 3394)
///     30     12  nonce
///     42      n  ciphertext    of the wrapped key (n = 40 for an AES-256 key)
///   42+n     16  tag
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealedKeyInfo {
    /// Which replication key sealed it.
    pub trk_id: TrkId,
    /// Which transport key wrapped it.
    pub transport_id: TransportId,
    /// How it was wrapped.
    pub wrap_mech: u16,
}

/// A record cut at its fields.
struct Parts<'a> {
    info: SealedKeyInfo,
    nonce: &'a [u8; NONCE_LEN],
    sealed: &'a [u8],
}

impl SealedKeyInfo {
    /// Reads a record's header; `None` unless it has the form of a sealed key. Says nothing
    /// about its authenticity.
    #[must_use]
    pub fn parse(record: &[u8]) -> Option<Self> {
        split(record).map(|parts| parts.info)
    }
}

fn split(record: &[u8]) -> Option<Parts<'_>> {
    let (magic, rest) = record.split_first_chunk::<4>()?;
    let (trk_id, rest) = rest.split_first_chunk::<8>()?;
    let (transport_id, rest) = rest.split_first_chunk::<16>()?;
    let (wrap_mech, rest) = rest.split_first_chunk::<2>()?;
    let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
    let info = SealedKeyInfo {
        trk_id: *trk_id,
        transport_id: TransportId::from_bytes(*transport_id),
        wrap_mech: u16::from_be_bytes(*wrap_mech),
    };
    (*magic == MAGIC && sealed.len() >= TAG_LEN).then_some(Parts { info, nonce, sealed })
}

fn prefix(trk_id: TrkId, transport_id: TransportId) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&trk_id);
    out.extend_from_slice(transport_id.as_bytes());
    out.extend_from_slice(&WRAP_AES_KEY_WRAP.to_be_bytes());
    out
}

impl ClusterKey {
    /// Seals a key that the token has wrapped with `CKM_AES_KEY_WRAP` under the transport key
    /// `context` names.
    pub fn seal_key(&self, context: &SealedKeyContext<'_>, wrapped: &[u8]) -> Result<Vec<u8>, SealError> {
        let prefix = prefix(self.trk_id, context.transport_id);
        seal(WHAT, &self.sealed_key, prefix, wrapped, &context.aad(self.trk_id))
    }

    /// Gives back the wrapped key, for `C_UnwrapKey` under the transport key `context` names.
    ///
    /// Names what is wrong as exactly as the record allows: another replication key, another
    /// transport key, a mechanism of a later version, or simply not authentic.
    pub fn open_key(
        &self,
        context: &SealedKeyContext<'_>,
        record: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let Parts { info, nonce, sealed } = split(record).ok_or(SealError::Format {
            what: WHAT,
            len: record.len(),
        })?;
        self.check_trk_id(WHAT, info.trk_id)?;
        if info.transport_id != context.transport_id {
            return Err(SealError::OtherTransportKey {
                what: WHAT,
                found: info.transport_id,
                expected: context.transport_id,
            });
        }
        if info.wrap_mech != WRAP_AES_KEY_WRAP {
            return Err(SealError::UnknownMechanism(info.wrap_mech));
        }
        open(WHAT, &self.sealed_key, nonce, sealed, &context.aad(self.trk_id))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::seal_with;
    use super::super::tests::cluster_key;
    use super::*;
    use crate::replication::ReplicationKey;

    const WRAPPED: [u8; 40] = [0x5A; 40];

    fn context() -> SealedKeyContext<'static> {
        SealedKeyContext {
            cluster_id: *b"cluster-id-16-by",
            slot: "exchange",
            context: "exchange-key",
            version: 7,
            key_uid: KeyUid::from_bytes(*b"0123456789abcdef"),
            transport_id: TransportId::from_bytes(*b"transport-key-01"),
            check_record: b"check record",
        }
    }

    /// Made with Python's `cryptography`. A change here makes sealed keys unreadable.
    #[test]
    fn the_golden_sealed_key_stands() {
        let key = cluster_key();
        let context = context();
        let sealed = seal_with(
            WHAT,
            &key.sealed_key,
            prefix(key.trk_id, context.transport_id),
            *b"nonce-123456",
            &WRAPPED,
            &context.aad(key.trk_id),
        )
        .unwrap();
        assert_eq!(
            hex::encode(&sealed),
            concat!(
                "48534b31dba57fde4a94a7da7472616e73706f72742d6b65792d303121096e6f6e63652d",
                "313233343536cc32fe256ac435f65a89e2e5e372f68bc2b9c5cae3b1624f1b56bed00e95",
                "bf7510e4c68d63188a0970f4397c40a068413cd54eb5aa1ce1b3",
            )
        );
        assert_eq!(key.open_key(&context, &sealed).unwrap().as_slice(), WRAPPED);
    }

    #[test]
    fn two_seals_of_one_key_differ_and_both_open() {
        let key = cluster_key();
        let (one, two) = (
            key.seal_key(&context(), &WRAPPED).unwrap(),
            key.seal_key(&context(), &WRAPPED).unwrap(),
        );
        assert_ne!(one, two);
        assert_eq!(one.len(), 42 + WRAPPED.len() + TAG_LEN);
        for sealed in [one, two] {
            assert_eq!(key.open_key(&context(), &sealed).unwrap().as_slice(), WRAPPED);
        }
    }

    #[test]
    fn a_record_tells_which_keys_it_needs() {
        let key = cluster_key();
        let info = SealedKeyInfo::parse(&key.seal_key(&context(), &WRAPPED).unwrap()).unwrap();
        assert_eq!(info.trk_id, key.trk_id());
        assert_eq!(info.transport_id, context().transport_id);
        assert_eq!(info.wrap_mech, WRAP_AES_KEY_WRAP);
    }

    #[test]
    fn another_replication_key_is_named_as_such() {
        let sealed = cluster_key().seal_key(&context(), &WRAPPED).unwrap();
        let other = ReplicationKey::generate()
            .unwrap()
            .for_cluster(b"cluster-id-16-by");
        let error = other.open_key(&context(), &sealed).unwrap_err();
        assert!(matches!(error, SealError::OtherReplicationKey { .. }), "{error}");
        assert!(
            error.to_string().contains(&hex::encode(cluster_key().trk_id())),
            "{error}"
        );
    }

    #[test]
    fn another_transport_key_and_an_unknown_mechanism_are_named_as_such() {
        let key = cluster_key();
        let mut sealed = key.seal_key(&context(), &WRAPPED).unwrap();
        let other = SealedKeyContext {
            transport_id: TransportId::from_bytes([1; 16]),
            ..context()
        };
        assert!(matches!(
            key.open_key(&other, &sealed),
            Err(SealError::OtherTransportKey { .. })
        ));
        sealed[29] ^= 1;
        assert!(matches!(
            key.open_key(&context(), &sealed),
            Err(SealError::UnknownMechanism(0x2108))
        ));
    }

    #[test]
    fn every_field_of_the_context_is_bound() {
        let key = cluster_key();
        let sealed = key.seal_key(&context(), &WRAPPED).unwrap();
        for other in [
            SealedKeyContext {
                cluster_id: [0; 16],
                ..context()
            },
            SealedKeyContext {
                slot: "2fa",
                ..context()
            },
            SealedKeyContext {
                context: "order-key",
                ..context()
            },
            SealedKeyContext {
                version: 8,
                ..context()
            },
            SealedKeyContext {
                key_uid: KeyUid::from_bytes([0; 16]),
                ..context()
            },
            SealedKeyContext {
                check_record: b"check recorD",
                ..context()
            },
            // The same bytes, cut elsewhere.
            SealedKeyContext {
                slot: "exchangeexchange",
                context: "-key",
                ..context()
            },
        ] {
            assert!(matches!(
                key.open_key(&other, &sealed),
                Err(SealError::Altered { .. })
            ));
        }
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_refused() {
        let key = cluster_key();
        let sealed = key.seal_key(&context(), &WRAPPED).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open_key(&context(), &flipped).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(
                key.open_key(&context(), &sealed[..length]).is_err(),
                "length {length}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            let mut record = MAGIC.to_vec();
            record.extend_from_slice(&bytes);
            let _ = SealedKeyInfo::parse(&bytes);
            let _ = SealedKeyInfo::parse(&record);
            prop_assert!(cluster_key().open_key(&context(), &record).is_err());
        }
    }
}
