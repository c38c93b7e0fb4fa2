//! Keys that version 1 made, in the token that it made them in.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use hsm_core::names::KeyUid;
use hsm_core::{AdoptKek, DecryptV1Job, DestroyedAdopted, HsmError, KekUse, OpError, Slot};
use sha2::{Digest, Sha256};

use crate::harness::{Sandbox, eventually};
use crate::keys::CONTEXT;
use crate::objects::beside;

pub(crate) const LABEL: &str = "kek-exchange-key-v1";
pub(crate) const KEY: [u8; 32] = [0x5c; 32];
const OTHER: [u8; 32] = [0xa3; 32];

/// As version 1 made it: it stated what follows, and the token set every other usage.
pub(crate) fn v1_key(session: &Session, label: &str, value: &[u8; 32], more: &[Attribute]) -> ObjectHandle {
    let mut template = vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Encrypt(true),
        Attribute::Decrypt(true),
        Attribute::Label(label.as_bytes().to_vec()),
        Attribute::Value(value.to_vec()),
    ];
    template.extend_from_slice(more);
    session.create_object(&template).unwrap()
}

fn labelled(session: &Session, label: &str) -> Vec<ObjectHandle> {
    let template = [
        Attribute::Token(true),
        Attribute::Label(label.as_bytes().to_vec()),
    ];
    session.find_objects(&template).unwrap()
}

fn of_id(session: &Session, uid: KeyUid) -> Vec<ObjectHandle> {
    let template = [Attribute::Token(true), Attribute::Id(uid.as_bytes().to_vec())];
    session.find_objects(&template).unwrap()
}

fn flags(session: &Session, key: ObjectHandle) -> Vec<AttributeType> {
    use AttributeType as A;
    let kinds = [
        A::Private,
        A::Sensitive,
        A::Extractable,
        A::Encrypt,
        A::Decrypt,
        A::Wrap,
        A::Unwrap,
        A::Sign,
        A::Verify,
        A::Derive,
    ];
    let set = |kind: &AttributeType| match session.get_attributes(key, &[*kind]).unwrap().as_slice() {
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
            | Attribute::Derive(value),
        ] => *value,
        other => panic!("{kind}: {other:?}"),
    };
    kinds.into_iter().filter(set).collect()
}

