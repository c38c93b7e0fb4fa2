//! Which lines go where: the audit, requests, and the rest, each to standard error, standard output or a file. What
//! the log says of itself, such as of lines that it has lost, goes to standard error in any case.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use super::backups;
use super::file::LogFile;
use super::line::LineWriter;
use super::place::{self, Absent};
use super::writer::LogWriter;
use super::{ACCESS, AUDIT, LoggingError, lost};
use crate::config::{ConfigError, LogRotation, LogStream, Logging};

const ERROR_PATH: &str = "logging.error_path";
const AUDIT_PATH: &str = "logging.audit_path";
const ACCESS_PATH: &str = "logging.access_path";

/// What the log writes to. Clones share everything.
#[derive(Clone)]
pub(super) struct Streams(Arc<Inner>);

struct Inner {
    stderr: LogWriter,
    /// Every place.
    all: Vec<LogWriter>,
    rest: Vec<LogWriter>,
    audit: Vec<LogWriter>,
    access: Vec<LogWriter>,
    /// No place had room for what was to be said of lost lines.
    unsaid: AtomicBool,
}

/// Looks whether the files could be opened, and makes nothing.
pub(super) fn check(logging: &Logging) -> Result<(), ConfigError> {
    for (key, stream) in [
        (ERROR_PATH, &logging.error),
        (AUDIT_PATH, &logging.audit),
        (ACCESS_PATH, &logging.access),
    ] {
        if let Some(path) = &stream.path {
            place::find(key, path, Absent::Look)?;
        }
    }
    Ok(())
}

impl Streams {
    /// Opens everything.
    pub(super) fn open(logging: &Logging) -> Result<Self, LoggingError> {
        // Before the first of them is made.
        check(logging)?;
        let mut places = Places::new(logging.rotation)?;
        let rest = places.or_stderr(ERROR_PATH, &logging.error)?;
        let mut audit = places.or_stderr(AUDIT_PATH, &logging.audit)?;
        let access = places.of(ACCESS_PATH, &logging.access)?;
        if logging.mirror_audit {
            // No line is written twice to one place.
            audit.retain(|place| !rest.iter().any(|there| there.is(place)));
            audit.extend_from_slice(&rest);
        }
        let (stderr, all) = places.finish()?;
        Ok(Self(Arc::new(Inner {
            stderr,
            all,
            rest,
            audit,
            access,
            unsaid: AtomicBool::new(false),
        })))
    }

    /// Whether what was said of lost lines since this was last asked has been taken by no place.
    pub(super) fn take_unsaid(&self) -> bool {
        self.0.unsaid.swap(false, Ordering::Relaxed)
    }

    /// Every place.
    pub(super) fn all(&self) -> &[LogWriter] {
        &self.0.all
    }

    /// Whether lines of requests are written.
    pub(super) fn has_access(&self) -> bool {
        !self.0.access.is_empty()
    }

    /// Says `words` on standard error, and waits until everything is written, but not for longer than `patience`.
    pub(super) fn finish(&self, words: Option<&str>, patience: Duration) {
        let Inner { stderr, all, .. } = &*self.0;
        // For all at once: a disk that hangs must not spend the time of the words.
        std::thread::scope(|scope| {
            for writer in all.iter().filter(|writer| !writer.is(stderr)) {
                // Without a thread nobody waits for this one.
                let waits = std::thread::Builder::new();
                let _ = waits.spawn_scoped(scope, move || writer.finish(None, patience));
            }
            stderr.finish(words, patience);
        });
    }

    fn line(&self, target: &str, module: Option<&str>) -> LineWriter<'_> {
        let Inner {
            stderr,
            rest,
            audit,
            access,
            unsaid,
            ..
        } = &*self.0;
        let places = match target {
            AUDIT => audit,
            ACCESS => access,
            _ => rest,
        };
        let is_own = module.is_some_and(|module| module.starts_with(super::MODULE));
        let is_missing = || !places.iter().any(|place| place.is(stderr));
        LineWriter {
            places,
            besides: (is_own && is_missing()).then_some(stderr),
            is_audit: target == AUDIT,
            unsaid: (module == Some(lost::MODULE)).then_some(unsaid),
        }
    }
}

/// What has been opened so far, each once.
struct Places {
    rotation: LogRotation,
    stderr: LogWriter,
    stdout: Option<LogWriter>,
    files: Vec<(PathBuf, LogWriter)>,
    /// Tells the thread that keeps backups that there is a new one.
    due: SyncSender<()>,
    is_due: Receiver<()>,
}

