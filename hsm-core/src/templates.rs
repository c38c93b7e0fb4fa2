//! Complete templates. SoftHSM sets every usage that a template does not state to true, so each
//! one here states them all; nothing may be made from a template written anywhere else.

use cryptoki_sys::{self as sys, CK_ATTRIBUTE_TYPE, CK_MECHANISM_TYPE, CK_OBJECT_CLASS};

use crate::attribute::{Attr, bytes, flag, mechanisms, number, unwrap_template};
use crate::kek::KekUse;

/// Bytes of every AES key this crate makes.
pub(crate) const AES_KEY_LEN: usize = 32;
/// Bits of a node key.
pub(crate) const RSA_BITS: usize = 3072;
/// The public exponent of node keys, 65537.
pub(crate) const RSA_EXPONENT: [u8; 3] = [1, 0, 1];
/// `CKA_ID` of the one node key in a token.
pub(crate) const NODE_KEY_ID: [u8; 16] = *b"hsm-node-key\0\0\0\0";

/// The usages of a secret key; each template states all of them.
const SECRET_USAGES: [CK_ATTRIBUTE_TYPE; 7] = [
    sys::CKA_ENCRYPT,
    sys::CKA_DECRYPT,
    sys::CKA_WRAP,
    sys::CKA_UNWRAP,
    sys::CKA_SIGN,
    sys::CKA_VERIFY,
    sys::CKA_DERIVE,
];

const KEK_USAGES: [CK_ATTRIBUTE_TYPE; 2] = [sys::CKA_ENCRYPT, sys::CKA_DECRYPT];
const TRANSPORT_USAGES: [CK_ATTRIBUTE_TYPE; 2] = [sys::CKA_WRAP, sys::CKA_UNWRAP];

/// What a transport key forces on every key it unwraps. Without it, T would unwrap a sealed KEK
/// as a readable object and `CKA_VALUE` would return it.
const TRANSPORT_UNWRAPS: [(CK_ATTRIBUTE_TYPE, bool); 4] = [
    (sys::CKA_SENSITIVE, true),
    (sys::CKA_EXTRACTABLE, false),
    (sys::CKA_WRAP, false),
    (sys::CKA_UNWRAP, false),
];

/// What a node key forces on every transport key it unwraps. `WRAP_WITH_TRUSTED` is the mode of
/// the generation: false is `standard`.
const NODE_KEY_UNWRAPS: [(CK_ATTRIBUTE_TYPE, bool); 4] = [
    (sys::CKA_SENSITIVE, true),
    (sys::CKA_ENCRYPT, false),
    (sys::CKA_DECRYPT, false),
    (sys::CKA_WRAP_WITH_TRUSTED, false),
];

fn secret_key(
    on_token: bool,
    sensitive: bool,
    extractable: bool,
    usages: &[CK_ATTRIBUTE_TYPE],
    allowed: &[CK_MECHANISM_TYPE],
) -> Vec<Attr> {
    let mut template = vec![
        number(sys::CKA_CLASS, sys::CKO_SECRET_KEY),
        number(sys::CKA_KEY_TYPE, sys::CKK_AES),
        flag(sys::CKA_TOKEN, on_token),
        flag(sys::CKA_PRIVATE, true),
        flag(sys::CKA_SENSITIVE, sensitive),
        flag(sys::CKA_EXTRACTABLE, extractable),
    ];
    template.extend(SECRET_USAGES.map(|usage| flag(usage, usages.contains(&usage))));
    if !allowed.is_empty() {
        template.push(mechanisms(allowed));
    }
    template
}

fn with(mut template: Vec<Attr>, more: impl IntoIterator<Item = Attr>) -> Vec<Attr> {
    template.extend(more);
    template
}

/// What finds a token object by its id. Never by its label.
pub(crate) fn by_id(class: CK_OBJECT_CLASS, id: &[u8; 16]) -> Vec<Attr> {
    vec![
        number(sys::CKA_CLASS, class),
        flag(sys::CKA_TOKEN, true),
        bytes(sys::CKA_ID, id),
    ]
}

/// The secret keys in the token with this label: how version 1 found its own.
pub(crate) fn secret_by_label(label: &str) -> Vec<Attr> {
    vec![
        number(sys::CKA_CLASS, sys::CKO_SECRET_KEY),
        flag(sys::CKA_TOKEN, true),
        bytes(sys::CKA_LABEL, label.as_bytes()),
    ]
}

