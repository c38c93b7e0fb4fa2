//! Which key a ciphertext was made with, and whether this caller's question fits it. A pure
//! decision over the key ring; the token still has the last word.

use hsm_api::ErrorCode;
use hsm_core::envelope::{HEADER_LEN, Header, Purpose, TAG_LEN};
use hsm_core::names::KeyUid;

use super::problem::ApiError;
use crate::config::ContextName;
use crate::keyring::{ContextKeys, KeyRing, MissingKey, MissingWhy, ReadableKey, RetiredWhy};

/// v1: nonce and tag around an empty plaintext.
const V1_MIN: usize = 12 + TAG_LEN;

/// How a ciphertext is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Resolution {
    /// An envelope of a key held here.
    V2(Header),
    /// A v1 ciphertext under a key held here.
    V1(KeyUid),
    /// It names a version that this node does not know yet; the leader has to be asked.
    AboveKnown(u32),
}

/// What a ciphertext is asked for as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// What a caller encrypted.
    Data,
    /// A data key.
    DataKey,
    /// Either: it does not come out.
    Either,
}

impl Wanted {
    /// Refuses what is of another purpose. A check record is of nobody's.
    fn check(self, purpose: Purpose) -> Result<(), ApiError> {
        match (self, purpose) {
            (Self::Data | Self::Either, Purpose::Data) | (Self::DataKey | Self::Either, Purpose::DataKey) => {
                Ok(())
            }
            (Self::DataKey, Purpose::Data | Purpose::Check) => Err(ApiError::new(ErrorCode::NotADataKey)),
            (Self::Data | Self::Either, _) => Err(ApiError::new(ErrorCode::NotADataCiphertext)),
        }
    }
}

/// Decides. It is v2 only if magic *and* a known (key, version) of the context match, because a
/// v1 nonce may begin with the magic; else, with `key_id`, it is v1.
///
/// Only who may use another context learns that a key is that context's. To others it is a key that nobody
/// has, in every respect, or they could find out which contexts and versions there are.
pub(crate) fn resolve(
    ring: &KeyRing,
    keys: &ContextKeys,
    ciphertext: &[u8],
    key_id: &str,
    wanted: Wanted,
    may_use: impl Fn(&ContextName) -> bool,
) -> Result<Resolution, ApiError> {
    let header = Header::parse(ciphertext).map(|(header, _)| header);
    if let Some(header) = header
        && let Some(known) = known(keys, &header.key_uid)
    {
        return envelope(keys, ciphertext, key_id, wanted, header, known);
    }
    if !key_id.is_empty()
        && let Some(key_uid) = keys.by_key_id.get(key_id)
    {
        return v1(keys, ciphertext, wanted, *key_uid);
    }
    if let Some(header) = header {
        let what = format!("key {} version {}", header.key_uid, header.version);
        return match ring.owner(&header.key_uid) {
            Some(owner) if may_use(owner) => Err(ApiError::new(ErrorCode::WrongContext)),
            _ if header.version > keys.highest_known => Ok(Resolution::AboveKnown(header.version)),
            owner => Err(unknown(&what, owner)),
        };
    }
    if ciphertext.len() < V1_MIN {
        return Err(too_short(ciphertext));
    }
    if key_id.is_empty() {
        return Err(ApiError::new(ErrorCode::UnknownKeyVersion)
            .detail("the ciphertext names no key version; a v1 ciphertext needs its key_id"));
    }
    let mut foreign = None;
    for owner in ring.contexts_with_key_id(key_id) {
        if may_use(owner) {
            return Err(ApiError::new(ErrorCode::WrongContext));
        }
        foreign = Some(owner);
    }
    let what = format!("key_id {:?}", key_id.chars().take(80).collect::<String>());
    Err(unknown(&what, foreign))
}

fn known<'k>(keys: &'k ContextKeys, key_uid: &KeyUid) -> Option<(u32, &'k str)> {
    let readable = keys
        .readable
        .get(key_uid)
        .map(|key| (key.version, key.key_id.as_str()));
    let missing = || {
        keys.missing
            .get(key_uid)
            .map(|key| (key.version, key.key_id.as_str()))
    };
    let retired = || {
        keys.retired
            .get(key_uid)
            .map(|key| (key.version, key.key_id.as_str()))
    };
    readable.or_else(missing).or_else(retired)
}

fn envelope(
    keys: &ContextKeys,
    ciphertext: &[u8],
    key_id: &str,
    wanted: Wanted,
    header: Header,
    (version, label): (u32, &str),
) -> Result<Resolution, ApiError> {
    if header.version != version {
        // A key has one version for ever, so these bytes were altered.
        return Err(ApiError::new(ErrorCode::AuthenticationFailed));
    }
    wanted.check(header.purpose)?;
    if !key_id.is_empty() && key_id != label {
        return Err(ApiError::new(ErrorCode::KeyIdMismatch));
    }
    if ciphertext.len() < HEADER_LEN + TAG_LEN {
        return Err(too_short(ciphertext));
    }
    held(keys, &header.key_uid)?;
    Ok(Resolution::V2(header))
}