impl Places {
    fn new(rotation: LogRotation) -> io::Result<Self> {
        // One is enough: whoever is told looks at all of them.
        let (due, is_due) = sync_channel(1);
        Ok(Self {
            rotation,
            stderr: LogWriter::start("standard error", io::stderr())?,
            stdout: None,
            files: Vec::new(),
            due,
            is_due,
        })
    }

    fn of(&mut self, key: &'static str, stream: &LogStream) -> Result<Vec<LogWriter>, LoggingError> {
        let mut writers = Vec::new();
        if let Some(path) = &stream.path {
            writers.push(self.file(key, path)?);
        }
        if stream.to_stdout {
            writers.push(self.stdout()?);
        }
        Ok(writers)
    }

    fn or_stderr(&mut self, key: &'static str, stream: &LogStream) -> Result<Vec<LogWriter>, LoggingError> {
        let mut writers = self.of(key, stream)?;
        if writers.is_empty() {
            writers.push(self.stderr.clone());
        }
        Ok(writers)
    }

    fn stdout(&mut self) -> io::Result<LogWriter> {
        if let Some(stdout) = &self.stdout {
            return Ok(stdout.clone());
        }
        // Not the buffered one, which keeps back what a full disk has not taken, and writes it before the next line.
        let unbuffered = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let stdout = LogWriter::start("standard output", unbuffered)?;
        Ok(self.stdout.insert(stdout).clone())
    }

    /// Two keys may name one file, which then has the lines of both.
    fn file(&mut self, key: &'static str, path: &Path) -> Result<LogWriter, LoggingError> {
        let found = place::find(key, path, Absent::Make)?;
        if let Some((_, writer)) = self.files.iter().find(|(open, _)| *open == found) {
            return Ok(writer.clone());
        }
        let opened = LogFile::open(key, found.clone(), self.rotation, self.due.clone())?;
        let writer = LogWriter::start(&path.display().to_string(), opened)?;
        self.files.push((found, writer.clone()));
        Ok(writer)
    }

    /// Standard error, and all of them.
    fn finish(self) -> io::Result<(LogWriter, Vec<LogWriter>)> {
        let (paths, mut all): (Vec<_>, Vec<_>) = self.files.into_iter().unzip();
        if !paths.is_empty() {
            backups::keep(paths, self.rotation, self.is_due)?;
        }
        all.push(self.stderr.clone());
        all.extend(self.stdout);
        Ok((self.stderr, all))
    }
}

impl<'a> MakeWriter<'a> for Streams {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        self.line("", None)
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        self.line(meta.target(), meta.module_path())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::config::LogFormat;

    const LONG: Duration = Duration::from_secs(20);

    fn logging() -> Logging {
        Logging {
            level: "info".to_owned(),
            format: LogFormat::Json,
            error: LogStream::default(),
            audit: LogStream::default(),
            access: LogStream::default(),
            mirror_audit: false,
            rotation: LogRotation {
                max_bytes: 1 << 20,
                max_backups: 10,
                max_age: Duration::from_secs(86_400),
                compress: true,
            },
        }
    }

    fn to(folder: &Path, name: &str) -> LogStream {
        LogStream {
            path: Some(folder.join(name)),
            to_stdout: false,
        }
    }

