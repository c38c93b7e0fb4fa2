//! Attributes as templates state them, and their names for messages. Values may be key bytes
//! (test keys, the public check constant), hence no `Debug`.

use cryptoki_sys::{self as sys, CK_ATTRIBUTE_TYPE, CK_MECHANISM_TYPE, CK_ULONG};

/// One attribute of a template.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Attr {
    pub(crate) kind: CK_ATTRIBUTE_TYPE,
    pub(crate) value: Value,
}

/// The value of an attribute, in the forms that templates of this crate need.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// `CK_BBOOL`.
    Bool(bool),
    /// `CK_ULONG` and everything defined as one: classes, key types, lengths.
    Ulong(CK_ULONG),
    /// Bytes and text.
    Bytes(Vec<u8>),
    /// `CKA_ALLOWED_MECHANISMS`.
    Mechanisms(Vec<CK_MECHANISM_TYPE>),
    /// `CKA_UNWRAP_TEMPLATE`; only flags are ever put in one.
    Template(Vec<(CK_ATTRIBUTE_TYPE, bool)>),
}

pub(crate) fn flag(kind: CK_ATTRIBUTE_TYPE, value: bool) -> Attr {
    Attr {
        kind,
        value: Value::Bool(value),
    }
}

pub(crate) fn number(kind: CK_ATTRIBUTE_TYPE, value: CK_ULONG) -> Attr {
    Attr {
        kind,
        value: Value::Ulong(value),
    }
}

pub(crate) fn bytes(kind: CK_ATTRIBUTE_TYPE, value: &[u8]) -> Attr {
    Attr {
        kind,
        value: Value::Bytes(value.to_vec()),
    }
}

pub(crate) fn mechanisms(allowed: &[CK_MECHANISM_TYPE]) -> Attr {
    Attr {
        kind: sys::CKA_ALLOWED_MECHANISMS,
        value: Value::Mechanisms(allowed.to_vec()),
    }
}

pub(crate) fn unwrap_template(flags: &[(CK_ATTRIBUTE_TYPE, bool)]) -> Attr {
    Attr {
        kind: sys::CKA_UNWRAP_TEMPLATE,
        value: Value::Template(flags.to_vec()),
    }
}

impl Value {
    /// The bytes a token gives back for this value; `None` for templates, which hold pointers
    /// and are read by a call of their own.
    pub(crate) fn encoded(&self) -> Option<Vec<u8>> {
        match self {
            Self::Bool(value) => Some(vec![u8::from(*value)]),
            Self::Ulong(value) => Some(value.to_ne_bytes().to_vec()),
            Self::Bytes(value) => Some(value.clone()),
            Self::Mechanisms(values) => {
                let mut sorted = values.clone();
                // Tokens keep a set: SoftHSM gives it back in ascending order.
                sorted.sort_unstable();
                Some(
                    sorted
                        .iter()
                        .flat_map(|mechanism| mechanism.to_ne_bytes())
                        .collect(),
                )
            }
            Self::Template(_) => None,
        }
    }
}

/// A `CK_ULONG` as a token gave it.
pub(crate) fn as_ulong(raw: &[u8]) -> Option<CK_ULONG> {
    raw.try_into().ok().map(CK_ULONG::from_ne_bytes)
}

/// A `CK_BBOOL` as a token gave it: every value but zero means true.
pub(crate) fn as_bool(raw: &[u8]) -> Option<bool> {
    match raw {
        [byte] => Some(*byte != 0),
        _ => None,
    }
}

/// Name of an attribute, for messages.
pub(crate) fn name(kind: CK_ATTRIBUTE_TYPE) -> String {
    let name = match kind {
        sys::CKA_CLASS => "CKA_CLASS",
        sys::CKA_TOKEN => "CKA_TOKEN",
        sys::CKA_PRIVATE => "CKA_PRIVATE",
        sys::CKA_LABEL => "CKA_LABEL",
        sys::CKA_VALUE => "CKA_VALUE",
        sys::CKA_KEY_TYPE => "CKA_KEY_TYPE",
        sys::CKA_ID => "CKA_ID",
        sys::CKA_SENSITIVE => "CKA_SENSITIVE",
        sys::CKA_ENCRYPT => "CKA_ENCRYPT",
        sys::CKA_DECRYPT => "CKA_DECRYPT",
        sys::CKA_WRAP => "CKA_WRAP",
        sys::CKA_UNWRAP => "CKA_UNWRAP",
        sys::CKA_SIGN => "CKA_SIGN",
        sys::CKA_SIGN_RECOVER => "CKA_SIGN_RECOVER",
        sys::CKA_VERIFY => "CKA_VERIFY",
        sys::CKA_DERIVE => "CKA_DERIVE",
        sys::CKA_MODULUS => "CKA_MODULUS",
        sys::CKA_PUBLIC_EXPONENT => "CKA_PUBLIC_EXPONENT",
        sys::CKA_EXTRACTABLE => "CKA_EXTRACTABLE",
        sys::CKA_WRAP_WITH_TRUSTED => "CKA_WRAP_WITH_TRUSTED",
        sys::CKA_UNWRAP_TEMPLATE => "CKA_UNWRAP_TEMPLATE",
        sys::CKA_ALLOWED_MECHANISMS => "CKA_ALLOWED_MECHANISMS",
        other => return format!("attribute 0x{other:x}"),
    };
    name.to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn values_encode_as_tokens_give_them_back() {
        assert_eq!(Value::Bool(true).encoded().unwrap(), [1]);
        assert_eq!(as_bool(&[0xff]), Some(true));
        assert_eq!(as_bool(&[]), None);
        let class = Value::Ulong(sys::CKO_SECRET_KEY).encoded().unwrap();
        assert_eq!(as_ulong(&class), Some(sys::CKO_SECRET_KEY));
        assert_eq!(as_ulong(&[1, 2, 3]), None);
        assert!(Value::Template(vec![(sys::CKA_WRAP, false)]).encoded().is_none());
    }

    #[test]
    fn the_order_of_mechanisms_does_not_matter() {
        let one = Value::Mechanisms(vec![9, 4231]).encoded();
        assert!(one == Value::Mechanisms(vec![4231, 9]).encoded());
    }
}
