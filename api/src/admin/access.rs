//! The admin routes about access: the cluster's rules as one document, what they say of somebody, and revocations.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeStruct, Serializer};
use serde::{Deserialize, Serialize};

use crate::wire::Base64;

/// Access control as people read and write it: answer of `GET /admin/v1/acl`, and what `POST` takes. A member that is
/// not known is an error on both sides: whoever writes back what he has read must not lose what he cannot read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclDocument {
    /// Names the rules as they were read, hex. `POST` changes nothing if others are in force meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// First OU → what its certificates may do.
    pub mappings: BTreeMap<String, AclMapping>,
    /// What further certificates may do, beside their OU's mapping.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<AclRule>,
    /// Role → who has it.
    pub roles: BTreeMap<String, Vec<AclRole>>,
}

/// What an OU may do: written as a list of contexts, with which everything may be done, or as `contexts` and
/// `operations`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AclMapping {
    /// Names of contexts.
    pub contexts: Vec<String>,
    /// `encrypt`, `decrypt`, `rewrap`, `datakey`; `None`: everything.
    pub operations: Option<Vec<String>>,
}

impl Serialize for AclMapping {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(operations) = &self.operations else {
            return self.contexts.serialize(serializer);
        };
        let mut mapping = serializer.serialize_struct("AclMapping", 2)?;
        mapping.serialize_field("contexts", &self.contexts)?;
        mapping.serialize_field("operations", operations)?;
        mapping.end()
    }
}

impl<'de> Deserialize<'de> for AclMapping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MappingVisitor)
    }
}

struct MappingVisitor;

/// The longer form.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    contexts: Vec<String>,
    operations: Vec<String>,
}

impl<'de> Visitor<'de> for MappingVisitor {
    type Value = AclMapping;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of contexts, or contexts and operations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<AclMapping, A::Error> {
        Ok(AclMapping {
            contexts: Vec::deserialize(SeqAccessDeserializer::new(list))?,
            operations: None,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<AclMapping, A::Error> {
        let held = Held::deserialize(MapAccessDeserializer::new(map))?;
        Ok(AclMapping {
            contexts: held.contexts,
            operations: Some(held.operations),
        })
    }
}

/// A rule: whoever it is about may do each of the operations with each of the contexts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclRule {
    /// Whom it is about.
    pub who: AclWho,
    /// Names of contexts.
    pub contexts: Vec<String>,
    /// As in [`AclMapping::operations`].
    pub operations: Vec<String>,
}

/// Certificates, by what they say: every part that is given must match, and one at least is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclWho {
    /// The issuer's distinguished name, in RFC 4514 order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// The first OU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ou: Option<String>,
    /// The last CN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cn: Option<String>,
}

/// Who has a role: the issuer always, and every other part that is given; one of them at least is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclRole {
    /// As in [`AclWho::issuer`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// The first OU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ou: Option<String>,
    /// The last CN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cn: Option<String>,
    /// SHA-256 of the DER `SubjectPublicKeyInfo`, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spki_sha256: Option<String>,
}

/// `POST /admin/v1/acl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAclRequest {
    /// What is to be in force, whole; with the digest of what was read.
    pub acl: AclDocument,
    /// Only look whether it could be.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer of `POST /admin/v1/acl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAclResponse {
    /// Names the rules that are in force now; of a dry run, those that would be.
    pub digest: String,
}

/// What `GET /admin/v1/acl/test` is asked, as its query.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclQuestion {
    /// The first OU of the certificate.
    #[serde(default)]
    pub ou: Option<String>,
    /// Its last CN.
    #[serde(default)]
    pub cn: Option<String>,
    /// Its issuer; needed only where the answer depends on it.
    #[serde(default)]
    pub issuer: Option<String>,
    /// The context.
    pub context: String,
    /// `encrypt`, `decrypt`, `rewrap` or `datakey`.
    pub operation: String,
}

/// Answer of `GET /admin/v1/acl/test`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclAnswer {
    /// Whether the certificate may.
    pub allowed: bool,
    /// What allows it, as a place in [`AclDocument`], or what is missing.
    pub reason: String,
    /// Everything that it may do with the context.
    pub operations: Vec<String>,
}

