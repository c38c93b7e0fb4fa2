//! What version 1 leaves to whoever comes after it: a token with its keys, its list of them, ciphertexts, and clients that
//! ask as they always have. Made without it.

use std::fs;
use std::path::Path;
use std::process::Command;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hsm_api::client::{Method, RawResponse};
use hsm_api::{Client, paths};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::CONTEXT;
use crate::pkcs11::{Token, Vector};
use crate::site::Site;

/// The label and the PIN of its token.
pub(crate) const LABEL: &str = "hsm-token";
pub(crate) const PIN: &str = "1234";

pub(crate) const FIRST: [u8; 32] = [0x11; 32];
pub(crate) const SECOND: [u8; 32] = [0x22; 32];
pub(crate) const TWO_FACTOR: [u8; 32] = [0x33; 32];
/// Its keys, under the labels that it gave.
pub(crate) static KEYS: [(&str, [u8; 32]); 3] = [
    ("kek-exchange-key-v1", FIRST),
    ("kek-exchange-key-v2", SECOND),
    ("kek-2fa-v1", TWO_FACTOR),
];

pub(crate) const JSON: (&str, &str) = ("content-type", "application/json");

/// An empty token of its, with a PIN that anybody can guess.
pub(crate) fn make_token(softhsm2_conf: &Path) -> Result<()> {
    let made = Command::new("softhsm2-util")
        .args(["--init-token", "--free", "--label", LABEL])
        .args(["--so-pin", "12345678", "--pin", PIN])
        .env("SOFTHSM2_CONF", softhsm2_conf)
        .output()
        .context("softhsm2-util: install softhsm2")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// Puts its keys into the token of its site.
pub(crate) fn make_keys(site: &Site) -> Result<Token> {
    site.keep("secrets/v1.pin", PIN)?;
    let token = token(site);
    for (label, key) in KEYS {
        token.make_v1(label, &key)?;
    }
    Ok(token)
}

/// Puts its list of keys in the place where its configuration has it; the versions of `exchange-key` are these. Returns
/// what is in it.
pub(crate) fn write_list(site: &Site, exchange: &[u32]) -> Result<String> {
    let list = metadata(exchange);
    fs::write(site.folder.join("metadata.yaml"), &list)?;
    Ok(list)
}

/// As version 1 wrote it, with checksums that prove nothing.
fn metadata(exchange: &[u32]) -> String {
    let version = |number: &u32| {
        format!(
            "      - label: kek-exchange-key-v{number}\n        version: {number}\n        created_at: \
             2024-0{number}-01T00:00:00Z\n        checksum: 00ff\n"
        )
    };
    let versions: String = exchange.iter().map(version).collect();
    let current = exchange.iter().max().unwrap();
    format!(
        "rotation:\n  exchange-key:\n    current: kek-exchange-key-v{current}\n    rotation_interval_days: 45\n    \
         versions:\n{versions}  2fa:\n    current: kek-2fa-v1\n    versions:\n      - label: kek-2fa-v1\n        \
         version: 1\n"
    )
}

/// The nonce of all that it has encrypted here; of its own it made one each time.
const NONCE: [u8; 12] = *b"v1 nonce 012";

/// To whom it bound a ciphertext: the first OU or the CN.
fn aad(context: &str, bound_to: &str) -> Vec<u8> {
    Sha256::digest([context.as_bytes(), b"\0", bound_to.as_bytes()].concat()).to_vec()
}

/// As it encrypted: `nonce ‖ ciphertext ‖ tag`.
pub(crate) fn sealed(key: &[u8; 32], context: &str, bound_to: &str, plaintext: &[u8]) -> Vec<u8> {
    let sealed = Aes256Gcm::new_from_slice(key).unwrap().encrypt(
        (&NONCE).into(),
        Payload {
            msg: plaintext,
            aad: &aad(context, bound_to),
        },
    );
    [NONCE.to_vec(), sealed.unwrap()].concat()
}

/// The same, to be done in a token.
pub(crate) fn to_seal(context: &str, bound_to: &str, plaintext: &[u8]) -> Vector {
    Vector {
        nonce: NONCE,
        aad: hex::encode(aad(context, bound_to)),
        plaintext: plaintext.to_vec(),
    }
}

/// Its token in its site, for whoever opens it by PKCS#11 alone. The node must not run.
pub(crate) fn token(site: &Site) -> Token {
    Token::at(
        site.folder.join("softhsm2.conf"),
        LABEL,
        site.folder.join("secrets/v1.pin"),
    )
}

/// Its client's request, and what that client reads of the answer.
pub(crate) async fn post(client: &Client, path: &str, body: &Value) -> Result<(u16, Value)> {
    let text = body.to_string().into_bytes();
    let answer: RawResponse = client.request(Method::POST, path, &[JSON], text).await?;
    Ok((answer.status, serde_json::from_str(&answer.text())?))
}

async fn opens(client: &Client, context: &str, key_id: &str, ciphertext: &[u8], text: &[u8]) -> Result<()> {
    let body = json!({ "context": context, "ciphertext": STANDARD.encode(ciphertext), "key_id": key_id });
    let answer = post(client, paths::DECRYPT, &body).await?;
    ensure!(
        answer == (200, json!({ "plaintext": STANDARD.encode(text) })),
        "{key_id}: {answer:?}"
    );
    Ok(())
}

/// What was encrypted under each of its keys is opened for whom it was encrypted, and answered in its form.
pub(crate) async fn ciphertexts_open(site: &Site) -> Result<()> {
    let trading = site.client("trading-1")?;
    for (key_id, key) in &KEYS[..2] {
        let ciphertext = sealed(key, CONTEXT, "Trading", key_id.as_bytes());
        opens(&trading, CONTEXT, key_id, &ciphertext, key_id.as_bytes()).await?;
    }
    let own = sealed(&TWO_FACTOR, "2fa", "2fa-1", b"123456");
    opens(&site.client("2fa-1")?, "2fa", "kek-2fa-v1", &own, b"123456").await
}
