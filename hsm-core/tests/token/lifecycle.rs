//! Keys coming and going, and what kills leave behind.

use std::fs;
use std::time::Duration;

use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use hsm_core::names::TransportId;
use hsm_core::test_support::duplicate_kek;
use hsm_core::{HsmError, KekUse, OpError, Slot, SlotState};

use crate::harness::{Sandbox, eventually};
use crate::keys::Kek;

pub(crate) fn works(slot: &Slot, kek: &Kek) {
    kek.test(slot).unwrap();
    let ciphertext = kek.encrypt(slot, b"text").unwrap();
    assert_eq!(kek.decrypt(slot, &ciphertext).unwrap(), b"text");
}

pub(crate) fn held(slot: &Slot, kek: &Kek) -> usize {
    let keks = slot.inventory().unwrap();
    keks.iter()
        .filter(|key| key.key_uid == kek.uid && key.problem.is_none())
        .count()
}

pub(crate) fn make_one_key(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    works(&slot, &kek);
    kek.save(&sandbox.path("kek"));
}

pub(crate) fn key_still_works(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    let kek = Kek::saved(&sandbox.path("kek"));
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
}

pub(crate) fn import_twice(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let files = sandbox.object_files();
    kek.import(&slot).unwrap();
    assert_eq!(sandbox.object_files(), files);
    assert_eq!(held(&slot, &kek), 1);
    works(&slot, &kek);
    kek.save(&sandbox.path("kek"));
}

pub(crate) fn import_after_restart(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    let kek = Kek::saved(&sandbox.path("kek"));
    let files = sandbox.object_files();
    kek.import(&slot).unwrap();
    assert_eq!(sandbox.object_files(), files);
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
    assert!(slot.remove_torn_objects().unwrap().is_empty());
}

pub(crate) fn duplicates(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    duplicate_kek(&slot, kek.uid).unwrap();
    let quarantined = |outcome: Result<(), HsmError>| {
        assert!(
            matches!(outcome, Err(HsmError::Quarantined { what: "KEK", .. })),
            "{outcome:?}"
        );
    };
    quarantined(slot.load_kek(kek.uid, KekUse::DecryptOnly));
    quarantined(kek.import(&slot));
    quarantined(kek.test(&slot));
    assert_eq!(kek.encrypt(&slot, b"text").unwrap_err(), OpError::KeyNotLoaded);
    assert_eq!(
        slot.state(),
        SlotState::Ready,
        "one bad key must not fail the slot"
    );

    assert_eq!(slot.destroy_kek(kek.uid).unwrap(), 2);
    kek.import(&slot).unwrap();
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
}

pub(crate) fn destroy(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"text").unwrap();
    let files = sandbox.object_files().len();
    assert_eq!(slot.destroy_kek(kek.uid).unwrap(), 1);
    assert_eq!(sandbox.object_files().len(), files - 1);
    assert_eq!(
        kek.decrypt(&slot, &ciphertext).unwrap_err(),
        OpError::KeyNotLoaded
    );
    let session = crate::objects::beside(&slot);
    let left = session
        .find_objects(&[cryptoki::object::Attribute::Id(kek.uid.as_bytes().to_vec())])
        .unwrap();
    assert!(left.is_empty(), "a session copy outlived its key");
    assert!(matches!(
        slot.load_kek(kek.uid, KekUse::DecryptOnly),
        Err(HsmError::NotFound { what: "KEK", .. })
    ));
    assert_eq!(slot.destroy_kek(kek.uid).unwrap(), 0);

    assert_eq!(slot.destroy_transport_key(kek.transport).unwrap(), 1);
    assert!(matches!(
        kek.import(&slot),
        Err(HsmError::NotFound {
            what: "transport key",
            ..
        })
    ));
}

pub(crate) fn forged(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let transport = TransportId::random().unwrap();
    let check = slot.create_transport_key(transport).unwrap();
    assert_eq!(slot.create_transport_key(transport).unwrap(), check);
    let kek = Kek::generate(&slot, transport, 1);
    let other = Kek::generate(&slot, transport, 1);
    let elsewhere = TransportId::random().unwrap();
    assert_ne!(slot.create_transport_key(elsewhere).unwrap(), check);
    let files = sandbox.object_files();

    let refused = |forged: &Kek, reason: &str| {
        let error = forged.import(&slot).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(sandbox.object_files(), files, "something was left in the token");
    };
    // A wrapped key that everybody knows: the transport key's own check.
    refused(
        &Kek {
            wrapped: check.to_vec(),
            ..kek.clone()
        },
        "forged record",
    );
    refused(
        &Kek {
            wrapped: other.wrapped.clone(),
            ..kek.clone()
        },
        "check record does not decrypt",
    );
    refused(
        &Kek {
            transport: elsewhere,
            ..kek.clone()
        },
        "does not unwrap",
    );
    refused(
        &Kek {
            check_record: other.check_record.clone(),
            ..kek.clone()
        },
        "not the check record",
    );
    refused(
        &Kek {
            version: 2,
            ..kek.clone()
        },
        "not the check record",
    );
    refused(
        &Kek {
            wrapped: kek.wrapped[..32].to_vec(),
            ..kek.clone()
        },
        "a wrapped AES-256 key has 40",
    );
    let mut flipped = kek.clone();
    flipped.wrapped[17] ^= 1;
    refused(&flipped, "does not unwrap");
    assert_eq!(slot.state(), SlotState::Ready);

    kek.import(&slot).unwrap();
    assert_eq!(held(&slot, &kek), 1);
}

