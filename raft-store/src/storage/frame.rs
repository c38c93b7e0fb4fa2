//! Framing of rows: each physical value carries what it is, in which version it is encoded, and a checksum over
//! key and contents; values too large for one sled leaf are cut into chunks.
//!
//! ```text
//! offset  0  magic 'H' 'R'
//!         2  kind              u8   RowKind or a log kind
//!         3  row version       u8   of the row's encoding
//!         4  chunks            u16  big endian, chunks of this row
//!         6  total length      u32  big endian, bytes of the whole row
//!        10  chunk's contents
//!       end  crc32c            u32  big endian, over the physical key and everything before
//! ```
//! The physical key is the row's key followed by the chunk's number, u16 big endian.

use super::error::StoreFailure;
use crate::state::table::RowKind;

/// Contents of one chunk. sled moves a leaf to unsynced blob files by its total size; values this small
/// never make one that large.
pub(crate) const CHUNK: usize = 6 * 1024 - OVERHEAD;
const OVERHEAD: usize = HEAD + 4;
const HEAD: usize = 10;
const MAGIC: [u8; 2] = *b"HR";
/// Largest row: a command at its limit with its log id, and what `RowKind::limit` allows.
pub(crate) const MAX_ROW: usize = 128 * 1024;
const _: () = assert!(crate::codec::MAX_COMMAND_BYTES + 1024 <= MAX_ROW);

/// What a row is, and the version of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) kind: u8,
    pub(crate) version: u8,
}

/// Rows that are none of the state.
pub(crate) const LOG: Form = Form {
    kind: 200,
    version: 1,
};
pub(crate) const VOTE: Form = Form {
    kind: 201,
    version: 1,
};
pub(crate) const PURGED: Form = Form {
    kind: 202,
    version: 1,
};
pub(crate) const POINTER: Form = Form {
    kind: 203,
    version: 1,
};

impl From<RowKind> for Form {
    fn from(kind: RowKind) -> Self {
        let version = kind.version();
        Self {
            kind: kind.into(),
            version,
        }
    }
}

impl Form {
    /// The error of a row that is of no form known here. Its checksum is right, so it was written as it is.
    pub(crate) fn unknown(self) -> StoreFailure {
        StoreFailure::Newer(format!(
            "a row of kind {} and version {}",
            self.kind, self.version
        ))
    }
}

/// A physical key and its frame.
pub(crate) type Pair = (Vec<u8>, Vec<u8>);

/// Cuts a row into physical key-value pairs.
pub(crate) fn pack(form: Form, key: &[u8], value: &[u8]) -> Result<Vec<Pair>, StoreFailure> {
    if value.len() > MAX_ROW {
        return Err(StoreFailure::Damaged(format!(
            "a row of kind {} has {} bytes, more than {MAX_ROW}",
            form.kind,
            value.len()
        )));
    }
    let parts: Vec<&[u8]> = if value.is_empty() {
        vec![&[]]
    } else {
        value.chunks(CHUNK).collect()
    };
    let count = parts.len() as u16;
    let packed = parts.into_iter().enumerate().map(|(number, part)| {
        let key = chunk_key(key, number as u16);
        let mut frame = Vec::with_capacity(part.len() + OVERHEAD);
        frame.extend_from_slice(&MAGIC);
        frame.extend_from_slice(&[form.kind, form.version]);
        frame.extend_from_slice(&count.to_be_bytes());
        frame.extend_from_slice(&(value.len() as u32).to_be_bytes());
        frame.extend_from_slice(part);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&key), &frame);
        frame.extend_from_slice(&crc.to_be_bytes());
        (key, frame)
    });
    Ok(packed.collect())
}

/// The physical key of a row's chunk.
pub(crate) fn chunk_key(key: &[u8], number: u16) -> Vec<u8> {
    [key, &number.to_be_bytes()].concat()
}

/// How many chunks a value of `len` bytes takes.
pub(crate) fn chunks_of(len: usize) -> u16 {
    len.div_ceil(CHUNK).max(1) as u16
}

/// Puts rows together again from physical pairs in key order.
#[derive(Default)]
pub(crate) struct Unpacker {
    open: Option<Open>,
}

struct Open {
    form: Form,
    key: Vec<u8>,
    value: Vec<u8>,
    next: u16,
    chunks: u16,
    total: usize,
}

