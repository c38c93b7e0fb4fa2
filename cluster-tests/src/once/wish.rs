//! What the clients ask for, and which answers are right.

use anyhow::{Context, Result, bail, ensure};
use hsm_api::data::{
    DataKeyRequest, DataKeyResponse, DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse,
    RewrapRequest,
};
use hsm_api::{Base64, paths};
use serde_json::Value;

const CONTEXT: &str = "exchange-key";

/// What a client has a ciphertext of.
pub(super) struct Sealed {
    plaintext: Vec<u8>,
    ciphertext: Base64,
    is_key: bool,
    /// It was brought under the active key version once.
    pub(super) is_rewrapped: bool,
}

/// One request, or one item of a batch.
pub(super) enum Wish {
    Encrypt(Vec<u8>),
    DataKey,
    Rewrap(Sealed),
    Decrypt(Sealed),
}

impl Wish {
    pub(super) fn path(&self) -> &'static str {
        match self {
            Self::Encrypt(_) => paths::ENCRYPT,
            Self::DataKey => paths::DATAKEY,
            Self::Rewrap(_) => paths::REWRAP,
            Self::Decrypt(_) => paths::DECRYPT,
        }
    }

    pub(super) fn body(&self) -> Result<Value> {
        let body = match self {
            Self::Encrypt(plaintext) => {
                serde_json::to_value(EncryptRequest::new(CONTEXT, plaintext.as_slice()))
            }
            Self::DataKey => serde_json::to_value(DataKeyRequest::new(CONTEXT)),
            Self::Rewrap(sealed) => {
                serde_json::to_value(RewrapRequest::new(CONTEXT, sealed.ciphertext.clone()))
            }
            Self::Decrypt(sealed) => {
                let request = DecryptRequest::new(CONTEXT, sealed.ciphertext.clone());
                serde_json::to_value(match sealed.is_key {
                    true => request.as_data_key(),
                    false => request,
                })
            }
        };
        Ok(body?)
    }

    /// What the client has now, if this is the right answer.
    pub(super) fn granted(self, answer: Value) -> Result<Option<Sealed>> {
        Ok(match self {
            Self::Encrypt(plaintext) => {
                let answer: EncryptResponse = serde_json::from_value(answer)?;
                Some(Sealed {
                    plaintext,
                    ciphertext: answer.ciphertext,
                    is_key: false,
                    is_rewrapped: false,
                })
            }
            Self::DataKey => {
                let answer: DataKeyResponse = serde_json::from_value(answer)?;
                let key = answer.plaintext.context("an answer without the data key")?;
                Some(Sealed {
                    plaintext: key.as_slice().to_vec(),
                    ciphertext: answer.ciphertext,
                    is_key: true,
                    is_rewrapped: false,
                })
            }
            Self::Rewrap(sealed) => {
                let answer: EncryptResponse = serde_json::from_value(answer)?;
                Some(Sealed {
                    ciphertext: answer.ciphertext,
                    is_rewrapped: true,
                    ..sealed
                })
            }
            Self::Decrypt(sealed) => {
                let answer: DecryptResponse = serde_json::from_value(answer)?;
                ensure!(
                    answer.plaintext.as_slice() == sealed.plaintext,
                    "{:?} was decrypted to something else",
                    String::from_utf8_lossy(sealed.plaintext.get(..80).unwrap_or(&sealed.plaintext))
                );
                None
            }
        })
    }
}

/// The JSON of an answer, if it has status 200.
pub(super) fn right(status: Option<u16>, body: &[u8]) -> Result<Value> {
    ensure!(
        status == Some(200),
        "{status:?} {:?}",
        String::from_utf8_lossy(body)
    );
    Ok(serde_json::from_slice(body)?)
}

/// The items of a batch, each of which has to have status 200.
pub(super) fn items(mut answer: Value) -> Result<Vec<Value>> {
    let Some(Value::Array(items)) = answer.get_mut("batch").map(Value::take) else {
        bail!("no batch: {answer}");
    };
    for item in &items {
        ensure!(item["status"] == 200, "of a batch: {item}");
    }
    Ok(items)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_of_another_status_is_not_right() {
        assert_eq!(right(Some(200), br#"{"a": 1}"#).unwrap(), json!({"a": 1}));
        for (status, body) in [
            (Some(503), r#"{"code": "overloaded"}"#),
            (None, "{}"),
            (Some(200), "{"),
        ] {
            assert!(right(status, body.as_bytes()).is_err(), "{status:?} {body}");
        }
        let said = right(Some(503), br#"{"code": "overloaded"}"#).unwrap_err();
        assert!(said.to_string().contains("overloaded"), "{said}");
    }

    #[test]
    fn a_batch_is_right_if_each_of_its_items_is() {
        let good = json!({"status": 200, "plaintext": "YQ=="});
        let bad = json!({"status": 503, "code": "key_version_not_ready"});
        let both = items(json!({"batch": [good, good]})).unwrap();
        assert_eq!(both.len(), 2);
        let said = items(json!({"batch": [good, bad]})).unwrap_err();
        assert!(said.to_string().contains("key_version_not_ready"), "{said}");
        assert!(items(json!({"status": 200})).is_err());
    }

    #[test]
    fn what_is_decrypted_to_something_else_is_not_right() {
        let sealed = || {
            let answer = json!({"ciphertext": "YQ==", "key_id": "k", "key_version": 1});
            let sealed = Wish::Encrypt(b"text".to_vec()).granted(answer).unwrap();
            Wish::Decrypt(sealed.unwrap())
        };
        assert!(
            sealed()
                .granted(json!({"plaintext": "dGV4dA=="}))
                .unwrap()
                .is_none()
        );
        for wrong in ["dGV4dQ==", ""] {
            let said = sealed().granted(json!({"plaintext": wrong})).err();
            assert!(said.unwrap().to_string().contains("something else"));
        }
        assert!(sealed().granted(json!({})).is_err());
    }

    #[test]
    fn a_data_key_is_asked_for_as_one() {
        let answer = json!({"ciphertext": "YQ==", "key_id": "k", "key_version": 1, "plaintext": "a2V5"});
        let key = Wish::DataKey.granted(answer).unwrap().unwrap();
        let body = Wish::Decrypt(key).body().unwrap();
        assert_eq!(body["purpose"], "datakey");
        let without = json!({"ciphertext": "YQ==", "key_id": "k", "key_version": 1});
        assert!(Wish::DataKey.granted(without).is_err());
    }
}
