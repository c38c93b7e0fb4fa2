//! Distinguished names as text, in RFC 4514 order and escaping: the most specific part first, no
//! two different names with one text. Role bindings and revocations compare these texts.

use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// Renders a name: `CN=Client CA,O=Example`.
#[must_use]
pub fn render(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| rdn.iter().map(attribute).collect::<Vec<_>>().join("+"))
        .collect();
    parts.reverse();
    parts.join(",")
}

/// Brings a name as people or openssl (`-nameopt RFC2253`) write it into the form of [`render`]:
/// white space around `,`, `+` and `=` removed, types in upper case, one way of escaping. The
/// order stays: most specific part first.
#[must_use]
pub fn normalise(text: &str) -> String {
    split_unescaped(text, ',')
        .iter()
        .map(|rdn| {
            let parts: Vec<String> = split_unescaped(rdn, '+')
                .iter()
                .map(|part| normal_part(part))
                .collect();
            parts.join("+")
        })
        .collect::<Vec<_>>()
        .join(",")
}

fn normal_part(part: &str) -> String {
    match part.split_once('=') {
        Some((kind, value)) => {
            let value = trim_value(value);
            let kind = kind.trim_matches(space).to_ascii_uppercase();
            match unescape(value) {
                Some(text) if !value.starts_with('#') => format!("{kind}={}", escape(&text)),
                _ => format!("{kind}={value}"),
            }
        }
        None => trim_value(part).to_owned(),
    }
}

/// What people put around the parts of a name. A space of another script belongs to the value: [`render`] writes it as
/// it is, and only these never bare.
fn space(c: char) -> bool {
    c.is_ascii_whitespace()
}

/// Trims white space, but not an escaped space at the end.
fn trim_value(value: &str) -> &str {
    let value = value.trim_start_matches(space);
    let trimmed = value.trim_end_matches(space);
    let escaped = trimmed.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1;
    match value[trimmed.len()..].chars().next() {
        Some(space) if escaped => &value[..trimmed.len() + space.len_utf8()],
        _ => trimmed,
    }
}

/// `\,` and `\2C` both stand for a comma. `None` if the result is no text.
fn unescape(value: &str) -> Option<String> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'\\' {
            out.push(*byte);
            continue;
        }
        let mut decoded = [0_u8; 1];
        match rest.split_at_checked(2) {
            Some((pair, after)) if hex::decode_to_slice(pair, &mut decoded).is_ok() => {
                out.push(decoded[0]);
                rest = after;
            }
            _ => {
                let (escaped, after) = rest.split_first()?;
                out.push(*escaped);
                rest = after;
            }
        }
    }
    String::from_utf8(out).ok()
}

fn split_unescaped(text: &str, separator: char) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == separator {
            parts.push(&text[start..at]);
            start = at + c.len_utf8();
        }
    }
    parts.push(&text[start..]);
    parts
}

fn attribute(part: &AttributeTypeAndValue<'_>) -> String {
    let oid = part.attr_type();
    let kind = match oid.as_bytes() {
        [0x55, 4, 3] => "CN".to_owned(),
        [0x55, 4, 5] => "SERIALNUMBER".to_owned(),
        [0x55, 4, 6] => "C".to_owned(),
        [0x55, 4, 7] => "L".to_owned(),
        [0x55, 4, 8] => "ST".to_owned(),
        [0x55, 4, 9] => "STREET".to_owned(),
        [0x55, 4, 10] => "O".to_owned(),
        [0x55, 4, 11] => "OU".to_owned(),
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1] => "UID".to_owned(),
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25] => "DC".to_owned(),
        // Hex where an arc is too large: in upper case, as [`normalise`] has types.
        _ => oid.to_id_string().to_ascii_uppercase(),
    };
    match super::string_value(part) {
        Some(value) => format!("{kind}={}", escape(&value)),
        None => format!("{kind}=#{}", hex::encode(part.as_slice())),
    }
}

/// RFC 4514 section 2.4. Control characters become hex pairs, so that a name is always one line.
fn escape(value: &str) -> String {
    let last = value.chars().count().saturating_sub(1);
    let mut out = String::with_capacity(value.len());
    for (at, c) in value.chars().enumerate() {
        let edge_space = c == ' ' && (at == 0 || at == last);
        match c {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            '#' if at == 0 => out.push_str("\\#"),
            _ if edge_space => out.push_str("\\ "),
            c if c.is_control() => {
                let mut bytes = [0_u8; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    out.push_str(&format!("\\{byte:02X}"));
                }
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn people_may_write_spaces_and_small_letters() {
        assert_eq!(normalise("cn = Client CA, o=Example"), "CN=Client CA,O=Example");
        assert_eq!(normalise("CN=Client CA,O=Example"), "CN=Client CA,O=Example");
        assert_eq!(normalise(r"CN=a\,b , OU=x+UID=y"), r"CN=a\,b,OU=x+UID=y");
    }

    #[test]
    fn an_escaped_space_at_the_end_stays() {
        assert_eq!(normalise(r"CN=a\ ,O=b"), r"CN=a\ ,O=b");
        assert_eq!(normalise(r"CN=a\\  ,O=b"), r"CN=a\\,O=b");
        // Else it would escape the comma, and two parts would be one.
        assert_eq!(normalise(r" a\ ,O=b"), r"a\ ,O=b");
    }

    /// Trimmed, it would be another name, and perhaps that of another CA.
    #[test]
    fn a_space_of_another_script_is_part_of_the_name() {
        for name in ["CN=\u{a0}a\u{2003},O=b", "CN=a,O=\u{3000}"] {
            assert_eq!(normalise(name), name);
        }
    }

    #[test]
    fn both_ways_of_escaping_are_one() {
        assert_eq!(normalise(r"CN=M\C3\BCller\2C x"), "CN=Müller\\, x");
        assert_eq!(normalise(r"CN=a\\b"), r"CN=a\\b");
    }

    #[test]
    fn a_value_cannot_pretend_to_be_two_parts() {
        assert_eq!(escape("a,O=b"), r"a\,O=b");
        assert_eq!(escape(" #x "), r"\ #x\ ");
        assert_eq!(escape("#x\n"), r"\#x\0A");
        assert_eq!(escape(""), "");
    }
}
