//! The memory of a slot that was ready once: from then on its failure is the slot's alone and must
//! never keep the node from starting. Durable before anything relies on it.

use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use raft_store::names::SlotName;

use crate::durable;

const MAGIC: &str = "hsm slot ready v1";

/// The file `<name>.ready`:
///
/// ```text
/// hsm slot ready v1
/// <serial number of the token>
/// ```
pub(super) struct ReadyMarker {
    path: PathBuf,
}

impl ReadyMarker {
    pub(super) fn of(dir: &Path, slot: &SlotName) -> Self {
        Self {
            path: dir.join(format!("{slot}.ready")),
        }
    }

    /// Where it is, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Serial number of the token that was ready; `None` if none ever was. That the file is there is
    /// what counts: one that was cut short names no serial and is a marker all the same, and one with a flipped bit
    /// names another token, which is told at each start and refuses nothing.
    pub(super) fn read(&self) -> io::Result<Option<String>> {
        match std::fs::read(&self.path) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                Ok(Some(text.lines().nth(1).unwrap_or_default().to_owned()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Durable when it returns.
    pub(super) fn write(&self, serial: &str) -> io::Result<()> {
        // A serial is text of the token's choosing; the marker has one line for it.
        let serial: String = serial.chars().filter(|c| !c.is_control()).collect();
        durable::write(&self.path, format!("{MAGIC}\n{serial}\n").as_bytes())
    }
}

/// Makes the folder of markers, and the data folder if it does not exist yet, closed to others.
pub(super) fn make_dir(data_dir: &Path) -> io::Result<PathBuf> {
    let dir = data_dir.join("slots");
    DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    File::open(data_dir)?.sync_all()?;
    Ok(dir)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_kept_and_can_be_replaced() {
        let data = tempfile::tempdir().unwrap();
        let dir = make_dir(&data.path().join("data")).unwrap();
        let marker = ReadyMarker::of(&dir, &SlotName::new("exchange").unwrap());
        assert_eq!(marker.read().unwrap(), None);
        marker.write("104c\n30e7").unwrap();
        assert_eq!(marker.read().unwrap().as_deref(), Some("104c30e7"));
        marker.write("77").unwrap();
        assert_eq!(marker.read().unwrap().as_deref(), Some("77"));
        let other = ReadyMarker::of(&dir, &SlotName::new("2fa").unwrap());
        assert_eq!(other.read().unwrap(), None);
    }

    #[test]
    fn a_marker_that_was_cut_short_is_a_marker() {
        let dir = tempfile::tempdir().unwrap();
        let marker = ReadyMarker::of(dir.path(), &SlotName::new("a").unwrap());
        std::fs::write(marker.path(), "").unwrap();
        assert_eq!(marker.read().unwrap().as_deref(), Some(""));
    }

    /// A damaged one costs no start of a node whose token is lost.
    #[test]
    fn a_marker_is_one_whatever_became_of_its_bits() {
        let dir = tempfile::tempdir().unwrap();
        let marker = ReadyMarker::of(dir.path(), &SlotName::new("a").unwrap());
        marker.write("104c30e7").unwrap();
        let whole = std::fs::read(marker.path()).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut contents = whole.clone();
            contents[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(marker.path(), contents).unwrap();
            assert!(marker.read().unwrap().is_some(), "bit {bit}");
        }
        for length in 0..whole.len() {
            std::fs::write(marker.path(), &whole[..length]).unwrap();
            assert!(marker.read().unwrap().is_some(), "{length} bytes");
        }
    }
}
