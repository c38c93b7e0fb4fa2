//! Requests and answers of the data plane. Reading v1's looser JSON (key case, unknown members,
//! line ends in base64) is the server's work; these types are what a correct client sends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wire::{Base64, SecretBase64, words};

mod batch;

pub use batch::{
    BATCH_MAX_BYTES, BATCH_MAX_ITEMS, Batch, BatchResponse, DataKeyBatch, DecryptBatch, EncryptBatch,
    ItemError, ItemResult, RewrapBatch,
};

/// `POST /encrypt`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EncryptRequest {
    /// Whose active key encrypts.
    pub context: String,
    /// What is encrypted; may be empty.
    pub plaintext: SecretBase64,
    /// Authenticated with it and needed again to decrypt; not stored in the ciphertext.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Base64>,
}

impl EncryptRequest {
    /// Without associated data.
    pub fn new(context: impl Into<String>, plaintext: impl Into<SecretBase64>) -> Self {
        Self {
            context: context.into(),
            plaintext: plaintext.into(),
            aad: None,
        }
    }

    /// With associated data.
    #[must_use]
    pub fn with_aad(mut self, aad: impl Into<Base64>) -> Self {
        self.aad = Some(aad.into());
        self
    }
}

/// Answer of `POST /encrypt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptResponse {
    /// The envelope: it names its own key version.
    pub ciphertext: Base64,
    /// Label of the key version, for v1's clients, who send it back to decrypt.
    pub key_id: String,
    /// Number of the key version.
    pub key_version: u32,
}

/// `POST /decrypt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecryptRequest {
    /// The context it was encrypted in.
    pub context: String,
    /// An envelope, or a v1 ciphertext.
    pub ciphertext: Base64,
    /// Needed for v1 ciphertexts only; for an envelope it must not contradict it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// The associated data it was encrypted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Base64>,
    /// What it is asked for as; data unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<Purpose>,
}

impl DecryptRequest {
    /// For an envelope without associated data.
    pub fn new(context: impl Into<String>, ciphertext: impl Into<Base64>) -> Self {
        Self {
            context: context.into(),
            ciphertext: ciphertext.into(),
            key_id: None,
            aad: None,
            purpose: None,
        }
    }

    /// As a data key: it does not come out otherwise.
    #[must_use]
    pub fn as_data_key(mut self) -> Self {
        self.purpose = Some(Purpose::DataKey);
        self
    }

    /// With the label of the key version, as v1's ciphertexts need.
    #[must_use]
    pub fn with_key_id(mut self, key_id: impl Into<String>) -> Self {
        self.key_id = Some(key_id.into());
        self
    }

    /// With associated data.
    #[must_use]
    pub fn with_aad(mut self, aad: impl Into<Base64>) -> Self {
        self.aad = Some(aad.into());
        self
    }
}

/// Answer of `POST /decrypt`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecryptResponse {
    /// What was encrypted.
    pub plaintext: SecretBase64,
}

words! {
    /// What a ciphertext is asked for as.
    pub enum Purpose {
        /// A plaintext that somebody encrypted.
        Data = "data",
        /// A data key of `/datakey`.
        DataKey = "datakey",
    }
}

/// Whom a ciphertext is bound to, by the names in a certificate. Which of them counts is the context's mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrincipalName {
    /// First organizational unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ou: Option<String>,
    /// Common name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cn: Option<String>,
}

/// `POST /rewrap`: the ciphertext under the context's active key version. The plaintext stays in the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewrapRequest {
    /// The context it was encrypted in, and stays in.
    pub context: String,
    /// An envelope, or a v1 ciphertext.
    pub ciphertext: Base64,
    /// As in [`DecryptRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// The associated data it was encrypted with, and keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Base64>,
    /// Whom it was encrypted for, if not for the caller. For administrators and operators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<PrincipalName>,
    /// Whom it is for from now on, if not for the same. For administrators and operators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebind: Option<PrincipalName>,
}

impl RewrapRequest {
    /// For an envelope without associated data, of the caller's own.
    pub fn new(context: impl Into<String>, ciphertext: impl Into<Base64>) -> Self {
        Self {
            context: context.into(),
            ciphertext: ciphertext.into(),
            key_id: None,
            aad: None,
            principal: None,
            rebind: None,
        }
    }

    /// With the label of the key version, as v1's ciphertexts need.
    #[must_use]
    pub fn with_key_id(mut self, key_id: impl Into<String>) -> Self {
        self.key_id = Some(key_id.into());
        self
    }

    /// With associated data.
    #[must_use]
    pub fn with_aad(mut self, aad: impl Into<Base64>) -> Self {
        self.aad = Some(aad.into());
        self
    }

    /// Of somebody else's.
    #[must_use]
    pub fn of(mut self, ou: impl Into<String>, cn: impl Into<String>) -> Self {
        self.principal = Some(PrincipalName {
            ou: Some(ou.into()),
            cn: Some(cn.into()),
        });
        self
    }

    /// For somebody else from now on.
    #[must_use]
    pub fn rebound_to(mut self, ou: impl Into<String>, cn: impl Into<String>) -> Self {
        self.rebind = Some(PrincipalName {
            ou: Some(ou.into()),
            cn: Some(cn.into()),
        });
        self
    }
}

