//! A PIN of a token that is initialised here: in a file, which is made if there is none, or typed. It is on disk before
//! any token has it.

use std::path::Path;

use anyhow::{Result, bail};
use hsm_core::secrets::Pin;

use crate::exit::usage;
use crate::files;
use crate::output::note;
use crate::terminal;

/// Where a PIN comes from, for people.
pub(super) fn shown(path: Option<&Path>, what: &str) -> String {
    path.map_or_else(
        || format!("the {what} as typed"),
        |path| path.display().to_string(),
    )
}

/// A PIN and the file that has it, or shall have it; or one that was typed, and is in no file.
pub(super) struct PinFile<'a> {
    path: Option<&'a Path>,
    what: &'static str,
    pub(super) pin: Pin,
    /// There was no file: the PIN was made here.
    made: bool,
}

impl<'a> PinFile<'a> {
    /// Reads the PIN, or makes one and leaves it in memory.
    pub(super) fn at(path: &'a Path, what: &'static str) -> Result<Self> {
        let made = !path.exists();
        let pin = if made {
            hsm_core::generate_pin()?
        } else {
            Pin::new(files::read_secret(path)?.as_str().to_owned())
        };
        Ok(Self {
            path: Some(path),
            what,
            pin,
            made,
        })
    }

    /// Asks for the PIN; twice where a slip of the hand would make a token that nobody can open.
    pub(super) fn typed(what: &'static str, question: &str, twice: bool) -> Result<Self> {
        if twice {
            note(&format!(
                "{what}: a software token takes none of fewer than 128 random bits, which is 28 random characters of \
                 0-9 and A-Z; nothing is shown while you type"
            ));
        }
        let pin = terminal::secret(&format!("{question}: "))?;
        if pin.expose().is_empty() {
            return Err(usage(format!("no {what} was typed; no token was touched")));
        }
        if twice && terminal::secret(&format!("{question}, again: "))?.expose() != pin.expose() {
            return Err(usage(format!(
                "the two {what}s that were typed differ; no token was touched"
            )));
        }
        Ok(Self {
            path: None,
            what,
            pin,
            made: false,
        })
    }

    /// One that nobody will have, in the place of one that would be typed.
    pub(super) fn stand_in(what: &'static str) -> Result<Self> {
        Ok(Self {
            path: None,
            what,
            pin: hsm_core::generate_pin()?,
            made: false,
        })
    }

    /// Where it is, or will be.
    pub(super) fn described(&self) -> String {
        let made = if self.made { ", made anew" } else { "" };
        format!("{} ({}{made})", self.what, self.source())
    }

    pub(super) fn source(&self) -> String {
        shown(self.path, self.what)
    }

    /// Puts a PIN that was made here on disk.
    pub(super) fn save(&self) -> Result<()> {
        let Some(path) = self.path.filter(|_| self.made) else {
            return Ok(());
        };
        if path.exists() {
            bail!(
                "{}: has appeared meanwhile and is left alone; no token was touched: give each PIN a file of its own",
                path.display()
            );
        }
        files::write(path, self.pin.expose().as_bytes())?;
        note(&format!(
            "{}: a new {} of 140 random bits",
            path.display(),
            self.what
        ));
        Ok(())
    }

    /// Takes back what was saved: no token has this PIN.
    pub(super) fn discard(&self) {
        if let Some(path) = self.path.filter(|_| self.made)
            && std::fs::remove_file(path).is_ok()
        {
            note(&format!("{}: removed again, no token has it", path.display()));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_pin_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        assert!(
            made.made && !path.exists(),
            "nothing is written before all is well"
        );
        made.save().unwrap();
        assert_eq!(made.pin.expose().len(), 28);
        let again = PinFile::at(&path, "PIN").unwrap();
        assert!(!again.made);
        assert_eq!(again.pin.expose(), made.pin.expose());
    }

    #[test]
    fn what_was_there_before_is_neither_replaced_nor_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        files::write(&path, b"somebody else's").unwrap();
        let error = made.save().unwrap_err().to_string();
        assert!(error.contains("a file of its own"), "{error}");
        PinFile::at(&path, "PIN").unwrap().discard();
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
    }

    #[test]
    fn a_saved_pin_that_no_token_has_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        made.save().unwrap();
        made.discard();
        assert!(!path.exists());
    }

    #[test]
    fn it_is_described_by_where_it_lies_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        let text = made.described();
        assert!(
            text.starts_with("PIN (") && text.ends_with("/pin, made anew)"),
            "{text}"
        );
        assert!(!text.contains(made.pin.expose()));
        let typed = PinFile::stand_in("SO PIN").unwrap();
        assert_eq!(typed.described(), "SO PIN (the SO PIN as typed)");
    }
}
