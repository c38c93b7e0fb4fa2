//! For each parser of this crate a property that holds whatever the bytes are. A function panics where it does not
//! hold, and otherwise says whether the bytes were accepted. The crate `hsm-fuzz` feeds them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use crate::check_record;
use crate::envelope::{HEADER_LEN, Header, SIGNED_HEADER_LEN, TAG_LEN, aad_v2};
use crate::names::{KeyUid, TransportId};
use crate::object_file::{self, ObjectFile};
use crate::pin;
use crate::replication::{
    ClusterKey, GrantContext, ReplicationKey, ReplicationKeyError, SealError, SealedKeyContext,
    SealedKeyInfo, WRAP_AES_KEY_WRAP,
};
use crate::secrets::Pin;
use crate::softhsm_files::is_torn;
use crate::spki::RsaPublicKey;

/// No message needs more, whatever was sent.
const LONGEST_MESSAGE: usize = 1024;

/// What the sealed keys and grants of the corpus are sealed under.
fn cluster_key() -> ClusterKey {
    ReplicationKey::parse("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
        .unwrap()
        .for_cluster(b"cluster-id-16-by")
}

fn with_last_bit_flipped(data: &[u8]) -> Vec<u8> {
    let mut other = data.to_vec();
    if let Some(last) = other.last_mut() {
        *last ^= 1;
    }
    other
}

/// The header of an envelope: what is accepted is what is written, and every bit of it is authenticated.
pub fn envelope(data: &[u8]) -> bool {
    let Some((header, at)) = Header::parse(data) else {
        return false;
    };
    assert_eq!(at, HEADER_LEN);
    assert_eq!(header.encode(), &data[..at]);
    assert_eq!(
        Header::parse(&data[..at]),
        Some((header, at)),
        "what follows decides nothing"
    );
    assert!(Header::parse(&data[..at - 1]).is_none());
    let aad = aad_v2(data, "c", "x", b"");
    for bit in 0..SIGNED_HEADER_LEN * 8 {
        let mut other = data[..at].to_vec();
        other[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(aad_v2(&other, "c", "x", b""), aad, "bit {bit}");
    }
    true
}

/// A check record: of one key version and no other.
pub fn check_record(data: &[u8]) -> bool {
    const UID: KeyUid = KeyUid::from_bytes(*b"0123456789abcdef");
    let Some(header) = check_record::parse(data, UID, 3) else {
        return false;
    };
    assert_eq!(data.len(), check_record::RECORD_LEN);
    assert_eq!(header.encode(), &data[..HEADER_LEN]);
    assert!(check_record::parse(data, UID, 4).is_none());
    assert!(check_record::parse(data, KeyUid::from_bytes([0; 16]), 3).is_none());
    assert!(check_record::parse(&data[..data.len() - 1], UID, 3).is_none());
    true
}

/// A sealed key: opens only if it is authentic, and then for nothing else than it was sealed for.
pub fn sealed_key(data: &[u8]) -> bool {
    let key = cluster_key();
    let sealed_for = SealedKeyContext {
        cluster_id: *b"cluster-id-16-by",
        slot: "exchange",
        context: "exchange-key",
        version: 7,
        key_uid: KeyUid::from_bytes(*b"0123456789abcdef"),
        transport_id: TransportId::from_bytes(*b"transport-key-01"),
        check_record: b"check record",
    };
    let info = SealedKeyInfo::parse(data);
    let wrapped = match key.open_key(&sealed_for, data) {
        Ok(wrapped) => wrapped,
        Err(error) => {
            assert_eq!(matches!(error, SealError::Format { .. }), info.is_none());
            assert!(error.to_string().len() < LONGEST_MESSAGE);
            return false;
        }
    };
    let info = info.unwrap();
    assert_eq!(
        (info.trk_id, info.transport_id, info.wrap_mech),
        (key.trk_id(), sealed_for.transport_id, WRAP_AES_KEY_WRAP)
    );
    assert_eq!(data.len(), 42 + wrapped.len() + TAG_LEN);
    assert!(key.open_key(&sealed_for, &with_last_bit_flipped(data)).is_err());
    let next = SealedKeyContext {
        version: 8,
        ..sealed_for
    };
    assert!(key.open_key(&next, data).is_err());
    let again = key.seal_key(&sealed_for, &wrapped).unwrap();
    assert!(key.open_key(&sealed_for, &again).unwrap() == wrapped);
    true
}

/// A grant of a transport key, likewise.
pub fn grant(data: &[u8]) -> bool {
    let key = cluster_key();
    let granted = GrantContext {
        cluster_id: *b"cluster-id-16-by",
        epoch: 1,
        slot: "exchange",
        transport_id: TransportId::from_bytes(*b"transport-key-01"),
        raft_id: 4,
        spki_sha256: [0x11; 32],
    };
    let blob = match key.open_grant(&granted, data) {
        Ok(blob) => blob,
        Err(error) => {
            assert!(error.to_string().len() < LONGEST_MESSAGE);
            return false;
        }
    };
    assert_eq!(data.len(), 40 + blob.len() + TAG_LEN);
    assert!(key.open_grant(&granted, &with_last_bit_flipped(data)).is_err());
    let another = GrantContext {
        raft_id: 5,
        ..granted
    };
    assert!(key.open_grant(&another, data).is_err());
    let again = key.seal_grant(&granted, &blob).unwrap();
    assert!(key.open_grant(&granted, &again).unwrap() == blob);
    true
}

/// The replication key's text: every form of one key is that key, and a refusal says nothing but a length.
pub fn replication_key(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    match ReplicationKey::parse(text) {
        Ok(key) => {
            let written = key.to_hex();
            assert!(ReplicationKey::parse(&written).unwrap().to_hex() == written);
            assert!(ReplicationKey::parse(&format!(" {text}\r\n")).unwrap().to_hex() == written);
            true
        }
        Err(error) => {
            let text = text.trim();
            match error {
                ReplicationKeyError::Empty => assert!(text.is_empty()),
                ReplicationKeyError::Length(length) => assert_eq!(length, text.chars().count()),
                ReplicationKeyError::Encoding => assert!(matches!(text.len(), 43 | 44 | 64)),
            }
            false
        }
    }
}

/// The text of a key's id.
pub fn key_uid(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    match KeyUid::from_hex(text) {
        Ok(uid) => {
            assert_eq!(uid.to_string(), text.to_ascii_lowercase());
            assert_eq!(TransportId::from_hex(text).unwrap().as_bytes(), uid.as_bytes());
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < LONGEST_MESSAGE);
            false
        }
    }
}

/// The look at a PIN's entropy: whatever passes has the characters for 128 bits.
pub fn pin_entropy(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    if !pin::has_enough_entropy(&Pin::new(text.to_owned())) {
        return false;
    }
    let distinct: std::collections::BTreeSet<char> = text.chars().collect();
    // The largest alphabet counted is that of a keyboard, 94 characters: 6.55 bits each.
    assert!(text.chars().count() >= 20 && distinct.len() >= 6);
    true
}

/// SoftHSM's object files: what was read is what stands there, in a cut file too, and a file that is the beginning of
/// its own copy is known as such, because its token is restored by that.
pub fn object_file(data: &[u8]) -> bool {
    let parsed = object_file::parse(data);
    assert!(!is_torn(&parsed, &parsed));
    // Each byte may become a replacement character of three.
    assert!(
        parsed
            .serial()
            .is_none_or(|serial| serial.len() <= 3 * data.len())
    );
    match &parsed {
        ObjectFile::Unknown => false,
        ObjectFile::Torn(attributes) => {
            assert!(data.starts_with(&contents(data, attributes)));
            false
        }
        ObjectFile::Whole(attributes) => {
            assert_eq!(contents(data, attributes), data);
            for length in [0, 8, data.len() / 3, data.len() / 2, data.len() - 1] {
                cut(&parsed, attributes, &data[..length.min(data.len())]);
            }
            true
        }
    }
}

/// What a file of these attributes holds, under the generation of `data`.
fn contents(data: &[u8], attributes: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut contents = data.get(..8).unwrap_or_default().to_vec();
    for (kind, value) in attributes {
        contents.extend_from_slice(&kind.to_be_bytes());
        contents.extend_from_slice(value);
    }
    contents
}

fn cut(whole: &ObjectFile, attributes: &[(u64, Vec<u8>)], beginning: &[u8]) {
    let found = object_file::parse(beginning);
    let (ObjectFile::Whole(left) | ObjectFile::Torn(left)) = &found else {
        panic!("the beginning of a file that is understood is not");
    };
    assert_eq!(left, &attributes[..left.len()]);
    let kinds: std::collections::BTreeSet<u64> = attributes.iter().map(|(kind, _)| *kind).collect();
    // SoftHSM writes each kind once; of a file with one twice nothing is claimed.
    if kinds.len() == attributes.len() {
        assert_eq!(is_torn(&found, whole), left.len() < attributes.len());
    }
}

/// Another node's public key: one encoding for each.
pub fn spki(data: &[u8]) -> bool {
    let Ok(key) = RsaPublicKey::from_spki(data) else {
        return false;
    };
    assert_eq!(key.to_spki(), data);
    assert!((384..=1024).contains(&key.modulus.len()));
    assert!(RsaPublicKey::from_spki(&[data, &[0]].concat()).is_err());
    true
}
