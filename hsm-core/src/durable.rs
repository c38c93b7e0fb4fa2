//! Writing small files so that they are on disk, whole, when the function returns.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::HsmError;

/// Replaces `path` in one step: temporary file, fsync, rename, fsync of the directory. Mode 0600.
pub(crate) fn write(path: &Path, contents: &[u8]) -> Result<(), HsmError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let fail = |action| move |error: std::io::Error| HsmError::file(path, action, &error);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .map_err(fail("create"))?;
    file.write_all(contents).map_err(fail("write"))?;
    file.sync_all().map_err(fail("sync"))?;
    std::fs::rename(&partial, path).map_err(fail("rename"))?;
    sync_parent(path)
}

/// Removes a file for good; that it is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<(), HsmError> {
    match std::fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(HsmError::file(path, "remove", &error)),
    }
}

/// The whole file; `None` if there is none.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, HsmError> {
    match std::fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HsmError::file(path, "read", &error)),
    }
}

/// Fsync of one file or directory.
pub(crate) fn sync(path: &Path) -> Result<(), HsmError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| HsmError::file(path, "sync", &error))
}

/// Makes a directory that only its owner may enter, if it is not there.
pub(crate) fn private_dir(path: &Path) -> Result<(), HsmError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| HsmError::file(path, "create directory", &error))
}

fn sync_parent(path: &Path) -> Result<(), HsmError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => sync(Path::new(".")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("marker");
        assert_eq!(read(&path).unwrap(), None);
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }

    #[test]
    fn an_error_names_the_file() {
        let error = write(Path::new("/nonexistent/dir/marker"), b"").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/dir/marker"), "{error}");
    }
}