fn label_of(session: &Session, key: ObjectHandle) -> Vec<u8> {
    match session
        .get_attributes(key, &[AttributeType::Label])
        .unwrap()
        .as_slice()
    {
        [Attribute::Label(label)] => label.clone(),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn kek() -> AdoptKek {
    AdoptKek {
        key_uid: KeyUid::from_bytes(*b"adopted-key-0001"),
        version: 1,
        context: CONTEXT.to_owned(),
        label: LABEL.to_owned(),
    }
}

/// What version 1 gave out: nonce, ciphertext, tag, for the unit Trading.
pub(crate) fn sealed(key: &[u8; 32], plaintext: &[u8]) -> Vec<u8> {
    let aad = Sha256::digest([CONTEXT.as_bytes(), b"\0Trading"].concat());
    let nonce = *b"nonce-of-v1!";
    let sealed = Aes256Gcm::new_from_slice(key)
        .unwrap()
        .encrypt(
            (&nonce).into(),
            Payload {
                msg: plaintext,
                aad: &aad,
            },
        )
        .unwrap();
    [nonce.to_vec(), sealed].concat()
}

pub(crate) fn open(slot: &Slot, kek: &AdoptKek, ciphertext: Vec<u8>) -> Result<Vec<u8>, OpError> {
    let (send, receive) = channel();
    let job = DecryptV1Job {
        key_uid: kek.key_uid,
        ciphertext,
        context: CONTEXT.into(),
        binding_value: "Trading".into(),
    };
    slot.decrypt_v1(job, move |outcome| {
        send.send(outcome.map(|plaintext| plaintext.as_slice().to_vec()))
            .unwrap();
    })?;
    receive.recv_timeout(Duration::from_secs(30)).expect("an answer")
}

/// Adopts, loads and reads what version 1 has encrypted.
fn works(slot: &Slot, kek: &AdoptKek, record: &[u8]) {
    slot.adopt_kek(kek, record, false).unwrap();
    slot.load_kek(kek.key_uid, KekUse::DecryptOnly).unwrap();
    assert_eq!(open(slot, kek, sealed(&KEY, b"4111")).unwrap(), b"4111");
    assert_eq!(
        open(slot, kek, sealed(&OTHER, b"4111")).unwrap_err(),
        OpError::AuthenticationFailed
    );
    slot.known_answer_test(kek.key_uid, kek.version, CONTEXT, record)
        .unwrap();
}

fn saved(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("record")
}

pub(crate) fn adopt(sandbox: &Sandbox) {
    use AttributeType as A;
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let original = v1_key(&session, LABEL, &KEY, &[]);
    let (before, kek) = (flags(&session, original), kek());
    assert!(
        before.contains(&A::Encrypt) && before.contains(&A::Wrap),
        "{before:?}"
    );

    slot.examine_v1_key(LABEL, None).unwrap();
    let record = slot.v1_check_record(&kek, None).unwrap();
    assert!(of_id(&session, kek.key_uid).is_empty(), "only looked at");
    works(&slot, &kek, &record);
    works(&slot, &kek, &record);

    let copies = of_id(&session, kek.key_uid);
    assert_eq!(copies.len(), 1);
    assert_eq!(flags(&session, copies[0]), [A::Private, A::Sensitive, A::Decrypt]);
    assert_eq!(
        label_of(&session, copies[0]),
        format!("adopted:{LABEL}").into_bytes()
    );
    let value = session.get_attributes(copies[0], &[A::Value]).unwrap();
    assert!(value.is_empty(), "CKA_VALUE was revealed");
    // Version 1 still finds its one key, as it made it.
    let originals = labelled(&session, LABEL);
    assert_eq!(originals.len(), 1);
    assert_eq!(flags(&session, originals[0]), before);

    let error = slot.load_kek(kek.key_uid, KekUse::EncryptDecrypt).unwrap_err();
    assert!(error.to_string().contains("never encrypts"), "{error}");
    let objects = slot.objects().unwrap();
    assert_eq!(objects.keks.len(), 1);
    assert_eq!(
        (objects.keks[0].key_uid, &objects.keks[0].problem),
        (kek.key_uid, &None)
    );
    assert!(objects.labelled.contains(LABEL) && objects.labelled.len() == 1);
    fs::write(saved(sandbox), record).unwrap();
}

pub(crate) fn after_restart(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    assert!(slot.remove_torn_objects().unwrap().is_empty());
    let record = fs::read(saved(sandbox)).unwrap();
    works(&slot, &kek(), &record);
    assert_eq!(of_id(&beside(&slot), kek().key_uid).len(), 1);
}

pub(crate) fn refusals(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let named = |label: &str| AdoptKek {
        label: label.to_owned(),
        ..kek()
    };
    let refused = |label: &str| {
        let error = slot.v1_check_record(&named(label), None).unwrap_err();
        assert_eq!(slot.examine_v1_key(label, None).unwrap_err(), error);
        assert!(error.to_string().contains(label), "{error}");
        error
    };
    assert!(matches!(refused("kek-none-v1"), HsmError::NotFound { .. }));
    v1_key(&session, "twice", &KEY, &[]);
    v1_key(&session, "twice", &OTHER, &[]);
    let error = refused("twice");
    let text = error.to_string();
    assert!(
        text.contains("2 keys in the token") && text.contains("Delete none"),
        "{text}"
    );
    let copy = refused("adopted:twice");
    assert!(copy.to_string().contains("copy that adoption makes"), "{copy}");
    v1_key(&session, "kept", &KEY, &[Attribute::Copyable(false)]);
    assert!(matches!(refused("kept"), HsmError::NotSupported { .. }));
    let secret = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(true),
        Attribute::Label(b"no-aes".to_vec()),
        Attribute::Value(vec![1; 32]),
    ];
    session.create_object(&secret).unwrap();
    assert!(matches!(refused("no-aes"), HsmError::Argument { .. }));
    // The one that nothing was wrong with can still be adopted, and nothing was left behind.
    v1_key(&session, LABEL, &KEY, &[]);
    let record = slot.v1_check_record(&kek(), None).unwrap();
    works(&slot, &kek(), &record);
    assert_eq!(slot.objects().unwrap().keks.len(), 1);
}

/// A key that anybody could read gets a copy that nobody can.
pub(crate) fn open_original(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
        Attribute::Label(LABEL.as_bytes().to_vec()),
        Attribute::Value(KEY.to_vec()),
    ];
    session.create_object(&template).unwrap();
    let record = slot.v1_check_record(&kek(), None).unwrap();
    works(&slot, &kek(), &record);
    let copies = of_id(&session, kek().key_uid);
    let value = session
        .get_attributes(copies[0], &[AttributeType::Value])
        .unwrap();
    assert!(value.is_empty(), "CKA_VALUE was revealed");
}

