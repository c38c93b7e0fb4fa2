//! Reading SoftHSM's object files, only to tell a whole one from a torn one and to find a
//! token's serial number. It never writes one, and what it does not understand it calls unknown.

/// `CKA_CLASS`, and `CKO_PRIVATE_KEY` as its value stands in a file: kind(8) number(8).
const CLASS: u64 = 0;
const PRIVATE_KEY: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3];
/// Attributes of `token.object`, in the order SoftHSM writes them.
pub(crate) const TOKEN_LABEL: u64 = VENDOR + 1;
pub(crate) const TOKEN_SERIAL: u64 = VENDOR + 2;
pub(crate) const TOKEN_FLAGS: u64 = VENDOR + 3;
#[cfg(test)]
pub(crate) const SO_PIN: u64 = VENDOR + 4;
/// Of the fields into which SoftHSM copies label and serial number without a look at their length (`CK_TOKEN_INFO`).
const FIELDS: [(u64, &str, usize); 2] = [(TOKEN_LABEL, "label", 32), (TOKEN_SERIAL, "serial number", 16)];
/// SoftHSM's own attribute range: `CKA_VENDOR_DEFINED` + "SH".
const VENDOR: u64 = 0x8000_5348;

/// What a file holds:
///
/// ```text
/// generation(8) { attribute type(8) kind(8) value }*      all numbers big-endian
/// kind 1: bool(1)   2: number(8)   3: length(8) bytes   4: length(8) attribute map   5: count(8) numbers
/// ```
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ObjectFile {
    /// Attribute types with kind and value as they stand in the file. Says nothing about an end
    /// that was cut off exactly between two attributes.
    Whole(Vec<(u64, Vec<u8>)>),
    /// It ends in the middle of something; the attributes before that.
    Torn(Vec<(u64, Vec<u8>)>),
    /// A kind this reader does not know.
    Unknown,
}

impl ObjectFile {
    /// The attribute of this type, as it stands in the file.
    pub(crate) fn attribute(&self, kind: u64) -> Option<&[u8]> {
        match self {
            Self::Whole(attributes) | Self::Torn(attributes) => attributes
                .iter()
                .find(|(found, _)| *found == kind)
                .map(|(_, value)| value.as_slice()),
            Self::Unknown => None,
        }
    }

    /// Whether it is that of a private key, by what is left of it. SoftHSM writes the class first.
    pub(crate) fn is_private_key(&self) -> bool {
        self.attribute(CLASS) == Some(&PRIVATE_KEY[..])
    }

    /// The serial number in a `token.object`.
    pub(crate) fn serial(&self) -> Option<String> {
        // kind(8) length(8) bytes
        let text = self.attribute(TOKEN_SERIAL)?.get(16..)?;
        Some(String::from_utf8_lossy(text).trim().to_owned())
    }
}

/// Reads a file's contents. An empty file is torn.
pub(crate) fn parse(contents: &[u8]) -> ObjectFile {
    let mut attributes = Vec::new();
    let Some((_generation, mut rest)) = contents.split_first_chunk::<8>() else {
        return ObjectFile::Torn(attributes);
    };
    while !rest.is_empty() {
        let Some((kind, value_len)) = attribute_header(rest) else {
            return ObjectFile::Torn(attributes);
        };
        let Some(value_len) = value_len else {
            return ObjectFile::Unknown;
        };
        // From the kind on: type(8) is left out.
        let Some(value) = rest.get(8..).and_then(|rest| rest.get(..value_len)) else {
            return ObjectFile::Torn(attributes);
        };
        attributes.push((kind, value.to_vec()));
        rest = rest.get(8 + value_len..).unwrap_or_default();
    }
    ObjectFile::Whole(attributes)
}

/// A label or serial number in a `token.object` that is longer than it can be, by its name, and its length.
///
/// SoftHSM 2.6.1 copies it into a field of `CK_TOKEN_INFO` all the same, which its build hardening ends the process over.
pub(crate) fn overlong_name(contents: &[u8]) -> Option<(&'static str, usize)> {
    let parsed = parse(contents);
    let (ObjectFile::Whole(attributes) | ObjectFile::Torn(attributes)) = &parsed else {
        return None;
    };
    attributes.iter().find_map(|(kind, value)| {
        let (_, name, most) = FIELDS.iter().find(|(field, ..)| field == kind)?;
        // kind(8) length(8) bytes
        let length = value.len().saturating_sub(16);
        (length > *most).then_some((*name, length))
    })
}

/// The first length in a file that goes beyond its end, in an attribute of an attribute map too; `None` if there is none.
///
/// SoftHSM asks for that much memory before it looks how much is there. (It does not for the numbers of kind 5.)
pub(crate) fn announced_beyond_the_end(contents: &[u8]) -> Option<u64> {
    beyond_the_end(contents.get(8..)?, true)
}

fn beyond_the_end(mut rest: &[u8], maps: bool) -> Option<u64> {
    loop {
        // From the kind on.
        let value = rest.get(8..)?;
        let (storage, counted) = value.split_first_chunk::<8>()?;
        let storage = u64::from_be_bytes(*storage);
        let (_, length) = attribute_header(rest)?;
        let length = length?;
        if length > value.len() && matches!(storage, 3 | 4) {
            let (count, _) = counted.split_first_chunk::<8>()?;
            return Some(u64::from_be_bytes(*count));
        }
        if storage == 4
            && maps
            && let Some(length) = beyond_the_end(value.get(16..length)?, false)
        {
            return Some(length);
        }
        rest = value.get(length..)?;
    }
}

