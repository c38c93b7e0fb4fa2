//! The place of a file of the log, as its key names it: looked at before it is opened, by the start and by `--check`.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::{AccessFlags, access};

use crate::config::ConfigError;

/// Of a file that is made. One that takes the place of another has that one's.
const MODE: u32 = 0o600;

/// Where the file is that `key` names: with its folder's real path, whatever the working directory is later. Makes
/// nothing.
///
/// # Errors
/// What forbids to write there, or to rename it when it is full.
pub(super) fn find(key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let refused = |problem: String, remedy: &str| ConfigError::invalid(key, path.display(), problem, remedy);
    let Some(name) = path.file_name() else {
        return Err(refused("names no file".to_owned(), "write the path of a file"));
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = folder.canonicalize().map_err(|error| {
        let shown = folder.display();
        refused(
            format!("its folder {shown} cannot be found: {error}"),
            "make the folder (mkdir -m 0750) and give it to the user that the node runs as",
        )
    })?;
    access(&folder, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|error| {
        refused(
            format!("no file can be made in its folder: {error}"),
            "let the node's user write to the folder: a file that is full is renamed in it",
        )
    })?;
    let found = folder.join(name);
    match fs::symlink_metadata(&found) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(refused(error.to_string(), "write the path of a file")),
        Ok(there) if there.is_symlink() => {
            return Err(refused(
                "is a symbolic link, which would be renamed in place of its file".to_owned(),
                "write the path that it leads to",
            ));
        }
        Ok(there) if !there.is_file() => {
            return Err(refused(
                "is no regular file".to_owned(),
                "write the path of a file; standard output has a key of its own (…_to_stdout: true)",
            ));
        }
        Ok(_) => {}
    }
    match options().open(&found) {
        Ok(_) => Ok(found),
        Err(error) => Err(refused(
            format!("cannot be written to: {error}"),
            "let the node's user read and write it",
        )),
    }
}

/// Reading shows how the last line ends. Opening must not hang, nor follow what has taken the file's place.
pub(super) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .append(true)
        .mode(MODE)
        .custom_flags(O_NOFOLLOW | O_NONBLOCK);
    options
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const KEY: &str = "logging.audit_path";

    fn find_in(folder: &tempfile::TempDir, name: &str) -> Result<PathBuf, String> {
        find(KEY, &folder.path().join(name)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_path_that_cannot_be_a_file_of_the_log_is_refused_with_key_value_and_remedy() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        symlink(folder.path().join("file"), folder.path().join("link")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (name, problem, remedy) in [
            ("absent/a.log", "cannot be found", "mkdir -m 0750"),
            ("file/a.log", "in its folder: ", "let the node's user"),
            ("folder", "is no regular file", "write the path of a file"),
            ("pipe", "is no regular file", "_to_stdout: true"),
            ("link", "is a symbolic link", "write the path that it leads to"),
            ("..", "names no file", "write the path of a file"),
        ] {
            let error = find_in(&folder, name).unwrap_err();
            let start = format!("config: {KEY}: {}: ", folder.path().join(name).display());
            assert!(error.starts_with(&start), "{name}: {error}");
            assert!(
                error.contains(problem) && error.contains(remedy),
                "{name}: {error}"
            );
        }
        assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "x");
        assert!(find_in(&folder, "a.log").is_ok() && !folder.path().join("a.log").exists());
    }

    #[test]
    fn what_the_nodes_user_may_not_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.log"), "").unwrap();
        for (name, mode) in [("a.log", 0o400), ("", 0o500)] {
            fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
            let found = find_in(&folder, "a.log");
            // Root may write anything.
            assert_eq!(found.is_ok(), nix::unistd::geteuid().is_root(), "{found:?}");
            fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(0o700)).unwrap();
        }
    }
}
