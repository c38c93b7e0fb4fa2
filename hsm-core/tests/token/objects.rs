//! What objects are, seen past this crate: through `cryptoki` on the same login.

use cryptoki::context::Pkcs11;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use hsm_core::names::{KeyUid, TransportId};
use hsm_core::test_support::{duplicate_kek, import_test_key};
use hsm_core::{KekUse, Slot};

use crate::harness::{MODULE, Sandbox};
use crate::keys::Kek;

/// A session beside the slot's own ones. Logins count for the whole process.
pub(crate) fn beside(slot: &Slot) -> Session {
    let pkcs11 = Pkcs11::new(MODULE).unwrap();
    let place = pkcs11
        .get_slots_with_initialized_token()
        .unwrap()
        .into_iter()
        .find(|place| pkcs11.get_token_info(*place).unwrap().serial_number() == slot.serial())
        .unwrap();
    pkcs11.open_rw_session_no_drop(place).unwrap()
}

fn by_id(session: &Session, id: &[u8]) -> ObjectHandle {
    let found = session
        .find_objects(&[Attribute::Token(true), Attribute::Id(id.to_vec())])
        .unwrap();
    assert_eq!(found.len(), 1);
    found[0]
}

const FLAGS: [AttributeType; 11] = [
    AttributeType::Private,
    AttributeType::Sensitive,
    AttributeType::Extractable,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::Sign,
    AttributeType::Verify,
    AttributeType::Derive,
    AttributeType::Token,
];

fn assert_secret(session: &Session, key: ObjectHandle, set: &[AttributeType], mechanism: MechanismType) {
    for kind in FLAGS {
        let expected = set.contains(&kind);
        let read = session.get_attributes(key, &[kind]).unwrap();
        let value = match read.as_slice() {
            [
                Attribute::Private(value)
                | Attribute::Sensitive(value)
                | Attribute::Extractable(value)
                | Attribute::Encrypt(value)
                | Attribute::Decrypt(value)
                | Attribute::Wrap(value)
                | Attribute::Unwrap(value)
                | Attribute::Sign(value)
                | Attribute::Verify(value)
                | Attribute::Derive(value)
                | Attribute::Token(value),
            ] => *value,
            other => panic!("{kind}: {other:?}"),
        };
        assert_eq!(value, expected, "{kind}");
    }
    let read = session
        .get_attributes(key, &[AttributeType::AllowedMechanisms])
        .unwrap();
    assert_eq!(read, [Attribute::AllowedMechanisms(vec![mechanism])]);
}

fn assert_closed(session: &Session, key: ObjectHandle) {
    assert!(
        session
            .get_attributes(key, &[AttributeType::Value])
            .unwrap()
            .is_empty(),
        "CKA_VALUE was revealed"
    );
}

pub(crate) fn attributes(sandbox: &Sandbox) {
    use AttributeType as A;
    let slot = sandbox.new_slot("slot-a");
    let spki = slot.node_key().unwrap();
    assert_eq!(slot.node_key().unwrap(), spki, "the node key must stay the same");
    let kek = Kek::new(&slot);
    let session = beside(&slot);

    let key = by_id(&session, kek.uid.as_bytes());
    let set = [A::Token, A::Private, A::Sensitive, A::Encrypt, A::Decrypt];
    assert_secret(&session, key, &set, MechanismType::AES_GCM);
    assert_closed(&session, key);
    let label = session.get_attributes(key, &[A::Label]).unwrap();
    assert_eq!(label, [Attribute::Label(b"kek-exchange-key-v1".to_vec())]);

    let transport = by_id(&session, kek.transport.as_bytes());
    let set = [
        A::Token,
        A::Private,
        A::Sensitive,
        A::Extractable,
        A::Wrap,
        A::Unwrap,
    ];
    assert_secret(&session, transport, &set, MechanismType::AES_KEY_WRAP);
    assert_closed(&session, transport);

    let private = session
        .find_objects(&[Attribute::Token(true), Attribute::Class(ObjectClass::PRIVATE_KEY)])
        .unwrap();
    assert_eq!(private.len(), 1);
    let kinds = [
        A::Sensitive,
        A::Extractable,
        A::Decrypt,
        A::Sign,
        A::SignRecover,
        A::Unwrap,
        A::Derive,
    ];
    let expected = [
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Decrypt(false),
        Attribute::Sign(false),
        Attribute::SignRecover(false),
        Attribute::Unwrap(true),
        Attribute::Derive(false),
    ];
    assert_eq!(session.get_attributes(private[0], &kinds).unwrap(), expected);
    let mechanisms = session
        .get_attributes(private[0], &[A::AllowedMechanisms])
        .unwrap();
    assert_eq!(
        mechanisms,
        [Attribute::AllowedMechanisms(vec![MechanismType::RSA_PKCS_OAEP])]
    );

    // Session copies: as closed as what they were copied from.
    slot.load_kek(kek.uid, KekUse::DecryptOnly).unwrap();
    let copies = session
        .find_objects(&[
            Attribute::Token(false),
            Attribute::Id(kek.uid.as_bytes().to_vec()),
        ])
        .unwrap();
    assert_eq!(copies.len(), 1);
    assert_secret(
        &session,
        copies[0],
        &[A::Private, A::Sensitive, A::Decrypt],
        MechanismType::AES_GCM,
    );
    assert_closed(&session, copies[0]);

    // Nothing that generating and importing needed is left.
    assert_eq!(
        session.find_objects(&[]).unwrap().len(),
        4,
        "KEK, its copy, transport key, node key"
    );
    assert!(
        session.wrap_key(&Mechanism::AesKeyWrap, transport, key).is_err(),
        "a KEK was wrapped"
    );
}

