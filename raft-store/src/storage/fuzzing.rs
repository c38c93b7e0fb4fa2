//! As `crate::fuzzing`, for what lies on disk. Almost no change of bytes survives a checksum, so each function can be
//! given bytes without one and puts the right one to them: the first byte says whether.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::path::Path;

use super::control::{parse_slot, slot};
use super::frame::{Form, MAX_ROW, UnpackedRow, Unpacker, pack};
use super::machine::row_hash;
use super::snapshot::{read_from, write_to};
use crate::codec;

/// The first byte of an input that has its checksums.
const WHOLE: u8 = 0;
/// The first byte of one that gets them here.
const TO_BE_SUMMED: u8 = 1;

/// Rows cut into frames: any number of them, each as length of the key (u8), length of the frame (u16, big-endian), key
/// and frame. A row that comes out goes in again and comes out the same.
pub fn frames(data: &[u8]) -> bool {
    let Some((mode, mut data)) = data.split_first() else {
        return false;
    };
    let mut unpacker = Unpacker::default();
    let mut rows = 0;
    while let Some(([key, high, low], rest)) = data.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let Some((key, rest)) = rest.split_at_checked(usize::from(*key)) else {
            return false;
        };
        let Some((frame, rest)) = rest.split_at_checked(length) else {
            return false;
        };
        data = rest;
        let mut frame = frame.to_vec();
        if *mode == TO_BE_SUMMED {
            let sum = crc32c::crc32c_append(crc32c::crc32c(key), &frame);
            frame.extend_from_slice(&sum.to_be_bytes());
        }
        match unpacker.push(key, &frame) {
            Ok(None) => {}
            Ok(Some(row)) => {
                goes_in_and_out(&row);
                rows += 1;
            }
            Err(_) => return false,
        }
    }
    unpacker.finish().is_ok() && rows > 0
}

fn goes_in_and_out(row: &UnpackedRow) {
    assert!(row.value.len() <= MAX_ROW);
    let mut unpacker = Unpacker::default();
    let mut out = None;
    for (key, frame) in pack(row.form, &row.key, &row.value).unwrap() {
        assert!(out.is_none(), "a row has ended before its last frame");
        out = unpacker.push(&key, &frame).unwrap();
    }
    unpacker.finish().unwrap();
    assert_eq!(out.as_ref(), Some(row));
}

/// A slot of `control`: what is accepted is what is written, byte by byte.
pub fn control_slot(data: &[u8]) -> bool {
    let Some((mode, data)) = data.split_first() else {
        return false;
    };
    let mut bytes = data.to_vec();
    if *mode == TO_BE_SUMMED {
        bytes.extend_from_slice(&crc32c::crc32c(data).to_be_bytes());
    }
    let Ok(Some((sequence, control))) = parse_slot(&bytes) else {
        return false;
    };
    let written = slot(sequence, &control).unwrap();
    assert!(bytes.starts_with(&written));
    true
}

/// A snapshot's file: what is accepted is written to a file that says the same. Of one that gets its checksums here
/// only the blocks are given.
pub fn snapshot(data: &[u8]) -> bool {
    let shown = Path::new("x");
    let file = match data.split_first() {
        Some((&WHOLE, file)) => file.to_vec(),
        Some((&TO_BE_SUMMED, blocks)) => summed(blocks),
        _ => return false,
    };
    let Ok(contents) = read_from(file.as_slice(), shown) else {
        return false;
    };
    let mut written = Vec::new();
    write_to(&mut written, &contents.meta, &contents.rows).unwrap();
    assert!(written.len() <= file.len());
    let again = read_from(written.as_slice(), shown).unwrap();
    assert_eq!(again.meta, contents.meta);
    assert_eq!(again.digest, contents.digest);
    assert_eq!(again.rows.len(), contents.rows.len());
    let mut rewritten = Vec::new();
    write_to(&mut rewritten, &again.meta, &again.rows).unwrap();
    assert_eq!(rewritten, written);
    true
}

/// A file of these blocks, with its count, digest and checksum.
fn summed(blocks: &[u8]) -> Vec<u8> {
    let mut file = b"HSMSNAP1".to_vec();
    file.extend_from_slice(blocks);
    let (mut rest, mut count, mut digest) = (blocks, 0_u64, 0_u128);
    let mut meta = true;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((block, after)) = after.split_at_checked(length) else {
            break;
        };
        rest = after;
        // The first one says what the snapshot covers.
        if std::mem::take(&mut meta) {
            continue;
        }
        count += 1;
        if let Ok((kind, version, key, value)) = codec::decode::<(u8, u8, Vec<u8>, Vec<u8>)>(block) {
            digest = digest.wrapping_add(row_hash(Form { kind, version }, &key, &value));
        }
    }
    file.extend_from_slice(&u32::MAX.to_be_bytes());
    file.extend_from_slice(&count.to_be_bytes());
    file.extend_from_slice(&digest.to_be_bytes());
    let crc = crc32c::crc32c(&file);
    file.extend_from_slice(&crc.to_be_bytes());
    file
}
