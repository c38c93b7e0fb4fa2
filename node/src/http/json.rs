//! Requests of the data plane, read as Go's `encoding/json` reads them, so that no v1 client notices the change;
//! the items of a batch too. Plaintexts pass through here: what is copied is wiped, and the JSON library is asked only
//! where a value ends, because what it copies, into errors too, is not.

use std::fmt;

use hsm_api::data::BATCH_MAX_ITEMS;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

pub(crate) use super::text::Text;

/// The body is no JSON object of such members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotJson;

/// A member that is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Member {
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Scalar,
    Raw,
}

impl Member {
    /// A text; anything else is an error.
    pub(crate) const fn text(name: &'static str) -> Self {
        let kind = Kind::Text;
        Self { name, kind }
    }

    /// A text, or a number or a boolean that is taken for its text.
    pub(crate) const fn scalar(name: &'static str) -> Self {
        let kind = Kind::Scalar;
        Self { name, kind }
    }

    /// Anything; what is given is its JSON.
    pub(crate) const fn raw(name: &'static str) -> Self {
        let kind = Kind::Raw;
        Self { name, kind }
    }

    /// What it is called.
    pub(crate) const fn name(self) -> &'static str {
        self.name
    }
}

impl Kind {
    /// What a JSON value is as such a member, if it may be one. `null` never comes here.
    fn read(self, raw: &str) -> Option<Text<'_>> {
        let is_scalar = || matches!(raw, "true" | "false") || raw.parse::<u64>().is_ok();
        match self {
            Self::Raw => Some(Text::Borrowed(raw)),
            Self::Scalar if is_scalar() => Some(Text::Borrowed(raw)),
            Self::Scalar | Self::Text => Text::of(raw),
        }
    }
}

/// The text of a body.
pub(crate) enum Document<'a> {
    /// The body itself.
    Body(&'a str),
    /// A copy, wiped as the body is.
    Copy(Zeroizing<String>),
}

impl<'a> Document<'a> {
    /// Go replaces what is no UTF-8; only unknown members can hold such and still be accepted. `pay` is asked
    /// for the memory of a copy.
    pub(crate) fn of<E>(body: &'a [u8], pay: impl FnOnce(usize) -> Result<(), E>) -> Result<Self, E> {
        if let Ok(text) = std::str::from_utf8(body) {
            return Ok(Self::Body(text));
        }
        // A buffer that grows leaves an unwiped one behind.
        let length: usize = parts(body)
            .map(|(valid, replaced)| valid.len() + replaced.len())
            .sum();
        pay(length)?;
        let mut copy = Zeroizing::new(String::with_capacity(length));
        for (valid, replaced) in parts(body) {
            copy.push_str(valid);
            copy.push_str(replaced);
        }
        Ok(Self::Copy(copy))
    }

    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Body(text) => text,
            Self::Copy(text) => text,
        }
    }
}

/// What is UTF-8, and what stands for the bytes behind it that are not.
fn parts(body: &[u8]) -> impl Iterator<Item = (&str, &'static str)> {
    body.utf8_chunks().map(|part| {
        let replaced = if part.invalid().is_empty() { "" } else { "\u{fffd}" };
        (part.valid(), replaced)
    })
}

/// What a request asks for: one thing by its members, or many.
pub(crate) struct Request<'a, const N: usize> {
    pub(crate) members: [Text<'a>; N],
    pub(crate) batch: Option<Items<'a>>,
}

/// The items of a batch as they came, to be read one by one: a bad one costs no other anything.
#[derive(Default)]
pub(crate) struct Items<'a> {
    /// At most [`BATCH_MAX_ITEMS`].
    pub(crate) list: Vec<&'a RawValue>,
    /// There are more.
    pub(crate) too_many: bool,
}

/// Reads a request: these members, or those that stand beside a batch.
pub(crate) fn request<'a, const N: usize>(
    text: &'a str,
    members: &[Member; N],
) -> Result<Request<'a, N>, NotJson> {
    read(text, members, true)
}

/// Reads the named members of an object. As in Go: unknown members are ignored, names are compared without case,
/// the last of several counts, `null` changes nothing, `null` for the object is an empty one, and what is
/// absent is empty. Unlike Go, text after the object is an error.
pub(crate) fn members<'a, const N: usize>(
    text: &'a str,
    members: &[Member; N],
) -> Result<[Text<'a>; N], NotJson> {
    read(text, members, false).map(|request| request.members)
}

fn read<'a, const N: usize>(
    text: &'a str,
    members: &[Member; N],
    batch: bool,
) -> Result<Request<'a, N>, NotJson> {
    // The library would copy a text to say that it is no object.
    if text.trim_start().starts_with('"') {
        return Err(NotJson);
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let found = deserializer
        .deserialize_any(Object { members, batch })
        .map_err(|_| NotJson)?;
    deserializer.end().map_err(|_| NotJson)?;
    Ok(found)
}

