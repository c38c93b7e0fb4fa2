//! `logging`: what is written, how, and where to. The keys are version 1's, and so is what they mean; without a path
//! nothing is written to a file. Nothing here touches one: [`crate::logging`] does.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::env::{self, Env};
use super::error::ConfigError;
use super::file::LoggingSection;
use super::server::number;

const MEBIBYTE: u64 = 1 << 20;
const DAY: u64 = 86_400;

/// The log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// A level or an `EnvFilter` directive.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
    /// Everything that is neither of the audit nor a line of a request. Standard error without a place of its own.
    pub error: LogStream,
    /// Lines of the audit. Standard error without a place of their own.
    pub audit: LogStream,
    /// A line for each request. Not written without a place.
    pub access: LogStream,
    /// Whether lines of the audit also go where [`Logging::error`] goes.
    pub mirror_audit: bool,
    /// When a file is full, and what becomes of it.
    pub rotation: LogRotation,
}

/// Where lines of one kind go. Nowhere is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogStream {
    /// A file.
    pub path: Option<PathBuf>,
    /// Standard output, beside the file or alone.
    pub to_stdout: bool,
}

/// For every file of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRotation {
    /// A file that would grow beyond it is put aside.
    pub max_bytes: u64,
    /// Files put aside that are kept.
    pub max_backups: usize,
    /// They are kept for as long.
    pub max_age: Duration,
    /// Whether they are compressed (gzip).
    pub compress: bool,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl Logging {
    /// The same on standard error, whatever files there are: a look at the configuration makes none.
    #[must_use]
    pub fn on_standard_error(&self) -> Self {
        Self {
            error: LogStream::default(),
            audit: LogStream::default(),
            access: LogStream::default(),
            ..self.clone()
        }
    }
}

impl LoggingSection {
    /// Says in `ignored` which keys are given and have no effect.
    pub(super) fn resolve(self, env: Env<'_>, ignored: &mut Vec<String>) -> Result<Logging, ConfigError> {
        let given_of_files = [
            ("logging.max_size_mb", self.max_size_mb.is_some()),
            ("logging.max_backups", self.max_backups.is_some()),
            ("logging.max_age_days", self.max_age_days.is_some()),
            ("logging.compress", self.compress.is_some()),
            (
                "logging.audit_mirror_to_error_on_debug",
                self.audit_mirror_to_error_on_debug.is_some(),
            ),
        ];
        let level = given(env, "HSM_LOG_LEVEL", self.level, "info");
        crate::logging::filter(&level).map_err(|problem| {
            ConfigError::invalid(
                "logging.level",
                &level,
                problem,
                "write error, warn, info, debug or trace, or a filter such as info,hsm_node=debug",
            )
        })?;
        let format = format(&given(env, "HSM_LOG_FORMAT", self.format, "json"))?;
        let error = stream(env, "error", self.error_path, self.error_to_stdout, ignored)?;
        let audit = stream(env, "audit", self.audit_path, self.audit_to_stdout, ignored)?;
        let access = stream(env, "access", self.access_path, self.access_to_stdout, ignored)?;
        if [&error, &audit, &access]
            .iter()
            .all(|stream| stream.path.is_none())
        {
            let without =
                "has no effect: no file is written without logging.error_path, audit_path or access_path";
            let unused = given_of_files.iter().filter(|(_, given)| *given);
            ignored.extend(unused.map(|(key, _)| format!("{key}: {without}")));
        }
        let mirror = flag(
            env,
            "logging.audit_mirror_to_error_on_debug",
            self.audit_mirror_to_error_on_debug,
        )?;
        let is_debug = matches!(level.trim().to_ascii_lowercase().as_str(), "debug" | "trace");
        let count = |key, file, default, most| count(env, key, file, default, most);
        let rotation = LogRotation {
            max_bytes: MEBIBYTE * count("logging.max_size_mb", self.max_size_mb, 100, 10_240)?,
            max_backups: usize::try_from(count("logging.max_backups", self.max_backups, 10, 1000)?)
                .unwrap_or(usize::MAX),
            max_age: Duration::from_secs(DAY * count("logging.max_age_days", self.max_age_days, 30, 3650)?),
            compress: flag(env, "logging.compress", self.compress)?.unwrap_or(true),
        };
        Ok(Logging {
            level,
            format,
            error,
            audit,
            access,
            mirror_audit: is_debug && mirror.unwrap_or(true),
            rotation,
        })
    }
}

