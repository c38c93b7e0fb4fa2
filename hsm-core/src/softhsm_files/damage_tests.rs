//! Damage to the copy of `token.object`: it is made anew, or is of no use. It never replaces a whole `token.object`, and
//! never a torn one by something else than was copied.

use super::*;
use crate::object_file::{SO_PIN, TOKEN_SERIAL};

/// A file is damaged so often in each way, unless `HSM_DAMAGE_ROUNDS` says how often.
const ROUNDS: u64 = 60;
const SEED: u64 = 0x5eed_0020;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit as u64) as usize
    }
}

fn attribute(kind: u64, storage: u64, value: &[u8]) -> Vec<u8> {
    [kind.to_be_bytes().as_slice(), &storage.to_be_bytes(), value].concat()
}

fn counted(kind: u64, value: &[u8]) -> Vec<u8> {
    let count = (value.len() as u64).to_be_bytes();
    attribute(kind, 3, &[count.as_slice(), value].concat())
}

/// As SoftHSM writes it: label, serial, flags and both PINs.
fn token_object() -> Vec<u8> {
    [
        7_u64.to_be_bytes().to_vec(),
        attribute(1, 1, &[0xff]),
        counted(TOKEN_SERIAL - 1, b"slot-a"),
        counted(TOKEN_SERIAL, b"104c30e7692f2727"),
        attribute(TOKEN_FLAGS, 2, &0x42d_u64.to_be_bytes()),
        counted(SO_PIN, &[3; 72]),
        counted(SO_PIN + 1, &[4; 72]),
    ]
    .concat()
}

fn flipped(contents: &[u8], bit: usize) -> Vec<u8> {
    let mut contents = contents.to_vec();
    contents[bit / 8] ^= 1 << (bit % 8);
    contents
}

/// What a torn `token.object` would be replaced by.
fn restored(stored: &[u8]) -> Option<Vec<u8>> {
    let copy = copy::unpack(stored)?;
    is_torn(&object_file::parse(b""), &object_file::parse(&copy)).then_some(copy)
}

#[test]
fn no_flipped_bit_of_a_copy_is_ever_restored() {
    let whole = token_object();
    let stored = copy::pack(&whole);
    assert_eq!(restored(&stored).as_ref(), Some(&whole));
    for bit in 0..stored.len() * 8 {
        assert_eq!(restored(&flipped(&stored, bit)), None, "bit {bit}");
    }
}

#[test]
fn no_damaged_copy_replaces_a_whole_token_object() {
    let whole = token_object();
    let now = object_file::parse(&whole);
    let stored = copy::pack(&whole);
    let flips = (0..stored.len() * 8).map(|bit| flipped(&stored, bit));
    let cuts = (0..stored.len()).map(|length| stored[..length].to_vec());
    // Of an earlier release, without a digest: the type of the flags is where one bit once made a copy look like more
    // than the token has.
    let old = (0..whole.len() * 8).map(|bit| flipped(&whole, bit));
    for (number, stored) in flips.chain(cuts).chain(old).enumerate() {
        let copy = copy::unpack(&stored).unwrap_or_default();
        assert!(!is_torn(&now, &object_file::parse(&copy)), "damage {number}");
    }
}

#[test]
fn a_copy_of_an_earlier_release_is_restored_and_made_anew() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("1f2e-uuid");
    std::fs::create_dir(&dir).unwrap();
    let whole = token_object();
    std::fs::write(copy_of(&dir), &whole).unwrap();
    std::fs::write(dir.join(TOKEN_OBJECT), b"").unwrap();
    assert_eq!(restore_torn_tokens(root.path()).unwrap(), ["104c30e7692f2727"]);
    let files = TokenFiles::locate(root.path(), "104c30e7692f2727").unwrap();
    files.unwrap().back_up().unwrap();
    assert_eq!(std::fs::read(copy_of(&dir)).unwrap(), copy::pack(&whole));
}

#[test]
fn a_damaged_copy_beside_a_whole_token_object_is_made_anew() {
    let rounds = std::env::var("HSM_DAMAGE_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("1f2e-uuid");
    std::fs::create_dir(&dir).unwrap();
    let whole = token_object();
    let stored = copy::pack(&whole);
    std::fs::write(dir.join(TOKEN_OBJECT), &whole).unwrap();
    let mut random = Random(SEED);
    for round in 0..rounds * 2 {
        let damaged = if round % 2 == 0 {
            flipped(&stored, random.below(stored.len() * 8))
        } else {
            stored[..random.below(stored.len())].to_vec()
        };
        std::fs::write(copy_of(&dir), damaged).unwrap();
        let told = format!("round {round}, seed {SEED:#x}");
        assert!(restore_torn_tokens(root.path()).unwrap().is_empty(), "{told}");
        assert_eq!(std::fs::read(dir.join(TOKEN_OBJECT)).unwrap(), whole, "{told}");
        let files = TokenFiles::locate(root.path(), "104c30e7692f2727").unwrap();
        files.unwrap().back_up().unwrap();
        assert_eq!(std::fs::read(copy_of(&dir)).unwrap(), stored, "{told}");
    }
    println!("copy of token.object: {rounds} flips, {rounds} cuts, all made anew (seed {SEED:#x})");
}