pub(crate) fn unwrapped_keys_stay_closed(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let session = beside(&slot);
    let transport = by_id(&session, kek.transport.as_bytes());
    let unwrap = |flags: &[Attribute]| {
        let mut template = vec![
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(false),
        ];
        template.extend_from_slice(flags);
        session.unwrap_key(&Mechanism::AesKeyWrap, transport, &kek.wrapped, &template)
    };
    let (sensitive, closed) = (Attribute::Sensitive(true), Attribute::Extractable(false));
    let (no_wrap, no_unwrap) = (Attribute::Wrap(false), Attribute::Unwrap(false));
    let readable = [
        vec![
            Attribute::Sensitive(false),
            Attribute::Extractable(true),
            no_wrap.clone(),
            no_unwrap.clone(),
        ],
        vec![
            sensitive.clone(),
            Attribute::Extractable(true),
            no_wrap.clone(),
            no_unwrap.clone(),
        ],
        vec![
            Attribute::Sensitive(false),
            closed.clone(),
            no_wrap.clone(),
            no_unwrap.clone(),
        ],
        vec![
            sensitive.clone(),
            closed.clone(),
            Attribute::Wrap(true),
            Attribute::Unwrap(true),
        ],
        vec![],
    ];
    for flags in &readable {
        assert!(unwrap(flags).is_err(), "unwrapped with {flags:?}");
    }
    let key = unwrap(&[sensitive, closed, no_wrap, no_unwrap]).unwrap();
    assert_closed(&session, key);
    let wrapped = session.wrap_key(&Mechanism::AesKeyWrap, transport, key);
    assert!(wrapped.is_err(), "an unwrapped KEK was wrapped again");
}

pub(crate) fn inventory(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    slot.node_key().unwrap();
    let kek = Kek::new(&slot);
    let other = KeyUid::random().unwrap();
    import_test_key(&slot, &[7; 32], other, "kek-order-key-v1").unwrap();
    duplicate_kek(&slot, other).unwrap();
    let session = beside(&slot);
    // A key as v1 makes it: every usage, an id of its own.
    let v1 = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(true),
        Attribute::Value(vec![9; 32]),
        Attribute::Label(b"kek-2fa-v1".to_vec()),
        Attribute::Id(b"short id".to_vec()),
    ];
    session.create_object(&v1).unwrap();

    let objects = slot.objects().unwrap();
    assert!(objects.node_key);
    assert_eq!(objects.transport_keys, [kek.transport]);
    assert_eq!(objects.keks.len(), 2);
    let held = objects.keks.iter().find(|key| key.key_uid == kek.uid).unwrap();
    assert_eq!(
        (held.label.as_str(), &held.problem),
        (kek.label().as_str(), &None)
    );
    let doubled = objects.keks.iter().find(|key| key.key_uid == other).unwrap();
    assert!(doubled.duplicate && doubled.problem.is_some());
    assert!(
        slot.load_kek(other, KekUse::DecryptOnly)
            .unwrap_err()
            .to_string()
            .contains("quarantined")
    );
    assert_eq!(objects.foreign.len(), 1);
    assert_eq!(objects.foreign[0].label, "kek-2fa-v1");

    // Foreign objects are reported and left alone.
    assert!(slot.remove_torn_objects().unwrap().is_empty());
    assert_eq!(slot.foreign_objects().unwrap().len(), 1);
    let unknown = TransportId::random().unwrap();
    assert_eq!(slot.transport_check(unknown).unwrap(), None);
    assert!(slot.transport_check(kek.transport).unwrap().is_some());
}
