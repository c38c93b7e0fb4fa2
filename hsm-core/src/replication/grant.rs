//! Sealed grants: a slot's transport key, encrypted inside a member's token to a joiner's node
//! key, sealed under the replication key. RSA-OAEP proves nothing about its sender; this seal
//! proves that a holder of the replication key made the grant for this very node and slot.

use zeroize::Zeroizing;

use super::{ClusterKey, NONCE_LEN, SealError, TAG_LEN, TrkId, open, seal};
use crate::envelope::put_lp;
use crate::names::TransportId;

const WHAT: &str = "transport key grant";
const MAGIC: [u8; 4] = *b"HSG1";
const DOMAIN: &[u8] = b"hsm/grant/v1\0";

/// Whom a grant is for. Everything in it is authenticated.
#[derive(Clone, Copy)]
pub struct GrantContext<'a> {
    /// Id of the cluster.
    pub cluster_id: [u8; 16],
    /// Epoch of the cluster: grants of an older one are void.
    pub epoch: u64,
    /// Name of the slot.
    pub slot: &'a str,
    /// The transport key that is granted.
    pub transport_id: TransportId,
    /// Raft id of the node it is granted to.
    pub raft_id: u64,
    /// SHA-256 of the DER `SubjectPublicKeyInfo` of that node's key pair in the slot.
    pub spki_sha256: [u8; 32],
}

impl GrantContext<'_> {
    /// ```text
    /// "hsm/grant/v1\0" ‖ lp(cluster id) ‖ epoch(u64 BE) ‖ lp(slot) ‖ transport_id(16)
    ///   ‖ raft_id(u64 BE) ‖ lp(SPKI hash) ‖ trk_id(8)
    /// ```
    fn aad(&self, trk_id: TrkId) -> Vec<u8> {
        let mut out = Vec::with_capacity(160 + self.slot.len());
        out.extend_from_slice(DOMAIN);
        put_lp(&mut out, &self.cluster_id);
        out.extend_from_slice(&self.epoch.to_be_bytes());
        put_lp(&mut out, self.slot.as_bytes());
        out.extend_from_slice(self.transport_id.as_bytes());
        out.extend_from_slice(&self.raft_id.to_be_bytes());
        put_lp(&mut out, &self.spki_sha256);
        out.extend_from_slice(&trk_id);
        out
    }
}

/// A sealed grant cut at its fields. At rest:
///
/// ```text
/// offset  bytes  field
///      0      4  magic         48 53 47 31 ("HSG1")
///      4      8  trk_id        which replication key sealed it
///     12     16  transport_id  which transport key is granted
///     28     12  nonce
///     40      n  ciphertext    of the OAEP blob (n = 384 for RSA-3072)
///   40+n     16  tag
/// ```
struct Parts<'a> {
    trk_id: TrkId,
    transport_id: TransportId,
    nonce: &'a [u8; NONCE_LEN],
    sealed: &'a [u8],
}

fn split(record: &[u8]) -> Option<Parts<'_>> {
    let (magic, rest) = record.split_first_chunk::<4>()?;
    let (trk_id, rest) = rest.split_first_chunk::<8>()?;
    let (transport_id, rest) = rest.split_first_chunk::<16>()?;
    let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
    let transport_id = TransportId::from_bytes(*transport_id);
    (*magic == MAGIC && sealed.len() >= TAG_LEN).then_some(Parts {
        trk_id: *trk_id,
        transport_id,
        nonce,
        sealed,
    })
}

fn prefix(trk_id: TrkId, transport_id: TransportId) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&trk_id);
    out.extend_from_slice(transport_id.as_bytes());
    out
}

impl ClusterKey {
    /// Seals the OAEP blob that the granting token made for the node `context` names.
    pub fn seal_grant(&self, context: &GrantContext<'_>, blob: &[u8]) -> Result<Vec<u8>, SealError> {
        let prefix = prefix(self.trk_id, context.transport_id);
        seal(WHAT, &self.grant, prefix, blob, &context.aad(self.trk_id))
    }

