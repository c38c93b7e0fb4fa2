//! How a slot fails, and how it comes back.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptoki::object::Attribute;
use hsm_core::names::KeyUid;
use hsm_core::test_support::import_test_key;
use hsm_core::{HsmError, KekUse, OpError, Slot, SlotState};
use nix::fcntl::{FcntlArg, fcntl};

use crate::harness::{Sandbox, eventually};
use crate::keys::Kek;
use crate::objects::beside;

fn failed_with(slot: &Slot, expected: &str) -> bool {
    matches!(slot.state(), SlotState::Failed { code, .. } if code == expected)
}

fn not_ready(slot: &Slot, kek: &Kek) -> bool {
    matches!(kek.encrypt(slot, b"text"), Err(OpError::SlotNotReady(_)))
}

/// SoftHSM makes the serial number of the last 16 hex digits of the directory's name.
fn dir_of(sandbox: &Sandbox, slot: &Slot) -> PathBuf {
    fs::read_dir(sandbox.path("tokens"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .replace('-', "")
                .ends_with(slot.serial())
        })
        .unwrap()
}

pub(crate) fn lost_token(sandbox: &Sandbox) {
    let (lost, kept) = (sandbox.new_slot("slot-a"), sandbox.new_slot("slot-b"));
    let (key_of_lost, key_of_kept) = (Kek::new(&lost), Kek::new(&kept));
    key_of_lost.test(&lost).unwrap();
    let dir = dir_of(sandbox, &lost);
    fs::rename(&dir, sandbox.path("away")).unwrap();
    // The session copy works on: only the test sees the loss.
    key_of_lost.encrypt(&lost, b"text").unwrap();
    key_of_lost.test(&lost).unwrap_err();
    assert!(failed_with(&lost, "known_answer_test"), "{}", lost.state());
    assert!(not_ready(&lost, &key_of_lost));
    // What cannot be searched is not acknowledged as gone.
    let error = lost.destroy_transport_key(key_of_lost.transport).unwrap_err();
    assert!(matches!(error, HsmError::NotFound { .. }), "{error}");

    key_of_kept.test(&kept).unwrap();
    key_of_kept.encrypt(&kept, b"text").unwrap();
    assert_eq!(kept.state(), SlotState::Ready);
}

pub(crate) fn fail_and_recover(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let (kek, other) = (Kek::new(&slot), Kek::new(&slot));
    // A record that belongs to another version says nothing about the slot.
    let misplaced = Kek {
        version: 9,
        ..kek.clone()
    };
    assert!(matches!(
        misplaced.test(&slot).unwrap_err(),
        HsmError::Argument { .. }
    ));
    assert_eq!(slot.state(), SlotState::Ready);

    let mut wrong = kek.clone();
    *wrong.check_record.last_mut().unwrap() ^= 1;
    let error = wrong.test(&slot).unwrap_err();
    assert!(matches!(error, HsmError::CheckRecord { .. }), "{error}");
    assert!(failed_with(&slot, "known_answer_test"));
    assert!(not_ready(&slot, &kek) && not_ready(&slot, &other));

    // Another key passes: its copies are back without being asked for.
    other.test(&slot).unwrap();
    assert_eq!(slot.state(), SlotState::Ready);
    let ciphertext = other.encrypt(&slot, b"text").unwrap();
    assert_eq!(other.decrypt(&slot, &ciphertext).unwrap(), b"text");
}

/// Somebody put another key in the place of one that was proven.
pub(crate) fn planted(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let (kek, other) = (Kek::new(&slot), Kek::new(&slot));
    let ciphertext = kek.encrypt(&slot, b"text").unwrap();
    let session = beside(&slot);
    let held = session
        .find_objects(&[Attribute::Token(true), Attribute::Id(kek.uid.as_bytes().to_vec())])
        .unwrap();
    session.destroy_object(held[0]).unwrap();
    import_test_key(&slot, &[7; 32], kek.uid, &kek.label()).unwrap();

    let error = kek.test(&slot).unwrap_err();
    assert!(matches!(error, HsmError::CheckRecord { .. }), "{error}");
    other.test(&slot).unwrap();
    assert_eq!(slot.state(), SlotState::Ready);
    assert_eq!(
        kek.encrypt(&slot, b"text").unwrap_err(),
        OpError::KeyNotLoaded,
        "encrypted under a key that was planted"
    );
    let found = slot.inventory().unwrap();
    let planted = found.iter().find(|key| key.key_uid == kek.uid).unwrap();
    assert!(planted.problem.is_some(), "{planted:?}");

    // A sealed key that does not prove itself takes nothing away; the right one takes its place.
    let forged = Kek {
        wrapped: other.wrapped.clone(),
        ..kek.clone()
    };
    forged.replace(&slot).unwrap_err();
    assert_eq!(slot.inventory().unwrap().len(), 2);
    kek.replace(&slot).unwrap();
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    kek.test(&slot).unwrap();
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"text");
}

