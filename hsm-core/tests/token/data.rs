//! Encrypting and decrypting.

use std::sync::mpsc::channel;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use hsm_core::envelope::Header;
use hsm_core::names::KeyUid;
use hsm_core::test_support::import_test_key;
use hsm_core::{DecryptV1Job, KekUse, OpError, Slot, SlotState};
use sha2::{Digest, Sha256};

use crate::harness::Sandbox;
use crate::keys::{CONTEXT, Kek, decrypt};

pub(crate) fn round_trip(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    for length in [0, 1, 15, 16, 17, 4096, 65_536, 1 << 20] {
        let plaintext: Vec<u8> = (0..length).map(|i: usize| (i % 251) as u8).collect();
        let ciphertext = kek.encrypt(&slot, &plaintext).unwrap();
        assert_eq!(ciphertext.len(), 40 + length + 16);
        let (header, _) = Header::parse(&ciphertext).unwrap();
        assert_eq!((header.key_uid, header.version), (kek.uid, 1));
        assert!(
            kek.decrypt(&slot, &ciphertext).unwrap() == plaintext,
            "{length} bytes"
        );
    }
    let twice = [
        kek.encrypt(&slot, b"same").unwrap(),
        kek.encrypt(&slot, b"same").unwrap(),
    ];
    assert_ne!(twice[0], twice[1], "a nonce was used twice");
}

pub(crate) fn bit_flips(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"4111 1111 1111 1111").unwrap();
    for bit in 0..ciphertext.len() * 8 {
        let mut flipped = ciphertext.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let outcome = kek.decrypt(&slot, &flipped);
        // In the key id a flip names another key, which is not there.
        let expected = if (8..24).contains(&(bit / 8)) {
            OpError::KeyNotLoaded
        } else {
            OpError::AuthenticationFailed
        };
        assert_eq!(outcome.unwrap_err(), expected, "bit {bit}");
    }
    assert_eq!(
        slot.state(),
        SlotState::Ready,
        "bad ciphertexts must not cost the slot anything"
    );
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"4111 1111 1111 1111");
}

pub(crate) fn other_associated_data(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"secret").unwrap();
    let open = |context, principal, aad: &[u8]| decrypt(&slot, &ciphertext, context, principal, aad);
    assert_eq!(open(CONTEXT, "trading-1", b"order 17").unwrap(), b"secret");
    let wrong = [
        open("order-key", "trading-1", b"order 17"),
        open(CONTEXT, "trading-2", b"order 17"),
        open(CONTEXT, "trading-1", b"order 18"),
        open(CONTEXT, "trading-1", b""),
        open(CONTEXT, "", b"order 17"),
    ];
    for outcome in wrong {
        assert_eq!(outcome.unwrap_err(), OpError::AuthenticationFailed);
    }
}

/// X, plaintext and ciphertext of v1 under the key `00 01 … 1f`, made with Python's `cryptography` and `hashlib`
/// as the v1 service does it. The last two nonces begin like a v2 envelope.
const V1_VECTORS: [(&str, &str, &str); 4] = [
    (
        "Trading",
        "676f6c64656e207368617265642074657874",
        concat!(
            "6162636465666768696a6b6c98581b3b648dd6c778b06bd1d22d3f69a19e25abba36e05e0ea2f6fe",
            "3d166f5303a1",
        ),
    ),
    (
        "trading-1",
        "",
        "6162636465666768696a6b6d96848d966ee712eaa7ce1be094853207",
    ),
    (
        "trading-1",
        "000102030405060708090a0b0c0d0e0f",
        concat!(
            "f5485332696a6b6c6d6e6f7097e3b22a11506668a9732949ff3d1cf14b295d808ebaa9160bec7666",
            "fb0e8a9c",
        ),
    ),
    (
        "Trading",
        concat!(
            "612068656164657220696e20657665727920726573706563742c206f66206e6f206b657920686572",
            "6521",
        ),
        concat!(
            "f54853320101020c393837369846fe20fbf2f019e0b5c73ed40f0621512f0f3160360a37c1e2f4a3",
            "3b9a9211012f6987386fc40a962de969b3f9f08bd0d68563bac8122d889d",
        ),
    ),
];

fn open_v1(
    slot: &Slot,
    uid: KeyUid,
    ciphertext: &[u8],
    context: &str,
    principal: &str,
) -> Result<Vec<u8>, OpError> {
    let (send, receive) = channel();
    let job = DecryptV1Job {
        key_uid: uid,
        ciphertext: ciphertext.to_vec(),
        context: context.into(),
        binding_value: principal.into(),
    };
    slot.decrypt_v1(job, move |outcome| {
        send.send(outcome.map(|plaintext| plaintext.as_slice().to_vec()))
            .unwrap();
    })?;
    receive.recv().unwrap()
}

