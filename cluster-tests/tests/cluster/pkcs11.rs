//! Tokens past their node: opened by PKCS#11 alone, as whoever has a token's folder and its PIN can. SoftHSM
//! reads its configuration from the environment, once per process, so each visit is a process of its own: this
//! binary again.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::Error as CryptokiError;
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeInfo, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::{AuthPin, Ulong};
use serde_json::{Value, json};

use crate::common::softhsm_conf;

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// Names the folder through which a visit and its test speak.
const FOLDER: &str = "CLUSTER_TEST_VISIT";
const TAG_BITS: u64 = 128;

/// What a visit does, with what, and what it brings back.
type Task = fn(&Session, &Value) -> Result<Value>;

static TASKS: [(&str, Task); 6] = [
    ("labels", labels),
    ("seal", seal),
    ("rob", rob),
    ("unwrap", unwrap),
    ("forget_keys", forget_keys),
    ("make_v1", make_v1),
];

/// Where a token is, and where its PIN stands.
pub(crate) struct Token {
    conf: PathBuf,
    label: String,
    pin: PathBuf,
}

/// One AES-GCM encryption, complete.
pub(crate) struct Vector {
    pub(crate) nonce: [u8; 12],
    /// In hex.
    pub(crate) aad: String,
    pub(crate) plaintext: Vec<u8>,
}

impl Token {
    /// A node's token. A token has one owner: the node must not run.
    pub(crate) fn of(cluster: &Playground, node: &Node, slot: &str) -> Self {
        Self {
            conf: node.dir.join("softhsm2.conf"),
            label: format!("slot-{slot}"),
            pin: cluster.dir().join(format!("secrets/{slot}.pin")),
        }
    }

    /// A token anywhere, with its PIN in this file.
    pub(crate) fn at(conf: PathBuf, label: &str, pin: PathBuf) -> Self {
        Self {
            conf,
            label: label.to_owned(),
            pin,
        }
    }

    /// Makes a key as version 1 did, of bytes that are known.
    pub(crate) fn make_v1(&self, label: &str, value: &[u8; 32]) -> Result<()> {
        let order = json!({ "key": label, "value": hex::encode(value) });
        self.visit("make_v1", &order).map(|_| ())
    }

    /// The labels of its secret keys, in order.
    pub(crate) fn labels(&self) -> Result<Vec<String>> {
        let mut labels: Vec<String> = serde_json::from_value(self.visit("labels", &Value::Null)?)?;
        labels.sort_unstable();
        Ok(labels)
    }

    /// The same token in a copy of the folder that it lies in.
    pub(crate) fn copied_to(mut self, tokens: &Path) -> Result<Self> {
        self.conf = tokens.with_extension("conf");
        softhsm_conf(&self.conf, tokens)?;
        Ok(self)
    }

    /// The labels of its KEKs, in order.
    pub(crate) fn keks(&self) -> Result<Vec<String>> {
        let mut keks = self.labels()?;
        keks.retain(|label| label.starts_with("kek-"));
        Ok(keks)
    }

    /// `nonce ‖ ciphertext ‖ tag` of each vector under the key with this label.
    pub(crate) fn seal(&self, key: &str, vectors: &[Vector]) -> Result<Vec<Vec<u8>>> {
        let vectors: Vec<Value> = vectors
            .iter()
            .map(|vector| {
                json!({
                    "nonce": hex::encode(vector.nonce),
                    "aad": vector.aad,
                    "plaintext": hex::encode(&vector.plaintext),
                })
            })
            .collect();
        let sealed = self.visit("seal", &json!({ "key": key, "vectors": vectors }))?;
        let sealed = sealed.as_array().context("no ciphertexts")?;
        sealed
            .iter()
            .map(|one| Ok(hex::decode(one.as_str().context("no text")?)?))
            .collect()
    }

    /// Tries to get every key out; says for each way what the token answered.
    pub(crate) fn rob(&self) -> Result<Value> {
        self.visit("rob", &Value::Null)
    }