pub(crate) fn logout(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    slot.check_session().unwrap();
    let kek = Kek::new(&slot);
    for _ in 0..2 {
        beside(&slot).logout().unwrap();
        kek.encrypt(&slot, b"text").unwrap_err();
        kek.test(&slot).unwrap();
        assert_eq!(slot.state(), SlotState::Ready);
        kek.encrypt(&slot, b"text").unwrap();
    }
    // Nothing is found then, and nothing is destroyed.
    beside(&slot).logout().unwrap();
    let error = slot.destroy_kek(kek.uid).unwrap_err();
    assert!(matches!(error, HsmError::Login(_)), "{error}");
    kek.test(&slot).unwrap();
    beside(&slot).logout().unwrap();
    let error = slot.destroy_transport_key(kek.transport).unwrap_err();
    assert!(matches!(error, HsmError::Login(_)), "{error}");
    kek.test(&slot).unwrap();
    assert!(slot.transport_check(kek.transport).unwrap().is_some());
    kek.encrypt(&slot, b"text").unwrap();
    // A slot without a key to be tested with asks the session.
    beside(&slot).logout().unwrap();
    slot.check_session().unwrap();
    kek.test(&slot).unwrap();
}

pub(crate) fn hang(sandbox: &Sandbox) {
    sandbox.init("slot-a");
    let mut options = sandbox.options("slot-a");
    options.deadline = Duration::from_millis(1200);
    options.control_deadline = Duration::from_secs(3);
    let slot = Slot::open(&sandbox.module(), options).unwrap_or_else(|error| panic!("{error}"));
    let kek = Kek::new(&slot);
    let helper = sandbox.helper("hold_generation");
    let held = sandbox.path("held");
    eventually("the lock", || held.exists());

    // SoftHSM waits for the lock inside the call, for as long as it takes.
    let hanging = {
        let slot = slot.clone();
        std::thread::spawn(move || slot.inventory().map(|keks| keks.len()))
    };
    eventually("the failure", || failed_with(&slot, "hung"));
    assert!(not_ready(&slot, &kek));
    let error = slot.unload_kek(kek.uid).unwrap_err();
    assert!(
        matches!(
            error,
            HsmError::Busy {
                running: "inventory",
                ..
            }
        ),
        "{error}"
    );

    helper.kill();
    eventually("its end", || failed_with(&slot, "untested"));
    assert!(not_ready(&slot, &kek));
    kek.test(&slot).unwrap();
    assert_eq!(slot.state(), SlotState::Ready);
    assert_eq!(hanging.join().unwrap().unwrap(), 1);
    let ciphertext = kek.encrypt(&slot, b"text").unwrap();
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"text");
}

/// Helper: holds the lock that SoftHSM takes to see whether a token has changed.
pub(crate) fn hold_generation(sandbox: &Sandbox) {
    let path = sandbox.token_dir().join("generation");
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let lock = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as _,
        l_whence: nix::libc::SEEK_SET as _,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_SETLK(&lock)).unwrap();
    fs::write(sandbox.path("held"), "").unwrap();
    loop {
        std::thread::park();
    }
}

pub(crate) fn on_call(sandbox: &Sandbox) {
    sandbox.init("slot-a");
    let seen: Arc<Mutex<Vec<(&'static str, bool)>>> = Arc::default();
    let mut options = sandbox.options("slot-a");
    let sink = Arc::clone(&seen);
    options.on_call = Some(Arc::new(move |name, took, ok| {
        assert!(took < Duration::from_secs(30));
        sink.lock().unwrap().push((name, ok));
    }));
    let slot = Slot::open(&sandbox.module(), options).unwrap_or_else(|error| panic!("{error}"));
    let kek = Kek::new(&slot);
    let mut ciphertext = kek.encrypt(&slot, b"text").unwrap();
    kek.decrypt(&slot, &ciphertext).unwrap();
    *ciphertext.last_mut().unwrap() ^= 1;
    kek.decrypt(&slot, &ciphertext).unwrap_err();
    slot.load_kek(KeyUid::random().unwrap(), KekUse::DecryptOnly)
        .unwrap_err();

    let seen = seen.lock().unwrap();
    for expected in [
        "create_transport_key",
        "generate_kek",
        "import_kek",
        "load_kek",
        "encrypt",
        "decrypt",
    ] {
        assert!(
            seen.contains(&(expected, true)),
            "{expected} is missing in {seen:?}"
        );
    }
    assert!(seen.contains(&("load_kek", false)));
    assert!(
        !seen.contains(&("decrypt", false)),
        "a bad ciphertext is no failure of the token"
    );
}