/// What a revocation matches: a CN, a serial number of an issuer, or a fingerprint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationMatch {
    /// Every certificate with this last CN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cn: Option<String>,
    /// Serial number, hex; goes with `issuer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The issuer's distinguished name, in RFC 4514 order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// SHA-256 of the certificate, hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// `POST /admin/v1/revocations`: one of `what` and `certificate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeRequest {
    /// What to match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what: Option<RevocationMatch>,
    /// A certificate, DER; it is revoked by serial and issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Base64>,
    /// Why, for people.
    pub reason: String,
}

/// Answer of `POST /admin/v1/revocations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeResponse {
    /// What is revoked now.
    pub revocations: Vec<RevocationMatch>,
    /// How many of them were not before.
    pub added: u64,
    /// What may have been meant otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// `POST /admin/v1/revocations/remove`: one of `what` and `certificate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnrevokeRequest {
    /// What was matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what: Option<RevocationMatch>,
    /// A certificate, DER; its revocations by serial and issuer and by fingerprint are taken back, those of its CN
    /// are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Base64>,
}

/// Answer of `POST /admin/v1/revocations/remove`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnrevokeResponse {
    /// What is not revoked any more.
    pub revocations: Vec<RevocationMatch>,
    /// How many of them were before.
    pub removed: u64,
}

/// `POST /admin/v1/revocations/crl`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeCrlRequest {
    /// The file as it is: DER, or PEM with one list or more.
    pub crl: Base64,
    /// Why, for people.
    pub reason: String,
}

/// Answer of `POST /admin/v1/revocations/crl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeCrlResponse {
    /// The lists of the file.
    pub lists: Vec<CrlInfo>,
    /// How many of their certificates were not revoked before.
    pub added: u64,
}

/// A certificate revocation list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrlInfo {
    /// Who signed it.
    pub issuer: String,
    /// Certificates in it.
    pub entries: u64,
    /// When its issuer wanted to publish the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_update: Option<String>,
}

/// What `GET /admin/v1/revocations` is asked, as its query.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationsPage {
    /// [`RevocationsResponse::next`] of the page before.
    #[serde(default)]
    pub after: Option<String>,
}

/// Answer of `GET /admin/v1/revocations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationsResponse {
    /// One page of them, in the order of their kinds and values.
    pub revocations: Vec<RevocationInfo>,
    /// How many there are in all.
    pub total: u64,
    /// Where the next page begins, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A revocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationInfo {
    /// What it matches.
    pub what: RevocationMatch,
    /// Why.
    pub reason: String,
    /// Since when.
    pub revoked_at: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mapping_is_a_list_or_contexts_with_operations() {
        for (json, operations) in [
            (json!(["a", "b"]), None),
            (
                json!({"contexts": ["a", "b"], "operations": ["decrypt"]}),
                Some(vec!["decrypt".to_owned()]),
            ),
        ] {
            let mapping: AclMapping = serde_json::from_value(json.clone()).unwrap();
            assert_eq!((mapping.contexts.len(), &mapping.operations), (2, &operations));
            assert_eq!(serde_json::to_value(&mapping).unwrap(), json);
        }
        for bad in [
            json!("a"),
            json!(null),
            json!([1]),
            json!({"contexts": ["a"]}),
            json!({"contexts": ["a"], "operations": [], "more": 1}),
        ] {
            assert!(
                serde_json::from_value::<AclMapping>(bad.clone()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_document_must_be_whole_and_hold_nothing_else() {
        let whole = json!({"mappings": {"Trading": ["a"]}, "roles": {"admin": [{"ou": "Admin"}]}});
        let read = |json: &serde_json::Value| serde_json::from_value::<AclDocument>(json.clone());
        let document = read(&whole).unwrap();
        assert_eq!(serde_json::to_value(&document).unwrap(), whole);
        // Left out by mistake, they would take everything away.
        for member in ["mappings", "roles"] {
            let mut less = whole.clone();
            less.as_object_mut().unwrap().remove(member);
            let error = read(&less).unwrap_err().to_string();
            assert!(error.contains(member), "{error}");
        }
        let mut more = whole.clone();
        more["rulez"] = json!([]);
        assert!(read(&more).is_err());
    }
}
