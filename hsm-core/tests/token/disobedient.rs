//! A module that does not do as the templates say: `cluster-tests/shim` stands between the slot and its token, and
//! shows one flag of what a call makes as another than it was told. Whichever it is, whatever call it was, the key is
//! refused by the name of the flag and nothing of it is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cryptoki::object::{Attribute, ObjectClass};
use hsm_core::names::{KeyUid, TransportId};
use hsm_core::{GenerateKek, HsmError, KekUse, OpError};

use crate::harness::{MODULE, SHIM, Sandbox};
use crate::keys::{CONTEXT, Kek};
use crate::lifecycle::{held, works};
use crate::objects::beside;

/// The flags that every template of a secret key states, with their numbers (PKCS#11 2.40, appendix A).
const FLAGS: [(u32, &str); 11] = [
    (0x001, "CKA_TOKEN"),
    (0x002, "CKA_PRIVATE"),
    (0x103, "CKA_SENSITIVE"),
    (0x104, "CKA_ENCRYPT"),
    (0x105, "CKA_DECRYPT"),
    (0x106, "CKA_WRAP"),
    (0x107, "CKA_UNWRAP"),
    (0x108, "CKA_SIGN"),
    (0x10a, "CKA_VERIFY"),
    (0x10c, "CKA_DERIVE"),
    (0x162, "CKA_EXTRACTABLE"),
];

/// What has to be true of a KEK that is unwrapped, and of a transport key that is: the rest has to be false.
const KEK: [&str; 4] = ["CKA_PRIVATE", "CKA_SENSITIVE", "CKA_ENCRYPT", "CKA_DECRYPT"];
const TRANSPORT: [&str; 5] = [
    "CKA_PRIVATE",
    "CKA_SENSITIVE",
    "CKA_WRAP",
    "CKA_UNWRAP",
    "CKA_EXTRACTABLE",
];

fn and(set: &[&'static str], more: &'static str) -> Vec<&'static str> {
    [set, &[more]].concat()
}

/// The module that the sandbox uses from here on.
struct Shim(PathBuf);

impl Shim {
    fn build(sandbox: &Sandbox) -> Self {
        let shim = Self(sandbox.path(SHIM));
        shim.obey(&[]);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster-tests/shim/pkcs11_shim.c");
        let built = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-o"])
            .arg(&shim.0)
            .arg(&source)
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(built.success(), "cc {}: {built}", source.display());
        shim
    }

    fn obey(&self, rules: &[&str]) {
        let text = format!("module {MODULE}\n{}\n", rules.join("\n"));
        let path = self.0.with_extension("so.rules");
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }
}

pub(crate) fn every_flag(sandbox: &Sandbox) {
    let shim = Shim::build(sandbox);
    let slot = sandbox.new_slot("slot-a");
    let session = beside(&slot);
    let everything = || (sandbox.object_files(), session.find_objects(&[]).unwrap().len());
    // One flag after the other of what `call` makes is shown as the opposite of what `set` says.
    let refused = |call: &str, set: &[&str], work: &dyn Fn() -> Result<(), HsmError>| {
        let before = everything();
        for (number, flag) in FLAGS {
            let shown = u8::from(!set.contains(&flag));
            shim.obey(&[&format!("{call} shows {number:x}={shown:02x}")]);
            let outcome = work();
            shim.obey(&[]);
            match outcome {
                Err(HsmError::Attribute { attribute, .. }) => assert_eq!(attribute, flag, "{call}"),
                other => panic!("{call}, {flag} shown as {shown}: {other:?}"),
            }
            assert_eq!(everything(), before, "{call}, {flag}: something was left");
        }
    };

    let transport = TransportId::random().unwrap();
    refused("C_CopyObject", &and(&TRANSPORT, "CKA_TOKEN"), &|| {
        slot.create_transport_key(transport).map(drop)
    });
    let check = slot.create_transport_key(transport).unwrap();

    refused("C_GenerateKey", &and(&KEK, "CKA_EXTRACTABLE"), &|| {
        let kek = GenerateKek {
            key_uid: KeyUid::random().unwrap(),
            version: 1,
            context: CONTEXT.to_owned(),
            transport_id: transport,
        };
        slot.generate_kek(&kek).map(drop)
    });
    let kek = Kek::generate(&slot, transport, 1);

    // Before it is proven, and once it is in the token.
    refused("C_UnwrapKey", &KEK, &|| kek.import(&slot));
    refused("C_CopyObject", &and(&KEK, "CKA_TOKEN"), &|| kek.import(&slot));
    kek.import(&slot).unwrap();

    let only_decrypts = ["CKA_PRIVATE", "CKA_SENSITIVE", "CKA_DECRYPT"];
    refused("C_CopyObject", &only_decrypts, &|| {
        slot.load_kek(kek.uid, KekUse::DecryptOnly)
    });
    refused("C_CopyObject", &KEK, &|| {
        slot.load_kek(kek.uid, KekUse::EncryptDecrypt)
    });
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);

    // A transport key that comes by grant: this token's own, which it has lost meanwhile.
    let spki = slot.node_key().unwrap();
    let grant = slot.grant_transport_key(transport, &spki).unwrap();
    assert_eq!(slot.destroy_transport_key(transport).unwrap(), 1);
    let accept = || slot.accept_transport_key(transport, &grant, &check);
    refused("C_UnwrapKey", &TRANSPORT, &accept);
    refused("C_CopyObject", &and(&TRANSPORT, "CKA_TOKEN"), &accept);
    accept().unwrap();
    Kek::generate(&slot, transport, 2).import(&slot).unwrap();
}

