//! Requests of the v1 routes, read as Go's `encoding/json` and `encoding/base64` read them, so
//! that no v1 client notices the change. Plaintexts pass through here: what is copied is wiped.

use std::borrow::Cow;
use std::fmt;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use zeroize::{Zeroize, Zeroizing};

/// A member's text: borrowed from the body, or unescaped into a copy that is wiped.
pub(crate) enum Text<'a> {
    Borrowed(&'a str),
    Owned(Zeroizing<String>),
}

impl Text<'_> {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Owned(text) => text,
        }
    }
}

/// The body is no JSON object of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotJson;

/// Reads the named members of an object, all of them texts. As in Go: unknown members are
/// ignored, names are compared without case, the last of several counts, `null` changes nothing,
/// a body of `null` is an empty object, and what is absent is empty. Unlike Go, text after the
/// object is an error.
pub(crate) fn members<'a, const N: usize>(
    body: &'a [u8],
    names: [&'static str; N],
) -> Result<[Text<'a>; N], NotJson> {
    // Go replaces what is no UTF-8; only unknown members can hold such and still be accepted.
    let Ok(text) = std::str::from_utf8(body) else {
        let replaced = match String::from_utf8_lossy(body) {
            Cow::Owned(text) => Zeroizing::new(text),
            Cow::Borrowed(text) => Zeroizing::new(text.to_owned()),
        };
        let members = read(&replaced, names)?;
        return Ok(members.map(|member| Text::Owned(Zeroizing::new(member.as_str().to_owned()))));
    };
    read(text, names)
}

fn read<'a, const N: usize>(text: &'a str, names: [&'static str; N]) -> Result<[Text<'a>; N], NotJson> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let found = deserializer
        .deserialize_any(Object { names })
        .map_err(|_| NotJson)?;
    deserializer.end().map_err(|_| NotJson)?;
    Ok(found)
}