/// Type of the attribute, and bytes from its kind to its end: `None` inside if the kind is
/// unknown, outside if the bytes do not suffice to tell.
fn attribute_header(bytes: &[u8]) -> Option<(u64, Option<usize>)> {
    let (kind, rest) = bytes.split_first_chunk::<8>()?;
    let (storage, rest) = rest.split_first_chunk::<8>()?;
    let counted = |unit: usize| -> Option<usize> {
        let (count, _) = rest.split_first_chunk::<8>()?;
        // An absurd count makes the value end beyond the file, which then is torn.
        let count = usize::try_from(u64::from_be_bytes(*count)).unwrap_or(usize::MAX / 16);
        Some(16_usize.saturating_add(count.min(usize::MAX / 16).saturating_mul(unit)))
    };
    let length = match u64::from_be_bytes(*storage) {
        1 => Some(8 + 1),
        2 => Some(8 + 8),
        3 | 4 => Some(counted(1)?),
        5 => Some(counted(8)?),
        _ => None,
    };
    Some((u64::from_be_bytes(*kind), length))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u64, storage: u64, value: &[u8]) -> Vec<u8> {
        [kind.to_be_bytes().as_slice(), &storage.to_be_bytes(), value].concat()
    }

    fn counted(kind: u64, storage: u64, count: usize, value: &[u8]) -> Vec<u8> {
        attribute(
            kind,
            storage,
            &[(count as u64).to_be_bytes().as_slice(), value].concat(),
        )
    }

    fn sample() -> Vec<u8> {
        [
            7_u64.to_be_bytes().to_vec(),
            attribute(0, 2, &4_u64.to_be_bytes()),
            attribute(1, 1, &[0xff]),
            counted(0x4000_0212, 4, 17, &[0; 17]),
            counted(0x4000_0600, 5, 2, &[0; 16]),
            counted(TOKEN_SERIAL, 3, 16, b"104c30e7692f2727"),
            counted(SO_PIN, 3, 3, b"xyz"),
        ]
        .concat()
    }

    #[test]
    fn a_whole_file_gives_its_attributes() {
        let parsed = parse(&sample());
        assert!(matches!(&parsed, ObjectFile::Whole(attributes) if attributes.len() == 6));
        assert_eq!(parsed.serial().unwrap(), "104c30e7692f2727");
        assert!(parsed.attribute(TOKEN_FLAGS).is_none());
    }

    #[test]
    fn a_cut_file_is_torn_unless_cut_between_two_attributes() {
        let whole = sample();
        let boundaries = [8, 32, 49, 90, 130, 170];
        for length in 0..whole.len() {
            let torn = matches!(parse(&whole[..length]), ObjectFile::Torn(_));
            assert_eq!(torn, !boundaries.contains(&length), "{length}");
        }
    }

    #[test]
    fn a_length_that_goes_beyond_the_end_is_found_in_a_map_too() {
        let whole = sample();
        assert_eq!(announced_beyond_the_end(&whole), None);
        let lengths = [65, 146, 186];
        for at in lengths {
            for byte in 0..7 {
                let mut damaged = whole.clone();
                damaged[at + byte] ^= 0x40;
                let said = u64::from_be_bytes(*damaged[at..].first_chunk::<8>().unwrap());
                assert_eq!(announced_beyond_the_end(&damaged), Some(said), "{at} {byte}");
            }
        }
        let inner = counted(0x100, 3, usize::MAX, b"");
        let map = counted(0x4000_0212, 4, inner.len(), &inner);
        let contents = [vec![0; 8], map].concat();
        assert!(matches!(parse(&contents), ObjectFile::Whole(_)));
        assert_eq!(announced_beyond_the_end(&contents), Some(u64::MAX));
        for length in 0..whole.len() {
            // Cut off, it announces no more than it had.
            let announced = announced_beyond_the_end(&whole[..length]);
            assert!(announced.is_none_or(|length| length <= 17), "{length}");
        }
    }

    #[test]
    fn a_name_that_is_longer_than_its_field_is_found_whatever_it_was_before() {
        let named = |kind: u64, length: usize| {
            let first = counted(TOKEN_LABEL, 3, 32, &[b'l'; 32]);
            [vec![0; 8], first, counted(kind, 3, length, &vec![b'x'; length])].concat()
        };
        for (kind, length, found) in [
            (TOKEN_SERIAL, 16, None),
            (TOKEN_SERIAL, 17, Some(("serial number", 17))),
            (TOKEN_LABEL, 33, Some(("label", 33))),
            (SO_PIN, 72, None),
        ] {
            assert_eq!(overlong_name(&named(kind, length)), found, "{kind:x} {length}");
        }
        let torn = named(TOKEN_LABEL, 40);
        assert_eq!(overlong_name(&torn[..torn.len() - 1]), None);
        assert_eq!(overlong_name(&[torn, vec![0; 3]].concat()), Some(("label", 40)));
    }

    #[test]
    fn a_private_key_is_known_by_the_first_attribute() {
        let with =
            |class: u64| parse(&[vec![0; 8], attribute(0, 2, &class.to_be_bytes()), vec![0; 9]].concat());
        assert!(matches!(with(3), ObjectFile::Torn(_)) && with(3).is_private_key());
        assert!(!with(4).is_private_key() && !parse(b"").is_private_key());
    }

    #[test]
    fn an_unknown_kind_is_never_called_torn() {
        let contents = [vec![0; 8], attribute(5, 9, b"whatever")].concat();
        assert_eq!(parse(&contents), ObjectFile::Unknown);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(contents: Vec<u8>) {
            let _ = (parse(&contents).serial(), announced_beyond_the_end(&contents), overlong_name(&contents));
        }
    }
}
