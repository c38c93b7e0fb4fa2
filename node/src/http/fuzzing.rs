//! See [`crate::fuzzing`].
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

mod proxies;

use std::collections::HashMap;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue};
use hsm_api::data::BATCH_MAX_ITEMS;
use hsm_core::SlotState;
use hsm_core::envelope::{Binding, HEADER_LEN, Header, TAG_LEN, V1_NONCE_LEN};
use hsm_core::names::KeyUid;
use serde::de::IgnoredAny;
use serde_json::Value;

pub use self::proxies::{client_cert, proxy_header};
use super::json::{Document, Items, Member, Request, request};
use super::resolve::{Resolution, Wanted, resolve};
use super::{RequestId, TraceId, go_base64 as base64};
use crate::config::ContextName;
use crate::keyring::{ClosedSlot, ContextKeys, KeyRing, KeySlot, ReadableKey};

const MEMBERS: [Member; 4] = [
    Member::text("context"),
    Member::text("key_id"),
    Member::scalar("bits"),
    Member::raw("principal"),
];

/// A request's JSON: what is accepted is JSON, has one plain form that says the same, and where no rule of Go's own is
/// at work it says what `serde_json` reads.
pub fn request_json(data: &[u8]) -> bool {
    let Ok(document) = Document::of(data, |_| Ok::<(), ()>(())) else {
        return false;
    };
    let text = document.as_str();
    let Ok(Request { members, batch }) = request(text, &MEMBERS) else {
        return false;
    };
    assert!(serde_json::from_str::<IgnoredAny>(text).is_ok());
    let members = members.map(|member| member.as_str().to_owned());
    assert_eq!(read_again(&members), members);
    let Items { list, too_many } = batch.unwrap_or_default();
    assert!(list.len() <= BATCH_MAX_ITEMS && (list.len() == BATCH_MAX_ITEMS || !too_many));
    assert!(list.iter().map(|item| item.get().len()).sum::<usize>() <= text.len());
    if let Ok(Value::Object(object)) = serde_json::from_str(text) {
        for (member, found) in MEMBERS.iter().zip(&members).take(2) {
            if is_plain(text, member.name()) {
                let expected = object.get(member.name()).and_then(Value::as_str);
                assert_eq!(found, expected.unwrap_or_default(), "{}", member.name());
            }
        }
    }
    true
}

/// The members written plainly, and read.
fn read_again(members: &[String; 4]) -> [String; 4] {
    let [context, key_id, bits, principal] = members;
    let quoted = |text: &String| serde_json::to_string(text).unwrap();
    let raw = if principal.is_empty() { "null" } else { principal };
    let plain = format!(
        "{{\"context\":{},\"key_id\":{},\"bits\":{},\"principal\":{raw}}}",
        quoted(context),
        quoted(key_id),
        quoted(bits)
    );
    let read = request(&plain, &MEMBERS).expect("what is plain is read");
    assert!(read.batch.is_none());
    read.members.map(|member| member.as_str().to_owned())
}

/// Whether a name occurs once, and in no spelling that only Go takes for it, nor in one that hides it.
fn is_plain(text: &str, name: &str) -> bool {
    text.is_ascii()
        && !text.contains("\\u")
        && text.to_ascii_lowercase().matches(name).count() == 1
        && text.contains(&format!("\"{name}\""))
}

/// Base64 is read as a plain transcription of Go's rules reads it, and what is written is read back.
pub fn go_base64(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let decoded = base64::decode(text);
    assert_eq!(decoded.as_ref().map(|bytes| bytes.to_vec()), as_go_reads(text));
    let Some(bytes) = decoded else {
        return false;
    };
    let mut written = Vec::new();
    base64::encode_into(&mut written, &bytes).unwrap();
    assert_eq!(Some(written.len()), base64::encoded_len(&bytes));
    let written = String::from_utf8(written).unwrap();
    assert!(*base64::decode(&written).unwrap() == *bytes);
    // The API's own type takes the plain form only, and means the same by it.
    let strict: hsm_api::Base64 = written.parse().unwrap();
    assert_eq!(strict.as_slice(), bytes.as_slice());
    true
}

