//! See [`crate::fuzzing`].
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::path::Path;

use hsm_api::admin::RevocationMatch;
use raft_store::state::access::{Acl, RevocationKey};
use raft_store::state::table::RowKey;
use serde_json::Value;

use super::access::{document, revocations};
use super::call::CallError;
use super::seed;
use crate::config::parse_revoked;

/// The CAs that certificates are accepted from here.
fn issuers() -> Vec<String> {
    vec!["CN=Admin CA,O=Example".to_owned(), "CN=Clients".to_owned()]
}

fn acl(value: Value) -> Result<Acl, CallError> {
    document::resolve(&document::parse(value)?, &issuers())
}

/// An access-control document: what is accepted is shown as a document that says the same, under the same digest.
/// What is refused is refused with its place.
pub fn acl_document(data: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        return false;
    };
    let acl = match self::acl(value) {
        Ok(acl) => acl,
        Err(error) => {
            assert!(error.detail.starts_with("acl"), "{error}");
            return false;
        }
    };
    let shown = document::show(&acl);
    assert_eq!(document::digest(&shown).unwrap(), acl.digest());
    let again = self::acl(serde_json::to_value(&shown).unwrap()).unwrap();
    assert_eq!(again, acl);
    true
}

/// What is to be revoked, as JSON: what is accepted is kept under a key that gives it back, and named as people did.
pub fn revocation(data: &[u8]) -> bool {
    let Ok(what) = serde_json::from_slice::<RevocationMatch>(data) else {
        return false;
    };
    let Ok(key) = revocations::key(&what) else {
        return false;
    };
    let kept = key.encode();
    assert!(kept.len() <= seed::MAX_NAME);
    assert_eq!(RevocationKey::decode(&kept).as_ref(), Some(&key));
    assert_eq!(revocations::key(&revocations::matching(&key)).as_ref(), Ok(&key));
    assert_eq!(revocations::place(&hex::encode(&kept)).as_ref(), Ok(&key));
    true
}

/// Version 1's `revoked.yaml`: no entry is passed over, and each becomes something that can be kept.
pub fn revoked_file(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let path = Path::new("x");
    let Ok(entries) = parse_revoked(text, path) else {
        return false;
    };
    let mut revoked = Vec::new();
    for entry in entries {
        let Ok(revoked_by_it) = seed::revoked_by(path, entry, &issuers()) else {
            return false;
        };
        assert!(!revoked_by_it.is_empty(), "an entry revokes nothing");
        revoked.extend(revoked_by_it);
    }
    for (key, reason) in &revoked {
        assert!(key.encode().len() <= raft_store::state::table::MAX_KEY);
        assert_eq!(RevocationKey::decode(&key.encode()).as_ref(), Some(key));
        assert!(reason.chars().count() <= 200);
    }
    true
}
