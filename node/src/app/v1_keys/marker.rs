//! That version 1's list of keys was read to its end, and which one that was.

use std::io;
use std::path::{Path, PathBuf};

use crate::durable;

const NAME: &str = "v1-metadata";
const BEGUN: &str = "v1-metadata-begun";
const MAGIC: &str = "hsm v1 metadata adopted v1";

/// The file `v1-metadata` in the data folder:
///
/// ```text
/// hsm v1 metadata adopted v1
/// <SHA-256 of the list, in hex>
/// <where it was>
/// ```
pub(super) struct Marker {
    path: PathBuf,
    digest: String,
    of: String,
}

impl Marker {
    pub(super) fn of(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join(NAME),
            digest: String::new(),
            of: String::new(),
        }
    }

    /// Of this list, to be written.
    pub(super) fn with(self, digest: String, of: &Path) -> Self {
        Self {
            digest,
            of: of.display().to_string(),
            ..self
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The digest of the list that was read; `None` if none was. One that cannot be read says nothing, and the list
    /// is compared with the state once more.
    pub(super) fn read(&self) -> Option<String> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let mut lines = text.lines();
        let known = lines.next() == Some(MAGIC);
        lines.next().filter(|_| known).map(str::to_owned)
    }

    fn begun(&self) -> PathBuf {
        self.path.with_file_name(BEGUN)
    }

    /// Whether a start has begun to adopt, and none has come to the end of it.
    pub(super) fn is_begun(&self) -> bool {
        self.begun().exists()
    }

    /// To be written before the first entry: an empty file says it.
    pub(super) fn begin(&self) -> io::Result<()> {
        durable::write(&self.begun(), b"")
    }

    /// That the list was read to its end. Nothing is begun any more then.
    pub(super) fn write(&self) -> io::Result<()> {
        durable::write(
            &self.path,
            format!("{MAGIC}\n{}\n{}\n", self.digest, self.of).as_bytes(),
        )?;
        match std::fs::remove_file(self.begun()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_was_read_is_remembered_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::of(dir.path());
        assert_eq!(marker.read(), None);
        marker.with("ab".to_owned(), Path::new("m.yaml")).write().unwrap();
        assert_eq!(Marker::of(dir.path()).read().as_deref(), Some("ab"));
        std::fs::write(dir.path().join(NAME), "something else\nab\n").unwrap();
        assert_eq!(Marker::of(dir.path()).read(), None);
    }

    #[test]
    fn what_was_begun_is_remembered_until_it_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let marker = Marker::of(dir.path());
        assert!(!marker.is_begun());
        marker.begin().unwrap();
        assert!(Marker::of(dir.path()).is_begun());
        assert_eq!(marker.read(), None, "begun is not done");
        let marker = marker.with("ab".to_owned(), Path::new("m.yaml"));
        marker.write().unwrap();
        assert!(!marker.is_begun());
        marker.write().unwrap();
    }

    /// It is the list's digest still, or says nothing of the list, which is then compared with the state again.
    #[test]
    fn a_damaged_marker_names_no_other_list_that_there_could_be() {
        let dir = tempfile::tempdir().unwrap();
        let (digest, other) = ("ab".repeat(32), "cd".repeat(32));
        let marker = Marker::of(dir.path()).with(digest.clone(), Path::new("m.yaml"));
        marker.write().unwrap();
        let path = dir.path().join(NAME);
        let whole = std::fs::read(&path).unwrap();
        let flips = (0..whole.len() * 8).map(|bit| {
            let mut contents = whole.clone();
            contents[bit / 8] ^= 1 << (bit % 8);
            contents
        });
        let cuts = (0..whole.len()).map(|length| whole[..length].to_vec());
        let mut known = 0;
        for (number, contents) in flips.chain(cuts).enumerate() {
            std::fs::write(&path, contents).unwrap();
            let read = Marker::of(dir.path()).read();
            assert_ne!(read.as_deref(), Some(other.as_str()), "damage {number}");
            known += usize::from(read.as_deref() == Some(digest.as_str()));
        }
        // The path is for people: what becomes of it costs nothing.
        assert!(known > 0, "it is never understood");
    }
}
