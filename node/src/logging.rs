//! The node's own log: structured lines on standard error. Nothing secret may reach it: secrets
//! live in types that cannot be printed. Records of the `log` crate are not taken here, because
//! the storage listens to them itself.

mod writer;

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;
use tracing_subscriber::fmt::SubscriberBuilder;

use self::writer::LogWriter;
use crate::config::{LogFormat, Logging};

/// How long the end of the process waits for a log that nobody reads.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One for the process, as the log itself.
static WRITER: OnceLock<LogWriter> = OnceLock::new();

/// The epoch that audit lines name; zero before there is a cluster.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// Says which epoch of the cluster lines of the audit belong to from now on.
pub fn note_epoch(epoch: u64) {
    EPOCH.store(epoch, Ordering::Relaxed);
}

/// The epoch last noted.
pub(crate) fn epoch() -> u64 {
    EPOCH.load(Ordering::Relaxed)
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The level or filter is none.
    #[error("logging.level: {value}: {problem}")]
    Filter {
        /// As configured.
        value: String,
        /// Why it is refused.
        problem: String,
    },
    /// Something else in this process has set up a log.
    #[error("the log is already set up in this process")]
    AlreadySet,
    /// There is no thread for it.
    #[error("the operating system refuses a thread for the log: {0}")]
    Thread(#[from] std::io::Error),
}

/// Libraries that below `info` describe every frame they see: quiet them unless the operator
/// writes a filter of their own. openraft reports a dead peer several times a second; what matters of
/// it is reported by `consensus`.
const QUIET: &str = "h2=info,hyper=info,hyper_util=info,rustls=info,tokio_rustls=info,tower=info,\
                     sled=info,openraft=off";

/// Words that stand alone; `warning` is what some loggers call it.
const LEVELS: [(&str, &str); 7] = [
    ("off", "off"),
    ("error", "error"),
    ("warn", "warn"),
    ("warning", "warn"),
    ("info", "info"),
    ("debug", "debug"),
    ("trace", "trace"),
];

/// The audit is written whatever else is: who used a privilege is on record at `error` and `off` too, and no
/// filter of an operator's own takes it out.
const AUDIT: &str = "audit=info";

/// Turns a level, or a list of directives such as `info,hsm_node=debug`, into a filter. Lines of the audit pass it
/// in any case.
///
/// # Errors
/// What is wrong with it, for the message that names the key.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    let lower = text.trim().to_ascii_lowercase();
    let known = LEVELS
        .iter()
        .find(|(name, _)| *name == lower)
        .map(|(_, level)| *level);
    let directives = match known {
        Some(level @ ("off" | "error")) => level.to_owned(),
        Some(level) => format!("{level},{QUIET}"),
        // A single word would be taken for the name of a module and silence everything else.
        None if !lower.contains(['=', ',']) => return Err("is no level".to_owned()),
        None => text.trim().to_owned(),
    };
    let audit = AUDIT.parse::<Directive>().map_err(|error| error.to_string())?;
    let filter = EnvFilter::builder()
        .parse(directives)
        .map_err(|error| error.to_string())?;
    Ok(filter.add_directive(audit))
}

/// Sets up the log of this process. Before it ends, [`last_words`] has to be called.
///
/// # Errors
/// A filter that is none, a log that is set up already, or no thread.
pub fn init(logging: &Logging) -> Result<(), LoggingError> {
    let filter = filter(&logging.level).map_err(|problem| LoggingError::Filter {
        value: logging.level.clone(),
        problem,
    })?;
    let writer = LogWriter::start(std::io::stderr())?;
    let builder = SubscriberBuilder::default()
        .with_env_filter(filter)
        .with_writer(writer.clone());
    let installed = match logging.format {
        LogFormat::Json => install(
            builder
                .json()
                .flatten_event(true)
                .with_current_span(true)
                .with_span_list(false)
                .finish(),
        ),
        LogFormat::Text => install(builder.with_ansi(std::io::stderr().is_terminal()).finish()),
    };
    installed?;
    // The subscriber could be set only once, so this is the first.
    let _ = WRITER.set(writer);
    Ok(())
}

/// The last thing before the process ends: says `words` in plain text, whatever the level, and waits a moment
/// until the log is written.
pub fn last_words(words: Option<&str>) {
    match (WRITER.get(), words) {
        (Some(writer), words) => writer.finish(words, LAST_WORDS),
        (None, Some(words)) => eprintln!("{words}"),
        (None, None) => {}
    }
}

/// Lines lost since the start because standard error did not take them in time.
pub fn lines_lost() -> u64 {
    WRITER.get().map_or(0, LogWriter::dropped)
}

/// Audit lines among them.
pub fn audit_lines_lost() -> u64 {
    WRITER.get().map_or(0, LogWriter::audit_dropped)
}

/// Says so if lines were lost since it was last said. To be called every few seconds.
pub fn say_lost() {
    static SAID: AtomicU64 = AtomicU64::new(0);
    static SAID_OF_AUDIT: AtomicU64 = AtomicU64::new(0);
    let audit_lost = audit_lines_lost();
    if SAID_OF_AUDIT.swap(audit_lost, Ordering::Relaxed) < audit_lost {
        tracing::error!(
            target: "audit", epoch = epoch(),
            audit_lost,
            "audit lines lost since the start: standard error does not take them in time"
        );
    }
    let lost = lines_lost();
    // A count since the start: if this line is lost too, the next one says all of it.
    if SAID.swap(lost, Ordering::Relaxed) < lost {
        tracing::warn!(
            lost,
            "log lines lost since the start: standard error does not take them in time"
        );
    }
}

/// Not the subscriber's own `init`: that would also take the `log` crate's records.
fn install(subscriber: impl Subscriber + Send + Sync + 'static) -> Result<(), LoggingError> {
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LoggingError::AlreadySet)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn v1s_levels_are_accepted_in_any_case() {
        for level in ["error", "WARN", "warning", "info", " debug ", "trace", "off"] {
            assert!(filter(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn a_misspelt_level_is_refused_and_not_taken_for_a_module() {
        assert!(filter("inof").is_err());
        assert!(filter("").is_err());
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_audit_is_written_at_every_level_and_through_every_filter() {
        for level in [
            "off",
            "error",
            "warn",
            "info",
            "trace",
            "off,audit=off",
            "warn,hsm_node=debug",
        ] {
            let lines = Lines::default();
            let writer = lines.clone();
            let subscriber = SubscriberBuilder::default()
                .with_env_filter(filter(level).unwrap())
                .with_writer(move || writer.clone())
                .finish();
            tracing::subscriber::with_default(subscriber, || {
                tracing::info!(target: "audit", "privilege used");
                tracing::info!(target: "noise", "something else");
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert!(text.contains("privilege used"), "{level}: {text}");
            let is_verbose = matches!(level, "info" | "trace");
            assert_eq!(text.contains("something else"), is_verbose, "{level}");
        }
    }

    #[test]
    fn directives_are_accepted_and_checked() {
        assert!(filter("info,hsm_node=debug").is_ok());
        assert!(filter("info,hsm_node=loud").is_err());
    }
}
