//! Private files: folders 0700, files 0600, whole or not there at all. A file that others can read, or
//! that somebody else owns, is never taken for a secret.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::geteuid;
use zeroize::Zeroizing;

/// Longest secret in a file.
const MAX_SECRET: usize = 4096;

/// No core dumps, and no other process of this user reading this one's memory. Before any secret.
pub(crate) fn harden() -> Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("setrlimit(RLIMIT_CORE, 0)")?;
    nix::sys::prctl::set_dumpable(false).context("prctl(PR_SET_DUMPABLE, 0)")
}

/// Makes a folder that only its owner can enter. One that is there already is checked and closed to
/// others.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    let shown = path.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("{shown}: cannot be made"))?;
    check_owner(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("{shown}: chmod 700"))
}

/// Refuses what belongs to another user.
pub(crate) fn check_owner(path: &Path) -> Result<()> {
    let shown = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("{shown}: cannot be read"))?;
    let (owner, user) = (metadata.uid(), geteuid().as_raw());
    if owner != user {
        bail!(
            "{shown} belongs to user {owner} and this is user {user}: somebody else could change what is in it; \
             use a folder of your own"
        );
    }
    Ok(())
}

/// Writes a file that only its owner can read: written beside, synced, renamed, folder synced.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let shown = path.display();
    let folder = path
        .parent()
        .with_context(|| format!("{shown}: not a file's path"))?;
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let name = path
        .file_name()
        .with_context(|| format!("{shown}: not a file's path"))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    let partial = folder.join(partial);
    let attempt = || -> std::io::Result<()> {
        match std::fs::remove_file(&partial) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        File::open(folder)?.sync_all()
    };
    attempt().with_context(|| format!("{shown}: cannot be written"))
}

/// Reads a secret of one line: as [`read_secret_text`], without the newline at its end.
pub(crate) fn read_secret(path: &Path) -> Result<Zeroizing<String>> {
    let text = read_secret_text(path)?;
    let line = secret_line(&text);
    if line.is_empty() {
        bail!("{}: empty", path.display());
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// Editors end a file with a newline that is not part of the secret. Spaces may be.
pub(crate) fn secret_line(text: &str) -> &str {
    let line = text.strip_suffix('\n').unwrap_or(text);
    line.strip_suffix('\r').unwrap_or(line)
}

/// Reads a secret: a regular file of this user or root, closed to others.
pub(crate) fn read_secret_text(path: &Path) -> Result<Zeroizing<String>> {
    let shown = path.display();
    // Checked on the open file, so that it cannot be swapped in between.
    let mut file = File::open(path).with_context(|| format!("{shown}: cannot be read"))?;
    let metadata = file
        .metadata()
        .with_context(|| format!("{shown}: cannot be read"))?;
    if !metadata.is_file() {
        bail!("{shown}: not a regular file");
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        bail!("{shown} has mode {mode:04o}, so others can read the secret; chmod 600 {shown}");
    }
    if metadata.uid() != 0 && metadata.uid() != geteuid().as_raw() {
        bail!(
            "{shown} belongs to user {}, who could change it; make it yours",
            metadata.uid()
        );
    }
    // Reserved at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(MAX_SECRET + 1));
    (&mut file)
        .take(MAX_SECRET as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{shown}: cannot be read"))?;
    if bytes.len() > MAX_SECRET {
        bail!("{shown}: longer than {MAX_SECRET} bytes, so it is not the secret");
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => bail!("{shown}: not UTF-8 text"),
    }
}

/// All of a reader up to `limit` bytes, without leaving unwiped copies behind.
pub(crate) fn read_bounded(mut reader: impl Read, limit: usize, what: &str) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::<u8>::with_capacity(64 * 1024));
    loop {
        if bytes.len() == bytes.capacity() {
            // As `Vec` grows, but the old buffer is wiped.
            let mut larger = Zeroizing::new(Vec::<u8>::with_capacity(bytes.capacity() * 2));
            larger.extend_from_slice(&bytes);
            bytes = larger;
        }
        let room = (bytes.capacity() - bytes.len()) as u64;
        let read = (&mut reader)
            .take(room)
            .read_to_end(&mut bytes)
            .with_context(|| format!("read {what}"))?;
        if bytes.len() > limit {
            bail!("{what} is longer than {limit} bytes, more than any node takes");
        }
        if read == 0 {
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_written_is_private_and_replaces_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        write(&path, b"one").unwrap();
        write(&path, b"two\n").unwrap();
        assert_eq!(
            (mode(&path), read_secret(&path).unwrap().as_str()),
            (0o600, "two")
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused_without_repeating_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        write(&path, b"planted").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = read_secret(&path).unwrap_err().to_string();
        assert!(
            error.contains("chmod 600") && !error.contains("planted"),
            "{error}"
        );
    }

    #[test]
    fn an_open_folder_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("play");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        private_dir(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let given = dir.path().join("play");
        std::fs::create_dir(&given).unwrap();
        std::fs::set_permissions(&given, std::fs::Permissions::from_mode(0o755)).unwrap();
        // Only root can give a folder away; for anybody else the root folder is somebody else's.
        let foreign = if geteuid().is_root() {
            std::os::unix::fs::chown(&given, Some(65_534), None).unwrap();
            given.as_path()
        } else {
            Path::new("/")
        };
        let before = mode(foreign);
        let error = private_dir(foreign).unwrap_err().to_string();
        let owner = std::fs::metadata(foreign).unwrap().uid();
        assert!(
            error.contains(&format!("belongs to user {owner} and this is user"))
                && error.contains("use a folder of your own"),
            "{error}"
        );
        assert_eq!(mode(foreign), before);
    }

    #[test]
    fn reading_is_whole_and_bounded() {
        let long = vec![7_u8; 200_000];
        assert_eq!(
            read_bounded(long.as_slice(), 200_000, "x").unwrap().as_slice(),
            long
        );
        assert!(read_bounded(long.as_slice(), 199_999, "x").is_err());
        assert!(read_bounded([].as_slice(), 0, "x").unwrap().is_empty());
    }
}