/// SoftHSM 2.6.1 says to a wrong tag what every module says when something is wrong with itself. Nobody is told then that a ciphertext
/// is wrong, and no key is put out of use.
pub(crate) fn general_error(sandbox: &Sandbox) {
    let shim = Shim::build(sandbox);
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let good = kek.encrypt(&slot, b"4111").unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    let tells_them_apart = || {
        assert_eq!(kek.decrypt(&slot, &good).unwrap(), b"4111");
        let refused = kek.decrypt(&slot, &bad).unwrap_err();
        assert_eq!(refused, OpError::AuthenticationFailed);
    };
    tells_them_apart();

    // Once, and it has passed: as if nothing had been.
    for work in [Kek::import, Kek::test] {
        shim.obey(&["C_Decrypt once 5"]);
        work(&kek, &slot).unwrap();
    }
    shim.obey(&["C_Decrypt once 5"]);
    tells_them_apart();

    shim.obey(&["C_Decrypt fail 5"]);
    for ciphertext in [&good, &bad] {
        let refused = kek.decrypt(&slot, ciphertext).unwrap_err();
        assert!(
            matches!(refused, OpError::Token(HsmError::Call(_))),
            "{refused:?}"
        );
    }
    for failed in [kek.import(&slot), kek.test(&slot)] {
        assert!(matches!(failed, Err(HsmError::Call(_))), "{failed:?}");
    }
    let refused = kek.decrypt(&slot, &good).unwrap_err();
    assert!(matches!(refused, OpError::SlotNotReady(_)), "{refused:?}");

    shim.obey(&[]);
    assert_eq!(held(&slot, &kek), 1, "it was quarantined");
    works(&slot, &kek);
    tells_them_apart();
}

/// Neither as it was ordered nor to be got rid of: it is out of use until it is replaced.
pub(crate) fn left_behind(sandbox: &Sandbox) {
    let shim = Shim(sandbox.path(SHIM));
    let slot = sandbox.open("slot-a");
    let transport = TransportId::random().unwrap();
    slot.create_transport_key(transport).unwrap();
    let kek = Kek::generate(&slot, transport, 1);
    let quarantined = |outcome: Result<(), HsmError>| {
        assert!(
            matches!(&outcome, Err(HsmError::Quarantined { what: "KEK", reason, .. }) if reason.contains("CKA_EXTRACTABLE")),
            "{outcome:?}"
        );
    };
    shim.obey(&["C_CopyObject shows 162=01", "C_DestroyObject fail 30"]);
    quarantined(kek.import(&slot));
    shim.obey(&[]);
    assert_eq!(held(&slot, &kek), 0, "it is listed as sound");
    quarantined(kek.import(&slot));
    quarantined(slot.load_kek(kek.uid, KekUse::DecryptOnly));

    kek.replace(&slot).unwrap();
    assert_eq!(held(&slot, &kek), 1);
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    works(&slot, &kek);
}

/// The node key, to which transport keys come: one that could be read is neither kept, nor, if it could not be got rid
/// of, shown to others or unwrapped with.
pub(crate) fn node_key(sandbox: &Sandbox) {
    let shim = Shim(sandbox.path(SHIM));
    let slot = sandbox.open("slot-a");
    let session = beside(&slot);
    let held = || {
        let private = [Attribute::Token(true), Attribute::Class(ObjectClass::PRIVATE_KEY)];
        session.find_objects(&private).unwrap()
    };
    let removed = || {
        assert_eq!(held().len(), 1);
        session.destroy_object(held()[0]).unwrap();
    };
    let extractable = |outcome: Result<(), HsmError>| match outcome {
        Err(HsmError::Attribute { attribute, .. }) => assert_eq!(attribute, "CKA_EXTRACTABLE"),
        other => panic!("{other:?}"),
    };
    let transport = TransportId::random().unwrap();
    let check = slot.create_transport_key(transport).unwrap();
    let grant = slot
        .grant_transport_key(transport, &slot.node_key().unwrap())
        .unwrap();
    assert_eq!(slot.destroy_transport_key(transport).unwrap(), 1);

    removed();
    shim.obey(&["C_CopyObject shows 162=01"]);
    extractable(slot.node_key().map(drop));
    assert!(held().is_empty(), "it was kept");

    shim.obey(&["C_CopyObject shows 162=01", "C_DestroyObject fail 30"]);
    let left = slot.node_key();
    assert!(
        matches!(&left, Err(HsmError::Quarantined { what: "node key", reason, .. }) if reason.contains("CKA_EXTRACTABLE")),
        "{left:?}"
    );
    shim.obey(&[]);
    extractable(slot.find_node_key().map(drop));
    extractable(slot.node_key().map(drop));
    extractable(slot.accept_transport_key(transport, &grant, &check));

    removed();
    slot.node_key().unwrap();
}