    /// What each transport key of the token makes of a wrapped key.
    pub(crate) fn unwrap(&self, wrapped: &[u8]) -> Result<Value> {
        self.visit("unwrap", &json!({ "wrapped": hex::encode(wrapped) }))
    }

    /// Destroys the KEKs and the transport keys; the node's own key stays. Returns how many there were.
    pub(crate) fn forget_keys(&self) -> Result<u64> {
        let forgotten = self.visit("forget_keys", &Value::Null)?;
        forgotten.as_u64().context("no number")
    }

    fn visit(&self, task: &str, input: &Value) -> Result<Value> {
        let folder = tempfile::Builder::new().prefix("hsm-visit-").tempdir()?;
        let order = json!({ "task": task, "label": self.label, "pin": self.pin, "input": input });
        std::fs::write(folder.path().join("order"), order.to_string())?;
        let output = Command::new(std::env::current_exe()?)
            .args(["--exact", "pkcs11::helper", "--nocapture"])
            .env("SOFTHSM2_CONF", &self.conf)
            .env(FOLDER, folder.path())
            .stdin(Stdio::null())
            .output()?;
        let answer = std::fs::read_to_string(folder.path().join("answer"));
        let answer = answer.with_context(|| format!("{task} in {}: no answer: {output:?}", self.label))?;
        let answer: Value = serde_json::from_str(&answer)?;
        match answer.get("found") {
            Some(found) => Ok(found.clone()),
            None => bail!("{task} in {}: {answer}", self.label),
        }
    }
}

/// Not a test: what a visit starts as a process of its own.
#[test]
fn helper() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let answer = match carry_out(&folder) {
        Ok(found) => json!({ "found": found }),
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    std::fs::write(folder.join("answer"), answer.to_string()).unwrap();
}

fn carry_out(folder: &Path) -> Result<Value> {
    let order: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("order"))?)?;
    let name = text(&order, "task")?;
    let (_, task) = TASKS
        .iter()
        .find(|(known, _)| *known == name)
        .context("no such task")?;
    let pin = std::fs::read_to_string(text(&order, "pin")?)?;
    task(&log_in(text(&order, "label")?, pin.trim())?, &order["input"])
}

fn log_in(label: &str, pin: &str) -> Result<Session> {
    let pkcs11 = Pkcs11::new(MODULE)?;
    pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    for slot in pkcs11.get_slots_with_initialized_token()? {
        if pkcs11.get_token_info(slot)?.label().trim_end() == label {
            let session = pkcs11.open_rw_session(slot)?;
            session.login(UserType::User, Some(&AuthPin::from(pin.to_owned())))?;
            return Ok(session);
        }
    }
    bail!("no token has the label {label:?}")
}

fn text<'v>(value: &'v Value, name: &str) -> Result<&'v str> {
    value[name].as_str().with_context(|| format!("no {name}"))
}

fn seal(session: &Session, input: &Value) -> Result<Value> {
    let label = text(input, "key")?;
    let template = [
        Attribute::Token(true),
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::Label(label.as_bytes().to_vec()),
    ];
    let found = session.find_objects(&template)?;
    ensure!(found.len() == 1, "{} keys have the label {label:?}", found.len());
    let mut sealed = Vec::new();
    for vector in input["vectors"].as_array().context("no vectors")? {
        let mut nonce = hex::decode(text(vector, "nonce")?)?;
        let aad = hex::decode(text(vector, "aad")?)?;
        let plaintext = hex::decode(text(vector, "plaintext")?)?;
        let body = {
            let params = GcmParams::new(&mut nonce, &aad, Ulong::from(TAG_BITS))?;
            session.encrypt(&Mechanism::AesGcm(params), found[0], &plaintext)?
        };
        nonce.extend_from_slice(&body);
        sealed.push(hex::encode(nonce));
    }
    Ok(json!(sealed))
}