fn given(env: Env<'_>, variable: &str, text: Option<String>, default: &str) -> String {
    env::or_file(env, variable, text)
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

fn format(text: &str) -> Result<LogFormat, ConfigError> {
    match text.to_ascii_lowercase().as_str() {
        "json" => Ok(LogFormat::Json),
        "text" | "console" => Ok(LogFormat::Text),
        _ => Err(ConfigError::invalid(
            "logging.format",
            text,
            "is not known",
            "write json or text",
        )),
    }
}

/// Beside a file lines go to standard output too, unless it is said that they do not.
fn stream(
    env: Env<'_>,
    kind: &str,
    path: Option<PathBuf>,
    to_stdout: Option<bool>,
    ignored: &mut Vec<String>,
) -> Result<LogStream, ConfigError> {
    let (path_key, key) = (
        format!("logging.{kind}_path"),
        format!("logging.{kind}_to_stdout"),
    );
    let path = env::or_file(env, &variable(&path_key), path).filter(|path| !path.as_os_str().is_empty());
    let to_stdout = flag(env, &key, to_stdout)?;
    if path.is_none() && to_stdout == Some(false) {
        ignored.push(format!("{key}: false is what it is without {path_key}"));
    }
    Ok(LogStream {
        to_stdout: to_stdout.unwrap_or(path.is_some()),
        path,
    })
}

/// Version 1's name for a key in the environment, such as `HSM_LOG_AUDIT_PATH`.
fn variable(key: &str) -> String {
    key.replace("logging.", "HSM_LOG_").to_ascii_uppercase()
}

/// A variable's value is told like one of the file.
fn or_file<T: FromStr>(
    env: Env<'_>,
    key: &str,
    file: Option<T>,
    remedy: &str,
) -> Result<Option<T>, ConfigError> {
    let variable = variable(key);
    let Some(text) = env(&variable).filter(|text| !text.is_empty()) else {
        return Ok(file);
    };
    let text = text.trim();
    let wrong = |_| ConfigError::invalid(key, text, format!("is not what {variable} may be"), remedy);
    text.to_ascii_lowercase().parse().map(Some).map_err(wrong)
}

/// Written as version 1 read it.
struct Flag(bool);

impl FromStr for Flag {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "true" | "t" | "1" => Ok(Self(true)),
            "false" | "f" | "0" => Ok(Self(false)),
            _ => Err(()),
        }
    }
}

fn flag(env: Env<'_>, key: &str, file: Option<bool>) -> Result<Option<bool>, ConfigError> {
    let given = or_file(env, key, file.map(Flag), "write true or false")?;
    Ok(given.map(|flag| flag.0))
}

