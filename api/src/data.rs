//! Requests and answers of the data plane. Reading v1's looser JSON (key case, unknown members,
//! line ends in base64) is the server's work; these types are what a correct client sends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wire::{Base64, SecretBase64, words};

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
}

impl DecryptRequest {
    /// For an envelope without associated data.
    pub fn new(context: impl Into<String>, ciphertext: impl Into<Base64>) -> Self {
        Self {
            context: context.into(),
            ciphertext: ciphertext.into(),
            key_id: None,
            aad: None,
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
}

/// Answer of `POST /decrypt`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecryptResponse {
    /// What was encrypted.
    pub plaintext: SecretBase64,
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
