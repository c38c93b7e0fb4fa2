//! The random 16-byte names of keys. A label is for people; these are what objects are found
//! by, so they are never derived from a label and never reused.

use std::fmt;
use std::str::FromStr;

use crate::secrets::{RandomError, random_bytes};

/// A text that is not the hex form of a 16-byte id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?}: expected 32 hex digits")]
pub struct IdError {
    kind: &'static str,
    value: String,
}

/// How much of a wrong id an error repeats: enough to find it, whatever a caller sent.
const SHOWN: usize = 64;

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id of these bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The id of a slice, as an attribute read from a token is; `None` unless it has
            /// exactly 16 bytes.
            #[must_use]
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                <[u8; 16]>::try_from(bytes).ok().map(Self)
            }

            /// The 16 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// Reads 32 hex digits of either case.
            pub fn from_hex(text: &str) -> Result<Self, IdError> {
                let mut bytes = [0_u8; 16];
                match hex::decode_to_slice(text, &mut bytes) {
                    Ok(()) => Ok(Self(bytes)),
                    Err(_) => Err(IdError {
                        kind: $kind,
                        value: text.chars().take(SHOWN).collect(),
                    }),
                }
            }

            /// A new id from the operating system's random source.
            pub fn random() -> Result<Self, RandomError> {
                random_bytes().map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::from_hex(text)
            }
        }
    };
}

id16!(
    /// Names one key version everywhere: `CKA_ID` of its object, envelope, sealed key, check
    /// record, tombstone.
    KeyUid,
    "key uid"
);

id16!(
    /// Names one generation of a slot's transport key; every sealed key carries it.
    TransportId,
    "transport id"
);

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_prints_as_lower_case_hex() {
        let uid = KeyUid::from_bytes(*b"0123456789abcdef");
        assert_eq!(uid.to_string(), "30313233343536373839616263646566");
        assert_eq!(format!("{uid:?}"), "KeyUid(30313233343536373839616263646566)");
    }

    #[test]
    fn an_error_names_kind_value_and_remedy() {
        let error = TransportId::from_hex("12").unwrap_err();
        assert_eq!(error.to_string(), "transport id \"12\": expected 32 hex digits");
    }

    #[test]
    fn an_error_repeats_only_the_beginning_of_a_long_value() {
        assert!(
            KeyUid::from_hex(&"z".repeat(10_000))
                .unwrap_err()
                .to_string()
                .len()
                < 120
        );
    }

    #[test]
    fn only_sixteen_bytes_are_an_id() {
        assert!(KeyUid::from_slice(&[0; 15]).is_none());
        assert!(KeyUid::from_slice(&[0; 17]).is_none());
        assert_eq!(KeyUid::from_slice(&[5; 16]), Some(KeyUid::from_bytes([5; 16])));
    }

    #[test]
    fn two_random_ids_differ() {
        assert_ne!(KeyUid::random().unwrap(), KeyUid::random().unwrap());
    }

    proptest! {
        #[test]
        fn hex_round_trips(bytes: [u8; 16]) {
            let id = TransportId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<TransportId>().unwrap(), id);
            prop_assert_eq!(TransportId::from_hex(&id.to_string().to_uppercase()).unwrap(), id);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = KeyUid::from_hex(&text);
        }
    }
}