struct Object<const N: usize> {
    names: [&'static str; N],
}

impl<'de, const N: usize> Visitor<'de> for Object<N> {
    type Value = [Text<'de>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(std::array::from_fn(|_| Text::Borrowed("")))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = std::array::from_fn(|_| Text::Borrowed(""));
        while let Some(index) = map.next_key_seed(Name { names: &self.names })? {
            match index {
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
                Some(index) => {
                    if let (Some(value), Some(place)) = (map.next_value_seed(Value)?, found.get_mut(index)) {
                        *place = value;
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Index of a member's name, compared as Go folds it.
struct Name<'n, const N: usize> {
    names: &'n [&'static str; N],
}

impl<'de, const N: usize> DeserializeSeed<'de> for Name<'_, N> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<const N: usize> Visitor<'_> for Name<'_, N> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.names.iter().position(|known| folds_to(name, known)))
    }
}

/// ASCII case, and the two other letters Unicode folds to ASCII: `ſ` (s) and the Kelvin sign (k).
fn folds_to(name: &str, known: &str) -> bool {
    let folded = name.chars().map(|c| match c {
        '\u{017f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    });
    folded.eq(known.chars())
}

/// A text or null.
struct Value;

impl<'de> DeserializeSeed<'de> for Value {
    type Value = Option<Text<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value {
    type Value = Option<Text<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Some(Text::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(Text::Owned(Zeroizing::new(text.to_owned()))))
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// Go's `base64.StdEncoding`: standard alphabet, padding required, unused bits not looked at.
const GO_STANDARD: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical)
        .with_decode_allow_trailing_bits(true),
);

/// Decodes base64 as Go does: carriage returns and line feeds are skipped, anywhere.
pub(crate) fn base64(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if !text.contains(['\r', '\n']) {
        return decode(text.as_bytes());
    }
    let mut compact = Zeroizing::new(Vec::with_capacity(text.len()));
    compact.extend(text.bytes().filter(|byte| !matches!(byte, b'\r' | b'\n')));
    decode(&compact)
}

fn decode(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    // Its full size at once, so that growing leaves no copy behind.
    let mut out = Zeroizing::new(vec![0_u8; base64::decoded_len_estimate(text.len())]);
    let length = GO_STANDARD.decode_slice(text, &mut out).ok()?;
    out.truncate(length);
    Some(out)
}

/// The answer of `/decrypt`, in one buffer that is wiped when it has been sent.
pub(crate) fn plaintext_body(plaintext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    const BEFORE: &[u8] = b"{\"plaintext\":\"";
    const AFTER: &[u8] = b"\"}";
    let length = base64::encoded_len(plaintext.len(), true)?;
    let mut body = Zeroizing::new(vec![0_u8; BEFORE.len() + length + AFTER.len()]);
    let (before, rest) = body.split_at_mut_checked(BEFORE.len())?;
    let (text, after) = rest.split_at_mut_checked(length)?;
    before.copy_from_slice(BEFORE);
    after.copy_from_slice(AFTER);
    if GO_STANDARD.encode_slice(plaintext, text).is_err() {
        body.zeroize();
        return None;
    }
    Some(body)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn two(body: &str) -> Result<(String, String), NotJson> {
        let [context, key_id] = members(body.as_bytes(), ["context", "key_id"])?;
        Ok((context.as_str().to_owned(), key_id.as_str().to_owned()))
    }

    fn ok(context: &str, key_id: &str) -> Result<(String, String), NotJson> {
        Ok((context.to_owned(), key_id.to_owned()))
    }

    /// Each row was checked against the rules of Go's `encoding/json`.
    #[test]
    fn objects_are_read_as_go_reads_them() {
        for (body, expected) in [
            (r#"{"context":"a","key_id":"b"}"#, ok("a", "b")),
            (r#" {"key_id":"b" , "context":"a" }  "#, ok("a", "b")),
            ("{}", ok("", "")),
            ("null", ok("", "")),
            (r#"{"CONTEXT":"a","Key_ID":"b"}"#, ok("a", "b")),
            ("{\"\u{212a}ey_id\":\"b\"}", ok("", "b")),
            (r#"{"keyid":"b","contexts":"a","context ":"a"}"#, ok("", "")),
            (r#"{"context":"a","context":"c"}"#, ok("c", "")),
            (r#"{"context":"a","Context":"c"}"#, ok("c", "")),
            (r#"{"context":"a","context":null}"#, ok("a", "")),
            (r#"{"context":null}"#, ok("", "")),
            (r#"{"context":"a\u0062\n\"","key_id":""}"#, ok("ab\n\"", "")),
            (
                r#"{"extra":{"deep":[1,{"x":null}]},"n":1e999,"context":"a"}"#,
                ok("a", ""),
            ),
            (r#"{"context":5}"#, Err(NotJson)),
            (r#"{"context":["a"]}"#, Err(NotJson)),
            (r#"{"context":{}}"#, Err(NotJson)),
            (r#"{"context":true}"#, Err(NotJson)),
            ("", Err(NotJson)),
            ("{", Err(NotJson)),
            (r#"{"context":"a""#, Err(NotJson)),
            (r#"{"context":"a",}"#, Err(NotJson)),
            (r#"{context:"a"}"#, Err(NotJson)),
            (r#"["context"]"#, Err(NotJson)),
            (r#""context""#, Err(NotJson)),
            (r#"{"context":"a"} x"#, Err(NotJson)),
            (r#"{"context":"a"}{}"#, Err(NotJson)),
        ] {
            assert_eq!(two(body), expected, "{body}");
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced_as_in_go() {
        let body = b"{\"other\":\"\xff\",\"context\":\"a\xfe\"}";
        let [context] = members(body, ["context"]).unwrap();
        assert_eq!(context.as_str(), "a\u{fffd}");
    }

    #[test]
    fn a_deep_unknown_member_does_not_overflow_the_stack() {
        let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let _ = members(deep.as_bytes(), ["context"]);
    }

    #[test]
    fn base64_is_read_as_go_reads_it() {
        for (text, expected) in [
            ("", Some("")),
            ("YQ==", Some("a")),
            ("YWI=", Some("ab")),
            ("YWJj", Some("abc")),
            ("YW\r\nJj\n", Some("abc")),
            ("Y\nQ=\r=", Some("a")),
            // Unused bits set: Go's StdEncoding is not strict.
            ("YR==", Some("a")),
            ("YQ", None),
            ("YQ=", None),
            ("YQ===", None),
            ("YQ==YQ==", None),
            ("Y Q==", None),
            ("YQ==\t", None),
            ("-_-_", None),
            ("a", None),
            ("====", None),
        ] {
            let decoded = base64(text);
            assert_eq!(
                decoded.as_ref().map(|bytes| bytes.as_slice()),
                expected.map(str::as_bytes),
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_plaintext_comes_back_whole(bytes: Vec<u8>) {
            let body = plaintext_body(&bytes).unwrap();
            let [text] = members(&body, ["plaintext"]).unwrap();
            let decoded = base64(text.as_str()).unwrap();
            prop_assert_eq!(decoded.as_slice(), bytes.as_slice());
        }

        #[test]
        fn no_body_makes_the_reader_panic(body: Vec<u8>, text: String) {
            let _ = members(&body, ["context", "plaintext"]);
            let _ = members(text.as_bytes(), ["context"]);
            let _ = base64(&text);
        }
    }
}
