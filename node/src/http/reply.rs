//! What the data plane answers, each in one buffer that never grows and is wiped when it has been sent: plaintexts
//! pass through here.

use hsm_api::data::ItemError;
use hsm_core::secrets::Plaintext;
use zeroize::Zeroizing;

use super::go_base64;
use super::problem::ApiError;

/// Names, quotes, numbers and braces of one answer.
const AROUND: usize = 160;
const BEFORE: &[u8] = b"{\"batch\":[";
const AFTER: &[u8] = b"]}";

/// A ciphertext and what it was made under.
pub(super) struct Sealed {
    pub(super) ciphertext: Vec<u8>,
    pub(super) key_id: String,
    pub(super) version: u32,
}

/// What a request that succeeded is answered.
pub(super) struct Success {
    pub(super) sealed: Option<Sealed>,
    pub(super) plaintext: Option<Plaintext>,
}

impl Success {
    /// An object of it; in a batch with the status that its own answer would have had.
    pub(super) fn json(&self, in_batch: bool) -> Result<Zeroizing<Vec<u8>>, ApiError> {
        let json = self.write(in_batch);
        json.ok_or_else(|| ApiError::internal("the answer is too long to encode"))
    }

    fn write(&self, in_batch: bool) -> Option<Zeroizing<Vec<u8>>> {
        let mut room = AROUND;
        if let Some(sealed) = &self.sealed {
            // An escaped character takes six.
            room += go_base64::encoded_len(&sealed.ciphertext)? + 6 * sealed.key_id.len();
        }
        if let Some(plaintext) = &self.plaintext {
            room += go_base64::encoded_len(plaintext.as_slice())?;
        }
        let mut out = Zeroizing::new(Vec::with_capacity(room));
        out.push(b'{');
        if in_batch {
            name(&mut out, "status");
            out.extend_from_slice(b"200");
        }
        if let Some(sealed) = &self.sealed {
            name(&mut out, "ciphertext");
            bytes(&mut out, &sealed.ciphertext)?;
            name(&mut out, "key_id");
            serde_json::to_writer(&mut *out, &sealed.key_id).ok()?;
            name(&mut out, "key_version");
            out.extend_from_slice(sealed.version.to_string().as_bytes());
        }
        if let Some(plaintext) = &self.plaintext {
            name(&mut out, "plaintext");
            bytes(&mut out, plaintext.as_slice())?;
        }
        out.push(b'}');
        Some(out)
    }
}

fn name(out: &mut Vec<u8>, name: &str) {
    // Behind the brace there is nothing to part it from.
    if out.len() > 1 {
        out.push(b',');
    }
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    out.push(b'"');
    go_base64::encode_into(out, bytes)?;
    out.push(b'"');
    Some(())
}

/// What one item of a batch is answered that was not carried out.
pub(super) fn failure(error: &ApiError) -> Zeroizing<Vec<u8>> {
    let item = ItemError {
        status: error.status().as_u16(),
        code: error.code().as_str().to_owned(),
        error: error.v1().to_owned(),
        detail: error.caller_detail().to_owned(),
        retryable: error.code().retryable(),
    };
    // A struct of texts and numbers always serialises.
    Zeroizing::new(serde_json::to_vec(&item).unwrap_or_default())
}

/// The answer to a batch, of the answers to its items in their order.
pub(super) fn batch(items: &[Zeroizing<Vec<u8>>]) -> Zeroizing<Vec<u8>> {
    let room: usize = items.iter().map(|item| item.len() + 1).sum();
    let mut out = Zeroizing::new(Vec::with_capacity(BEFORE.len() + room + AFTER.len()));
    out.extend_from_slice(BEFORE);
    for (number, item) in items.iter().enumerate() {
        if number > 0 {
            out.push(b',');
        }
        out.extend_from_slice(item);
    }
    out.extend_from_slice(AFTER);
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;
    use serde_json::{Value, json};

    use super::*;

    fn read(json: &[u8]) -> Value {
        serde_json::from_slice(json).unwrap()
    }

    fn sealed(key_id: &str) -> Option<Sealed> {
        Some(Sealed {
            ciphertext: vec![7; 100],
            key_id: key_id.to_owned(),
            version: u32::MAX,
        })
    }

    #[test]
    fn an_answer_has_the_members_of_its_parts_in_v1s_order() {
        let success = Success {
            sealed: sealed("kek-c-v1"),
            plaintext: None,
        };
        let json = success.json(false).unwrap();
        let text = std::str::from_utf8(&json).unwrap();
        assert!(text.starts_with(r#"{"ciphertext":"BwcH"#), "{text}");
        assert!(
            text.ends_with(r#","key_id":"kek-c-v1","key_version":4294967295}"#),
            "{text}"
        );
        let success = Success {
            sealed: None,
            plaintext: Some(Plaintext::new(b"abc".to_vec())),
        };
        assert_eq!(
            success.json(false).unwrap().as_slice(),
            br#"{"plaintext":"YWJj"}"#
        );
        assert_eq!(
            success.json(true).unwrap().as_slice(),
            br#"{"status":200,"plaintext":"YWJj"}"#
        );
    }

    #[test]
    fn no_answer_outgrows_its_buffer() {
        // A label is whatever a v1 token had.
        for key_id in ["", "k", "\u{0}\u{1}\"\\", &"\u{1f}".repeat(200), &"ü".repeat(100)] {
            for length in [0, 1, 2, 3, 1000] {
                let success = Success {
                    sealed: sealed(key_id),
                    plaintext: Some(Plaintext::new(vec![1; length])),
                };
                let room = AROUND
                    + go_base64::encoded_len(&[7; 100]).unwrap()
                    + 6 * key_id.len()
                    + go_base64::encoded_len(&vec![1; length]).unwrap();
                let json = success.json(true).unwrap();
                assert!(json.len() <= room, "{} > {room}", json.len());
                assert_eq!(read(&json)["key_id"], key_id);
            }
        }
    }

    #[test]
    fn a_batch_is_its_items_between_brackets() {
        let opened = Success {
            sealed: None,
            plaintext: Some(Plaintext::new(Vec::new())),
        };
        let refused = ApiError::new(ErrorCode::KeyVersionNotReady).detail("version 7 is being imported");
        let items = [opened.json(true).unwrap(), failure(&refused)];
        assert_eq!(
            read(&batch(&items)),
            json!({"batch": [
                {"status": 200, "plaintext": ""},
                {
                    "status": 503, "code": "key_version_not_ready", "error": "key version not ready",
                    "detail": "version 7 is being imported", "retryable": true,
                },
            ]})
        );
        assert_eq!(batch(&[]).as_slice(), br#"{"batch":[]}"#);
        let fault = failure(&ApiError::internal("CKR_DEVICE_ERROR").v1_text("encryption failed"));
        assert_eq!(read(&fault)["error"], "encryption failed");
        assert!(!read(&fault).to_string().contains("CKR_DEVICE_ERROR"));
    }
}
