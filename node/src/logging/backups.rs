//! What becomes of files of the log that were full: they are named as version 1 named them, compressed, and removed
//! when there are too many or when they are too old. A thread of its own does that, so that no line waits for it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use nix::libc::O_NOFOLLOW;

use super::place;
use crate::clock::unix_millis;
use crate::config::LogRotation;

/// Between two looks for what has become too old, where no file is full meanwhile.
const LOOK: Duration = Duration::from_secs(3600);
/// When it was put aside, in UTC: `audit-2026-01-31T23-59-59.999.log`.
const STAMP: &str = "%Y-%m-%dT%H-%M-%S.%3f";
const COMPRESSED: &str = ".gz";
/// Compressed so far. Whoever is killed leaves it behind, beside the file that it was made from.
const PARTIAL: &str = ".gz.partial";

/// Milliseconds since the Unix epoch.
type Millis = i64;

/// The backups of one file.
struct Family {
    folder: PathBuf,
    /// `audit-` of `audit.log`.
    before: String,
    /// `.log`
    after: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Partial,
    Plain,
    Compressed,
}

impl Family {
    /// `path` is one that [`super::place::find`] has found.
    fn of(path: &Path) -> Self {
        let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        let extension = part(path.extension());
        Self {
            folder: path.parent().unwrap_or(Path::new(".")).to_owned(),
            before: part(path.file_stem()) + "-",
            after: if extension.is_empty() {
                extension
            } else {
                format!(".{extension}")
            },
        }
    }

    fn name(&self, at: Millis) -> io::Result<PathBuf> {
        let at = Timestamp::from_millisecond(at).map_err(io::Error::other)?;
        let Self {
            folder,
            before,
            after,
        } = self;
        Ok(folder.join(format!("{before}{}{after}", at.strftime(STAMP))))
    }

    /// When the file of this name was put aside; nothing if it is none of this family.
    fn read(&self, name: &str) -> Option<(Millis, Form)> {
        let rest = name.strip_prefix(&self.before)?;
        let (rest, form) = [(PARTIAL, Form::Partial), (COMPRESSED, Form::Compressed)]
            .iter()
            .find_map(|(end, form)| Some((rest.strip_suffix(end)?, *form)))
            .unwrap_or((rest, Form::Plain));
        let stamp = rest.strip_suffix(&self.after)?;
        let at = DateTime::strptime(STAMP, stamp).ok()?;
        // A file of somebody else that only looks like one.
        if at.strftime(STAMP).to_string() != stamp {
            return None;
        }
        let at = at.to_zoned(TimeZone::UTC).ok()?.timestamp();
        Some((at.as_millisecond(), form))
    }

    fn find(&self) -> io::Result<BTreeMap<Millis, Vec<(PathBuf, Form)>>> {
        let mut found: BTreeMap<Millis, Vec<_>> = BTreeMap::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some((at, form)) = name.to_str().and_then(|name| self.read(name))
                && entry.file_type()?.is_file()
            {
                found.entry(at).or_default().push((entry.path(), form));
            }
        }
        Ok(found)
    }
}