fn v1(
    keys: &ContextKeys,
    ciphertext: &[u8],
    wanted: Wanted,
    key_uid: KeyUid,
) -> Result<Resolution, ApiError> {
    if ciphertext.len() < V1_MIN {
        return Err(too_short(ciphertext));
    }
    // v1 made no data keys.
    wanted.check(Purpose::Data)?;
    held(keys, &key_uid)?;
    Ok(Resolution::V1(key_uid))
}

fn too_short(ciphertext: &[u8]) -> ApiError {
    ApiError::new(ErrorCode::CiphertextTooShort).detail(format!(
        "{} bytes cannot hold a nonce and a tag",
        ciphertext.len()
    ))
}

/// No key of this context; for the operator, whose it is.
fn unknown(what: &str, owner: Option<&ContextName>) -> ApiError {
    let reason = match owner {
        Some(owner) => format!("{what} is of context {owner}, which the caller may not use"),
        None => format!("{what} is known to nobody here"),
    };
    ApiError::new(ErrorCode::UnknownKeyVersion).operator(reason)
}

/// Refuses a key that the state names and this node's token lacks, and one that decrypts nothing any more.
pub(crate) fn held<'k>(keys: &'k ContextKeys, key_uid: &KeyUid) -> Result<&'k ReadableKey, ApiError> {
    if let Some(key) = keys.readable.get(key_uid) {
        return Ok(key);
    }
    if let Some(retired) = keys.retired.get(key_uid) {
        let version = retired.version;
        return Err(match retired.why {
            RetiredWhy::Disabled => ApiError::new(ErrorCode::KeyVersionDisabled).detail(format!(
                "version {version} is disabled, or waits for its destruction"
            )),
            RetiredWhy::Destroyed => ApiError::new(ErrorCode::KeyVersionDestroyed)
                .detail(format!("version {version} was destroyed")),
        });
    }
    let Some(MissingKey { version, why, .. }) = keys.missing.get(key_uid) else {
        return Err(ApiError::new(ErrorCode::KeyVersionNotReady).operator(format!("key {key_uid}")));
    };
    Err(match why {
        MissingWhy::NotImportedYet => ApiError::new(ErrorCode::KeyVersionNotReady)
            .detail(format!("version {version} is being imported on this node")),
        MissingWhy::NotReplicable => ApiError::new(ErrorCode::KeyNotOnThisNode)
            .detail(format!("version {version} is held by other nodes only")),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::HashMap;

    use hsm_core::SlotState;
    use hsm_core::envelope::{Binding, MAGIC};

    use super::*;
    use crate::keyring::{ClosedSlot, KeySlot, RetiredKey};

    fn uid(byte: u8) -> KeyUid {
        KeyUid::from_bytes([byte; 16])
    }

    fn keys(readable: &[(u8, u32)], missing: &[(u8, u32, MissingWhy)]) -> ContextKeys {
        let label = |uid: u8, version: u32| format!("kek-{uid}-v{version}");
        let slot = KeySlot {
            name: "s".into(),
            ops: std::sync::Arc::new(ClosedSlot(SlotState::Locked)),
        };
        ContextKeys {
            binding: Binding::Private,
            active: None,
            readable: readable
                .iter()
                .map(|(u, v)| {
                    (
                        uid(*u),
                        ReadableKey {
                            slot: slot.clone(),
                            version: *v,
                            key_id: label(*u, *v),
                        },
                    )
                })
                .collect(),
            by_key_id: readable
                .iter()
                .map(|(u, v)| (label(*u, *v), uid(*u)))
                .chain(missing.iter().map(|(u, v, _)| (label(*u, *v), uid(*u))))
                .collect(),
            highest_known: 3,
            missing: missing
                .iter()
                .map(|(u, v, why)| {
                    (
                        uid(*u),
                        MissingKey {
                            version: *v,
                            key_id: label(*u, *v),
                            why: *why,
                        },
                    )
                })
                .collect(),
            retired: HashMap::new(),
        }
    }

    fn ring() -> KeyRing {
        let here = keys(
            &[(1, 1), (2, 2)],
            &[
                (3, 3, MissingWhy::NotImportedYet),
                (4, 0, MissingWhy::NotReplicable),
            ],
        );
        KeyRing::new(HashMap::from([
            (ContextName::new("here").unwrap(), here),
            (ContextName::new("there").unwrap(), keys(&[(9, 1)], &[])),
            (ContextName::new("foreign").unwrap(), keys(&[(7, 5)], &[])),
        ]))
    }

    fn header(key: u8, version: u32) -> Header {
        Header {
            purpose: Purpose::Data,
            binding: Binding::Private,
            key_uid: uid(key),
            version,
            iv: [0; 12],
        }
    }

    fn sealed(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode();
        bytes.extend_from_slice(&[0; TAG_LEN + 5]);
        bytes
    }

    fn ask(ciphertext: &[u8], key_id: &str) -> Result<Resolution, ErrorCode> {
        let ring = ring();
        let (_, keys) = ring.context("here").unwrap();
        let may_use = |owner: &ContextName| owner.as_str() != "foreign";
        resolve(&ring, keys, ciphertext, key_id, Wanted::Data, may_use).map_err(|error| error.code())
    }

    #[test]
    fn an_envelope_names_its_key() {
        assert_eq!(ask(&sealed(&header(1, 1)), ""), Ok(Resolution::V2(header(1, 1))));
        assert_eq!(
            ask(&sealed(&header(2, 2)), "kek-2-v2"),
            Ok(Resolution::V2(header(2, 2)))
        );
    }

    #[test]
    fn a_contradicting_key_id_is_refused() {
        for key_id in ["kek-1-v1", "no-such"] {
            assert_eq!(ask(&sealed(&header(2, 2)), key_id), Err(ErrorCode::KeyIdMismatch));
        }
    }

    #[test]
    fn a_v1_ciphertext_needs_a_known_key_id() {
        let v1 = [7_u8; 40];
        assert_eq!(ask(&v1, "kek-2-v2"), Ok(Resolution::V1(uid(2))));
        assert_eq!(ask(&v1, ""), Err(ErrorCode::UnknownKeyVersion));
        assert_eq!(ask(&v1, "no-such"), Err(ErrorCode::UnknownKeyVersion));
        assert_eq!(ask(&v1, "kek-9-v1"), Err(ErrorCode::WrongContext));
    }

    #[test]
    fn a_v1_nonce_may_begin_with_the_magic() {
        let mut v1 = [7_u8; 60];
        v1[..4].copy_from_slice(&MAGIC);
        assert_eq!(ask(&v1, "kek-2-v2"), Ok(Resolution::V1(uid(2))));
        // Even one that is a header in every respect, but of no key of this context.
        assert_eq!(
            ask(&sealed(&header(8, 1)), "kek-2-v2"),
            Ok(Resolution::V1(uid(2)))
        );
    }

    #[test]
    fn what_comes_from_another_context_says_so() {
        assert_eq!(ask(&sealed(&header(9, 1)), ""), Err(ErrorCode::WrongContext));
    }

    #[test]
    fn a_key_of_a_context_that_the_caller_may_not_use_is_one_that_nobody_has() {
        let ring = ring();
        let (_, keys) = ring.context("here").unwrap();
        let answer = |ciphertext: &[u8], key_id: &str| {
            let may_use = |owner: &ContextName| owner.as_str() != "foreign";
            resolve(&ring, keys, ciphertext, key_id, Wanted::Data, may_use)
        };
        let refused = |ciphertext: &[u8], key_id: &str| {
            let error = answer(ciphertext, key_id).unwrap_err();
            let seen = (error.code(), error.caller_detail().to_owned());
            (seen, error.operator_detail().unwrap().to_owned())
        };
        // Below the highest version of this context, and above it.
        let (foreign, reason) = refused(&sealed(&header(7, 2)), "");
        let (nobodys, _) = refused(&sealed(&header(8, 2)), "");
        assert_eq!(foreign, nobodys);
        assert!(reason.contains("context foreign"), "{reason}");
        for key in [7, 8] {
            assert_eq!(
                answer(&sealed(&header(key, 5)), ""),
                Ok(Resolution::AboveKnown(5))
            );
        }
        let (foreign, reason) = refused(&[7; 40], "kek-7-v5");
        let (nobodys, _) = refused(&[7; 40], "kek-7-v6");
        assert_eq!(foreign, nobodys);
        assert!(reason.contains("context foreign"), "{reason}");
    }

    #[test]
    fn a_version_above_the_highest_is_asked_for_and_others_are_unknown() {
        assert_eq!(ask(&sealed(&header(8, 4)), ""), Ok(Resolution::AboveKnown(4)));
        assert_eq!(
            ask(&sealed(&header(8, 4)), "kek-8-v4"),
            Ok(Resolution::AboveKnown(4))
        );
        assert_eq!(ask(&sealed(&header(8, 3)), ""), Err(ErrorCode::UnknownKeyVersion));
    }

    #[test]
    fn a_key_that_is_missing_here_is_the_nodes_fault() {
        assert_eq!(
            ask(&sealed(&header(3, 3)), ""),
            Err(ErrorCode::KeyVersionNotReady)
        );
        assert_eq!(ask(&[7; 40], "kek-4-v0"), Err(ErrorCode::KeyNotOnThisNode));
    }

    #[test]
    fn a_version_that_decrypts_nothing_any_more_says_so_by_envelope_and_by_label() {
        let mut here = keys(&[(1, 1)], &[]);
        for (key, why) in [(5, RetiredWhy::Disabled), (6, RetiredWhy::Destroyed)] {
            let (version, key_id) = (u32::from(key), format!("kek-{key}"));
            here.by_key_id.insert(key_id.clone(), uid(key));
            here.retired.insert(uid(key), RetiredKey { version, key_id, why });
        }
        let ring = KeyRing::new(HashMap::from([(ContextName::new("here").unwrap(), here)]));
        let (_, keys) = ring.context("here").unwrap();
        let ask = |ciphertext: &[u8], key_id: &str| {
            resolve(&ring, keys, ciphertext, key_id, Wanted::Data, |_| true).map_err(|error| error.code())
        };
        for (key, code) in [
            (5, ErrorCode::KeyVersionDisabled),
            (6, ErrorCode::KeyVersionDestroyed),
        ] {
            let envelope = sealed(&header(key, key.into()));
            assert_eq!(ask(&envelope, ""), Err(code));
            assert_eq!(ask(&[7; 40], &format!("kek-{key}")), Err(code));
            // What was altered is that, whatever became of the key.
            let altered = sealed(&header(key, 1));
            assert_eq!(ask(&altered, ""), Err(ErrorCode::AuthenticationFailed));
            assert_eq!(ring.owner(&uid(key)).unwrap().as_str(), "here");
        }
    }

    #[test]
    fn data_keys_and_check_records_do_not_come_out() {
        for purpose in [Purpose::DataKey, Purpose::Check] {
            let header = Header {
                purpose,
                ..header(1, 1)
            };
            assert_eq!(ask(&sealed(&header), ""), Err(ErrorCode::NotADataCiphertext));
        }
    }

    #[test]
    fn a_data_key_comes_out_only_where_one_is_asked_for() {
        let ring = ring();
        let (_, keys) = ring.context("here").unwrap();
        let ask = |wanted, ciphertext: &[u8], key_id: &str| {
            resolve(&ring, keys, ciphertext, key_id, wanted, |_| true).map_err(|error| error.code())
        };
        for (purpose, wanted, refused) in [
            (Purpose::DataKey, Wanted::DataKey, None),
            (Purpose::DataKey, Wanted::Either, None),
            (Purpose::Data, Wanted::Either, None),
            (Purpose::Data, Wanted::DataKey, Some(ErrorCode::NotADataKey)),
            (Purpose::Check, Wanted::DataKey, Some(ErrorCode::NotADataKey)),
            (
                Purpose::Check,
                Wanted::Either,
                Some(ErrorCode::NotADataCiphertext),
            ),
        ] {
            let header = Header {
                purpose,
                ..header(1, 1)
            };
            let expected = refused.map_or(Ok(Resolution::V2(header)), Err);
            assert_eq!(
                ask(wanted, &sealed(&header), ""),
                expected,
                "{purpose:?} {wanted:?}"
            );
        }
        let v1 = [7_u8; 40];
        assert_eq!(ask(Wanted::Either, &v1, "kek-2-v2"), Ok(Resolution::V1(uid(2))));
        assert_eq!(ask(Wanted::DataKey, &v1, "kek-2-v2"), Err(ErrorCode::NotADataKey));
    }

    #[test]
    fn what_cannot_hold_a_tag_is_too_short() {
        for length in [0, 1, 27] {
            assert_eq!(ask(&vec![7; length], ""), Err(ErrorCode::CiphertextTooShort));
            assert_eq!(
                ask(&vec![7; length], "kek-1-v1"),
                Err(ErrorCode::CiphertextTooShort)
            );
        }
        let bare = header(1, 1).encode();
        assert_eq!(ask(&bare, ""), Err(ErrorCode::CiphertextTooShort));
    }

    /// Any flipped bit is the caller's fault: never a 503, never another key.
    #[test]
    fn a_flipped_bit_in_the_header_is_the_callers_fault() {
        let good = sealed(&header(2, 2));
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match ask(&bad, "") {
                // Binding and nonce: the token finds out.
                Ok(Resolution::V2(found)) => assert_eq!(found.key_uid, uid(2)),
                Ok(other) => panic!("bit {bit}: {other:?}"),
                Err(code) => assert_eq!(code.status(), 400, "bit {bit}: {code}"),
            }
        }
    }
}
