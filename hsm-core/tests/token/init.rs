//! Initialising tokens, and not doing so.

use std::fs;

use hsm_core::secrets::Pin;
use hsm_core::{HsmError, InitToken, TokenInfo, generate_pin, init_token};

use crate::harness::Sandbox;

fn init(
    sandbox: &Sandbox,
    label: &str,
    pin: &Pin,
    so_pin: &Pin,
    destroy_existing: bool,
) -> Result<TokenInfo, HsmError> {
    init_token(
        &sandbox.module(),
        InitToken {
            label,
            pin,
            so_pin,
            destroy_existing,
        },
    )
}

pub(crate) fn refuses_initialised(sandbox: &Sandbox) {
    let made = sandbox.init("slot-a");
    assert!(made.initialised && made.user_pin_set);
    assert_eq!(made.label, "slot-a");
    let (pin, so_pin) = (generate_pin().unwrap(), sandbox.so_pin("slot-a"));
    let error = init(sandbox, "slot-a", &pin, &so_pin, false).unwrap_err();
    assert!(matches!(error, HsmError::AlreadyInitialised { .. }), "{error}");
    // Another label is another token.
    assert_ne!(sandbox.init("slot-b").serial, made.serial);
    sandbox.open("slot-a");
}

pub(crate) fn refuses_owned(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let (pin, so_pin) = (generate_pin().unwrap(), sandbox.so_pin("slot-a"));
    let error = init(sandbox, "slot-a", &pin, &so_pin, true).unwrap_err();
    assert!(matches!(error, HsmError::Owned { .. }), "{error}");
    slot.node_key().unwrap();
}

pub(crate) fn destroy_existing(sandbox: &Sandbox) {
    let files = sandbox.object_files().len();
    assert!(files > 0);
    let pin = generate_pin().unwrap();
    let wrong = generate_pin().unwrap();
    let error = init(sandbox, "slot-a", &pin, &wrong, true)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("security officer's PIN") && error.contains("not tried again"),
        "{error}"
    );
    assert_eq!(
        sandbox.object_files().len(),
        files,
        "a wrong SO PIN destroyed objects"
    );
    let copy = sandbox.token_dir().with_extension("token-object");
    assert!(copy.is_file(), "a wrong SO PIN cost the token its copy");

    let short = Pin::new("12345678".to_owned());
    let error = init(sandbox, "slot-a", &short, &sandbox.so_pin("slot-a"), true).unwrap_err();
    assert!(
        matches!(error, HsmError::Argument { what: "user PIN", .. }),
        "{error}"
    );
    // What the token has as its SO PIN is not chosen here: it is asked, whatever it looks like.
    let error = init(sandbox, "slot-a", &pin, &short, true)
        .unwrap_err()
        .to_string();
    assert!(error.contains("not tried again"), "{error}");

    let made = init(sandbox, "slot-a", &pin, &sandbox.so_pin("slot-a"), true).unwrap();
    assert!(made.user_pin_set);
    assert!(sandbox.object_files().is_empty());
    fs::write(sandbox.path("pin-slot-a"), pin.expose()).unwrap();
}

pub(crate) fn new_pin_works(sandbox: &Sandbox) {
    assert!(
        sandbox.module().restored_tokens().is_empty(),
        "the old PINs came back"
    );
    let slot = sandbox.open("slot-a");
    assert!(slot.inventory().unwrap().is_empty());
}

pub(crate) fn refuses_bad_arguments(sandbox: &Sandbox) {
    let (pin, so_pin) = (generate_pin().unwrap(), generate_pin().unwrap());
    for label in [
        "",
        " slot",
        "slot ",
        "a\nb",
        "a label of more than thirty-two bytes",
    ] {
        let error = init(sandbox, label, &pin, &so_pin, false).unwrap_err();
        assert!(
            matches!(error, HsmError::Argument { what: "label", .. }),
            "{error}"
        );
    }
    let weak = Pin::new("12345678".to_owned());
    let error = init(sandbox, "slot-a", &weak, &so_pin, false).unwrap_err();
    assert!(
        matches!(error, HsmError::Argument { what: "user PIN", .. }),
        "{error}"
    );
    let error = init(sandbox, "slot-a", &pin, &weak, false).unwrap_err();
    assert!(
        matches!(
            error,
            HsmError::Argument {
                what: "security officer's PIN",
                ..
            }
        ),
        "{error}"
    );
    let error = init(sandbox, "slot-a", &pin, &pin, false).unwrap_err();
    assert!(error.to_string().contains("must differ"), "{error}");
    assert!(
        sandbox
            .module()
            .tokens()
            .unwrap()
            .iter()
            .all(|token| !token.initialised)
    );
}