pub(crate) fn kill_in_import(sandbox: &Sandbox) {
    for round in 0..16_u64 {
        let helper = sandbox.helper("import_for_ever");
        let started = sandbox.path("importing");
        eventually("the first import", || started.exists());
        std::thread::sleep(Duration::from_millis(round * 13 % 29));
        helper.kill();
        fs::remove_file(started).unwrap();
        assert!(sandbox.helper("check_after_kill").succeeds(), "round {round}");
    }
}

/// Helper: writes token objects all the time.
pub(crate) fn import_for_ever(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    let kek = Kek::saved(&sandbox.path("kek"));
    loop {
        slot.destroy_kek(kek.uid).unwrap();
        kek.import(&slot).unwrap();
        fs::write(sandbox.path("importing"), "").unwrap();
    }
}

/// Helper: what a node does after a kill.
pub(crate) fn check_after_kill(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    for torn in slot.remove_torn_objects().unwrap() {
        eprintln!("removed: {torn}");
    }
    let kek = Kek::saved(&sandbox.path("kek"));
    kek.import(&slot).unwrap();
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
    assert_eq!(held(&slot, &kek), 1);
    let objects = slot.objects().unwrap();
    assert_eq!(
        (objects.keks.len(), objects.transport_keys.len()),
        (1, 1),
        "{objects:?}"
    );
    assert!(objects.foreign.is_empty(), "{objects:?}");
}

pub(crate) fn kill_in_login(sandbox: &Sandbox) {
    for round in 0..20_u64 {
        let helper = sandbox.helper("log_in_for_ever");
        let started = sandbox.path("logging-in");
        eventually("the first login", || started.exists());
        std::thread::sleep(Duration::from_micros(round * 1_700 % 9_000));
        helper.kill();
        fs::remove_file(started).unwrap();
    }
}

/// Helper: `C_Login` writes `token.object` each time.
pub(crate) fn log_in_for_ever(sandbox: &Sandbox) {
    let module = sandbox.module();
    let token = module
        .tokens()
        .unwrap()
        .into_iter()
        .find(|token| token.label == "slot-a")
        .expect("the token");
    let pkcs11 = cryptoki::context::Pkcs11::new(crate::harness::MODULE).unwrap();
    let session = pkcs11.open_rw_session(token.slot_id.try_into().unwrap()).unwrap();
    let pin = AuthPin::from(sandbox.pin("slot-a").expose().to_owned());
    loop {
        session.login(UserType::User, Some(&pin)).unwrap();
        session.logout().unwrap();
        fs::write(sandbox.path("logging-in"), "").unwrap();
    }
}

pub(crate) fn tear_token_object(sandbox: &Sandbox) {
    fs::write(sandbox.token_dir().join("token.object"), "").unwrap();
}

pub(crate) fn token_was_restored(sandbox: &Sandbox) {
    assert_eq!(sandbox.module().restored_tokens().len(), 1);
    key_still_works(sandbox);
}

/// Writes what kills at different moments would leave: an empty file, one cut off, one with
/// nothing in it, a copy before it became a token object, one without class.
pub(crate) fn tear_objects(sandbox: &Sandbox) {
    let dir = sandbox.token_dir();
    let whole = fs::read(&sandbox.object_files()[0]).unwrap();
    // generation(8), CKA_CLASS(24), CKA_TOKEN(17): the flag is the last byte.
    let mut not_on_token = whole.clone();
    assert_eq!(not_on_token[48], 0xff);
    not_on_token[48] = 0;
    let without_class = [&whole[..8], &whole[32..]].concat();
    let torn = [
        Vec::new(),
        whole[..300].to_vec(),
        whole[..8].to_vec(),
        not_on_token,
        without_class,
    ];
    for (number, contents) in torn.iter().enumerate() {
        fs::write(
            dir.join(format!("aaaaaaaa-0000-0000-0000-00000000000{number}.object")),
            contents,
        )
        .unwrap();
        fs::write(
            dir.join(format!("aaaaaaaa-0000-0000-0000-00000000000{number}.lock")),
            "",
        )
        .unwrap();
    }
}

pub(crate) fn torn_are_gone(sandbox: &Sandbox) {
    let slot = sandbox.open("slot-a");
    let removed = slot.remove_torn_objects().unwrap();
    assert_eq!(removed.len(), 5, "{removed:?}");
    assert_eq!(sandbox.object_files().len(), 2, "the KEK and its transport key");
    let kek = Kek::saved(&sandbox.path("kek"));
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
}