#[derive(Clone, Copy)]
struct Object<'m, const N: usize> {
    members: &'m [Member; N],
    /// Whether the member `batch` is known.
    batch: bool,
}

impl<'de, const N: usize> Visitor<'de> for Object<'_, N> {
    type Value = Request<'de, N>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Request {
            members: std::array::from_fn(|_| Text::Borrowed("")),
            batch: None,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = self.visit_unit::<A::Error>()?;
        while let Some(name) = map.next_key_seed(Name(self))? {
            let Some(known) = name else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let Some(raw) = map.next_value::<Option<&'de RawValue>>()? else {
                continue;
            };
            match known {
                Known::Member(index, kind) => {
                    let text = kind.read(raw.get());
                    let text = text.ok_or_else(|| A::Error::custom("not a text"))?;
                    if let Some(place) = found.members.get_mut(index) {
                        *place = text;
                    }
                }
                Known::Batch => found.batch = Some(items(raw.get()).map_err(A::Error::custom)?),
            }
        }
        Ok(found)
    }
}

/// What a member's name stands for, if it is looked for.
enum Known {
    /// One that the operation reads, by its place.
    Member(usize, Kind),
    Batch,
}

/// A member's name, compared as Go folds it.
struct Name<'m, const N: usize>(Object<'m, N>);

