//! A layer under a node's data that knows what was written and not synchronised, and can lose it as a machine does that loses
//! power: a FUSE file system that passes everything on to a folder, and keeps what would undo it until it is synchronised.
//!
//! Durable is what POSIX promises and the usual file systems keep: the bytes and the length of a file once `fsync` or
//! `fdatasync` of it has returned, and that it is there at all; names that were given, changed or removed once `fsync` of their
//! folder has. What a synchronisation that failed did not write is still to be written by the next one, as on file systems that
//! keep it dirty.

mod files;
mod journal;
mod names;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use fuser::{BackgroundSession, Config, MountOption};
use nix::mount::{MntFlags, umount2};

use self::files::Files;
use self::journal::Journal;
use self::names::Names;

/// What is lost at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Everything that was not synchronised.
    All,
    /// The end of the last write; so much of it is there, of a thousand. Everything before it is.
    LastWrite(u32),
}

/// What synchronisations meet.
#[derive(Debug, Clone, Copy, Default)]
struct Orders {
    delay: Duration,
    /// Besides, for whoever waits for a moment with something to lose.
    held_up: Duration,
    fail: bool,
}

impl Orders {
    fn longer(self) -> Duration {
        self.delay + self.held_up
    }
}

/// What the file system and its owner share.
struct Shared {
    orders: Mutex<Orders>,
    state: Mutex<State>,
    delayed: AtomicU64,
    failed: AtomicU64,
    synced: AtomicU64,
}