/// It stated no more than this, and the token set every other usage.
fn make_v1(session: &Session, input: &Value) -> Result<Value> {
    session.create_object(&[
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Encrypt(true),
        Attribute::Decrypt(true),
        Attribute::Label(text(input, "key")?.as_bytes().to_vec()),
        Attribute::Value(hex::decode(text(input, "value")?)?),
    ])?;
    Ok(json!("made"))
}

fn secret_keys(session: &Session) -> Result<Vec<ObjectHandle>> {
    let template = [Attribute::Token(true), Attribute::Class(ObjectClass::SECRET_KEY)];
    Ok(session.find_objects(&template)?)
}

fn labels(session: &Session, _: &Value) -> Result<Value> {
    let labels: Result<Vec<String>> = secret_keys(session)?
        .into_iter()
        .map(|key| label_of(session, key))
        .collect();
    Ok(json!(labels?))
}

fn forget_keys(session: &Session, _: &Value) -> Result<Value> {
    let keys = secret_keys(session)?;
    for key in &keys {
        session.destroy_object(*key)?;
    }
    Ok(json!(keys.len()))
}

/// KEKs under every key that can wrap, a key of the robber's own among them; and the transport key put to use.
fn rob(session: &Session, _: &Value) -> Result<Value> {
    let own = session.create_object(&[
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(false),
        Attribute::Value(vec![7; 32]),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
        Attribute::Wrap(true),
    ])?;
    let (mut keks, mut transport_keys) = (Vec::new(), Vec::new());
    for key in secret_keys(session)? {
        let label = label_of(session, key)?;
        if label.starts_with("kek-") {
            keks.push((label, key));
        } else {
            transport_keys.push((label, key));
        }
    }
    keks.sort_by(|one, other| one.0.cmp(&other.0));
    let mut robbed = Vec::new();
    for (label, kek) in &keks {
        let wrapping = transport_keys.iter().map(|(_, key)| *key).chain([own]);
        let wrapped: Vec<String> = wrapping
            .map(|key| answer(session.wrap_key(&Mechanism::AesKeyWrap, key, *kek)))
            .collect();
        robbed.push(json!({
            "label": label,
            "sensitive": flag(session, *kek, AttributeType::Sensitive)?,
            "extractable": flag(session, *kek, AttributeType::Extractable)?,
            "value": read_secret(session, *kek, AttributeType::Value)?,
            "wrapped": wrapped,
        }));
    }
    let mut used = Vec::new();
    for (label, key) in &transport_keys {
        ensure!(label.starts_with("transport-"), "a key called {label:?}");
        used.push(use_transport(session, *key, own)?);
    }
    let mut private = Vec::new();
    let template = [Attribute::Token(true), Attribute::Class(ObjectClass::PRIVATE_KEY)];
    for key in session.find_objects(&template)? {
        private.push(read_secret(session, key, AttributeType::PrivateExponent)?);
    }
    Ok(json!({ "keks": robbed, "transport_keys": used, "private_keys": private }))
}

fn use_transport(session: &Session, transport: ObjectHandle, own: ObjectHandle) -> Result<Value> {
    let wrapped = session.wrap_key(&Mechanism::AesKeyWrap, transport, own)?;
    let mut used = unwrap_with(session, transport, &wrapped)?;
    used["value"] = json!(read_secret(session, transport, AttributeType::Value)?);
    Ok(used)
}

fn unwrap(session: &Session, input: &Value) -> Result<Value> {
    let wrapped = hex::decode(text(input, "wrapped")?)?;
    let mut used = Vec::new();
    for key in secret_keys(session)? {
        if label_of(session, key)?.starts_with("transport-") {
            used.push(unwrap_with(session, key, &wrapped)?);
        }
    }
    Ok(json!(used))
}