    fn names<'a>(streams: &'a Streams, target: &str, module: &str) -> Vec<&'a str> {
        let line = streams.line(target, Some(module));
        line.places
            .iter()
            .chain(line.besides)
            .map(LogWriter::name)
            .collect()
    }

    fn log(streams: &Streams, target: &str, line: &str) {
        let mut writer = streams.line(target, Some("hsm_node::http"));
        writer.write_all(line.as_bytes()).unwrap();
    }

    fn read(folder: &Path, name: &str) -> String {
        std::fs::read_to_string(folder.join(name)).unwrap()
    }

    #[test]
    fn without_a_path_there_is_standard_error_alone_and_no_line_of_a_request() {
        let streams = Streams::open(&logging()).unwrap();
        assert!(streams.all().len() == 1 && !streams.has_access());
        for target in ["hsm_node::app", AUDIT] {
            for module in ["hsm_node::app", "hsm_node::logging"] {
                assert_eq!(names(&streams, target, module), ["standard error"]);
            }
        }
    }

    #[test]
    fn each_kind_of_line_goes_to_its_own_file() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let logging = Logging {
            error: to(folder, "error.log"),
            audit: to(folder, "audit.log"),
            access: to(folder, "access.log"),
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        log(&streams, "hsm_node::app", "started\n");
        log(&streams, AUDIT, "key destroyed\n");
        log(&streams, ACCESS, "request\n");
        streams.finish(None, LONG);
        assert_eq!(read(folder, "error.log"), "started\n");
        assert_eq!(read(folder, "audit.log"), "key destroyed\n");
        assert_eq!(read(folder, "access.log"), "request\n");
    }

    #[test]
    fn what_the_log_says_of_itself_is_on_standard_error_too() {
        let folder = tempfile::tempdir().unwrap();
        let logging = Logging {
            error: to(folder.path(), "error.log"),
            audit: to(folder.path(), "audit.log"),
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        for target in [crate::logging::MODULE, AUDIT] {
            let own = names(&streams, target, "hsm_node::logging::backups");
            assert!(own.len() == 2 && own.contains(&"standard error"), "{own:?}");
        }
        assert_eq!(names(&streams, AUDIT, "hsm_node::admin::audit").len(), 1);
    }

    #[test]
    fn two_keys_may_name_one_file_and_no_line_is_in_it_twice() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let logging = Logging {
            error: to(folder, "node.log"),
            audit: to(&folder.join("."), "node.log"),
            mirror_audit: true,
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        log(&streams, "hsm_node::app", "started\n");
        log(&streams, AUDIT, "key destroyed\n");
        streams.finish(None, LONG);
        assert_eq!(read(folder, "node.log"), "started\nkey destroyed\n");
    }

    #[test]
    fn a_mirrored_audit_is_in_both_files() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let logging = Logging {
            error: to(folder, "error.log"),
            audit: to(folder, "audit.log"),
            mirror_audit: true,
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        log(&streams, AUDIT, "key destroyed\n");
        streams.finish(None, LONG);
        for name in ["error.log", "audit.log"] {
            assert_eq!(read(folder, name), "key destroyed\n");
        }
    }

    #[test]
    fn standard_output_is_beside_a_file_or_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let logging = Logging {
            error: LogStream {
                to_stdout: true,
                ..to(folder.path(), "error.log")
            },
            access: LogStream {
                path: None,
                to_stdout: true,
            },
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        let names = |target| names(&streams, target, "hsm_node::app");
        assert_eq!(names("hsm_node::app").len(), 2);
        assert_eq!(names(ACCESS), ["standard output"]);
        assert_eq!(names(AUDIT), ["standard error"]);
    }

    /// Hangs until its sender is dropped.
    struct Hung(Receiver<()>);

    impl Write for Hung {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Hands on what it takes.
    struct Reader(SyncSender<Vec<u8>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.try_send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_last_words_do_not_wait_for_a_disk_that_hangs() {
        let (hangs, until) = sync_channel(0);
        let (to_reader, read) = sync_channel(1);
        let disk = LogWriter::start("disk", Hung(until)).unwrap();
        let stderr = LogWriter::start("standard error", Reader(to_reader)).unwrap();
        let streams = Streams(Arc::new(Inner {
            all: vec![disk.clone(), stderr.clone()],
            rest: vec![disk],
            audit: Vec::new(),
            access: Vec::new(),
            stderr,
            unsaid: AtomicBool::new(false),
        }));
        log(&streams, "hsm_node::app", "hangs\n");
        std::thread::scope(|scope| {
            scope.spawn(|| streams.finish(Some("why"), 3 * LONG));
            assert_eq!(read.recv_timeout(LONG).unwrap(), b"why\n");
            drop(hangs);
        });
    }

    /// A disk that is full for good.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(nix::libc::ENOSPC))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Has what was lost said `times` times.
    fn say_lost(streams: &Streams, times: usize) {
        let lines = tracing_subscriber::fmt().with_writer(streams.clone()).finish();
        tracing::subscriber::with_default(lines, || {
            for _ in 0..times {
                lost::say(streams);
                // Whatever it has cost is counted by then.
                for place in streams.all() {
                    place.finish(None, LONG);
                }
            }
        });
    }

    #[test]
    fn what_is_said_of_lost_lines_is_not_counted_where_they_are_lost() {
        let disk = LogWriter::start("error.log", Full).unwrap();
        let audit = LogWriter::start("audit.log", Full).unwrap();
        let (to_reader, read) = sync_channel(100);
        let stderr = LogWriter::start("standard error", Reader(to_reader)).unwrap();
        let streams = Streams(Arc::new(Inner {
            all: vec![disk.clone(), audit.clone(), stderr.clone()],
            rest: vec![disk.clone()],
            audit: vec![audit.clone(), disk.clone()],
            access: Vec::new(),
            stderr,
            unsaid: AtomicBool::new(false),
        }));
        log(&streams, "hsm_node::app", "started\n");
        log(&streams, AUDIT, "key destroyed\n");
        disk.finish(None, LONG);
        audit.finish(None, LONG);
        say_lost(&streams, 3);
        assert_eq!((disk.dropped(), audit.dropped()), (2, 1));
        let said: Vec<String> = read
            .try_iter()
            .map(|line| String::from_utf8(line).unwrap())
            .collect();
        // Lines and audit lines of either place.
        assert_eq!(said.len(), 4, "{said:?}");
    }

    #[test]
    fn what_nobody_has_taken_of_lost_lines_is_said_again() {
        let (hangs, until) = sync_channel(0);
        let stderr = LogWriter::start("standard error", Hung(until)).unwrap();
        let streams = Streams(Arc::new(Inner {
            all: vec![stderr.clone()],
            rest: vec![stderr.clone()],
            audit: vec![stderr.clone()],
            access: Vec::new(),
            stderr: stderr.clone(),
            unsaid: AtomicBool::new(false),
        }));
        while stderr.audit_dropped() == 0 {
            log(&streams, AUDIT, "key destroyed\n");
        }
        let lines = tracing_subscriber::fmt().with_writer(streams.clone()).finish();
        tracing::subscriber::with_default(lines, || {
            for _ in 0..3 {
                lost::say(&streams);
            }
        });
        let lost = stderr.audit_dropped();
        assert_eq!(stderr.more_audit_dropped(), Some(lost), "it is not said yet");
        stderr.say_audit_dropped_again();
        drop(hangs);
        stderr.finish(None, LONG);
        say_lost(&streams, 1);
        assert_eq!(
            (stderr.audit_dropped(), stderr.more_audit_dropped()),
            (lost, None)
        );
    }

    #[test]
    fn a_look_makes_nothing_and_a_refused_path_leaves_the_others_unmade() {
        let folder = tempfile::tempdir().unwrap();
        let mut logging = Logging {
            error: to(folder.path(), "error.log"),
            ..logging()
        };
        check(&logging).unwrap();
        logging.audit = to(folder.path(), "..");
        let error = Streams::open(&logging).err().unwrap().to_string();
        assert!(error.starts_with("config: logging.audit_path: "), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn lines_of_many_threads_stay_whole() {
        const THREADS: usize = 8;
        const LINES: usize = 200;
        let folder = tempfile::tempdir().unwrap();
        let logging = Logging {
            access: to(folder.path(), "access.log"),
            rotation: LogRotation {
                max_bytes: 64 << 10,
                max_backups: 1000,
                compress: false,
                ..logging().rotation
            },
            ..logging()
        };
        let streams = Streams::open(&logging).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let streams = &streams;
                scope.spawn(move || {
                    let filling = char::from(b'a' + u8::try_from(thread).unwrap())
                        .to_string()
                        .repeat(200);
                    for number in 0..LINES {
                        log(streams, ACCESS, &format!("{thread} {number} {filling}\n"));
                    }
                });
            }
        });
        streams.finish(None, LONG);
        assert_eq!(streams.all().iter().map(LogWriter::dropped).sum::<u64>(), 0);
        let mut next = [0; THREADS];
        let mut files: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(files.len() > 2, "{files:?}");
        // Backups by their times; `access.log` comes after every `access-…`.
        files.sort();
        for file in files {
            for line in std::fs::read_to_string(file).unwrap().lines() {
                let parts: Vec<&str> = line.split(' ').collect();
                let [thread, number, filling] = parts[..] else {
                    panic!("{line}")
                };
                let thread: usize = thread.parse().unwrap();
                assert_eq!(number.parse::<usize>().unwrap(), next[thread], "{line}");
                assert_eq!(filling.len(), 200, "{line}");
                next[thread] += 1;
            }
        }
        assert_eq!(next, [LINES; THREADS]);
    }
}