/// The session objects of this class and id, whichever session made them.
pub(crate) fn session_by_id(class: CK_OBJECT_CLASS, id: &[u8; 16]) -> Vec<Attr> {
    vec![
        number(sys::CKA_CLASS, class),
        flag(sys::CKA_TOKEN, false),
        bytes(sys::CKA_ID, id),
    ]
}

/// Every token object.
pub(crate) fn any_token_object() -> Vec<Attr> {
    vec![flag(sys::CKA_TOKEN, true)]
}

/// Changes that make a session object a token object. Nothing else: SoftHSM refuses to be told
/// again what the session object already is.
pub(crate) fn to_token(id: &[u8; 16], label: &str) -> Vec<Attr> {
    vec![
        flag(sys::CKA_TOKEN, true),
        bytes(sys::CKA_ID, id),
        bytes(sys::CKA_LABEL, label.as_bytes()),
    ]
}

/// A KEK as the leader generates it: a session object that can be wrapped once.
pub(crate) fn kek_generated() -> Vec<Attr> {
    with(kek_session(true), [number(sys::CKA_VALUE_LEN, AES_KEY_LEN as _)])
}

/// A key that a token is tried with: a session object that nobody can take out, and that ends with the trial.
pub(crate) fn control_key() -> Vec<Attr> {
    with(kek_session(false), [number(sys::CKA_VALUE_LEN, AES_KEY_LEN as _)])
}

/// A KEK as it is unwrapped: a session object, not extractable.
pub(crate) fn kek_unwrapped() -> Vec<Attr> {
    kek_session(false)
}

/// A KEK session object, as read back.
pub(crate) fn kek_session(extractable: bool) -> Vec<Attr> {
    secret_key(false, true, extractable, &KEK_USAGES, &[sys::CKM_AES_GCM])
}

/// A KEK in the token, as read back.
pub(crate) fn kek_held(id: &[u8; 16], label: &str) -> Vec<Attr> {
    let held = secret_key(true, true, false, &KEK_USAGES, &[sys::CKM_AES_GCM]);
    with(
        held,
        [bytes(sys::CKA_ID, id), bytes(sys::CKA_LABEL, label.as_bytes())],
    )
}

/// A KEK in the token whatever its label, as read back.
pub(crate) fn kek_held_any_label(id: &[u8; 16]) -> Vec<Attr> {
    let held = secret_key(true, true, false, &KEK_USAGES, &[sys::CKM_AES_GCM]);
    with(held, [bytes(sys::CKA_ID, id)])
}

/// Changes that make a session copy of a KEK. A version that only decrypts gets a copy that
/// only can.
pub(crate) fn kek_copy_changes(kek_use: KekUse) -> Vec<Attr> {
    vec![
        flag(sys::CKA_TOKEN, false),
        flag(sys::CKA_ENCRYPT, kek_use == KekUse::EncryptDecrypt),
    ]
}

/// A session copy of a KEK, as read back.
pub(crate) fn kek_copy(id: &[u8; 16], kek_use: KekUse) -> Vec<Attr> {
    let usages: &[CK_ATTRIBUTE_TYPE] = match kek_use {
        KekUse::EncryptDecrypt => &KEK_USAGES,
        KekUse::DecryptOnly => &[sys::CKA_DECRYPT],
    };
    let copy = secret_key(false, true, false, usages, &[sys::CKM_AES_GCM]);
    with(copy, [bytes(sys::CKA_ID, id)])
}

/// Changes that make a session copy of a key of version 1: whatever that may do besides, this one may not.
pub(crate) fn adopted_copy_changes(encrypts: bool) -> Vec<Attr> {
    let dropped = SECRET_USAGES
        .into_iter()
        .filter(|usage| !KEK_USAGES.contains(usage))
        .map(|usage| flag(usage, false));
    with(
        vec![flag(sys::CKA_TOKEN, false), flag(sys::CKA_ENCRYPT, encrypts)],
        dropped,
    )
}

/// A session copy of a key of version 1, as read back. Version 1 stated no mechanisms, and none can be added to a copy.
pub(crate) fn adopted_session(encrypts: bool) -> Vec<Attr> {
    let usages: &[CK_ATTRIBUTE_TYPE] = if encrypts {
        &KEK_USAGES
    } else {
        &[sys::CKA_DECRYPT]
    };
    secret_key(false, true, false, usages, &[])
}

/// The copy of a key of version 1 in the token, as read back.
pub(crate) fn adopted_held(id: &[u8; 16]) -> Vec<Attr> {
    with(
        secret_key(true, true, false, &[sys::CKA_DECRYPT], &[]),
        [bytes(sys::CKA_ID, id)],
    )
}

