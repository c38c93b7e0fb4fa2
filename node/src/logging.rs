//! The node's own log: structured lines on standard error, or where the configuration says. Nothing secret may reach it:
//! secrets live in types that cannot be printed. Records of the `log` crate are not taken here, because
//! the storage listens to them itself.

mod backups;
mod file;
mod line;
mod lost;
mod place;
mod streams;
mod writer;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::{Filter, Layer, SubscriberExt};
use tracing_subscriber::{EnvFilter, Registry, fmt, registry};

use self::streams::Streams;
use crate::config::{ConfigError, LogFormat, Logging};

/// How long the end of the process waits for a log that nobody reads.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One for the process, as the log itself.
static STREAMS: OnceLock<Streams> = OnceLock::new();

/// The target of lines of the audit.
const AUDIT: &str = "audit";
/// The target of lines of requests.
const ACCESS: &str = "access";
/// Lines from here and below are what the log says of itself.
const MODULE: &str = module_path!();

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
    /// A file that it cannot write to.
    #[error(transparent)]
    Path(#[from] ConfigError),
    /// There is no thread for it.
    #[error("the operating system refuses a thread for the log: {0}")]
    Thread(#[from] std::io::Error),
}

/// Libraries that below `info` describe every frame they see: quiet them unless the operator
/// writes a filter of their own. openraft reports a dead peer several times a second; what matters of
/// it is reported by `consensus`.
const QUIET: &str = "h2=info,hyper=info,hyper_util=info,rustls=info,tokio_rustls=info,tower=info,\
                     sled=info,openraft=off";

/// Lines of requests are written where they have a place, and nowhere else, whatever the level. The last of directives
/// for one target rules.
const NO_ACCESS: &str = "access=off";

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

/// Turns a level, or a list of directives such as `info,hsm_node=debug`, into a filter.
///
/// # Errors
/// What is wrong with it, for the message that names the key.
pub fn filter(text: &str) -> Result<EnvFilter, String> {
    // Such a directive is judged anew in every span, by what the filter itself keeps of it: then it is asked for lines
    // that something else lets through, and the audit could be lost with it.
    if text.contains('[') {
        return Err("names spans or fields; write levels and targets".to_owned());
    }
    let lower = text.trim().to_ascii_lowercase();
    let known = LEVELS
        .iter()
        .find(|(name, _)| *name == lower)
        .map(|(_, level)| *level);
    let directives = match known {
        Some(level @ ("off" | "error")) => format!("{level},{NO_ACCESS}"),
        Some(level) => format!("{level},{QUIET},{NO_ACCESS}"),
        // A single word would be taken for the name of a module and silence everything else.
        None if !lower.contains(['=', ',']) => return Err("is no level".to_owned()),
        None => format!("{},{NO_ACCESS}", text.trim()),
    };
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| error.to_string())
}

/// What is written: the audit whatever else is. Who used a privilege is on record at `error` and `off` too, and no
/// filter of an operator's own takes it out. A directive would not do: a more specific one goes before it. Nor does a
/// level take lines of requests out, where there is a place for them.
fn written(filter: EnvFilter, has_access: bool) -> impl Filter<Registry> + Send + Sync + 'static {
    let always = filter_fn(move |line: &Metadata<'_>| {
        let is_asked_for = match line.target() {
            AUDIT => true,
            ACCESS => has_access,
            _ => false,
        };
        is_asked_for && *line.level() <= Level::INFO
    });
    FilterExt::<Registry>::or(filter, always.with_max_level_hint(Level::INFO))
}

/// Sets up the log of this process. Before it ends, [`last_words`] has to be called.
///
/// # Errors
/// A filter that is none, a file that cannot be written to, a log that is set up already, or no thread.
pub fn init(logging: &Logging) -> Result<(), LoggingError> {
    let filter = filter(&logging.level).map_err(|problem| LoggingError::Filter {
        value: logging.level.clone(),
        problem,
    })?;
    let streams = Streams::open(logging)?;
    let written = written(filter, streams.has_access());
    let lines = fmt::layer::<Registry>().with_writer(streams.clone());
    let installed = match logging.format {
        LogFormat::Json => {
            let lines = lines
                .json()
                .flatten_event(true)
                .with_current_span(true)
                .with_span_list(false);
            install(registry().with(lines.with_filter(written)))
        }
        // Without colours: a sequence in a field could not be told from one of the subscriber's own.
        LogFormat::Text => install(registry().with(lines.with_ansi(false).with_filter(written))),
    };
    installed?;
    // The subscriber could be set only once, so this is the first.
    let _ = STREAMS.set(streams);
    Ok(())
}

