//! A file of the log, written by one thread. Lines are appended whole; a file that is full is renamed aside and
//! another one made. Whatever somebody else does to it, who renames, truncates or deletes it while the node runs, is
//! noticed within [`LOOK`]; from then on no line goes where nobody can read it without being counted as lost.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::backups;
use super::place::{give_rights, options};
use crate::clock::unix_millis;
use crate::config::{ConfigError, LogRotation};

/// Between two looks at what the path leads to.
const LOOK: Duration = Duration::from_secs(1);
/// After a file could not be put aside, until it is tried again.
const RETRY: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct LogFile {
    path: PathBuf,
    rotation: LogRotation,
    /// Tells the thread that keeps backups of a new one.
    due: SyncSender<()>,
    file: File,
    /// Device and inode of `file`.
    id: (u64, u64),
    len: u64,
    /// The last line has no end: a disk was full, or the node was killed.
    torn: bool,
    looked: Option<Instant>,
    /// Until then no file is put aside, because it has failed.
    waits_until: Option<Instant>,
}

impl LogFile {
    /// Opens the file that [`find`](super::place::find) has found, or makes it. It is this process's alone from then on.
    ///
    /// # Errors
    /// It cannot be opened, or another process has it.
    pub(super) fn open(
        key: &str,
        path: PathBuf,
        rotation: LogRotation,
        due: SyncSender<()>,
    ) -> Result<Self, ConfigError> {
        let refused =
            |problem: String, remedy: &str| ConfigError::invalid(key, path.display(), problem, remedy);
        let opened = options()
            .create(true)
            .open(&path)
            .and_then(|file| Ok((Open::of(&file)?, file)));
        let (open, file) = opened.map_err(|error| {
            refused(
                format!("cannot be opened: {error}"),
                "let the node's user write it",
            )
        })?;
        // Two that rename one file would lose each other's lines. Where files cannot be locked nothing is known.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(refused(
                "another process writes to it".to_owned(),
                "give each node files of its own",
            ));
        }
        Ok(Self {
            path,
            rotation,
            due,
            file,
            id: open.id,
            len: open.len,
            torn: open.torn,
            looked: Some(Instant::now()),
            waits_until: None,
        })
    }

    fn take(&mut self, file: File) -> io::Result<()> {
        let open = Open::of(&file)?;
        // The path is what is this node's; a lock on what lies there now is as good as it gets.
        let _ = file.try_lock();
        (self.id, self.len, self.torn) = (open.id, open.len, open.torn);
        self.file = file;
        Ok(())
    }

    /// Follows what others have done: renamed it, as logrotate does, truncated it (`copytruncate`), or deleted it.
    fn look(&mut self) -> io::Result<()> {
        if self.looked.is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(());
        }
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == self.id => {
                self.len = there.len();
                self.torn &= self.len > 0;
            }
            _ => {
                let opened = options().create(true).open(&self.path);
                if let Err(error) = opened.and_then(|file| self.take(file)) {
                    // Under another name it can be read; without one it cannot.
                    if self.file.metadata().map_or(0, |open| open.nlink()) == 0 {
                        self.looked = None;
                        return Err(error);
                    }
                }
            }
        }
        self.looked = Some(Instant::now());
        Ok(())
    }

    /// If it fails the file grows on.
    fn rotate(&mut self) {
        let now = Instant::now();
        if self.waits_until.is_some_and(|until| now < until) {
            return;
        }
        match self.put_aside() {
            Ok(()) => {
                self.waits_until = None;
                let _ = self.due.try_send(());
            }
            Err(error) => {
                self.waits_until = Some(now + RETRY);
                let path = self.path.display();
                tracing::warn!(%path, %error, "a file of the log is full and cannot be put aside: it grows on");
            }
        }
    }

    fn put_aside(&mut self) -> io::Result<()> {
        let full = self.file.metadata()?;
        let backup = backups::next_name(&self.path, unix_millis())?;
        fs::rename(&self.path, &backup)?;
        // Or opens what logrotate has made meanwhile.
        let made = options().create(true).open(&self.path);
        let taken = made.and_then(|file| {
            give_rights(&file, &full)?;
            self.take(file)
        });
        if taken.is_err() {
            // Lines go on into the file that is open, which must not be compressed and removed.
            let _ = fs::rename(&backup, &self.path);
        }
        taken
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            match self.file.write(left) {
                Ok(0) => return Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)),
                Ok(written) => {
                    left = left.get(written..).unwrap_or_default();
                    self.len += written as u64;
                    self.torn = !left.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// One call is one line.
impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.look()?;
        if self.len > 0 && self.len + line.len() as u64 > self.rotation.max_bytes {
            self.rotate();
        }
        if self.torn {
            self.append(b"\n")?;
        }
        self.append(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is known of an open file.
struct Open {
    id: (u64, u64),
    len: u64,
    torn: bool,
}

impl Open {
    fn of(file: &File) -> io::Result<Self> {
        let there = file.metadata()?;
        if !there.is_file() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut last = [b'\n'];
        if let Some(at) = there.len().checked_sub(1) {
            // What cannot be read ends in a line of its own at worst.
            let _ = file.read_at(&mut last, at);
        }
        Ok(Self {
            id: (there.dev(), there.ino()),
            len: there.len(),
            torn: last != [b'\n'],
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::{Receiver, sync_channel};

    use super::*;
    use crate::logging::place::{Absent, find};

    const KEY: &str = "logging.audit_path";

    struct Folder {
        folder: tempfile::TempDir,
        is_due: Receiver<()>,
        due: SyncSender<()>,
    }

    impl Folder {
        fn new() -> Self {
            let (due, is_due) = sync_channel(1);
            Self {
                folder: tempfile::tempdir().unwrap(),
                is_due,
                due,
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn open(&self, name: &str, max_bytes: u64) -> Result<LogFile, String> {
            let rotation = LogRotation {
                max_bytes,
                max_backups: 10,
                max_age: Duration::from_secs(86_400),
                compress: false,
            };
            let found = find(KEY, &self.path(name), Absent::Look).unwrap();
            let opened = LogFile::open(KEY, found, rotation, self.due.clone());
            opened.map_err(|error| error.to_string())
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path(name)).unwrap()
        }

        /// Of backups, the oldest first.
        fn backups(&self) -> Vec<String> {
            let names = fs::read_dir(self.folder.path()).unwrap();
            let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.filter(|name| name.starts_with("a-")).collect();
            names.sort();
            names
        }
    }

    /// As if [`LOOK`] were over.
    fn write(file: &mut LogFile, line: &str) {
        file.looked = None;
        file.write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn a_file_that_would_grow_too_large_is_put_aside_between_two_lines() {
        let folder = Folder::new();
        let mut file = folder.open("a.log", 10).unwrap();
        for line in [
            "one 1\n",
            "two 2\n",
            "three 3, which is too long\n",
            "four\n",
            "5\n",
        ] {
            write(&mut file, line);
        }
        assert_eq!(folder.read("a.log"), "four\n5\n");
        let backups = folder.backups();
        let texts: Vec<String> = backups.iter().map(|name| folder.read(name)).collect();
        assert_eq!(texts, ["one 1\n", "two 2\n", "three 3, which is too long\n"]);
        assert!(folder.is_due.try_recv().is_ok());
    }

    #[test]
    fn a_file_is_its_owners_and_one_that_follows_another_has_that_ones_mode() {
        let folder = Folder::new();
        let mode = || fs::metadata(folder.path("a.log")).unwrap().permissions().mode() & 0o777;
        let mut file = folder.open("a.log", 10).unwrap();
        assert_eq!(mode(), 0o600);
        fs::set_permissions(folder.path("a.log"), fs::Permissions::from_mode(0o640)).unwrap();
        write(&mut file, "one 1\n");
        write(&mut file, "two 2\n");
        assert_eq!((folder.backups().len(), mode()), (1, 0o640));
    }

    #[test]
    fn a_restart_appends_and_counts_what_is_there() {
        let folder = Folder::new();
        write(&mut folder.open("a.log", 20).unwrap(), "before\n");
        let mut file = folder.open("a.log", 20).unwrap();
        write(&mut file, "after\n");
        assert_eq!(folder.read("a.log"), "before\nafter\n");
        write(&mut file, "the next\n");
        assert_eq!(folder.read("a.log"), "the next\n");
    }

    #[test]
    fn a_line_after_a_torn_one_stands_alone() {
        let folder = Folder::new();
        fs::write(folder.path("a.log"), "{\"killed in the mid").unwrap();
        let mut file = folder.open("a.log", 1000).unwrap();
        write(&mut file, "whole\n");
        write(&mut file, "whole too\n");
        assert_eq!(folder.read("a.log"), "{\"killed in the mid\nwhole\nwhole too\n");
    }

    #[test]
    fn a_full_disk_is_an_error_and_not_silence() {
        let folder = Folder::new();
        let mut file = folder.open("a.log", 1000).unwrap();
        file.file = File::options().write(true).open("/dev/full").unwrap();
        (file.id, file.looked) = ((0, 0), Some(Instant::now() + Duration::from_secs(3600)));
        let error = file.write_all(b"lost\n").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOSPC));
        // The next look finds that the path is not what is open.
        write(&mut file, "there is room again\n");
        assert_eq!(folder.read("a.log"), "there is room again\n");
    }

    #[test]
    fn a_file_that_another_program_renames_or_truncates_is_followed() {
        let folder = Folder::new();
        let mut file = folder.open("a.log", 1000).unwrap();
        write(&mut file, "first\n");
        fs::rename(folder.path("a.log"), folder.path("a.log.1")).unwrap();
        write(&mut file, "second\n");
        assert_eq!(folder.read("a.log.1"), "first\n");
        assert_eq!(folder.read("a.log"), "second\n");
        File::options()
            .write(true)
            .open(folder.path("a.log"))
            .unwrap()
            .set_len(0)
            .unwrap();
        write(&mut file, "third\n");
        assert_eq!(folder.read("a.log"), "third\n");
        fs::remove_file(folder.path("a.log")).unwrap();
        write(&mut file, "fourth\n");
        assert_eq!(folder.read("a.log"), "fourth\n");
    }

    #[test]
    fn what_nobody_can_read_any_more_is_an_error() {
        let folder = Folder::new();
        fs::create_dir(folder.path("gone")).unwrap();
        let mut file = folder.open("gone/a.log", 1000).unwrap();
        fs::remove_dir_all(folder.path("gone")).unwrap();
        for _ in 0..2 {
            file.looked = file.looked.and_then(|at| at.checked_sub(LOOK));
            assert!(file.write_all(b"lost\n").is_err());
        }
        fs::create_dir(folder.path("gone")).unwrap();
        write(&mut file, "found\n");
        assert_eq!(folder.read("gone/a.log"), "found\n");
    }

    #[test]
    fn a_file_that_cannot_be_put_aside_grows_on() {
        let folder = Folder::new();
        fs::create_dir(folder.path("in")).unwrap();
        let mut file = folder.open("in/a.log", 10).unwrap();
        write(&mut file, "one 1\n");
        fs::rename(folder.path("in"), folder.path("elsewhere")).unwrap();
        // Without a look between: the path leads nowhere.
        file.looked = Some(Instant::now());
        file.write_all(b"two 2\n").unwrap();
        assert!(file.waits_until.is_some());
        assert_eq!(folder.read("elsewhere/a.log"), "one 1\ntwo 2\n");
    }

    #[test]
    fn two_processes_do_not_write_one_file() {
        let folder = Folder::new();
        let first = folder.open("a.log", 1000).unwrap();
        let error = folder.open("a.log", 1000).err().unwrap();
        assert!(error.contains("another process writes to it"), "{error}");
        drop(first);
        folder.open("a.log", 1000).unwrap();
    }
}
