//! Transport keys on their way from one token to another.

use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use hsm_core::names::TransportId;
use hsm_core::replication::{ReplicationKey, SealError, SealedKeyContext};
use hsm_core::{HsmError, KekUse, Slot};

use crate::harness::Sandbox;
use crate::keys::{CONTEXT, Kek};

fn two_slots(sandbox: &Sandbox) -> (Slot, Slot) {
    (sandbox.new_slot("slot-a"), sandbox.new_slot("slot-b"))
}

pub(crate) fn grant_and_accept(sandbox: &Sandbox) {
    let (a, b) = two_slots(sandbox);
    let kek = Kek::new(&a);
    let check = a.transport_check(kek.transport).unwrap().unwrap();
    let spki = b.node_key().unwrap();
    assert_ne!(spki, a.node_key().unwrap());

    let blob = a.grant_transport_key(kek.transport, &spki).unwrap();
    assert_ne!(
        a.grant_transport_key(kek.transport, &spki).unwrap(),
        blob,
        "OAEP is randomised"
    );
    b.accept_transport_key(kek.transport, &blob, &check).unwrap();
    b.accept_transport_key(kek.transport, &blob, &check).unwrap();
    let anew = a.grant_transport_key_anew(kek.transport, &spki).unwrap();
    assert_eq!(anew[0], 1, "SHA-1");
    assert_eq!(b.transport_check(kek.transport).unwrap(), Some(check));
    assert_eq!(b.objects().unwrap().transport_keys, [kek.transport]);

    kek.import(&b).unwrap();
    b.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    let from_a = kek.encrypt(&a, b"made by a").unwrap();
    let from_b = kek.encrypt(&b, b"made by b").unwrap();
    assert_eq!(kek.decrypt(&b, &from_a).unwrap(), b"made by a");
    assert_eq!(kek.decrypt(&a, &from_b).unwrap(), b"made by b");

    // What came by grant can be granted on, and made keys with.
    let made_by_b = Kek::generate(&b, kek.transport, 2);
    made_by_b.import(&a).unwrap();
    made_by_b.test(&a).unwrap();
    kek.save(&sandbox.path("kek"));
}

pub(crate) fn offered(sandbox: &Sandbox) {
    let (a, b) = two_slots(sandbox);
    let old = Kek::new(&a);
    let recipients = [a.node_key().unwrap(), b.node_key().unwrap(), vec![0; 9]];
    let before = a.objects().unwrap().transport_keys;
    let offered = a.offer_transport_key(&recipients).unwrap();
    assert_eq!(
        a.objects().unwrap().transport_keys,
        before,
        "what nobody has committed to stays in no token"
    );
    let [to_a, to_b, to_nobody] = offered.grants.as_slice() else {
        panic!("a grant for each")
    };
    assert!(to_nobody.is_err(), "one bad recipient costs the others nothing");
    let new = TransportId::random().unwrap();
    // Who made it takes it as everybody else does.
    for (slot, grant) in [(&a, to_a), (&b, to_b)] {
        let grant = grant.as_ref().unwrap();
        slot.accept_transport_key(new, grant, &offered.check).unwrap();
        assert_eq!(slot.transport_check(new).unwrap(), Some(offered.check));
    }
    let kek = Kek::generate(&a, new, 2);
    kek.import(&b).unwrap();
    kek.test(&b).unwrap();
    // What is wrapped under one transport key opens with no other: the next version is the only way.
    assert_eq!(a.destroy_transport_key(old.transport).unwrap(), 1);
    assert_eq!(a.destroy_transport_key(old.transport).unwrap(), 0);
    assert_eq!(a.objects().unwrap().transport_keys, [new]);
    old.test(&a).unwrap();
    assert!(old.import(&b).is_err(), "its transport key is nowhere any more");
}

pub(crate) fn after_restart(sandbox: &Sandbox) {
    let b = sandbox.open("slot-b");
    let kek = Kek::saved(&sandbox.path("kek"));
    kek.test(&b).unwrap();
    let next = Kek::generate(&b, kek.transport, 3);
    next.import(&b).unwrap();
    next.test(&b).unwrap();
}