/// Looks whether the files of the log could be opened, and makes nothing.
///
/// # Errors
/// The first that could not be.
pub fn check(logging: &Logging) -> Result<(), LoggingError> {
    Ok(streams::check(logging)?)
}

/// The last thing before the process ends: says `words` in plain text on standard error, whatever the level, and waits
/// a moment until the log is written.
pub fn last_words(words: Option<&str>) {
    match (STREAMS.get(), words) {
        (Some(streams), words) => streams.finish(words, LAST_WORDS),
        (None, Some(words)) => eprintln!("{words}"),
        (None, None) => {}
    }
}

/// Lines lost since the start because a place of the log did not take them, in time or at all. One that was to go to
/// two places and has reached one counts.
pub fn lines_lost() -> u64 {
    let places = STREAMS.get().map(Streams::all).unwrap_or_default();
    places.iter().map(writer::LogWriter::dropped).sum()
}

/// Audit lines among them.
pub fn audit_lines_lost() -> u64 {
    let places = STREAMS.get().map(Streams::all).unwrap_or_default();
    places.iter().map(writer::LogWriter::audit_dropped).sum()
}

/// Says so if lines were lost since it was last said, on standard error too. To be called every few seconds.
pub fn say_lost() {
    if let Some(streams) = STREAMS.get() {
        lost::say(streams);
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
            let written = written(filter(level).unwrap(), false);
            let to_lines = fmt::layer::<Registry>().with_writer(move || writer.clone());
            let subscriber = registry().with(to_lines.with_filter(written));
            tracing::subscriber::with_default(subscriber, || {
                tracing::info!(target: "audit", "privilege used");
                tracing::info!(target: "audit", key = 1, "key destroyed");
                tracing::debug!(target: "audit", "no line of the audit");
                tracing::info!(target: "noise", "something else");
                tracing::info!(target: "access", "a request");
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert!(text.contains("privilege used"), "{level}: {text}");
            assert!(text.contains("key destroyed"), "{level}: {text}");
            assert_eq!(text.contains("no line of the audit"), level == "trace", "{level}");
            let is_verbose = matches!(level, "info" | "trace");
            assert_eq!(text.contains("something else"), is_verbose, "{level}");
            assert!(!text.contains("a request"), "{level}: {text}");
        }
    }

    #[test]
    fn lines_of_requests_are_written_at_every_level_where_they_have_a_place() {
        for level in ["off", "warn", "trace", "info,access=off"] {
            let lines = Lines::default();
            let writer = lines.clone();
            let written = written(filter(level).unwrap(), true);
            let to_lines = fmt::layer::<Registry>().with_writer(move || writer.clone());
            let subscriber = registry().with(to_lines.with_filter(written));
            tracing::subscriber::with_default(subscriber, || {
                tracing::info!(target: "access", "a request");
                tracing::debug!(target: "access", "no line of a request");
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert!(text.contains("a request"), "{level}: {text}");
            assert!(!text.contains("no line"), "{level}: {text}");
        }
    }

    #[test]
    fn directives_of_spans_and_fields_are_refused_with_what_to_write() {
        for text in [
            "off,audit[{key}]=off",
            "off,audit[a_span{key=1}]=off,[{key}]=off",
            "info,[request]=debug",
            "[{key}]",
        ] {
            let problem = filter(text).unwrap_err();
            assert_eq!(
                problem, "names spans or fields; write levels and targets",
                "{text}"
            );
        }
    }

    #[test]
    fn directives_are_accepted_and_checked() {
        assert!(filter("info,hsm_node=debug").is_ok());
        assert!(filter("info,hsm_node=loud").is_err());
    }
}
