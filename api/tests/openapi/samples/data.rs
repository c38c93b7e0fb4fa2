//! What is sent on the data plane.

use std::collections::BTreeMap;

use hsm_api::data::*;
use hsm_api::{Base64, ErrorCode, Problem};

use super::{Sample, answer, request, text};

pub(super) fn samples() -> Vec<Sample> {
    let sealed = EncryptResponse {
        ciphertext: Base64::from(b"abc"),
        key_id: text("kek-exchange-key-v3"),
        key_version: 3,
    };
    let encrypt = EncryptRequest::new("exchange-key", b"abc").with_aad(b"x");
    let decrypt = DecryptRequest::new("exchange-key", b"abc")
        .with_key_id("kek-exchange-key-v3")
        .with_aad(b"x")
        .as_data_key();
    let rewrap = RewrapRequest::new("2fa", b"abc")
        .with_key_id("kek-2fa-v1")
        .with_aad(b"x")
        .of("2FA", "2fa-1")
        .rebound_to("2FA", "2fa-2");
    let datakey = DataKeyRequest::new("exchange-key")
        .with_aad(b"x")
        .with_bits(DataKeyBits::Bits128)
        .sealed_only();
    let principal = PrincipalName {
        ou: Some(text("2FA")),
        cn: Some(text("2fa-1")),
    };
    let opened = DecryptResponse {
        plaintext: b"abc".into(),
    };
    let key = |plaintext: Option<&[u8; 3]>| DataKeyResponse {
        ciphertext: Base64::from(b"abc"),
        key_id: text("kek-exchange-key-v3"),
        key_version: 3,
        plaintext: plaintext.map(Into::into),
    };
    let refused = ItemError {
        status: 503,
        code: text(ErrorCode::KeyVersionNotReady.as_str()),
        error: text("key version not ready"),
        detail: text("version 7 is being imported on this node"),
        retryable: true,
    };
    let health = HealthResponse {
        status: HealthStatus::Degraded,
        hsm_available: true,
        kek_status: BTreeMap::from([(text("kek-2fa-v1"), KekStatus::Unavailable)]),
    };
    let problem = Problem::new(
        ErrorCode::KeyVersionNotReady,
        "version 7 is being imported",
        "01J",
    );
    let encrypt_batch = EncryptBatch::new([encrypt.clone()]).with_context("2fa");
    let decrypt_batch = DecryptBatch::new([decrypt.clone()]).with_context("2fa");
    let rewrap_batch = RewrapBatch::new([rewrap.clone()]).with_context("2fa");
    let datakey_batch = DataKeyBatch::new([datakey.clone()]).with_context("2fa");
    vec![
        request("EncryptRequest", &encrypt, &[]),
        request("EncryptBatch", &encrypt_batch, &[]),
        answer("EncryptResponse", &sealed, &sealed),
        request("DecryptRequest", &decrypt, &[]),
        request("DecryptBatch", &decrypt_batch, &[]),
        answer("DecryptResponse", &opened, &opened),
        request("RewrapRequest", &rewrap, &[]),
        request("RewrapBatch", &rewrap_batch, &[]),
        answer::<RewrapResponse>("RewrapResponse", &sealed, &sealed),
        request("DataKeyRequest", &datakey, &[]),
        request("DataKeyBatch", &datakey_batch, &[]),
        answer("DataKeyResponse", &key(Some(b"abc")), &key(None)),
        request("PrincipalName", &principal, &[]),
        answer("ItemError", &refused, &refused),
        answer("HealthResponse", &health, &health),
        answer("Problem", &problem, &problem),
    ]
}
