//! Keys as a cluster would make and keep them, and blocking calls of the data path.

use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use hsm_core::envelope::{Binding, Header, Purpose};
use hsm_core::names::{KeyUid, TransportId};
use hsm_core::secrets::Plaintext;
use hsm_core::{DecryptJob, EncryptJob, GenerateKek, HsmError, ImportKek, KekUse, OpError, Slot};

pub(crate) const CONTEXT: &str = "exchange-key";
const PATIENCE: Duration = Duration::from_secs(60);

/// A key version as it stands in the replicated state (unsealed).
#[derive(Clone)]
pub(crate) struct Kek {
    pub(crate) uid: KeyUid,
    pub(crate) version: u32,
    pub(crate) transport: TransportId,
    pub(crate) wrapped: Vec<u8>,
    pub(crate) check_record: Vec<u8>,
}

impl Kek {
    /// Generates it under a transport key that is there.
    pub(crate) fn generate(slot: &Slot, transport: TransportId, version: u32) -> Self {
        let uid = KeyUid::random().unwrap();
        let made = slot
            .generate_kek(&GenerateKek {
                key_uid: uid,
                version,
                context: CONTEXT.to_owned(),
                transport_id: transport,
            })
            .unwrap();
        Self {
            uid,
            version,
            transport,
            wrapped: made.wrapped.to_vec(),
            check_record: made.check_record,
        }
    }

    /// Makes a transport key and a key under it, imports and loads it.
    pub(crate) fn new(slot: &Slot) -> Self {
        let transport = TransportId::random().unwrap();
        slot.create_transport_key(transport).unwrap();
        let kek = Self::generate(slot, transport, 1);
        kek.import(slot).unwrap();
        slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
        kek
    }

    pub(crate) fn label(&self) -> String {
        format!("kek-{CONTEXT}-v{}", self.version)
    }

    pub(crate) fn import(&self, slot: &Slot) -> Result<(), HsmError> {
        self.import_as(slot, false)
    }

    /// In place of whatever has its id.
    pub(crate) fn replace(&self, slot: &Slot) -> Result<(), HsmError> {
        self.import_as(slot, true)
    }

    fn import_as(&self, slot: &Slot, replace: bool) -> Result<(), HsmError> {
        slot.import_kek(&ImportKek {
            key_uid: self.uid,
            version: self.version,
            context: CONTEXT.to_owned(),
            label: self.label(),
            transport_id: self.transport,
            wrapped: self.wrapped.clone().into(),
            check_record: self.check_record.clone(),
            replace,
        })
    }

    pub(crate) fn test(&self, slot: &Slot) -> Result<(), HsmError> {
        slot.known_answer_test(self.uid, self.version, CONTEXT, &self.check_record)
    }

    /// Keeps it for the next phase.
    pub(crate) fn save(&self, path: &Path) {
        let lines = [
            self.uid.to_string(),
            self.version.to_string(),
            self.transport.to_string(),
            hex::encode(&self.wrapped),
            hex::encode(&self.check_record),
        ];
        fs::write(path, lines.join("\n")).unwrap();
    }

    pub(crate) fn saved(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        Self {
            uid: lines[0].parse().unwrap(),
            version: lines[1].parse().unwrap(),
            transport: lines[2].parse().unwrap(),
            wrapped: hex::decode(lines[3]).unwrap(),
            check_record: hex::decode(lines[4]).unwrap(),
        }
    }

    pub(crate) fn encrypt_job(&self, plaintext: &[u8]) -> EncryptJob {
        EncryptJob {
            purpose: Purpose::Data,
            key_uid: self.uid,
            version: self.version,
            context: CONTEXT.into(),
            binding: Binding::Private,
            binding_value: "trading-1".into(),
            aad: b"order 17".to_vec(),
            plaintext: Plaintext::new(plaintext.to_vec()),
        }
    }

    pub(crate) fn encrypt(&self, slot: &Slot, plaintext: &[u8]) -> Result<Vec<u8>, OpError> {
        let (send, receive) = channel();
        slot.encrypt(self.encrypt_job(plaintext), move |outcome| {
            send.send(outcome).unwrap()
        })?;
        receive.recv_timeout(PATIENCE).expect("an answer")
    }

    pub(crate) fn decrypt(&self, slot: &Slot, ciphertext: &[u8]) -> Result<Vec<u8>, OpError> {
        decrypt(slot, ciphertext, CONTEXT, "trading-1", b"order 17")
    }
}

/// Opens an envelope. One whose header is none gives `AuthenticationFailed`, as a node would say.
pub(crate) fn decrypt(
    slot: &Slot,
    ciphertext: &[u8],
    context: &str,
    principal: &str,
    aad: &[u8],
) -> Result<Vec<u8>, OpError> {
    let Some((header, _)) = Header::parse(ciphertext) else {
        return Err(OpError::AuthenticationFailed);
    };
    let (send, receive) = channel();
    let job = DecryptJob {
        header,
        ciphertext: ciphertext.to_vec(),
        context: context.into(),
        binding_value: principal.into(),
        aad: aad.to_vec(),
    };
    slot.decrypt_v2(job, move |outcome| {
        send.send(outcome.map(|plaintext| plaintext.as_slice().to_vec()))
            .unwrap();
    })?;
    receive.recv_timeout(PATIENCE).expect("an answer")
}