struct State {
    names: Names,
    journal: Journal,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mounted layer; unmounted when it is dropped.
pub struct Layer {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    mounted_on: PathBuf,
    below: PathBuf,
}

impl Layer {
    /// Mounts it on `at`; everything lies below `own`, which has to be empty.
    ///
    /// # Errors
    /// FUSE is not permitted here.
    pub fn mount(own: &Path, at: &Path) -> Result<Self> {
        let (root, aside) = (own.join("root"), own.join("aside"));
        for folder in [&root, &aside] {
            fs::create_dir(folder).with_context(|| folder.display().to_string())?;
        }
        let below = root.clone();
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            state: Mutex::new(State {
                names: Names::new(root),
                journal: Journal::new(aside),
            }),
            delayed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            synced: AtomicU64::new(0),
        });
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("chaos".to_owned()),
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        let files = Files::new(Arc::clone(&shared));
        let session = fuser::spawn_mount(files, at, &config).with_context(|| {
            format!(
                "mount a FUSE file system on {}; this needs root and /dev/fuse",
                at.display()
            )
        })?;
        Ok(Self {
            shared,
            session: Some(session),
            mounted_on: at.to_owned(),
            below,
        })
    }

    /// Loses what a machine without power loses, and returns how many changes that were. Nobody may be using it.
    ///
    /// # Errors
    /// The folder below does not take it.
    pub fn lose(&self, loss: &Loss) -> Result<usize> {
        let mut state = lock(&self.shared.state);
        let lost = match loss {
            Loss::All => state.journal.undo(),
            Loss::LastWrite(permille) => state.journal.tear(*permille),
        };
        let lost = lost.context("undo what was not synchronised")?;
        // Files may have other names now, or none.
        state.names.forget();
        Ok(lost)
    }

    /// The folder that everything is passed on to.
    #[must_use]
    pub fn below(&self) -> &Path {
        &self.below
    }

    /// How many changes a loss of power would undo now.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        lock(&self.shared.state).journal.len()
    }

    /// Every synchronisation from now on takes so much longer.
    pub fn delay(&self, each: Duration) {
        lock(&self.shared.orders).delay = each;
    }

    /// The same for somebody else: what one of them ends goes on for the other.
    pub fn hold_up(&self, each: Duration) {
        lock(&self.shared.orders).held_up = each;
    }

    /// Every synchronisation from now on fails with EIO, or no longer does.
    pub fn fail(&self, fail: bool) {
        lock(&self.shared.orders).fail = fail;
    }

    /// No more delays and failures.
    pub fn be_honest(&self) {
        *lock(&self.shared.orders) = Orders::default();
    }

    /// Synchronisations that were held up so far.
    #[must_use]
    pub fn delayed(&self) -> u64 {
        self.shared.delayed.load(Ordering::SeqCst)
    }

    /// Synchronisations that have failed so far.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::SeqCst)
    }

    /// Synchronisations that were done so far.
    #[must_use]
    pub fn synced(&self) -> u64 {
        self.shared.synced.load(Ordering::SeqCst)
    }

    /// Takes it away; what was written lies in the folder below, under `root`.
    ///
    /// # Errors
    /// The kernel does not let it go.
    pub fn unmount(mut self) -> Result<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> Result<()> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        // Whoever still has a file open in it must not keep it here.
        umount2(&self.mounted_on, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", self.mounted_on.display()))?;
        // Its thread ends with the last open file; this does not wait for others' files.
        drop(session);
        Ok(())
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            eprintln!("{error:#}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    use super::*;

    struct Mounted {
        layer: Layer,
        at: PathBuf,
        folder: tempfile::TempDir,
    }

    /// Whether this process may mount anything, and has the device. Root in a container may not.
    fn is_permitted() -> bool {
        const CAP_SYS_ADMIN: u32 = 21;
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let held = u64::from_str_radix(held.unwrap().trim(), 16).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse");
        (held >> CAP_SYS_ADMIN) & 1 == 1 && device.is_ok()
    }

    /// `None` where FUSE is not permitted: whoever runs tests there is told.
    fn mounted() -> Option<Mounted> {
        let folder = tempfile::tempdir().unwrap();
        let (own, at) = (folder.path().join("own"), folder.path().join("at"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&at).unwrap();
        match Layer::mount(&own, &at) {
            Ok(layer) => Some(Mounted { layer, at, folder }),
            Err(error) => {
                assert!(!is_permitted(), "{error:#}");
                eprintln!("not tested: {error:#}");
                None
            }
        }
    }

    fn synced_file(path: &Path, text: &[u8]) -> File {
        let mut file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        file.write_all(text).unwrap();
        file.sync_all().unwrap();
        file
    }

    #[test]
    fn what_is_synchronised_stays_and_what_is_not_is_gone() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let path = at.join("file");
        let mut file = synced_file(&path, b"kept, kept");
        file.write_all(b", lost").unwrap();
        file.write_all_at(b"LOST", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"LOST, kept, lost");
        drop(file);
        assert!(layer.unsynced() > 0);
        assert!(layer.lose(&Loss::All).unwrap() > 0);
        assert_eq!(fs::read(&path).unwrap(), b"kept, kept");
        assert_eq!(layer.unsynced(), 0);
        assert_eq!(layer.lose(&Loss::All).unwrap(), 0);
        // It goes on as a file system does after a start.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b", and more").unwrap();
        file.sync_data().unwrap();
        drop(file);
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept, kept, and more");
    }

    #[test]
    fn a_torn_write_has_its_first_part() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let path = at.join("file");
        let mut file = synced_file(&path, b"0123456789");
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"abcd").unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(b"ABCDEFGH").unwrap();
        drop(file);
        assert_eq!(layer.lose(&Loss::LastWrite(500)).unwrap(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"abcd456789ABCD");
        // A write over something: the end of it is what was there.
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"xxxxxxxx", 0).unwrap();
        drop(file);
        layer.lose(&Loss::LastWrite(250)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"xxcd456789ABCD");
        assert_eq!(layer.lose(&Loss::LastWrite(0)).unwrap(), 0);
    }

    #[test]
    fn names_are_durable_with_their_folder() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let folder = File::open(&at).unwrap();
        // As everybody replaces a file who cannot lose it.
        synced_file(&at.join("control"), b"old");
        folder.sync_all().unwrap();
        synced_file(&at.join("control.new"), b"new");
        fs::rename(at.join("control.new"), at.join("control")).unwrap();
        assert_eq!(fs::read(at.join("control")).unwrap(), b"new");
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(at.join("control")).unwrap(), b"old");
        fs::rename(at.join("control.new"), at.join("control")).unwrap();
        folder.sync_all().unwrap();
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(at.join("control")).unwrap(), b"new");
        assert!(!at.join("control.new").exists());
        // Removed, and not removed.
        fs::remove_file(at.join("control")).unwrap();
        fs::create_dir(at.join("sub")).unwrap();
        fs::write(at.join("sub/file"), b"x").unwrap();
        assert!(!at.join("control").exists() && at.join("sub/file").exists());
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(at.join("control")).unwrap(), b"new");
        assert!(!at.join("sub").exists());
    }

    #[test]
    fn what_is_cut_off_comes_back() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let path = at.join("file");
        let file = synced_file(&path, b"0123456789");
        file.set_len(3).unwrap();
        file.set_len(5).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"012\0\0");
        drop(file);
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"0123456789");
        fs::write(&path, b"").unwrap();
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"0123456789");
    }

    #[test]
    fn a_synchronisation_covers_what_was_there_when_it_began() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let path = at.join("file");
        let file = synced_file(&path, b"..........");
        file.write_all_at(b"first", 0).unwrap();
        let slow = Duration::from_millis(300);
        layer.delay(slow);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| file.sync_data().unwrap());
            while layer.delayed() == 0 {
                std::thread::yield_now();
            }
            // Over the same bytes and over others, while it is under way.
            file.write_all_at(b"later", 0).unwrap();
            file.write_all_at(b"later", 5).unwrap();
            syncing.join().unwrap();
        });
        assert!(begun.elapsed() >= slow);
        layer.be_honest();
        drop(file);
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first.....");
    }

    #[test]
    fn two_who_slow_it_down_do_not_end_each_others() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let (slow, held_up) = (Duration::from_millis(60), Duration::from_millis(90));
        layer.delay(slow);
        layer.hold_up(held_up);
        let takes = |name: &str| {
            let begun = Instant::now();
            synced_file(&at.join(name), b"x");
            begun.elapsed()
        };
        assert!(takes("both") >= slow + held_up);
        layer.delay(Duration::ZERO);
        assert!(takes("one") >= held_up);
        assert_eq!(layer.delayed(), 2);
        layer.hold_up(Duration::ZERO);
        takes("none");
        assert_eq!(layer.delayed(), 2);
    }

    #[test]
    fn a_synchronisation_that_fails_says_so_and_keeps_nothing() {
        let Some(Mounted {
            folder: _folder,
            layer,
            at,
        }) = mounted()
        else {
            return;
        };
        let path = at.join("file");
        let mut file = synced_file(&path, b"kept");
        layer.fail(true);
        file.write_all(b", lost").unwrap();
        let error = file.sync_data().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
        assert_eq!(layer.failed(), 1);
        layer.be_honest();
        let mut read = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut read).unwrap();
        assert_eq!(read, "kept, lost");
        drop(file);
        layer.lose(&Loss::All).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
    }

    #[test]
    fn nothing_is_left_behind() {
        let Some(mounted) = mounted() else { return };
        let at = mounted.at.clone();
        let is_mounted = || {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
            mounts.contains(at.to_str().unwrap())
        };
        fs::write(at.join("file"), b"x").unwrap();
        assert!(is_mounted());
        mounted.layer.unmount().unwrap();
        assert!(!is_mounted());
        assert!(!at.join("file").exists());
    }
}