pub(crate) fn substituted(sandbox: &Sandbox) {
    let (a, b) = two_slots(sandbox);
    let spki = b.node_key().unwrap();
    let (id, planted) = (TransportId::random().unwrap(), TransportId::random().unwrap());
    let check = a.create_transport_key(id).unwrap();
    a.create_transport_key(planted).unwrap();

    let good = a.grant_transport_key(id, &spki).unwrap();
    let forged = a.grant_transport_key(planted, &spki).unwrap();
    let mut wrong_check = check;
    wrong_check[0] ^= 1;
    for (blob, expected) in [(&good, wrong_check), (&forged, check)] {
        let error = b.accept_transport_key(id, blob, &expected).unwrap_err();
        assert!(matches!(error, HsmError::TransportCheck { .. }), "{error}");
    }
    let objects = b.objects().unwrap();
    assert!(
        objects.transport_keys.is_empty(),
        "a refused transport key stayed in the token"
    );
    assert_eq!(b.transport_check(id).unwrap(), None);

    b.accept_transport_key(id, &good, &check).unwrap();
    let error = b.accept_transport_key(id, &forged, &wrong_check).unwrap_err();
    assert!(matches!(error, HsmError::TransportCheck { .. }), "{error}");
}

/// What whoever has only the public key in this DER can make of any bytes, in any token.
fn wrapped_to(anywhere: &Slot, spki: &[u8], bytes: &[u8]) -> Vec<u8> {
    let session = crate::objects::beside(anywhere);
    assert_eq!(spki.len(), 422, "3072 bits and the exponent 65537");
    let recipient = [
        Attribute::Class(ObjectClass::PUBLIC_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Token(false),
        Attribute::Private(false),
        Attribute::Wrap(true),
        Attribute::Modulus(spki[33..417].to_vec()),
        Attribute::PublicExponent(vec![1, 0, 1]),
    ];
    let secret = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
        Attribute::Value(bytes.to_vec()),
    ];
    let (recipient, secret) = (
        session.create_object(&recipient).unwrap(),
        session.create_object(&secret).unwrap(),
    );
    let sha1 = PkcsOaepParams::new(
        MechanismType::SHA1,
        PkcsMgfType::MGF1_SHA1,
        PkcsOaepSource::empty(),
    );
    let wrapped = session
        .wrap_key(&Mechanism::RsaPkcsOaep(sha1), recipient, secret)
        .unwrap();
    [[1].as_slice(), &wrapped].concat()
}