/// Answer of `POST /rewrap`: the same members as that of `/encrypt`.
pub type RewrapResponse = EncryptResponse;

words! {
    /// Length of a data key.
    pub enum DataKeyBits {
        /// AES-128.
        Bits128 = "128",
        /// AES-256.
        Bits256 = "256",
    }
}

/// `POST /datakey`: a fresh key for the caller's own use, with its envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataKeyRequest {
    /// Whose active key version encrypts it.
    pub context: String,
    /// Authenticated with it and needed again to decrypt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aad: Option<Base64>,
    /// How long it is; 256 bits unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<DataKeyBits>,
    /// False: the envelope alone is answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<bool>,
}

impl DataKeyRequest {
    /// 256 bits, with the key itself in the answer.
    pub fn new(context: impl Into<String>) -> Self {
        Self {
            context: context.into(),
            aad: None,
            bits: None,
            plaintext: None,
        }
    }

    /// With associated data.
    #[must_use]
    pub fn with_aad(mut self, aad: impl Into<Base64>) -> Self {
        self.aad = Some(aad.into());
        self
    }

    /// Of this length.
    #[must_use]
    pub fn with_bits(mut self, bits: DataKeyBits) -> Self {
        self.bits = Some(bits);
        self
    }

    /// Without the key itself in the answer.
    #[must_use]
    pub fn sealed_only(mut self) -> Self {
        self.plaintext = Some(false);
        self
    }
}

/// Answer of `POST /datakey`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataKeyResponse {
    /// The key's envelope, which `/decrypt` opens when it is asked for as a data key.
    pub ciphertext: Base64,
    /// Label of the key version it is encrypted under.
    pub key_id: String,
    /// Number of that key version.
    pub key_version: u32,
    /// The key itself, unless it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext: Option<SecretBase64>,
}

/// `GET /health`, as v1 has it; 503 when degraded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResponse {
    /// Whether every key is usable.
    pub status: HealthStatus,
    /// Whether the tokens answer.
    pub hsm_available: bool,
    /// By label of the key version.
    pub kek_status: BTreeMap<String, KekStatus>,
}

words! {
    /// `status` of [`HealthResponse`].
    pub enum HealthStatus {
        /// All well.
        Healthy = "healthy",
        /// Something is not; the status is 503.
        Degraded = "degraded",
    }
}

words! {
    /// A key's state in [`HealthResponse`].
    pub enum KekStatus {
        /// Usable on this node.
        Available = "available",
        /// Not usable on this node.
        Unavailable = "unavailable",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn requests_look_as_v1_sends_them() {
        assert_eq!(
            serde_json::to_value(EncryptRequest::new("exchange-key", b"abc")).unwrap(),
            json!({"context": "exchange-key", "plaintext": "YWJj"})
        );
        assert_eq!(
            serde_json::to_value(
                DecryptRequest::new("exchange-key", b"abc")
                    .with_key_id("kek-exchange-key-v1")
                    .with_aad(b"x")
            )
            .unwrap(),
            json!({"context": "exchange-key", "ciphertext": "YWJj", "key_id": "kek-exchange-key-v1", "aad": "eA=="})
        );
    }

    #[test]
    fn the_other_requests_say_only_what_is_to_be_said() {
        assert_eq!(
            serde_json::to_value(DecryptRequest::new("c", b"abc").as_data_key()).unwrap(),
            json!({"context": "c", "ciphertext": "YWJj", "purpose": "datakey"})
        );
        let rewrap = RewrapRequest::new("2fa", b"abc")
            .of("2FA", "2fa-1")
            .rebound_to("2FA", "2fa-2");
        assert_eq!(
            serde_json::to_value(rewrap).unwrap(),
            json!({
                "context": "2fa", "ciphertext": "YWJj",
                "principal": {"ou": "2FA", "cn": "2fa-1"}, "rebind": {"ou": "2FA", "cn": "2fa-2"},
            })
        );
        let key = DataKeyRequest::new("c")
            .with_bits(DataKeyBits::Bits128)
            .sealed_only();
        assert_eq!(
            serde_json::to_value(key).unwrap(),
            json!({"context": "c", "bits": "128", "plaintext": false})
        );
    }

    #[test]
    fn a_plaintext_is_not_printed_with_its_request() {
        let shown = format!("{:?}", EncryptRequest::new("exchange-key", b"canary"));
        assert!(
            !shown.contains("canary") && !shown.contains("Y2FuYXJ5"),
            "{shown}"
        );
    }

    #[test]
    fn health_is_v1s_document() {
        let health = HealthResponse {
            status: HealthStatus::Degraded,
            hsm_available: true,
            kek_status: BTreeMap::from([("kek-2fa-v1".to_owned(), KekStatus::Unavailable)]),
        };
        let json =
            json!({"status": "degraded", "hsm_available": true, "kek_status": {"kek-2fa-v1": "unavailable"}});
        assert_eq!(serde_json::to_value(&health).unwrap(), json);
        assert_eq!(serde_json::from_value::<HealthResponse>(json).unwrap(), health);
    }
}
