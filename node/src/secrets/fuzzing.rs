//! See [`crate::fuzzing`].

use super::{MAX_SECRET, secret_in};

/// A file with a secret: one newline less, and nothing else changed. What is refused is not repeated, because what
/// is said of it are fixed words.
pub fn secret_file(data: &[u8]) -> bool {
    let Ok(secret) = secret_in(data) else {
        return false;
    };
    assert!(!secret.is_empty() && data.len() <= MAX_SECRET);
    let rest = data.strip_prefix(secret.as_bytes());
    assert!(matches!(rest, Some(b"" | b"\n" | b"\r\n" | b"\r")), "{rest:?}");
    // Written again as an editor would, it is the same secret.
    if secret.len() < MAX_SECRET {
        let edited = format!("{secret}\n");
        assert!(secret_in(edited.as_bytes()) == Ok(secret) || secret.ends_with('\r'));
    }
    true
}