impl<'de, const N: usize> DeserializeSeed<'de> for Name<'_, N> {
    type Value = Option<Known>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<const N: usize> Visitor<'_> for Name<'_, N> {
    type Value = Option<Known>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        let Object { members, batch } = self.0;
        let mut known = members.iter().enumerate();
        if let Some((index, member)) = known.find(|(_, member)| folds_to(name, member.name)) {
            return Ok(Some(Known::Member(index, member.kind)));
        }
        Ok((batch && folds_to(name, "batch")).then_some(Known::Batch))
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

/// The items of the value of `batch`.
fn items(raw: &str) -> Result<Items<'_>, &'static str> {
    if !raw.starts_with('[') {
        return Err("not an array");
    }
    let mut deserializer = serde_json::Deserializer::from_str(raw);
    deserializer.deserialize_seq(Array).map_err(|_| "not an array")
}

struct Array;

impl<'de> Visitor<'de> for Array {
    type Value = Items<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        let mut items = Items::default();
        while items.list.len() < BATCH_MAX_ITEMS {
            match array.next_element::<&'de RawValue>()? {
                Some(item) => items.list.push(item),
                None => return Ok(items),
            }
        }
        while array.next_element::<IgnoredAny>()?.is_some() {
            items.too_many = true;
        }
        Ok(items)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TWO: [Member; 2] = [Member::text("context"), Member::text("key_id")];

    fn two(body: &str) -> Result<(String, String), NotJson> {
        let [context, key_id] = members(body, &TWO)?;
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
            (r#"{"context":"\ud83d","key_id":"\/"}"#, ok("\u{fffd}", "/")),
            (r#" "\/""#, Err(NotJson)),
        ] {
            assert_eq!(two(body), expected, "{body}");
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced_as_in_go() {
        let body = b"{\"other\":\"\xff\",\"context\":\"a\xfe\"}";
        let document = free(body);
        let [context, _] = members(document.as_str(), &TWO).unwrap();
        assert_eq!(context.as_str(), "a\u{fffd}");
    }

    fn free(body: &[u8]) -> Document<'_> {
        Document::of(body, |_| Ok::<_, NotJson>(())).unwrap()
    }

    #[test]
    fn what_is_replaced_is_a_copy_that_never_grows_and_is_paid_for() {
        let body = [&b"{\"plaintext\":\"YQ==\",\"x\":\""[..], &[0xff; 5000], b"\"}"].concat();
        let mut paid = 0;
        let document = Document::of(&body, |bytes| {
            paid = bytes;
            Ok::<_, NotJson>(())
        });
        let Ok(Document::Copy(text)) = document else {
            panic!("not copied");
        };
        assert_eq!(text.as_str(), String::from_utf8_lossy(&body));
        assert_eq!((text.capacity(), paid), (text.len(), text.len()));
        assert!(matches!(free(b"{}"), Document::Body("{}")));
        assert!(Document::of(b"\xff", |_| Err(NotJson)).is_err());
    }

    #[test]
    fn a_deep_unknown_member_does_not_overflow_the_stack() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for body in [
            format!("{{\"x\":{deep}}}"),
            format!("{{\"batch\":{deep}}}"),
            format!("{{\"batch\":[{{\"x\":{deep}}}]}}"),
            format!("{{\"raw\":{deep}}}"),
        ] {
            let known = [Member::text("context"), Member::raw("raw")];
            for item in request(&body, &known).unwrap().batch.unwrap_or_default().list {
                let _ = members(item.get(), &known);
            }
        }
    }

    /// The items of a batch as they came, and the context beside them.
    fn batch(body: &str) -> Result<Option<(String, Vec<String>)>, NotJson> {
        let Request { members, batch } = request(body, &TWO)?;
        Ok(batch.map(|items| {
            assert!(!items.too_many);
            let list = items.list.iter().map(|item| item.get().to_owned());
            (members[0].as_str().to_owned(), list.collect())
        }))
    }

    #[test]
    fn a_batch_is_taken_apart_and_its_items_are_left_to_be_read() {
        let some = |context: &str, items: &[&str]| {
            let items: Vec<String> = items.iter().map(|item| (*item).to_owned()).collect();
            Ok::<_, NotJson>(Some((context.to_owned(), items)))
        };
        for (body, expected) in [
            (r#"{"batch":[]}"#, some("", &[])),
            (
                r#"{"Batch":[{"context":"a"}, {} ],"context":"c"}"#,
                some("c", &[r#"{"context":"a"}"#, "{}"]),
            ),
            // Whatever is JSON waits for its own answer.
            (
                r#"{"batch":[5,"x",null,[{}],{"context":true}]}"#,
                some("", &["5", r#""x""#, "null", "[{}]", r#"{"context":true}"#]),
            ),
            (r#"{"batch":null}"#, Ok(None)),
            (r#"{"batch":[{}],"batch":null}"#, some("", &["{}"])),
            (r#"{"batch":[{}],"batch":[]}"#, some("", &[])),
            (r#"{"context":"a"}"#, Ok(None)),
            (r#"{"batch":{}}"#, Err(NotJson)),
            (r#"{"batch":"x"}"#, Err(NotJson)),
            (r#"{"batch":"[]"}"#, Err(NotJson)),
            (r#"{"batch":5}"#, Err(NotJson)),
            (r#"{"batch":[{]}"#, Err(NotJson)),
            (r#"{"batch":[{}}"#, Err(NotJson)),
            (r#"{"batch":[{},]}"#, Err(NotJson)),
            (r#"{"batch":[],"context":5}"#, Err(NotJson)),
        ] {
            assert_eq!(batch(body), expected, "{body}");
        }
        // In an item the word means nothing.
        assert_eq!(two(r#"{"batch":5,"context":"a"}"#), ok("a", ""));
    }

    #[test]
    fn items_beyond_the_limit_are_counted_and_not_kept() {
        for (count, too_many) in [
            (BATCH_MAX_ITEMS, false),
            (BATCH_MAX_ITEMS + 1, true),
            (5000, true),
        ] {
            let body = format!("{{\"batch\":[{}]}}", vec!["{}"; count].join(","));
            let items = request(&body, &TWO).unwrap().batch.unwrap();
            assert_eq!((items.list.len(), items.too_many), (BATCH_MAX_ITEMS, too_many));
        }
        let broken = format!("{{\"batch\":[{}]}}", vec!["{}"; 5000].join(";"));
        assert!(request(&broken, &TWO).is_err());
    }

    #[test]
    fn some_members_may_be_more_than_texts() {
        let known = [
            Member::scalar("bits"),
            Member::scalar("plaintext"),
            Member::raw("who"),
        ];
        let read = |body: &str| {
            let found = members(body, &known);
            found.map(|texts| texts.map(|text| text.as_str().to_owned()))
        };
        for (body, expected) in [
            (r#"{"bits":"128","plaintext":"false"}"#, Ok(["128", "false", ""])),
            (r#"{"bits":256,"plaintext":false}"#, Ok(["256", "false", ""])),
            (
                r#"{"bits":null,"plaintext":true,"who":null}"#,
                Ok(["", "true", ""]),
            ),
            (r#"{"who": {"ou" : "a"} }"#, Ok(["", "", r#"{"ou" : "a"}"#])),
            (r#"{"who":5}"#, Ok(["", "", "5"])),
            (r#"{"bits":1.5}"#, Err(NotJson)),
            (r#"{"bits":-1}"#, Err(NotJson)),
            (r#"{"bits":[]}"#, Err(NotJson)),
            (r#"{"who":{]}"#, Err(NotJson)),
        ] {
            let expected: Result<[String; 3], NotJson> = expected.map(|texts| texts.map(str::to_owned));
            assert_eq!(read(body), expected, "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_the_reader_panic(body: Vec<u8>, text: String) {
            let known = [Member::text("context"), Member::scalar("bits"), Member::raw("who")];
            let document = free(&body);
            prop_assert_eq!(document.as_str(), String::from_utf8_lossy(&body));
            let _ = request(document.as_str(), &known);
            let _ = members(&text, &known);
        }
    }
}
