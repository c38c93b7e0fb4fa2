//! The node's own log: structured lines on standard error. Nothing secret may reach it: secrets
//! live in types that cannot be printed. Records of the `log` crate are not taken here, because
//! the storage listens to them itself.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::SubscriberBuilder;

use crate::config::{LogFormat, Logging};

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

/// Turns a level, or a list of directives such as `info,hsm_node=debug`, into a filter.
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
    EnvFilter::builder()
        .parse(directives)
        .map_err(|error| error.to_string())
}

/// Sets up the log of this process.
///
/// # Errors
/// A filter that is none, or a log that is set up already.
pub fn init(logging: &Logging) -> Result<(), LoggingError> {
    let filter = filter(&logging.level).map_err(|problem| LoggingError::Filter {
        value: logging.level.clone(),
        problem,
    })?;
    let builder = SubscriberBuilder::default()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match logging.format {
        LogFormat::Json => install(
            builder
                .json()
                .flatten_event(true)
                .with_current_span(true)
                .with_span_list(false)
                .finish(),
        ),
        LogFormat::Text => install(builder.with_ansi(std::io::stderr().is_terminal()).finish()),
    }
}

/// Not the subscriber's own `init`: that would also take the `log` crate's records.
fn install(subscriber: impl Subscriber + Send + Sync + 'static) -> Result<(), LoggingError> {
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LoggingError::AlreadySet)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
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

    #[test]
    fn directives_are_accepted_and_checked() {
        assert!(filter("info,hsm_node=debug").is_ok());
        assert!(filter("info,hsm_node=loud").is_err());
    }
}
