//! Transport keys on their way from one token to another.

use hsm_core::names::TransportId;
use hsm_core::{HsmError, KekUse, Slot};

use crate::harness::Sandbox;
use crate::keys::Kek;

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
    let refused = |blob: &[u8], reason: &str| {
        let error = b.accept_transport_key(id, blob, &check).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused(&own, "made for another key");
    refused(&[], "empty");
    refused(&own[..100], "made for another key");
    let with_hash = |hash: u8| [[hash].as_slice(), &own[1..]].concat();
    refused(&with_hash(9), "unknown hash 9");
    refused(&with_hash(2), "SHA-256");

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
