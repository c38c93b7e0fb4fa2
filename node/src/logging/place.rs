//! The place of a file of the log, as its key names it: looked at before it is opened, by the start and by `--check`.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::{AccessFlags, access};

use crate::config::ConfigError;

/// Of a file that is made. One that takes the place of another has that one's.
const MODE: u32 = 0o600;
/// Of a folder that is made, as version 1 made it.
const FOLDER_MODE: u32 = 0o750;

/// What becomes of a folder that is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absent {
    /// It is made.
    Make,
    /// Nothing is made: `--check` looks whether it could be.
    Look,
}

/// Where the file is that `key` names: with its folder's real path, whatever the working directory is later. Makes no
/// file.
///
/// # Errors
/// What forbids to write there, or to rename it when it is full.
pub(super) fn find(key: &str, path: &Path, absent: Absent) -> Result<PathBuf, ConfigError> {
    let refused = |problem: String, remedy: &str| ConfigError::invalid(key, path.display(), problem, remedy);
    let Some(name) = path.file_name() else {
        return Err(refused("names no file".to_owned(), "write the path of a file"));
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let no_folder = |done: &str, error: io::Error| {
        let shown = folder.display();
        refused(
            format!("its folder {shown} cannot be {done}: {error}"),
            "make the folder (mkdir -m 0750) and give it to the user that the node runs as",
        )
    };
    let folder = match folder.canonicalize() {
        Ok(folder) => folder,
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(no_folder("found", error)),
        Err(_) if absent == Absent::Make => {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(FOLDER_MODE);
            let made = builder.create(folder).and_then(|()| folder.canonicalize());
            made.map_err(|error| no_folder("made", error))?
        }
        Err(_) => {
            may_write(nearest(folder)).map_err(|error| no_folder("made", error))?;
            return Ok(folder.join(name));
        }
    };
    may_write(&folder).map_err(|error| {
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

/// The innermost folder on the way to this one that is there.
fn nearest(folder: &Path) -> &Path {
    let mut there = folder.ancestors().filter(|ancestor| ancestor.exists());
    there.next().unwrap_or(Path::new("."))
}

fn may_write(folder: &Path) -> io::Result<()> {
    Ok(access(folder, AccessFlags::W_OK | AccessFlags::X_OK)?)
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

/// Gives a file the group and the mode of the one whose place it takes: who reads the log by its group goes on reading
/// it. Where the node may not give it that group, its own group gets nothing.
pub(super) fn give_rights(file: &File, of: &Metadata) -> io::Result<()> {
    let mask = fchown(file, None, Some(of.gid())).map_or(0o707, |()| 0o777);
    file.set_permissions(Permissions::from_mode(of.mode() & mask))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const KEY: &str = "logging.audit_path";

    fn find_in(folder: &tempfile::TempDir, name: &str) -> Result<PathBuf, String> {
        find(KEY, &folder.path().join(name), Absent::Look).map_err(|error| error.to_string())
    }

    #[test]
    fn a_path_that_cannot_be_a_file_of_the_log_is_refused_with_key_value_and_remedy() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        fs::write(folder.path().join("file"), "x").unwrap();
        symlink(folder.path().join("file"), folder.path().join("link")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (name, problem, remedy) in [
            ("file/in/a.log", "cannot be found", "mkdir -m 0750"),
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
    fn a_folder_that_is_not_there_is_made_by_the_start_and_not_by_a_check() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("var/log/a.log");
        assert_eq!(find(KEY, &path, Absent::Look).unwrap(), path);
        assert!(!folder.path().join("var").exists());
        let found = find(KEY, &path, Absent::Make).unwrap();
        assert_eq!(found.file_name(), path.file_name());
        let mode = fs::metadata(found.parent().unwrap())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777 & !FOLDER_MODE, 0, "{mode:o}");
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

    #[test]
    fn a_groups_right_is_given_to_that_group_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("a.log")).unwrap();
        // Its group is root's, and may read it: whoever is not in it cannot give it a file.
        let other = fs::metadata("/").unwrap();
        give_rights(&file, &other).unwrap();
        let there = file.metadata().unwrap();
        let mask = if there.gid() == other.gid() { 0o777 } else { 0o707 };
        assert_eq!(there.mode() & 0o777, other.mode() & mask);
    }
}