pub(crate) fn v1_vector(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let key: [u8; 32] = std::array::from_fn(|i| i as u8);
    let uid = KeyUid::random().unwrap();
    import_test_key(&slot, &key, uid, "kek-exchange-key-v1").unwrap();
    slot.load_kek(uid, KekUse::DecryptOnly).unwrap();
    let open = |ciphertext: &[u8], principal: &str| open_v1(&slot, uid, ciphertext, CONTEXT, principal);
    let refused = |outcome: Result<Vec<u8>, OpError>| {
        assert_eq!(outcome.unwrap_err(), OpError::AuthenticationFailed);
    };

    for (principal, plaintext, ciphertext) in V1_VECTORS {
        let ciphertext = hex::decode(ciphertext).unwrap();
        assert_eq!(hex::encode(open(&ciphertext, principal).unwrap()), plaintext);
        refused(open(&ciphertext, "another"));
        refused(open(&ciphertext, ""));
        refused(open_v1(&slot, uid, &ciphertext, "order-key", principal));
        for bit in 0..ciphertext.len() * 8 {
            let mut flipped = ciphertext.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused(open(&flipped, principal));
        }
        for length in 28..ciphertext.len() {
            refused(open(&ciphertext[..length], principal));
        }
    }

    let cipher = Aes256Gcm::new_from_slice(&key).unwrap();
    let sizes = [0_usize, 1, 15, 16, 17, 24, 32, 4096, 65_536];
    for (number, size) in sizes.into_iter().enumerate() {
        let plaintext = vec![number as u8; size];
        for (mode, principal) in [(1_u8, "Trading"), (2, "trading-1")] {
            for first in [*b"v1 nonce--", *b"\xf5HS2\x01\x01\x00\x0c--"] {
                let mut nonce = [0_u8; 12];
                nonce[..10].copy_from_slice(&first);
                nonce[10..].copy_from_slice(&[number as u8, mode]);
                let aad = Sha256::digest([CONTEXT.as_bytes(), b"\0", principal.as_bytes()].concat());
                let payload = Payload {
                    msg: &plaintext,
                    aad: &aad,
                };
                let sealed = cipher.encrypt((&nonce).into(), payload).unwrap();
                let ciphertext = [nonce.as_slice(), &sealed].concat();
                assert!(open(&ciphertext, principal).unwrap() == plaintext, "{size} bytes");
                refused(open(&ciphertext, "another"));
            }
        }
    }
    assert_eq!(slot.state(), SlotState::Ready);
}

pub(crate) fn too_short(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"").unwrap();
    for length in 40..ciphertext.len() {
        assert_eq!(
            kek.decrypt(&slot, &ciphertext[..length]).unwrap_err(),
            OpError::TooShort
        );
    }
    let job = |length| DecryptV1Job {
        key_uid: kek.uid,
        ciphertext: vec![0; length],
        context: CONTEXT.into(),
        binding_value: "".into(),
    };
    for length in [0, 11, 12, 27] {
        let outcome = slot.decrypt_v1(job(length), |_| panic!("was queued"));
        assert_eq!(outcome.unwrap_err(), OpError::TooShort);
    }
    // The session works as before.
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"");
}

pub(crate) fn decrypt_only(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"old").unwrap();
    slot.load_kek(kek.uid, KekUse::DecryptOnly).unwrap();
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"old");
    assert_eq!(kek.encrypt(&slot, b"new").unwrap_err(), OpError::KeyNotLoaded);
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    kek.encrypt(&slot, b"new").unwrap();
}

pub(crate) fn not_loaded(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let ciphertext = kek.encrypt(&slot, b"text").unwrap();
    slot.unload_kek(kek.uid).unwrap();
    assert_eq!(kek.encrypt(&slot, b"text").unwrap_err(), OpError::KeyNotLoaded);
    assert_eq!(
        kek.decrypt(&slot, &ciphertext).unwrap_err(),
        OpError::KeyNotLoaded
    );
    slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), b"text");
}

pub(crate) fn many_callers(sandbox: &Sandbox) {
    sandbox.init("slot-a");
    let mut options = sandbox.options("slot-a");
    options.threads = 3;
    options.queue = 100_000;
    options.deadline = std::time::Duration::from_secs(30);
    let slot = hsm_core::Slot::open(&sandbox.module(), options).unwrap_or_else(|error| panic!("{error}"));
    let kek = Kek::new(&slot);
    std::thread::scope(|scope| {
        for caller in 0..8_u32 {
            let (slot, kek) = (slot.clone(), kek.clone());
            scope.spawn(move || {
                let (send, receive) = channel();
                for number in 0..500_u32 {
                    let send = send.clone();
                    let text = format!("{caller}/{number}");
                    slot.encrypt(kek.encrypt_job(text.as_bytes()), move |outcome| {
                        send.send((text, outcome.unwrap())).unwrap();
                    })
                    .unwrap();
                }
                drop(send);
                let mut answers = 0;
                for (text, ciphertext) in receive {
                    assert_eq!(kek.decrypt(&slot, &ciphertext).unwrap(), text.as_bytes());
                    answers += 1;
                }
                assert_eq!(answers, 500);
            });
        }
        // Control operations meanwhile must not disturb them.
        for _ in 0..5 {
            kek.test(&slot).unwrap();
            let other = Kek::generate(&slot, kek.transport, 2);
            other.import(&slot).unwrap();
            slot.load_kek(other.uid, KekUse::DecryptOnly).unwrap();
            slot.destroy_kek(other.uid).unwrap();
        }
    });
    assert_eq!(slot.state(), SlotState::Ready);
    assert_eq!(slot.queue_depth(), 0);
}