pub(crate) fn wrong_recipient(sandbox: &Sandbox) {
    let (a, b) = two_slots(sandbox);
    let id = TransportId::random().unwrap();
    let check = a.create_transport_key(id).unwrap();
    let own = a.grant_transport_key(id, &a.node_key().unwrap()).unwrap();

    let error = b.accept_transport_key(id, &own, &check).unwrap_err();
    assert!(
        matches!(error, HsmError::NotFound { what: "node key", .. }),
        "{error}"
    );
    let spki = b.node_key().unwrap();
    // Of the grant, whatever it is: a node has such a one taken back.
    let refused = |blob: &[u8], reason: &str| match b.accept_transport_key(id, blob, &check).unwrap_err() {
        HsmError::Argument {
            what: "grant",
            reason: said,
        } => assert!(said.contains(reason), "{said}"),
        error => panic!("{error:?}"),
    };
    refused(&own, "made for another key");
    refused(&[], "empty");
    refused(&own[..100], "made for another key");
    let with_hash = |hash: u8| [[hash].as_slice(), &own[1..]].concat();
    refused(&with_hash(9), "unknown hash 9");
    refused(&with_hash(2), "SHA-256");
    refused(&wrapped_to(&b, &spki, &[7; 20]), "");

    for (bad, reason) in [
        (b"no key".to_vec(), "no RSA key"),
        ([spki.as_slice(), &[0]].concat(), "no RSA key"),
        (spki[..400].to_vec(), "no RSA key"),
    ] {
        let error = a.grant_transport_key(id, &bad).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let unknown = TransportId::random().unwrap();
    let error = a.grant_transport_key(unknown, &spki).unwrap_err();
    assert!(
        matches!(
            error,
            HsmError::NotFound {
                what: "transport key",
                ..
            }
        ),
        "{error}"
    );
}

/// Whoever has a slot's whole token, its PIN, the replication key and the state lacks the transport key of the
/// other slot, and so has nothing that opens the other slot's sealed keys.
pub(crate) fn sealed_for_another_slot(sandbox: &Sandbox) {
    let (a, b) = two_slots(sandbox);
    let (kek, own) = (Kek::new(&a), Kek::new(&b));
    b.node_key().unwrap();
    let cluster_id = *b"cluster-id-16-by";
    let cluster_key = ReplicationKey::generate().unwrap().for_cluster(&cluster_id);
    let context = |slot: &'static str, transport_id: TransportId| SealedKeyContext {
        cluster_id,
        slot,
        context: CONTEXT,
        version: kek.version,
        key_uid: kek.uid,
        transport_id,
        check_record: &kek.check_record,
    };
    let home = context("exchange", kek.transport);
    let sealed = cluster_key.seal_key(&home, &kek.wrapped).unwrap();

    // Moved to the other slot, the record does not open, whichever transport key it is said to be under.
    let error = cluster_key
        .open_key(&context("2fa", own.transport), &sealed)
        .unwrap_err();
    assert!(matches!(error, SealError::OtherTransportKey { .. }), "{error}");
    let mut renamed = sealed.clone();
    let id = renamed
        .windows(16)
        .position(|window| window == kek.transport.as_bytes())
        .unwrap();
    renamed[id..id + 16].copy_from_slice(own.transport.as_bytes());
    for (context, record) in [
        (context("2fa", kek.transport), &sealed),
        (context("2fa", own.transport), &renamed),
        (context("exchange", own.transport), &renamed),
    ] {
        let error = cluster_key.open_key(&context, record).unwrap_err();
        assert!(matches!(error, SealError::Altered { .. }), "{error}");
    }

    // Opened as what it is, it is a wrapped key, and no key of this token unwraps it.
    let wrapped = cluster_key.open_key(&home, &sealed).unwrap();
    assert!(wrapped.as_slice() == kek.wrapped);
    let error = kek.import(&b).unwrap_err();
    assert!(
        matches!(
            error,
            HsmError::NotFound {
                what: "transport key",
                ..
            }
        ),
        "{error}"
    );
    let swapped = Kek {
        transport: own.transport,
        ..kek.clone()
    };
    let error = swapped.import(&b).unwrap_err().to_string();
    assert!(error.contains("does not unwrap"), "{error}");
    // Nor is the transport key to be had by the grant that the other slot's token got.
    let check = a.transport_check(kek.transport).unwrap().unwrap();
    let grant = a
        .grant_transport_key(kek.transport, &a.node_key().unwrap())
        .unwrap();
    let error = b
        .accept_transport_key(kek.transport, &grant, &check)
        .unwrap_err()
        .to_string();
    assert!(error.contains("made for another key"), "{error}");

    // Past this crate: the call that opens it in its own token fails here with every key.
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(false),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Wrap(false),
        Attribute::Unwrap(false),
    ];
    let opened_in = |slot: &Slot| {
        let session = crate::objects::beside(slot);
        let secret = [Attribute::Token(true), Attribute::Class(ObjectClass::SECRET_KEY)];
        let keys = session.find_objects(&secret).unwrap();
        assert_eq!(keys.len(), 2, "a transport key and a KEK");
        keys.into_iter()
            .filter(|key| {
                session
                    .unwrap_key(&Mechanism::AesKeyWrap, *key, &wrapped, &template)
                    .is_ok()
            })
            .count()
    };
    assert_eq!((opened_in(&a), opened_in(&b)), (1, 0));

    let objects = b.objects().unwrap();
    assert_eq!(objects.transport_keys, [own.transport]);
    assert_eq!(objects.keks.len(), 1, "{objects:?}");
}
