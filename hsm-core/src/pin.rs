//! Making PINs for software tokens, and refusing those that could be guessed: SoftHSM guards
//! its files with some 1,500 hashes of the PIN, so the PIN's own entropy is all there is.

use zeroize::{Zeroize, Zeroizing};

use crate::secrets::{Pin, RandomError};

/// What a PIN of a software token has to carry.
const REQUIRED_BITS: f64 = 128.0;
/// Characters of a generated PIN: 28 × 5 = 140 bits, within the 32 characters many tokens allow,
/// and enough for [`has_enough_entropy`] even when no digit happens to be drawn.
const GENERATED_CHARS: usize = 28;
/// Crockford's base 32: no I, L, O or U, so that a PIN can be read aloud and typed.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// A random PIN of enough bits has fewer different characters with a chance below 1e-8.
const MIN_DISTINCT: usize = 6;

/// A random PIN of 28 characters from `0-9A-Z` without I, L, O, U: 140 bits.
pub fn generate_pin() -> Result<Pin, RandomError> {
    let mut random = Zeroizing::new([0_u8; GENERATED_CHARS]);
    getrandom::fill(random.as_mut_slice())?;
    let mut text = String::with_capacity(GENERATED_CHARS);
    for byte in random.iter() {
        // 256 is a multiple of 32: the low five bits are uniform.
        text.push(char::from(ALPHABET[usize::from(byte & 31)]));
    }
    Ok(Pin::new(text))
}

/// Whether a PIN *could* carry 128 random bits: long enough for the characters it uses, and
/// neither repeating, nor running (`abcdef…`), nor of a handful of characters.
///
/// This is an upper bound and no proof: a sentence of a book passes. It catches what people
/// type when asked for a PIN.
#[must_use]
pub fn has_enough_entropy(pin: &Pin) -> bool {
    let mut chars: Vec<char> = pin.expose().chars().collect();
    let enough = looks_random(&chars);
    chars.zeroize();
    enough
}

#[allow(clippy::cast_precision_loss)] // A PIN's length is far below 2^52.
fn looks_random(chars: &[char]) -> bool {
    if distinct(chars) < MIN_DISTINCT || mostly_runs(chars) {
        return false;
    }
    period(chars) as f64 * bits_per_char(chars) >= REQUIRED_BITS
}

fn distinct(chars: &[char]) -> usize {
    let mut sorted = chars.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let count = sorted.len();
    sorted.zeroize();
    count
}

/// Three quarters or more of the steps from one character to the next are -1, 0 or +1.
fn mostly_runs(chars: &[char]) -> bool {
    let steps = chars.len().saturating_sub(1);
    let small = chars
        .windows(2)
        .filter(|pair| u32::from(pair[0]).abs_diff(u32::from(pair[1])) <= 1)
        .count();
    steps > 0 && small * 4 >= steps * 3
}

/// Length of the block that repeated gives the PIN (what a guesser has to find), or of the PIN.
/// Longer blocks than half of it are no pattern: a random PIN may well end as it began.
fn period(chars: &[char]) -> usize {
    (1..=chars.len() / 2)
        .find(|&p| chars[p..].iter().zip(chars).all(|(a, b)| a == b))
        .unwrap_or(chars.len())
}

/// log2 of the smallest usual alphabet the PIN fits in.
fn bits_per_char(chars: &[char]) -> f64 {
    let all = |test: fn(&char) -> bool| chars.iter().all(test);
    let any = |test: fn(&char) -> bool| chars.iter().any(test);
    let size: u32 = if all(char::is_ascii_digit) {
        10
    } else if all(|c| matches!(c, '0'..='9' | 'a'..='f')) || all(|c| matches!(c, '0'..='9' | 'A'..='F')) {
        16
    } else {
        let (lower, upper) = (any(char::is_ascii_lowercase), any(char::is_ascii_uppercase));
        let letters = 26 * (u32::from(lower) + u32::from(upper));
        // Both cases are taken for base 62, in which a short PIN may well lack digits.
        let digits = if (lower && upper) || any(char::is_ascii_digit) {
            10
        } else {
            0
        };
        // Everything else, other scripts too, counts as one keyboard's punctuation.
        let others = if any(|c| !c.is_ascii_alphanumeric()) {
            32
        } else {
            0
        };
        letters + digits + others
    };
    f64::from(size).log2()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn enough(text: &str) -> bool {
        has_enough_entropy(&Pin::new(text.to_owned()))
    }

    #[test]
    fn a_generated_pin_is_accepted_printable_and_never_the_same() {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let pin = generate_pin().unwrap();
            assert_eq!(pin.expose().len(), 28);
            assert!(pin.expose().bytes().all(|b| ALPHABET.contains(&b)));
            assert!(has_enough_entropy(&pin), "a generated PIN was refused");
            assert!(seen.insert(pin.expose().to_owned()));
        }
    }

    #[test]
    fn usual_random_forms_of_128_bits_are_accepted() {
        assert!(enough("9f86d081884c7d659a2feaa0c55ad015")); // 32 hex digits
        assert!(enough("n4bQgYhMfWWaLxqgxVrQFa")); // 22 base64 characters
        assert!(enough("583920174468302915774620983311750492863")); // 39 decimal digits
    }

    #[test]
    fn what_people_type_is_refused() {
        for pin in [
            "",
            "1234",
            "correcthorse",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
            "012345678901234567890123456789012345678901234567890",
            "hunter2hunter2hunter2hunter2hunter2hunter2",
            "9f86d081884c7d659a2feaa0c55ad01", // 31 hex digits: 124 bits
        ] {
            assert!(!enough(pin), "{pin:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn no_pin_makes_the_check_panic(text: String) {
            let _ = enough(&text);
        }
    }
}