/// A session copy of that, as read back.
pub(crate) fn adopted_loaded(id: &[u8; 16]) -> Vec<Attr> {
    with(adopted_session(false), [bytes(sys::CKA_ID, id)])
}

/// A transport key session object, as unwrapped and as read back. Extractable, because it has to
/// reach joiners.
pub(crate) fn transport_session() -> Vec<Attr> {
    transport(false)
}

/// A transport key as it is generated.
pub(crate) fn transport_generated() -> Vec<Attr> {
    with(transport(false), [number(sys::CKA_VALUE_LEN, AES_KEY_LEN as _)])
}

/// A transport key in the token, as read back.
pub(crate) fn transport_held(id: &[u8; 16]) -> Vec<Attr> {
    with(transport(true), [bytes(sys::CKA_ID, id)])
}

fn transport(on_token: bool) -> Vec<Attr> {
    let key = secret_key(on_token, true, true, &TRANSPORT_USAGES, &[sys::CKM_AES_KEY_WRAP]);
    with(
        key,
        [
            flag(sys::CKA_WRAP_WITH_TRUSTED, false),
            unwrap_template(&TRANSPORT_UNWRAPS),
        ],
    )
}

/// The session object with publicly known bytes that is wrapped to check a transport key. It can
/// do nothing, and is destroyed at once.
pub(crate) fn known_key(value: &[u8; AES_KEY_LEN]) -> Vec<Attr> {
    with(
        secret_key(false, false, true, &[], &[]),
        [bytes(sys::CKA_VALUE, value)],
    )
}

/// A KEK session object with bytes that a test knows.
#[cfg(feature = "test-support")]
pub(crate) fn test_kek(value: &[u8; AES_KEY_LEN]) -> Vec<Attr> {
    with(kek_session(false), [bytes(sys::CKA_VALUE, value)])
}

/// The public half of a new node key; the token keeps only the private one.
pub(crate) fn node_public_generated() -> Vec<Attr> {
    vec![
        flag(sys::CKA_TOKEN, false),
        flag(sys::CKA_PRIVATE, false),
        number(sys::CKA_MODULUS_BITS, RSA_BITS as _),
        bytes(sys::CKA_PUBLIC_EXPONENT, &RSA_EXPONENT),
        flag(sys::CKA_ENCRYPT, false),
        flag(sys::CKA_VERIFY, false),
        flag(sys::CKA_VERIFY_RECOVER, false),
        flag(sys::CKA_WRAP, false),
        flag(sys::CKA_DERIVE, false),
        mechanisms(&[sys::CKM_RSA_PKCS_OAEP]),
    ]
}

/// The private half of a new node key, as a session object.
pub(crate) fn node_private_generated() -> Vec<Attr> {
    node_private(false)
}

/// The node key in the token, as read back.
pub(crate) fn node_private_held() -> Vec<Attr> {
    let key_type = [
        number(sys::CKA_CLASS, sys::CKO_PRIVATE_KEY),
        number(sys::CKA_KEY_TYPE, sys::CKK_RSA),
    ];
    with(
        with(node_private(true), key_type),
        [bytes(sys::CKA_ID, &NODE_KEY_ID)],
    )
}

/// A private key has no `ENCRYPT`, `WRAP` or `VERIFY` (PKCS#11 2.40, 4.8 and 2.1.3).
fn node_private(on_token: bool) -> Vec<Attr> {
    vec![
        flag(sys::CKA_TOKEN, on_token),
        flag(sys::CKA_PRIVATE, true),
        flag(sys::CKA_SENSITIVE, true),
        flag(sys::CKA_EXTRACTABLE, false),
        flag(sys::CKA_DECRYPT, false),
        flag(sys::CKA_SIGN, false),
        flag(sys::CKA_SIGN_RECOVER, false),
        flag(sys::CKA_UNWRAP, true),
        flag(sys::CKA_DERIVE, false),
        mechanisms(&[sys::CKM_RSA_PKCS_OAEP]),
        unwrap_template(&NODE_KEY_UNWRAPS),
    ]
}