    /// Gives back the OAEP blob, for `C_UnwrapKey` under this node's private key. The caller
    /// still compares the transport key's check with the committed one before using it.
    pub fn open_grant(
        &self,
        context: &GrantContext<'_>,
        record: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let parts = split(record).ok_or(SealError::Format {
            what: WHAT,
            len: record.len(),
        })?;
        self.check_trk_id(WHAT, parts.trk_id)?;
        if parts.transport_id != context.transport_id {
            return Err(SealError::OtherTransportKey {
                what: WHAT,
                found: parts.transport_id,
                expected: context.transport_id,
            });
        }
        open(
            WHAT,
            &self.grant,
            parts.nonce,
            parts.sealed,
            &context.aad(self.trk_id),
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::seal_with;
    use super::super::tests::cluster_key;
    use super::*;
    use crate::names::KeyUid;
    use crate::replication::{ReplicationKey, SealedKeyContext};

    const BLOB: [u8; 384] = [0xC3; 384];

    fn context() -> GrantContext<'static> {
        GrantContext {
            cluster_id: *b"cluster-id-16-by",
            epoch: 1,
            slot: "exchange",
            transport_id: TransportId::from_bytes(*b"transport-key-01"),
            raft_id: 4,
            spki_sha256: [0x11; 32],
        }
    }

    /// Made with Python's `cryptography`.
    #[test]
    fn the_golden_grant_stands() {
        let key = cluster_key();
        let sealed = seal_with(
            WHAT,
            &key.grant,
            prefix(key.trk_id, context().transport_id),
            *b"nonce-123456",
            b"oaep blob",
            &context().aad(key.trk_id),
        )
        .unwrap();
        assert_eq!(
            hex::encode(&sealed),
            concat!(
                "48534731dba57fde4a94a7da7472616e73706f72742d6b65792d30316e6f6e63652d3132",
                "33343536a52222c0737135496260f456c4842285f04bc07de9ba39c0d4",
            )
        );
        assert_eq!(
            key.open_grant(&context(), &sealed).unwrap().as_slice(),
            b"oaep blob"
        );
    }

    #[test]
    fn every_field_of_the_context_is_bound() {
        let key = cluster_key();
        let sealed = key.seal_grant(&context(), &BLOB).unwrap();
        assert_eq!(key.open_grant(&context(), &sealed).unwrap().as_slice(), BLOB);
        for other in [
            GrantContext {
                cluster_id: [0; 16],
                ..context()
            },
            GrantContext {
                epoch: 2,
                ..context()
            },
            GrantContext {
                slot: "2fa",
                ..context()
            },
            GrantContext {
                transport_id: TransportId::from_bytes([1; 16]),
                ..context()
            },
            GrantContext {
                raft_id: 5,
                ..context()
            },
            GrantContext {
                spki_sha256: [0x12; 32],
                ..context()
            },
        ] {
            assert!(key.open_grant(&other, &sealed).is_err());
        }
    }

    #[test]
    fn a_grant_of_another_replication_key_is_refused_by_name() {
        let forged = ReplicationKey::generate()
            .unwrap()
            .for_cluster(b"cluster-id-16-by")
            .seal_grant(&context(), &BLOB)
            .unwrap();
        let error = cluster_key().open_grant(&context(), &forged).unwrap_err();
        assert!(matches!(error, SealError::OtherReplicationKey { .. }), "{error}");
    }

    #[test]
    fn a_sealed_key_is_no_grant() {
        let key = cluster_key();
        let sealed = key
            .seal_key(
                &SealedKeyContext {
                    cluster_id: context().cluster_id,
                    slot: "exchange",
                    context: "exchange-key",
                    version: 1,
                    key_uid: KeyUid::from_bytes([0; 16]),
                    transport_id: context().transport_id,
                    check_record: b"",
                },
                &BLOB,
            )
            .unwrap();
        assert!(matches!(
            key.open_grant(&context(), &sealed),
            Err(SealError::Format { .. })
        ));
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_refused() {
        let key = cluster_key();
        let sealed = key.seal_grant(&context(), b"oaep blob").unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open_grant(&context(), &flipped).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(
                key.open_grant(&context(), &sealed[..length]).is_err(),
                "length {length}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut record = MAGIC.to_vec();
            record.extend_from_slice(&bytes);
            prop_assert!(cluster_key().open_grant(&context(), &record).is_err());
        }
    }
}
