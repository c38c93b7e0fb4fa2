//! When a PIN is tried and when not, and who may have a token.

use std::fs;
use std::process::{Command, Stdio};

use cryptoki::context::Pkcs11;
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use hsm_core::secrets::Pin;
use hsm_core::{HsmError, Slot, SlotError, SlotState, generate_pin};

use crate::harness::{MODULE, Sandbox};

fn wrong_pin_of(sandbox: &Sandbox) -> Pin {
    sandbox.pin("wrong")
}

fn open_with(sandbox: &Sandbox, pin: Pin) -> Result<Slot, SlotError> {
    let mut options = sandbox.options("slot-a");
    options.pin = pin;
    Slot::open(&sandbox.module(), options)
}

fn markers(sandbox: &Sandbox) -> usize {
    fs::read_dir(sandbox.path("state-slot-a"))
        .map(Iterator::count)
        .unwrap_or(0)
}

fn token_object(sandbox: &Sandbox) -> Vec<u8> {
    fs::read(sandbox.token_dir().join("token.object")).unwrap()
}

pub(crate) fn set_up(sandbox: &Sandbox) {
    sandbox.init("slot-a");
}

pub(crate) fn wrong_pin(sandbox: &Sandbox) {
    sandbox.init("slot-a");
    let error = open_with(sandbox, wrong_pin_of(sandbox)).err().unwrap();
    assert!(matches!(error, SlotError::PinRefused { .. }), "{error}");
    assert_eq!(error.state(), SlotState::Locked);
    assert!(error.is_about_pin());
    assert_eq!(markers(sandbox), 1);
    wrong_pin_again(sandbox);
}

pub(crate) fn wrong_pin_again(sandbox: &Sandbox) {
    let before = token_object(sandbox);
    let error = open_with(sandbox, wrong_pin_of(sandbox)).err().unwrap();
    assert!(matches!(error, SlotError::PinRefusedBefore { .. }), "{error}");
    // Every C_Login writes this file.
    assert_eq!(token_object(sandbox), before, "the refused PIN was tried again");
    let text = error.to_string();
    assert!(!text.contains(wrong_pin_of(sandbox).expose()), "{text}");
}

pub(crate) fn right_pin(sandbox: &Sandbox) {
    let slot = open_with(sandbox, sandbox.pin("slot-a"));
    assert!(slot.is_ok(), "{:?}", slot.err());
    assert_eq!(markers(sandbox), 0);
}

pub(crate) fn count_low(sandbox: &Sandbox) {
    let module = sandbox.module();
    let token = module
        .tokens()
        .unwrap()
        .into_iter()
        .find(|token| token.label == "slot-a")
        .unwrap();
    let somebody = Pkcs11::new(MODULE)
        .unwrap()
        .open_rw_session(token.slot_id.try_into().unwrap())
        .unwrap();
    somebody
        .login(UserType::User, Some(&AuthPin::from("0000".to_owned())))
        .unwrap_err();

    let error = sandbox.try_open("slot-a").err().unwrap();
    assert!(matches!(error, SlotError::PinCountLow { .. }), "{error}");
    let mut options = sandbox.options("slot-a");
    options.retry_pin = true;
    let slot = Slot::open(&module, options);
    assert!(slot.is_ok(), "{:?}", slot.err());
}

pub(crate) fn weak(sandbox: &Sandbox) {
    sandbox.init("slot-a");
    let before = token_object(sandbox);
    let error = open_with(sandbox, Pin::new("1234".to_owned())).err().unwrap();
    assert!(matches!(error, SlotError::WeakPin { .. }), "{error}");
    assert_eq!(token_object(sandbox), before, "the weak PIN was tried");

    let mut options = sandbox.options("slot-a");
    options.pin = Pin::new("1234".to_owned());
    options.insecure_pin = true;
    let error = Slot::open(&sandbox.module(), options).err().unwrap();
    assert!(matches!(error, SlotError::PinRefused { .. }), "{error}");
}

pub(crate) fn labels(sandbox: &Sandbox) {
    // init_token makes no second token of one label; other tools do.
    for _ in 0..2 {
        let made = Command::new("softhsm2-util")
            .args([
                "--init-token",
                "--free",
                "--label",
                "twin",
                "--so-pin",
                "12345678",
                "--pin",
                "12345678",
            ])
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
    }
    let error = sandbox.try_open("twin").err().unwrap();
    assert!(
        matches!(error, SlotError::DuplicateLabel { count: 2, .. }),
        "{error}"
    );

    let error = sandbox.try_open("absent").err().unwrap();
    assert!(matches!(error, SlotError::TokenNotFound { .. }), "{error}");
    assert_eq!(error.state(), SlotState::Absent);
    let text = error.to_string();
    assert!(text.contains("\"absent\"") && text.contains("\"twin\""), "{text}");
}

pub(crate) fn one_owner(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let error = sandbox.try_open("slot-a").err().unwrap();
    assert!(
        matches!(
            &error,
            SlotError::Hsm {
                error: HsmError::Owned { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(
        !sandbox.helper("check_after_kill").succeeds(),
        "another process opened an owned token"
    );
    drop(slot);
    sandbox.open("slot-a");
}

pub(crate) fn open_again(sandbox: &Sandbox) {
    drop(sandbox.new_slot("slot-a"));
    let slot = sandbox.open("slot-a");
    let spki = slot.node_key().unwrap();
    drop(slot);
    // CKR_USER_ALREADY_LOGGED_IN would prove no PIN.
    let error = open_with(sandbox, generate_pin().unwrap()).err().unwrap();
    assert!(matches!(error, SlotError::PinUnproven { .. }), "{error}");
    assert_eq!(sandbox.open("slot-a").node_key().unwrap(), spki);
}
