//! Requests of the data plane, read as Go's `encoding/json` reads them, so that no v1 client notices the change;
//! the items of a batch too. Plaintexts pass through here: what is copied is wiped.

use std::borrow::Cow;
use std::fmt;

use hsm_api::data::BATCH_MAX_ITEMS;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
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

/// The text of a body.
pub(crate) struct Document<'a>(Cow<'a, str>);

impl<'a> Document<'a> {
    /// Go replaces what is no UTF-8; only unknown members can hold such and still be accepted.
    pub(crate) fn of(body: &'a [u8]) -> Self {
        Self(String::from_utf8_lossy(body))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// What was replaced is a copy of the body, and wiped as the body is.
impl Drop for Document<'_> {
    fn drop(&mut self) {
        if let Cow::Owned(text) = &mut self.0 {
            text.zeroize();
        }
    }
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
            let (index, kind) = match name {
                Known::Member(index, kind) => (index, kind),
                Known::Batch => {
                    if let Some(items) = map.next_value_seed(Array)? {
                        found.batch = Some(items);
                    }
                    continue;
                }
                Known::Not => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            let value = match kind {
                Kind::Text => map.next_value_seed(Value { scalars: false })?,
                Kind::Scalar => map.next_value_seed(Value { scalars: true })?,
                Kind::Raw => map
                    .next_value::<Option<&'de RawValue>>()?
                    .map(|raw| Text::Borrowed(raw.get())),
            };
            if let (Some(value), Some(place)) = (value, found.members.get_mut(index)) {
                *place = value;
            }
        }
        Ok(found)
    }
}

/// What a member's name stands for.
enum Known {
    /// One that is looked for, by its place.
    Member(usize, Kind),
    Batch,
    Not,
}

/// A member's name, compared as Go folds it.
struct Name<'m, const N: usize>(Object<'m, N>);

impl<'de, const N: usize> DeserializeSeed<'de> for Name<'_, N> {
    type Value = Known;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<const N: usize> Visitor<'_> for Name<'_, N> {
    type Value = Known;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Self::Value, E> {
        let Object { members, batch } = self.0;
        let mut known = members.iter().enumerate();
        if let Some((index, member)) = known.find(|(_, member)| folds_to(name, member.name)) {
            return Ok(Known::Member(index, member.kind));
        }
        Ok(if batch && folds_to(name, "batch") {
            Known::Batch
        } else {
            Known::Not
        })
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

/// A text or null; with `scalars` also what is taken for its text.
struct Value {
    scalars: bool,
}

impl Value {
    fn scalar<'de, E: Error>(&self, text: impl FnOnce() -> Text<'de>) -> Result<Option<Text<'de>>, E> {
        if self.scalars {
            Ok(Some(text()))
        } else {
            Err(E::custom("not a text"))
        }
    }
}

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

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        self.scalar(|| Text::Borrowed(if value { "true" } else { "false" }))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        self.scalar(|| Text::Owned(Zeroizing::new(value.to_string())))
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// The value of `batch`.
struct Array;

impl<'de> DeserializeSeed<'de> for Array {
    type Value = Option<Items<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Array {
    type Value = Option<Items<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        let mut items = Items::default();
        while items.list.len() < BATCH_MAX_ITEMS {
            match array.next_element::<&'de RawValue>()? {
                Some(item) => items.list.push(item),
                None => return Ok(Some(items)),
            }
        }
        while array.next_element::<IgnoredAny>()?.is_some() {
            items.too_many = true;
        }
        Ok(Some(items))
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
        ] {
            assert_eq!(two(body), expected, "{body}");
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced_as_in_go() {
        let body = b"{\"other\":\"\xff\",\"context\":\"a\xfe\"}";
        let document = Document::of(body);
        let [context, _] = members(document.as_str(), &TWO).unwrap();
        assert_eq!(context.as_str(), "a\u{fffd}");
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
            let document = Document::of(&body);
            let _ = request(document.as_str(), &known);
            let _ = members(&text, &known);
        }
    }
}
