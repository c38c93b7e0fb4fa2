//! Owners of secret bytes: plaintexts, PINs, fixed-size keys. They are wiped when dropped and
//! must never gain `Debug`, `Display`, `Serialize` or `Clone`: what cannot be printed cannot
//! end up in a log.

use zeroize::{Zeroize, Zeroizing};

/// The operating system could not give random bytes. Nothing that needs them may go on.
#[derive(Debug, thiserror::Error)]
#[error("the operating system's random source failed ({0}); refusing to go on with predictable bytes")]
pub struct RandomError(#[from] getrandom::Error);

/// `N` bytes from the operating system's random source.
///
/// For public values (ids, nonces). Secrets are made with [`SecretBytes::random`], which does
/// not leave them on the stack.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], RandomError> {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// A caller's plaintext, wiped when dropped.
///
/// The buffer is wiped as it is at the end: a `Vec` that grew on its way here has already left
/// copies behind, so make it with its final capacity.
pub struct Plaintext(Zeroizing<Vec<u8>>);

impl Plaintext {
    /// Takes the bytes over.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// This many bytes from the operating system's random source: a data key.
    pub fn random(length: usize) -> Result<Self, RandomError> {
        let mut bytes = Zeroizing::new(vec![0_u8; length]);
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The bytes, for the one call that needs them.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True for the empty plaintext, which is a valid one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes, still wiped when dropped.
    #[must_use]
    pub fn into_inner(self) -> Zeroizing<Vec<u8>> {
        self.0
    }
}

impl From<Zeroizing<Vec<u8>>> for Plaintext {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
}

/// A token's PIN (or SO PIN), wiped when dropped.
pub struct Pin(Zeroizing<String>);

impl Pin {
    /// Takes the text over. Trimming a file's trailing newline is the reader's job: a PIN may
    /// contain spaces.
    #[must_use]
    pub fn new(pin: String) -> Self {
        Self(Zeroizing::new(pin))
    }

    /// The text, for `C_Login` and `C_InitToken` only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// A secret of a fixed length, on the heap so that moving it leaves no copy, wiped when dropped.
pub struct SecretBytes<const N: usize>(Box<[u8; N]>);

/// A 256-bit key.
pub type SecretBytes32 = SecretBytes<32>;

impl<const N: usize> SecretBytes<N> {
    /// All zeros, to be filled in place with [`SecretBytes::expose_mut`].
    #[must_use]
    pub fn zeroed() -> Self {
        Self(Box::new([0_u8; N]))
    }

    /// Takes the bytes over and wipes the array they came in.
    #[must_use]
    pub fn new(bytes: &mut [u8; N]) -> Self {
        let mut secret = Self::zeroed();
        secret.0.copy_from_slice(bytes.as_slice());
        bytes.as_mut_slice().zeroize();
        secret
    }

    /// `N` bytes from the operating system's random source.
    pub fn random() -> Result<Self, RandomError> {
        let mut secret = Self::zeroed();
        getrandom::fill(secret.0.as_mut_slice())?;
        Ok(secret)
    }

    /// The bytes, for the one call that needs them.
    #[must_use]
    pub fn expose(&self) -> &[u8; N] {
        &self.0
    }

    /// The bytes, to be filled in place.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        &mut self.0
    }
}

impl<const N: usize> Drop for SecretBytes<N> {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_of_random_bytes_differ() {
        assert_ne!(random_bytes::<16>().unwrap(), random_bytes::<16>().unwrap());
        assert!(SecretBytes32::random().unwrap().expose() != &[0_u8; 32]);
        let key = Plaintext::random(32).unwrap();
        assert!(key.len() == 32 && key.as_slice() != [0_u8; 32]);
    }

    #[test]
    fn taking_an_array_over_wipes_it() {
        let mut source = [7_u8; 8];
        let secret = SecretBytes::new(&mut source);
        assert_eq!(source, [0_u8; 8]);
        assert_eq!(secret.expose(), &[7_u8; 8]);
    }

    #[test]
    fn a_plaintext_gives_back_what_it_took() {
        let plaintext = Plaintext::new(b"abc".to_vec());
        assert_eq!(
            (plaintext.len(), plaintext.is_empty(), plaintext.as_slice()),
            (3, false, b"abc".as_slice())
        );
        assert_eq!(plaintext.into_inner().as_slice(), b"abc");
        assert!(Plaintext::new(Vec::new()).is_empty());
        assert_eq!(Pin::new("1 2".to_owned()).expose(), "1 2");
    }
}