fn as_go_reads(text: &str) -> Option<Vec<u8>> {
    let text: Vec<u8> = text
        .bytes()
        .filter(|byte| !matches!(byte, b'\r' | b'\n'))
        .collect();
    let (mut out, mut ended) = (Vec::new(), false);
    for group in text.chunks(4) {
        let padding = group.iter().rev().take_while(|byte| **byte == b'=').count();
        if ended || group.len() != 4 || padding > 2 {
            return None;
        }
        let mut bits = 0_u32;
        for byte in &group[..4 - padding] {
            bits = (bits << 6) | six_bits(*byte)?;
        }
        let bytes = (bits << (6 * padding)).to_be_bytes();
        out.extend_from_slice(&bytes[1..4 - padding]);
        ended = padding > 0;
    }
    Some(out)
}

fn six_bits(byte: u8) -> Option<u32> {
    Some(u32::from(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

/// `traceparent`: an id that goes on is the caller's own 32 digits; else there is a new one.
pub fn traceparent(data: &[u8]) -> bool {
    let Some(headers) = header("traceparent", data) else {
        return false;
    };
    let id = TraceId::of(&headers);
    let digits = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    assert!(id.as_str().len() == 32 && id.as_str().bytes().all(digits));
    let goes_on = data.get(3..35) == Some(id.as_str().as_bytes());
    assert!(!goes_on || id == TraceId::of(&headers));
    goes_on
}

/// `X-Request-Id`: what is kept cannot forge a line of a log.
pub fn request_id(data: &[u8]) -> bool {
    let Some(headers) = header("x-request-id", data) else {
        return false;
    };
    let id = RequestId::of(&headers);
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    assert!((1..=64).contains(&id.as_str().len()) && id.as_str().bytes().all(harmless));
    id.as_str().as_bytes() == data
}

fn header(name: &'static str, value: &[u8]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert(name, HeaderValue::from_bytes(value).ok()?);
    Some(headers)
}

fn uid(byte: u8) -> KeyUid {
    KeyUid::from_bytes([byte; 16])
}

/// A context with the keys 1 and 2, as versions of the same numbers.
fn keys() -> ContextKeys {
    let slot = KeySlot {
        name: "s".into(),
        ops: Arc::new(ClosedSlot(SlotState::Locked)),
    };
    let key = |number: u8| {
        let key_id = format!("kek-c-v{number}");
        (
            uid(number),
            ReadableKey {
                slot: slot.clone(),
                version: u32::from(number),
                key_id,
            },
        )
    };
    let readable = HashMap::from([key(1), key(2)]);
    let labels = readable.iter().map(|(uid, key)| (key.key_id.clone(), *uid));
    ContextKeys {
        binding: Binding::Private,
        active: None,
        by_key_id: labels.collect(),
        readable,
        highest_known: 2,
        missing: HashMap::new(),
        retired: HashMap::new(),
    }
}

/// A ciphertext and the `key_id` that came with it (behind its length, u8): it is an envelope only if its header names
/// a key of the context, and of version 1's form only if `key_id` does; either has room for its tag.
pub fn ciphertext(data: &[u8]) -> bool {
    let Some((length, rest)) = data.split_first() else {
        return false;
    };
    let Some((key_id, ciphertext)) = rest.split_at_checked(usize::from(*length)) else {
        return false;
    };
    let Ok(key_id) = std::str::from_utf8(key_id) else {
        return false;
    };
    let ring = KeyRing::new(HashMap::from([(ContextName::new("c").unwrap(), keys())]));
    let (_, keys) = ring.context("c").unwrap();
    let header = Header::parse(ciphertext).map(|(header, _)| header);
    let known = header.and_then(|header| keys.readable.get(&header.key_uid));
    match resolve(
        &ring,
        keys,
        ciphertext,
        key_id,
        Wanted::Either,
        |_: &ContextName| false,
    ) {
        Ok(Resolution::V2(found)) => {
            assert_eq!(header, Some(found));
            assert_eq!(known.map(|key| key.version), Some(found.version));
            assert!(ciphertext.len() >= HEADER_LEN + TAG_LEN);
            true
        }
        Ok(Resolution::V1(found)) => {
            assert!(
                known.is_none(),
                "an envelope of this context was taken for version 1's"
            );
            assert_eq!(keys.by_key_id.get(key_id), Some(&found));
            assert!(ciphertext.len() >= V1_NONCE_LEN + TAG_LEN);
            true
        }
        Ok(Resolution::AboveKnown(version)) => {
            assert!(known.is_none() && version > keys.highest_known);
            assert_eq!(header.map(|header| header.version), Some(version));
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 2048);
            false
        }
    }
}