/// A row put together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnpackedRow {
    pub(crate) form: Form,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl Unpacker {
    /// Takes the next pair; returns a row when it is complete.
    pub(crate) fn push(&mut self, key: &[u8], frame: &[u8]) -> Result<Option<UnpackedRow>, StoreFailure> {
        let bad = |why: &str| StoreFailure::Damaged(format!("row {}: {why}", hex::encode(key)));
        let (row_key, number) = key
            .split_at_checked(key.len().wrapping_sub(2))
            .ok_or_else(|| bad("its key is too short"))?;
        let number = u16::from_be_bytes([number[0], number[1]]);
        let body = check(key, frame).ok_or_else(|| bad("its frame is damaged"))?;
        let (form, chunks, total, part) = body;
        let mut open = match self.open.take() {
            Some(open) if open.key == row_key => open,
            Some(open) => {
                return Err(bad(&format!(
                    "row {} before it is incomplete",
                    hex::encode(open.key)
                )));
            }
            None => Open {
                form,
                key: row_key.to_vec(),
                value: Vec::new(),
                next: 0,
                chunks,
                total,
            },
        };
        if open.next != number || open.chunks != chunks || open.total != total || open.form != form {
            return Err(bad("its chunks do not belong together"));
        }
        open.value.extend_from_slice(part);
        open.next += 1;
        if open.next < open.chunks {
            self.open = Some(open);
            return Ok(None);
        }
        if open.value.len() != open.total {
            return Err(bad("its length is wrong"));
        }
        Ok(Some(UnpackedRow {
            form: open.form,
            key: open.key,
            value: open.value,
        }))
    }

    /// Refuses when a row was cut off at the end.
    pub(crate) fn finish(self) -> Result<(), StoreFailure> {
        match self.open {
            None => Ok(()),
            Some(open) => Err(StoreFailure::Damaged(format!(
                "row {} is incomplete",
                hex::encode(open.key)
            ))),
        }
    }
}

fn check<'a>(key: &[u8], frame: &'a [u8]) -> Option<(Form, u16, usize, &'a [u8])> {
    let (body, crc) = frame.split_at_checked(frame.len().checked_sub(4)?)?;
    if crc32c::crc32c_append(crc32c::crc32c(key), body) != u32::from_be_bytes(crc.try_into().ok()?) {
        return None;
    }
    let (head, part) = body.split_at_checked(HEAD)?;
    if head[..2] != MAGIC {
        return None;
    }
    let chunks = u16::from_be_bytes([head[4], head[5]]);
    let total = u32::from_be_bytes([head[6], head[7], head[8], head[9]]) as usize;
    let form = Form {
        kind: head[2],
        version: head[3],
    };
    (chunks > 0 && total <= MAX_ROW).then_some((form, chunks, total, part))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unpack(pairs: &[(Vec<u8>, Vec<u8>)]) -> Result<Vec<UnpackedRow>, StoreFailure> {
        let mut unpacker = Unpacker::default();
        let mut rows = Vec::new();
        for (key, frame) in pairs {
            rows.extend(unpacker.push(key, frame)?);
        }
        unpacker.finish()?;
        Ok(rows)
    }

    const FORM: Form = Form { kind: 7, version: 3 };

    /// Head, contents and checksum: of a short row, and of the first and last chunk of a long one.
    #[test]
    fn golden_bytes_of_frames() {
        let pairs = pack(FORM, b"k", b"value").unwrap();
        assert_eq!(hex::encode(&pairs[0].0), "6b0000");
        let frame = concat!("4852", "07", "03", "0001", "00000005", "76616c7565", "7e1e22fb");
        assert_eq!(hex::encode(&pairs[0].1), frame);
        let long = pack(FORM, b"k", &vec![0xab; CHUNK + 1]).unwrap();
        let [first, last] = &long[..] else { panic!() };
        assert_eq!(hex::encode(&first.0), "6b0000");
        assert_eq!(hex::encode(&first.1[..HEAD]), "485207030002000017f3");
        assert_eq!(hex::encode(&first.1[HEAD + CHUNK..]), "2d8c97b7");
        assert_eq!(hex::encode(&last.0), "6b0001");
        assert_eq!(hex::encode(&last.1), "485207030002000017f3ab8dc05653");
    }

    #[test]
    fn a_row_at_its_maximum_is_cut_into_small_chunks_and_comes_back() {
        let value: Vec<u8> = (0..MAX_ROW).map(|i| i as u8).collect();
        let pairs = pack(FORM, b"key", &value).unwrap();
        assert!(pairs.iter().all(|(_, frame)| frame.len() <= 6 * 1024));
        assert_eq!(pairs.len(), usize::from(chunks_of(MAX_ROW)));
        let key = b"key".to_vec();
        let form = FORM;
        assert_eq!(unpack(&pairs).unwrap(), [UnpackedRow { form, key, value }]);
        assert!(pack(FORM, b"key", &vec![0; MAX_ROW + 1]).is_err());
    }

    #[test]
    fn what_commands_may_make_fits_into_a_row() {
        for kind in RowKind::STATE {
            assert!(kind.limit() <= MAX_ROW, "{kind}");
        }
    }

    #[test]
    fn a_missing_chunk_is_refused_wherever_it_is() {
        let pairs = pack(FORM, b"key", &vec![3; 3 * CHUNK]).unwrap();
        for gone in 0..pairs.len() {
            let mut cut = pairs.clone();
            cut.remove(gone);
            assert!(unpack(&cut).is_err(), "chunk {gone}");
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_key_or_frame_is_noticed(value in prop::collection::vec(any::<u8>(), 0..64), bit in any::<usize>()) {
            let (mut key, mut frame) = pack(FORM, b"a key", &value).unwrap().remove(0);
            let at = bit % ((key.len() + frame.len()) * 8);
            match at / 8 {
                byte if byte < key.len() => key[byte] ^= 1 << (at % 8),
                byte => frame[byte - key.len()] ^= 1 << (at % 8),
            }
            prop_assert!(unpack(&[(key, frame)]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(key in prop::collection::vec(any::<u8>(), 0..20), frame in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = unpack(&[(key, frame)]);
        }
    }
}