/// A name for `path` once it is full. It is later than that of every backup, whatever the clock says: the newest by
/// name are those that are kept.
pub(super) fn next_name(path: &Path, now: Millis) -> io::Result<PathBuf> {
    let family = Family::of(path);
    let newest = family.find()?.into_keys().next_back();
    family.name(newest.map_or(now, |newest| now.max(newest.saturating_add(1))))
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

/// Starts the thread. It looks at once, whenever it is told that a file was put aside, and now and then.
pub(super) fn keep(paths: Vec<PathBuf>, rotation: LogRotation, is_due: Receiver<()>) -> io::Result<()> {
    let keeper = std::thread::Builder::new().name("log-backups".to_owned());
    keeper.spawn(move || {
        let clock = Clock::start();
        loop {
            for (path, error) in tidy(&paths, rotation, clock.now()) {
                let path = path.display();
                tracing::warn!(%path, %error, "a backup of a file of the log cannot be compressed or removed");
            }
            if is_due.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    })?;
    Ok(())
}

/// A clock that is set forward while the node runs makes nothing old: what is removed does not come back.
struct Clock {
    began: Instant,
    wall: Millis,
}

impl Clock {
    fn start() -> Self {
        Self {
            began: Instant::now(),
            wall: unix_millis(),
        }
    }

    fn now(&self) -> Millis {
        let passed = i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.wall.saturating_add(passed).min(unix_millis())
    }
}

/// Removes what is to be removed, compresses one, and looks again at all of them: meanwhile others may have become too
/// many. What fails is left until the next time, and returned.
fn tidy(paths: &[PathBuf], rotation: LogRotation, now: Millis) -> BTreeMap<PathBuf, io::Error> {
    let mut failed = BTreeMap::new();
    loop {
        let mut plain = Vec::new();
        for path in paths {
            if let Err(error) = prune(path, rotation, now, &mut plain, &mut failed) {
                failed.insert(path.clone(), error);
            }
        }
        let next = plain.into_iter().find(|file| !failed.contains_key(file));
        let Some(file) = next.filter(|_| rotation.compress) else {
            return failed;
        };
        if let Err(error) = compress(&file) {
            failed.insert(file, error);
        }
    }
}

/// Adds to `plain` what stays and is not compressed, the newest first.
fn prune(
    path: &Path,
    rotation: LogRotation,
    now: Millis,
    plain: &mut Vec<PathBuf>,
    failed: &mut BTreeMap<PathBuf, io::Error>,
) -> io::Result<()> {
    let max_age = i64::try_from(rotation.max_age.as_millis()).unwrap_or(i64::MAX);
    for (number, (at, files)) in Family::of(path).find()?.into_iter().rev().enumerate() {
        let is_over = number >= rotation.max_backups || now.saturating_sub(at) > max_age;
        // It was given its name only when it was whole and on the disk.
        let is_compressed = files.iter().any(|(_, form)| *form == Form::Compressed);
        for (file, form) in files {
            match form {
                Form::Compressed if !is_over => {}
                Form::Plain if !is_over && !is_compressed => plain.push(file),
                _ => {
                    if let Err(error) = remove(&file) {
                        failed.insert(file, error);
                    }
                }
            }
        }
    }
    Ok(())
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The file is removed once what takes its place is on the disk, whole and under its name.
fn compress(file: &Path) -> io::Result<()> {
    let partial = with(file, PARTIAL);
    let done = compress_to(file, &partial).and_then(|()| fs::rename(&partial, with(file, COMPRESSED)));
    if let Err(error) = done {
        let _ = fs::remove_file(&partial);
        return Err(error);
    }
    if let Some(folder) = file.parent() {
        File::open(folder)?.sync_all()?;
    }
    remove(file)
}

fn compress_to(file: &Path, partial: &Path) -> io::Result<()> {
    let mut plain = OpenOptions::new()
        .read(true)
        .custom_flags(O_NOFOLLOW)
        .open(file)?;
    let there = plain.metadata()?;
    let sink = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)?;
    place::give_rights(&sink, &there)?;
    let mut encoder = GzEncoder::new(sink, Compression::default());
    io::copy(&mut plain, &mut encoder)?;
    encoder.finish()?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::sync_channel;

    use flate2::read::GzDecoder;

    use super::*;

    /// 2026-01-31T23:59:59.999Z.
    const AT: Millis = 1_769_903_999_999;
    const DAY: Millis = 86_400_000;

    fn rotation(max_backups: usize, compress: bool) -> LogRotation {
        LogRotation {
            max_bytes: 100,
            max_backups,
            max_age: Duration::from_secs(30 * 86_400),
            compress,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn unpacked(file: &Path) -> String {
        let mut text = String::new();
        GzDecoder::new(File::open(file).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    fn tidy_one(path: &Path, rotation: LogRotation, now: Millis) {
        let failed = tidy(&[path.to_owned()], rotation, now);
        assert!(failed.is_empty(), "{failed:?}");
    }

    #[test]
    fn names_are_those_of_version_1() {
        let folder = tempfile::tempdir().unwrap();
        for (name, backup) in [
            ("audit.log", "audit-2026-01-31T23-59-59.999.log"),
            ("audit", "audit-2026-01-31T23-59-59.999"),
        ] {
            let next = next_name(&folder.path().join(name), AT).unwrap();
            assert_eq!(next, folder.path().join(backup));
        }
    }

    #[test]
    fn what_was_put_aside_later_has_the_later_name_though_the_clock_was_set_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let name = next_name(&path, AT).unwrap();
        fs::write(&name, "").unwrap();
        for now in [AT, AT - DAY] {
            let next = next_name(&path, now).unwrap();
            assert_eq!(next, folder.path().join("audit-2026-02-01T00-00-00.000.log"));
        }
        fs::rename(&name, with(&name, COMPRESSED)).unwrap();
        let next = next_name(&path, AT).unwrap();
        assert_eq!(next, folder.path().join("audit-2026-02-01T00-00-00.000.log"));
        let later = next_name(&path, AT + 2).unwrap();
        assert_eq!(later, folder.path().join("audit-2026-02-01T00-00-00.001.log"));
    }

    #[test]
    fn only_what_has_such_a_name_is_a_backup() {
        let family = Family::of(Path::new("/logs/audit.log"));
        let read = |name: &str| family.read(name);
        assert_eq!(read("audit-2026-01-31T23-59-59.999.log"), Some((AT, Form::Plain)));
        assert_eq!(
            read("audit-2026-01-31T23-59-59.999.log.gz"),
            Some((AT, Form::Compressed))
        );
        assert_eq!(
            read("audit-2026-01-31T23-59-59.999.log.gz.partial"),
            Some((AT, Form::Partial))
        );
        for name in [
            "audit.log",
            "audit.log.1",
            "audit-.log",
            "audit-notes.log",
            "audit-2026-01-31.log",
            "audit-2026-01-31T23-59-59.log",
            "audit-2026-02-31T23-59-59.999.log",
            "audit-2026-01-31T23-59-59.999999.log",
            "audit-2026-01-31T23-59-59.999.txt",
            "audit-2026-01-31T23-59-59.999.log.old",
            "access-2026-01-31T23-59-59.999.log",
            "old-audit-2026-01-31T23-59-59.999.log",
        ] {
            assert_eq!(read(name), None, "{name}");
        }
    }

    #[test]
    fn the_newest_are_kept_and_nobody_elses_files_are_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let family = Family::of(&path);
        for number in 0..5 {
            fs::write(family.name(AT + number).unwrap(), number.to_string()).unwrap();
        }
        let others = ["a.log", "a-notes.log", "b-2020-01-01T00-00-00.000.log"];
        for other in others {
            fs::write(folder.path().join(other), "").unwrap();
        }
        tidy_one(&path, rotation(2, false), AT + 10);
        for number in 0..5 {
            let kept = family.name(AT + number).unwrap().exists();
            assert_eq!(kept, number >= 3, "{number}");
        }
        assert!(others.iter().all(|other| folder.path().join(other).exists()));
    }

    #[test]
    fn what_is_too_old_is_removed_compressed_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let family = Family::of(&path);
        let (old, older) = (
            family.name(AT - 31 * DAY).unwrap(),
            family.name(AT - 40 * DAY).unwrap(),
        );
        let young = family.name(AT - 29 * DAY).unwrap();
        fs::write(&old, "").unwrap();
        fs::write(with(&older, COMPRESSED), "").unwrap();
        fs::write(&young, "").unwrap();
        tidy_one(&path, rotation(10, false), AT);
        assert_eq!(names(folder.path()).len(), 1);
        assert!(young.exists());
    }

    #[test]
    fn a_compressed_backup_reads_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let plain = Family::of(&path).name(AT).unwrap();
        let text: String = (0..1000).map(|n| format!("{{\"line\":{n}}}\n")).collect();
        fs::write(&plain, &text).unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o640)).unwrap();
        tidy_one(&path, rotation(10, true), AT);
        let compressed = with(&plain, COMPRESSED);
        assert_eq!(unpacked(&compressed), text);
        let there = fs::metadata(&compressed).unwrap();
        assert_eq!(there.permissions().mode() & 0o777, 0o640);
        assert!(there.len() < text.len() as u64 / 2);
        assert_eq!(names(folder.path()), ["a-2026-01-31T23-59-59.999.log.gz"]);
        // Once is enough.
        tidy_one(&path, rotation(10, true), AT);
        assert_eq!(unpacked(&compressed), text);
    }

    #[test]
    fn what_a_kill_left_half_done_is_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let family = Family::of(&path);
        let (half, both) = (family.name(AT).unwrap(), family.name(AT + 1).unwrap());
        fs::write(&half, "half\n").unwrap();
        fs::write(with(&half, PARTIAL), "\u{1f}").unwrap();
        fs::write(&both, "both\n").unwrap();
        compress_to(&both, &with(&both, COMPRESSED)).unwrap();
        tidy_one(&path, rotation(10, true), AT);
        assert_eq!(unpacked(&with(&half, COMPRESSED)), "half\n");
        assert_eq!(unpacked(&with(&both, COMPRESSED)), "both\n");
        assert_eq!(names(folder.path()).len(), 2);
    }

    #[test]
    fn what_cannot_be_compressed_is_said_and_stops_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a.log"), folder.path().join("absent/b.log"));
        let family = Family::of(&path);
        let (old, bad) = (family.name(AT).unwrap(), family.name(AT + 1).unwrap());
        fs::write(&old, "old\n").unwrap();
        fs::write(&bad, "bad\n").unwrap();
        // In the way, and nothing that is this family's to remove.
        fs::create_dir(with(&bad, PARTIAL)).unwrap();
        let failed = tidy(&[other.clone(), path], rotation(10, true), AT);
        let failed: Vec<_> = failed.into_keys().collect();
        assert_eq!(failed, [bad.clone(), other]);
        assert_eq!(unpacked(&with(&old, COMPRESSED)), "old\n");
        assert_eq!(fs::read_to_string(&bad).unwrap(), "bad\n");
    }

    #[test]
    fn the_thread_compresses_what_it_is_told_of_and_what_it_finds_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let first = next_name(&path, unix_millis()).unwrap();
        fs::write(&first, "first\n").unwrap();
        let (due, is_due) = sync_channel(1);
        keep(vec![path.clone()], rotation(10, true), is_due).unwrap();
        let gone = |file: &Path| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while file.exists() {
                assert!(Instant::now() < deadline, "{}", file.display());
                std::thread::yield_now();
            }
        };
        gone(&first);
        let second = next_name(&path, unix_millis()).unwrap();
        fs::write(&second, "second\n").unwrap();
        due.send(()).unwrap();
        gone(&second);
        assert_eq!(unpacked(&with(&first, COMPRESSED)), "first\n");
        assert_eq!(unpacked(&with(&second, COMPRESSED)), "second\n");
    }
}