pub(crate) fn another_token(sandbox: &Sandbox) {
    let (first, second) = (sandbox.new_slot("slot-a"), sandbox.new_slot("slot-b"));
    v1_key(&beside(&first), LABEL, &KEY, &[]);
    let record = first.v1_check_record(&kek(), None).unwrap();
    first.adopt_kek(&kek(), &record, false).unwrap();

    let session = beside(&second);
    let other = v1_key(&session, LABEL, &OTHER, &[]);
    let error = second.adopt_kek(&kek(), &record, false).unwrap_err();
    assert!(matches!(error, HsmError::CheckRecord { .. }), "{error}");
    assert!(error.to_string().contains(LABEL), "{error}");
    assert!(of_id(&session, kek().key_uid).is_empty());
    // As in a copy of the first token.
    session.destroy_object(other).unwrap();
    v1_key(&session, LABEL, &KEY, &[]);
    works(&second, &kek(), &record);
}

/// Of several keys of one label the one that is named by its id is adopted, and every other token's copy is made of the
/// one that the check record proves.
pub(crate) fn one_of_many(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    for (value, id) in [(&OTHER, b"other-1"), (&KEY, b"right-1"), (&OTHER, b"other-2")] {
        v1_key(&session, LABEL, value, &[Attribute::Id(id.to_vec())]);
    }
    let text = slot.examine_v1_key(LABEL, None).unwrap_err().to_string();
    for id in [&b"other-1"[..], b"right-1", b"other-2"] {
        assert!(text.contains(&hex::encode(id)), "{text}");
    }
    let error = slot.v1_check_record(&kek(), Some(b"other-3")).unwrap_err();
    assert!(matches!(error, HsmError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains(&hex::encode("other-3")), "{error}");
    slot.examine_v1_key(LABEL, Some(b"right-1")).unwrap();
    let record = slot.v1_check_record(&kek(), Some(b"right-1")).unwrap();
    works(&slot, &kek(), &record);
    let gone = slot.destroy_adopted_kek(&kek(), &record).unwrap();
    assert_eq!((gone.copies, gone.originals, gone.others), (1, 1, 2));
    assert_eq!(labelled(&session, LABEL).len(), 2);
}

pub(crate) fn proven_only(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    v1_key(&session, LABEL, &KEY, &[]);
    let record = slot.v1_check_record(&kek(), None).unwrap();
    let error = slot.prove_adopted_kek(&kek(), &record).unwrap_err();
    assert!(matches!(error, HsmError::NotFound { .. }), "{error}");
    assert!(of_id(&session, kek().key_uid).is_empty(), "it made a copy");
    slot.adopt_kek(&kek(), &record, false).unwrap();
    slot.prove_adopted_kek(&kek(), &record).unwrap();
    assert_eq!(of_id(&session, kek().key_uid).len(), 1);
}

/// A second object of one id hides neither of the labels.
pub(crate) fn same_id(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let id = Attribute::Id(b"sixteen bytes id".to_vec());
    v1_key(&session, "kek-c-v1", &KEY, std::slice::from_ref(&id));
    v1_key(&session, "kek-c-v2", &OTHER, &[id]);
    let objects = slot.objects().unwrap();
    let labels: Vec<&str> = objects.labelled.iter().map(String::as_str).collect();
    assert_eq!(labels, ["kek-c-v1", "kek-c-v2"]);
    assert!(objects.keks[0].duplicate);
}

pub(crate) fn destroy(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    v1_key(&session, LABEL, &KEY, &[]);
    let record = slot.v1_check_record(&kek(), None).unwrap();
    works(&slot, &kek(), &record);
    // Somebody else's, which only goes by the same name.
    v1_key(&session, LABEL, &OTHER, &[]);
    let gone = |copies, originals| DestroyedAdopted {
        copies,
        originals,
        others: 1,
    };
    assert_eq!(slot.destroy_adopted_kek(&kek(), &record).unwrap(), gone(1, 1));
    assert!(of_id(&session, kek().key_uid).is_empty());
    assert_eq!(labelled(&session, LABEL).len(), 1);
    assert_eq!(
        open(&slot, &kek(), sealed(&KEY, b"x")).unwrap_err(),
        OpError::KeyNotLoaded
    );
    assert_eq!(slot.destroy_adopted_kek(&kek(), &record).unwrap(), gone(0, 0));
}

pub(crate) fn release(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let original = v1_key(&session, LABEL, &KEY, &[]);
    let record = slot.v1_check_record(&kek(), None).unwrap();
    works(&slot, &kek(), &record);
    session.destroy_object(original).unwrap();
    // The copy is the only key there is, and another key under the label is none.
    for other in [false, true] {
        if other {
            v1_key(&session, LABEL, &OTHER, &[]);
        }
        slot.load_kek(kek().key_uid, KekUse::DecryptOnly).unwrap();
        assert_eq!(
            slot.release_adopted_kek(&kek(), &record).unwrap(),
            None,
            "{other}"
        );
        assert_eq!(of_id(&session, kek().key_uid).len(), 1, "{other}");
        assert_eq!(
            open(&slot, &kek(), sealed(&KEY, b"x")).unwrap_err(),
            OpError::KeyNotLoaded,
            "kept, and out of use"
        );
    }
    v1_key(&session, LABEL, &KEY, &[]);
    assert_eq!(slot.release_adopted_kek(&kek(), &record).unwrap(), Some(1));
    assert!(of_id(&session, kek().key_uid).is_empty());
    assert_eq!(labelled(&session, LABEL).len(), 2, "version 1's own stay");
    assert_eq!(slot.release_adopted_kek(&kek(), &record).unwrap(), Some(0));
}

pub(crate) fn make_one(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    v1_key(&beside(&slot), LABEL, &KEY, &[]);
    fs::write(saved(sandbox), slot.v1_check_record(&kek(), None).unwrap()).unwrap();
}

pub(crate) fn kill(sandbox: &Sandbox) {
    for round in 0..8_u64 {
        let helper = sandbox.helper("adopt_for_ever");
        let started = sandbox.path("adopting");
        eventually("the first adoption", || started.exists());
        std::thread::sleep(Duration::from_millis(round * 13 % 29));
        helper.kill();
        fs::remove_file(started).unwrap();
        assert!(sandbox.helper("adopted_after_kill").succeeds(), "round {round}");
    }
}

/// Helper: makes and destroys the copy all the time.
pub(crate) fn adopt_for_ever(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    let record = fs::read(saved(sandbox)).unwrap();
    loop {
        slot.destroy_kek(kek().key_uid).unwrap();
        slot.adopt_kek(&kek(), &record, false).unwrap();
        fs::write(sandbox.path("adopting"), "").unwrap();
    }
}

/// Helper: the original is there, once, and can be adopted.
pub(crate) fn adopted_after_kill(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    for torn in slot.remove_torn_objects().unwrap() {
        eprintln!("removed: {torn}");
    }
    let session = beside(&slot);
    assert_eq!(labelled(&session, LABEL).len(), 1);
    let record = fs::read(saved(sandbox)).unwrap();
    works(&slot, &kek(), &record);
    assert_eq!(of_id(&session, kek().key_uid).len(), 1);
    assert_eq!(slot.objects().unwrap().keks.len(), 1);
}
