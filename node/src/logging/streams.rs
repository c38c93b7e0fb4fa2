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
mod tests;
