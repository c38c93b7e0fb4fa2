//! Names and identifiers of the replicated state. Parsed once at the edge; an invalid one cannot exist.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A node's Raft id: the index of the entry that registered it (the founder has 1). Never reused.
pub type RaftId = u64;

/// Milliseconds since the Unix epoch, UTC, by the proposer's clock. For people and schedules only.
pub type UnixMillis = i64;

/// A name that breaks the rule for names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?} is not valid: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit")]
pub struct InvalidName {
    /// What was being named.
    pub kind: &'static str,
    /// The refused value, cut to 80 characters.
    pub value: String,
}

fn check(kind: &'static str, value: &str) -> Result<(), InvalidName> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let ok = (1..=64).contains(&value.len())
        && value.chars().all(plain)
        && value.starts_with(|c: char| c.is_ascii_alphanumeric());
    if ok {
        Ok(())
    } else {
        Err(InvalidName {
            kind,
            value: value.chars().take(80).collect(),
        })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Parses a name; refuses one outside the rule.
            pub fn new(value: &str) -> Result<Self, InvalidName> {
                check($kind, value)?;
                Ok(Self(value.into()))
            }
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
            /// The name as shared text.
            pub fn to_arc(&self) -> Arc<str> {
                Arc::clone(&self.0)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                Self::new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// A context: what applications name when they encrypt.
    ContextName, "context");
name!(
    /// A slot of the configuration (not the PKCS#11 slot number).
    SlotName, "slot");
name!(
    /// A node's configured name (`cluster.node_id`).
    NodeName, "node_id");

macro_rules! id16 {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
        pub struct $type(pub [u8; 16]);

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    };
}

id16!(
    /// The cluster's random identity; salt of every key derived from the replication key.
    ClusterId);
id16!(
    /// Random identity of one filling of a data directory; a wiped node comes back with another.
    Incarnation);
id16!(
    /// Random identity of one run of a node's process.
    Boot);
id16!(
    /// A key version's identity: its `CKA_ID`.
    KeyUid);
id16!(
    /// A transport key generation's identity.
    TransportId);
id16!(
    /// A context's immutable identity; survives nothing but the context itself.
    ContextUid);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_rule_are_refused_with_the_value() {
        for bad in ["", "-a", "a b", "a/b", "ä", &"x".repeat(65)] {
            let error = ContextName::new(bad).unwrap_err();
            assert_eq!(error.kind, "context");
        }
        for good in ["a", "2fa", "exchange-key", "A.b_c-9", &"x".repeat(64)] {
            assert_eq!(ContextName::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_stored_invalid_name_does_not_decode() {
        let bytes = crate::codec::encode(&"no good".to_string()).unwrap();
        assert!(crate::codec::decode::<SlotName>(&bytes).is_err());
    }
}