/// Another node's public key, to wrap a transport key to it and for nothing else.
pub(crate) fn recipient(modulus: &[u8], exponent: &[u8]) -> Vec<Attr> {
    vec![
        number(sys::CKA_CLASS, sys::CKO_PUBLIC_KEY),
        number(sys::CKA_KEY_TYPE, sys::CKK_RSA),
        flag(sys::CKA_TOKEN, false),
        flag(sys::CKA_PRIVATE, false),
        bytes(sys::CKA_MODULUS, modulus),
        bytes(sys::CKA_PUBLIC_EXPONENT, exponent),
        flag(sys::CKA_ENCRYPT, false),
        flag(sys::CKA_VERIFY, false),
        flag(sys::CKA_VERIFY_RECOVER, false),
        flag(sys::CKA_WRAP, true),
        flag(sys::CKA_DERIVE, false),
        mechanisms(&[sys::CKM_RSA_PKCS_OAEP]),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::attribute::{Value, name};

    fn value(template: &[Attr], kind: CK_ATTRIBUTE_TYPE) -> Option<bool> {
        template
            .iter()
            .find(|attr| attr.kind == kind)
            .and_then(|attr| match attr.value {
                Value::Bool(value) => Some(value),
                _ => None,
            })
    }

    #[test]
    fn every_secret_key_states_every_usage() {
        let templates = [
            kek_generated(),
            kek_unwrapped(),
            kek_held(&[0; 16], "kek-a-v1"),
            kek_copy(&[0; 16], KekUse::DecryptOnly),
            transport_generated(),
            transport_session(),
            transport_held(&[0; 16]),
            known_key(&[0; 32]),
            adopted_session(true),
            adopted_held(&[0; 16]),
            adopted_loaded(&[0; 16]),
        ];
        for template in &templates {
            let flags = [
                sys::CKA_TOKEN,
                sys::CKA_PRIVATE,
                sys::CKA_SENSITIVE,
                sys::CKA_EXTRACTABLE,
            ];
            for kind in flags.into_iter().chain(SECRET_USAGES) {
                assert!(value(template, kind).is_some(), "{} is not stated", name(kind));
            }
            let mut kinds: Vec<_> = template.iter().map(|attr| attr.kind).collect();
            kinds.sort_unstable();
            kinds.dedup();
            assert_eq!(kinds.len(), template.len(), "stated twice");
            // SoftHSM's C_UnwrapKey has room for 28 attributes besides its own four.
            assert!(template.len() <= 28);
        }
    }

    #[test]
    fn a_kek_never_wraps_and_a_transport_key_never_decrypts() {
        let kek = kek_held(&[0; 16], "kek-a-v1");
        assert_eq!(value(&kek, sys::CKA_WRAP), Some(false));
        assert_eq!(value(&kek, sys::CKA_UNWRAP), Some(false));
        assert_eq!(value(&kek, sys::CKA_EXTRACTABLE), Some(false));
        let transport = transport_held(&[0; 16]);
        assert_eq!(value(&transport, sys::CKA_DECRYPT), Some(false));
        assert_eq!(value(&transport, sys::CKA_ENCRYPT), Some(false));
    }

    #[test]
    fn a_copy_of_an_adopted_key_does_nothing_but_decrypt() {
        for template in [
            adopted_held(&[0; 16]),
            adopted_loaded(&[0; 16]),
            adopted_session(false),
        ] {
            for usage in SECRET_USAGES {
                let expected = usage == sys::CKA_DECRYPT;
                assert_eq!(value(&template, usage), Some(expected), "{}", name(usage));
            }
        }
        let changes = adopted_copy_changes(false);
        assert_eq!(value(&changes, sys::CKA_DECRYPT), None, "left as it is");
        for usage in SECRET_USAGES
            .into_iter()
            .filter(|usage| *usage != sys::CKA_DECRYPT)
        {
            assert_eq!(value(&changes, usage), Some(false), "{}", name(usage));
        }
    }

    #[test]
    fn what_an_unwrap_template_demands_the_unwrapped_key_states() {
        for (demands, template) in [
            (TRANSPORT_UNWRAPS, kek_unwrapped()),
            (NODE_KEY_UNWRAPS, transport_session()),
        ] {
            for (kind, demanded) in demands {
                assert_eq!(value(&template, kind), Some(demanded), "{}", name(kind));
            }
        }
    }

    #[test]
    fn a_decrypt_only_copy_cannot_encrypt() {
        let copy = kek_copy(&[0; 16], KekUse::DecryptOnly);
        assert_eq!(value(&copy, sys::CKA_ENCRYPT), Some(false));
        assert_eq!(value(&copy, sys::CKA_DECRYPT), Some(true));
        assert_eq!(
            value(&kek_copy_changes(KekUse::DecryptOnly), sys::CKA_ENCRYPT),
            Some(false)
        );
        assert_eq!(
            value(&kek_copy_changes(KekUse::EncryptDecrypt), sys::CKA_ENCRYPT),
            Some(true)
        );
    }
}