/// What comes out of a wrapped key: with templates that would make it readable, and with the one that it takes.
fn unwrap_with(session: &Session, transport: ObjectHandle, wrapped: &[u8]) -> Result<Value> {
    let open = |[sensitive, extractable, wrap, unwrap]: [bool; 4]| {
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(false),
            Attribute::Sensitive(sensitive),
            Attribute::Extractable(extractable),
            Attribute::Wrap(wrap),
            Attribute::Unwrap(unwrap),
        ];
        session.unwrap_key(&Mechanism::AesKeyWrap, transport, wrapped, &template)
    };
    let readable: Vec<String> = [
        [false, true, false, false],
        [true, true, false, false],
        [false, false, false, false],
        [true, false, true, true],
    ]
    .into_iter()
    .map(|flags| answer(open(flags)))
    .collect();
    let closed = match open([true, false, false, false]) {
        Ok(key) => json!({
            "value": read_secret(session, key, AttributeType::Value)?,
            "wrapped": answer(session.wrap_key(&Mechanism::AesKeyWrap, transport, key)),
        }),
        refused => json!(answer(refused)),
    };
    Ok(json!({ "readable": readable, "closed": closed }))
}

/// The token's return code, or that it did what it was asked for.
fn answer<T>(result: Result<T, CryptokiError>) -> String {
    match result {
        Ok(_) => "done".to_owned(),
        Err(CryptokiError::Pkcs11(code, _)) => format!("{code:?}"),
        Err(error) => error.to_string(),
    }
}

fn label_of(session: &Session, key: ObjectHandle) -> Result<String> {
    match session.get_attributes(key, &[AttributeType::Label])?.as_slice() {
        [Attribute::Label(label)] => Ok(String::from_utf8_lossy(label).into_owned()),
        other => bail!("label: {other:?}"),
    }
}

fn flag(session: &Session, key: ObjectHandle, kind: AttributeType) -> Result<bool> {
    match session.get_attributes(key, &[kind])?.as_slice() {
        [Attribute::Sensitive(value) | Attribute::Extractable(value)] => Ok(*value),
        other => bail!("{kind}: {other:?}"),
    }
}

/// Whether the token gives a secret attribute away.
fn read_secret(session: &Session, key: ObjectHandle, kind: AttributeType) -> Result<&'static str> {
    let info = session.get_attribute_info(key, &[kind])?;
    let read = session.get_attributes(key, &[kind])?;
    let refused = matches!(info.as_slice(), [AttributeInfo::Sensitive]) && read.is_empty();
    Ok(if refused { "refused" } else { "given" })
}

/// A copy of a folder with all that is in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir(to).with_context(|| to.display().to_string())?;
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (old, new) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_folder(&old, &new)?;
        } else {
            std::fs::copy(&old, &new).with_context(|| old.display().to_string())?;
        }
    }
    Ok(())
}

/// The folder of the token with this label, in a node's folder of tokens.
pub(crate) fn token_folder(tokens: &Path, label: &str) -> Result<PathBuf> {
    let padded = padded(label);
    for entry in std::fs::read_dir(tokens)? {
        let folder = entry?.path();
        let contents = std::fs::read(folder.join("token.object")).unwrap_or_default();
        if find(&contents, padded.as_bytes()).is_some() {
            return Ok(folder);
        }
    }
    bail!("{}: no token has the label {label:?}", tokens.display())
}

/// Gives a token another label, in its file.
pub(crate) fn relabel(folder: &Path, from: &str, to: &str) -> Result<()> {
    let path = folder.join("token.object");
    let mut contents = std::fs::read(&path)?;
    let (from, to) = (padded(from), padded(to));
    let at = find(&contents, from.as_bytes()).context("the token has another label")?;
    contents[at..at + to.len()].copy_from_slice(to.as_bytes());
    Ok(std::fs::write(&path, contents)?)
}

/// PKCS#11 2.40, `CK_TOKEN_INFO`: 32 bytes, padded with blanks.
fn padded(label: &str) -> String {
    format!("{label:<32}")
}

fn find(contents: &[u8], part: &[u8]) -> Option<usize> {
    contents.windows(part.len()).position(|window| window == part)
}