/// 0 is the default, as in version 1.
fn count(env: Env<'_>, key: &str, file: Option<u64>, default: u64, most: u64) -> Result<u64, ConfigError> {
    let value = or_file(env, key, file, "write a number")?.filter(|value| *value != 0);
    number(key, value, default, 1..=most)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn resolve(section: LoggingSection, env: Env<'_>) -> (Result<Logging, String>, Vec<String>) {
        let mut ignored = Vec::new();
        let logging = section.resolve(env, &mut ignored);
        (logging.map_err(|error| error.to_string()), ignored)
    }

    #[test]
    fn without_a_path_nothing_leaves_standard_error() {
        let (logging, ignored) = resolve(LoggingSection::default(), &none);
        let logging = logging.unwrap();
        assert_eq!(logging, logging.on_standard_error());
        assert!(ignored.is_empty());
    }

    #[test]
    fn a_path_brings_version_1s_defaults_with_it() {
        let section = LoggingSection {
            error_path: Some("e.log".into()),
            audit_path: Some("a.log".into()),
            audit_to_stdout: Some(false),
            max_backups: Some(0),
            ..LoggingSection::default()
        };
        let (logging, ignored) = resolve(section, &none);
        let logging = logging.unwrap();
        let to = |path: &str, to_stdout| LogStream {
            path: Some(path.into()),
            to_stdout,
        };
        assert_eq!(logging.error, to("e.log", true));
        assert_eq!(logging.audit, to("a.log", false));
        assert_eq!(logging.access, LogStream::default());
        assert_eq!(
            logging.rotation,
            LogRotation {
                max_bytes: 100 << 20,
                max_backups: 10,
                max_age: Duration::from_secs(30 * 86_400),
                compress: true,
            }
        );
        assert!(ignored.is_empty(), "{ignored:?}");
        assert!(!logging.mirror_audit);
    }

    #[test]
    fn the_audit_is_mirrored_at_debug_unless_it_is_said_that_it_is_not() {
        for (level, said, mirrored) in [
            ("debug", None, true),
            ("DEBUG", Some(true), true),
            ("debug", Some(false), false),
            ("info", Some(true), false),
            ("info,hsm_node=debug", None, false),
        ] {
            let section = LoggingSection {
                level: Some(level.to_owned()),
                error_path: Some("e.log".into()),
                audit_mirror_to_error_on_debug: said,
                ..LoggingSection::default()
            };
            let (logging, _) = resolve(section, &none);
            assert_eq!(logging.unwrap().mirror_audit, mirrored, "{level} {said:?}");
        }
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let section = LoggingSection {
            max_size_mb: Some(5),
            compress: Some(true),
            audit_to_stdout: Some(false),
            access_to_stdout: Some(true),
            ..LoggingSection::default()
        };
        let (logging, ignored) = resolve(section, &none);
        assert!(logging.unwrap().access.to_stdout);
        let keys: Vec<_> = ignored.iter().filter_map(|line| line.split(':').next()).collect();
        assert_eq!(
            keys,
            [
                "logging.audit_to_stdout",
                "logging.max_size_mb",
                "logging.compress"
            ]
        );
    }

    #[test]
    fn version_1s_variables_go_before_the_file() {
        let env = |name: &str| {
            let value = match name {
                "HSM_LOG_ERROR_PATH" => "/var/e.log",
                "HSM_LOG_MAX_SIZE_MB" => "7",
                "HSM_LOG_COMPRESS" => "False",
                "HSM_LOG_ACCESS_TO_STDOUT" => "1",
                "HSM_LOG_AUDIT_PATH" => "",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let section = LoggingSection {
            error_path: Some("e.log".into()),
            audit_path: Some("a.log".into()),
            max_size_mb: Some(5),
            ..LoggingSection::default()
        };
        let (logging, _) = resolve(section, &env);
        let logging = logging.unwrap();
        assert_eq!(logging.error.path.as_deref(), Some(Path::new("/var/e.log")));
        assert_eq!(logging.audit.path.as_deref(), Some(Path::new("a.log")));
        assert_eq!(logging.rotation.max_bytes, 7 << 20);
        assert!(!logging.rotation.compress && logging.access.to_stdout);
    }

    #[test]
    fn values_that_are_none_are_refused_with_their_key() {
        let section = || LoggingSection {
            max_age_days: Some(3651),
            ..LoggingSection::default()
        };
        let (refused, _) = resolve(section(), &none);
        let error = refused.unwrap_err();
        assert!(
            error.starts_with("config: logging.max_age_days: 3651: "),
            "{error}"
        );
        for (variable, start) in [
            ("HSM_LOG_MAX_BACKUPS", "config: logging.max_backups: many: "),
            (
                "HSM_LOG_AUDIT_TO_STDOUT",
                "config: logging.audit_to_stdout: many: ",
            ),
        ] {
            let env = |name: &str| (name == variable).then(|| "many".to_owned());
            let (refused, _) = resolve(LoggingSection::default(), &env);
            let error = refused.unwrap_err();
            assert!(error.starts_with(start) && error.contains(variable), "{error}");
        }
    }
}
