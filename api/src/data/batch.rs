//! Many requests of the data plane in one, and an answer to each of them.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::{DataKeyRequest, DecryptRequest, EncryptRequest, RewrapRequest};
use crate::code::ErrorCode;

/// Most items of a [`Batch`].
pub const BATCH_MAX_ITEMS: usize = 1000;
/// Longest body of a [`Batch`], in bytes, whatever a node allows a single request.
pub const BATCH_MAX_BYTES: usize = 4 << 20;

/// Many requests in one: at most [`BATCH_MAX_ITEMS`] in [`BATCH_MAX_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch<T> {
    /// Of every item whose own context is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// The items.
    pub batch: Vec<T>,
}

/// `POST /encrypt` of many.
pub type EncryptBatch = Batch<EncryptRequest>;
/// `POST /decrypt` of many.
pub type DecryptBatch = Batch<DecryptRequest>;
/// `POST /rewrap` of many.
pub type RewrapBatch = Batch<RewrapRequest>;
/// `POST /datakey` of many.
pub type DataKeyBatch = Batch<DataKeyRequest>;

impl<T> Batch<T> {
    /// Items with a context each.
    pub fn new(items: impl IntoIterator<Item = T>) -> Self {
        Self {
            context: None,
            batch: items.into_iter().collect(),
        }
    }

    /// With a context for the items whose own is empty.
    #[must_use]
    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.context = Some(context.into());
        self
    }
}

/// Answer to a [`Batch`]: one result for each item, in their order.
#[derive(Debug, Clone, Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
pub struct BatchResponse<T> {
    /// The results.
    pub batch: Vec<ItemResult<T>>,
}

/// What became of one item of a batch.
#[derive(Debug, Clone)]
pub enum ItemResult<T> {
    /// Status 200: what a request of its own would have been answered.
    Ok(T),
    /// It was not carried out; the other items have nothing to do with it.
    Err(ItemError),
}

impl<T> ItemResult<T> {
    /// As the standard library's.
    pub fn into_result(self) -> Result<T, ItemError> {
        match self {
            Self::Ok(answer) => Ok(answer),
            Self::Err(error) => Err(error),
        }
    }

    /// What was asked for, if it was carried out.
    pub fn as_ok(&self) -> Option<&T> {
        match self {
            Self::Ok(answer) => Some(answer),
            Self::Err(_) => None,
        }
    }

    /// Why it was not carried out.
    pub fn as_err(&self) -> Option<&ItemError> {
        match self {
            Self::Ok(_) => None,
            Self::Err(error) => Some(error),
        }
    }
}

/// Why one item of a batch was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemError {
    /// The HTTP status that the item would have had by itself.
    pub status: u16,
    /// The stable code. A text, because a newer node may send one this version does not know.
    pub code: String,
    /// v1's text.
    #[serde(default)]
    pub error: String,
    /// What happened and what to do about it.
    #[serde(default)]
    pub detail: String,
    /// Whether the same item may succeed later or on another node.
    #[serde(default)]
    pub retryable: bool,
}

impl ItemError {
    /// The code, if this version knows it.
    #[must_use]
    pub fn error_code(&self) -> Option<ErrorCode> {
        self.code.parse().ok()
    }
}

/// Read from the text as it came: what serde keeps to try one form after the other is not wiped, and an item may
/// hold a plaintext.
impl<'de, T: DeserializeOwned> Deserialize<'de> for ItemResult<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Status {
            status: u16,
        }
        // serde's own messages may repeat what they could not read.
        let unreadable = |_: serde_json::Error| D::Error::custom("an item is not the expected JSON");
        let item = <&RawValue>::deserialize(deserializer)?.get();
        let Status { status } = serde_json::from_str(item).map_err(unreadable)?;
        if (200..300).contains(&status) {
            serde_json::from_str(item).map(Self::Ok).map_err(unreadable)
        } else {
            serde_json::from_str(item).map(Self::Err).map_err(unreadable)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::DecryptResponse;

    #[test]
    fn a_context_may_stand_once_for_all_items() {
        let batch = Batch::new([EncryptRequest::new("", b"a")]).with_context("c");
        assert_eq!(
            serde_json::to_value(batch).unwrap(),
            json!({"context": "c", "batch": [{"context": "", "plaintext": "YQ=="}]})
        );
    }

    #[test]
    fn each_item_of_a_batch_is_read_by_its_status() {
        let text = r#"{"batch": [
            {"status": 200, "plaintext": "YWJj", "new_member": [1]},
            {"status": 400, "code": "authentication_failed", "error": "decryption failed", "retryable": false},
            {"status": 503, "code": "moon_phase", "retryable": true}
        ]}"#;
        let answer: BatchResponse<DecryptResponse> = serde_json::from_str(text).unwrap();
        let [opened, refused, later] = &answer.batch[..] else {
            panic!("{} items", answer.batch.len());
        };
        assert_eq!(opened.as_ok().unwrap().plaintext.as_slice(), b"abc");
        let error = refused.as_err().unwrap();
        assert_eq!(error.error_code(), Some(ErrorCode::AuthenticationFailed));
        assert_eq!((error.status, error.error.as_str()), (400, "decryption failed"));
        let error = later.clone().into_result().unwrap_err();
        assert_eq!((error.error_code(), error.retryable), (None, true));
        assert!(later.as_ok().is_none() && opened.as_err().is_none());
    }

    #[test]
    fn an_item_that_cannot_be_read_is_not_repeated() {
        let text = r#"{"batch": [{"status": 200, "plaintext": "canary!"}]}"#;
        let error = serde_json::from_str::<BatchResponse<DecryptResponse>>(text).unwrap_err();
        assert!(!error.to_string().contains("canary"), "{error}");
    }
}
