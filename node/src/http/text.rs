//! The text of a member: borrowed from the body as it stands, or without its escapes in a copy that is wiped. The
//! JSON reader would undo them in memory of its own, which nobody wipes; so it is given no text to read.

use zeroize::Zeroizing;

/// A member's text.
pub(crate) enum Text<'a> {
    /// As it stands in the body.
    Borrowed(&'a str),
    /// A copy, in memory that has never grown.
    Owned(Zeroizing<String>),
}

impl<'a> Text<'a> {
    /// The text that this JSON value is, if it is one. The value is known to be well formed.
    pub(super) fn of(raw: &'a str) -> Option<Self> {
        let inside = raw.strip_prefix('"')?.strip_suffix('"')?;
        if inside.contains('\\') {
            unescape(inside).map(Self::Owned)
        } else {
            Some(Self::Borrowed(inside))
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Owned(text) => text,
        }
    }
}

/// As much memory as the text has now: no escape is shorter than what it stands for.
fn unescape(text: &str) -> Option<Zeroizing<String>> {
    let mut out = Zeroizing::new(String::with_capacity(text.len()));
    let mut rest = text;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        out.push_str(plain);
        let (character, after) = escape(escaped)?;
        out.push(character);
        rest = after;
    }
    out.push_str(rest);
    Some(out)
}

/// The character that an escape stands for, and what follows it.
fn escape(text: &str) -> Option<(char, &str)> {
    let mut rest = text.chars();
    let character = match rest.next()? {
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'u' => return utf16(rest.as_str()),
        same @ ('"' | '\\' | '/') => same,
        _ => return None,
    };
    Some((character, rest.as_str()))
}

/// One code unit or a pair of them. As in Go, half a pair is replaced.
fn utf16(text: &str) -> Option<(char, &str)> {
    let (first, rest) = unit(text)?;
    if let Some(character) = char::from_u32(u32::from(first)) {
        return Some((character, rest));
    }
    if let Some((second, after)) = rest.strip_prefix("\\u").and_then(unit)
        && let Some(Ok(character)) = char::decode_utf16([first, second]).next()
    {
        return Some((character, after));
    }
    Some((char::REPLACEMENT_CHARACTER, rest))
}

fn unit(text: &str) -> Option<(u16, &str)> {
    let (digits, rest) = text.split_at_checked(4)?;
    let all_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let unit = u16::from_str_radix(digits, 16).ok()?;
    all_hex.then_some((unit, rest))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(raw: &str) -> Option<String> {
        Text::of(raw).map(|text| text.as_str().to_owned())
    }

    /// Each row was checked against the rules of Go's `encoding/json`.
    #[test]
    fn escapes_are_undone_as_go_undoes_them() {
        for (raw, expected) in [
            (r#""""#, Some("")),
            (r#""plain ü""#, Some("plain ü")),
            (r#""\"\\\/\b\f\n\r\t""#, Some("\"\\/\u{8}\u{c}\n\r\t")),
            (r#""a\u0062\u00FC\u20ac!""#, Some("abü€!")),
            (r#""\ud83d\udd11""#, Some("🔑")),
            (r#""\ud83dx""#, Some("\u{fffd}x")),
            (r#""\ud83d\n""#, Some("\u{fffd}\n")),
            (r#""\udd11\ud83d\udd11""#, Some("\u{fffd}🔑")),
            (r#""\ud83d\u0041""#, Some("\u{fffd}A")),
            (r#""\u0000""#, Some("\0")),
            ("5", None),
            ("true", None),
            ("[]", None),
            // Not well formed; no reader hands these on.
            (r#"""#, None),
            (r#""\""#, None),
            (r#""\x""#, None),
            (r#""\u+123""#, None),
            (r#""\u12""#, None),
            (r#""\u123ü""#, None),
        ] {
            assert_eq!(read(raw).as_deref(), expected, "{raw}");
        }
    }

    #[test]
    fn the_copy_has_its_size_from_the_start() {
        let raw = format!("\"{}\"", r"A\/\u0041\ud83d\udd11".repeat(1000));
        let Some(Text::Owned(text)) = Text::of(&raw) else {
            panic!("not copied");
        };
        // A buffer that grows leaves an unwiped one behind.
        assert_eq!(text.capacity(), raw.len() - 2);
        assert_eq!(text.as_str(), "A/A🔑".repeat(1000));
        assert!(matches!(Text::of(r#""QUJD""#), Some(Text::Borrowed("QUJD"))));
    }

    proptest! {
        #[test]
        fn every_text_is_read_as_the_json_library_writes_it(text: String) {
            let raw = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(read(&raw), Some(text));
        }

        #[test]
        fn no_value_makes_the_reader_panic(raw: String) {
            let _ = read(&raw);
            let _ = read(&format!("\"{raw}\""));
        }
    }
}
