//! Where a token's PIN comes from: one source, of `hsm.slots` or of v1's single slot. No PIN is read here but the one
//! that stands in the configuration itself.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use hsm_core::secrets::Pin;

use super::env::Env;
use super::error::ConfigError;
use super::file::SecretText;
use super::hsm::Surroundings;

const PIN_KEYS: &str = "pin_file or pin_credential";

/// Where a PIN is read from, with the key that says so.
#[derive(Clone)]
pub enum PinSource {
    /// An environment variable. Cannot be wiped afterwards: files and credentials are better.
    Env {
        /// The configuration key.
        key: String,
        /// The variable.
        variable: String,
    },
    /// A file that only its owner can read.
    File {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
    },
    /// A systemd credential (`LoadCredential=`), a file in `$CREDENTIALS_DIRECTORY`.
    Credential {
        /// The configuration key.
        key: String,
        /// Its name.
        name: String,
    },
    /// Typed on the node's terminal at start.
    Prompt {
        /// The configuration key.
        key: String,
        /// Empty until it was typed. All copies share it, so that a slot that opens later does so with the same
        /// PIN: nobody is asked twice.
        typed: Arc<OnceLock<Pin>>,
    },
    /// Written in the configuration itself; only in v1's legacy mode.
    Inline(Arc<Pin>),
}

impl fmt::Debug for PinSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env { variable, .. } => write!(f, "Env({variable})"),
            Self::File { path, .. } => write!(f, "File({})", path.display()),
            Self::Credential { name, .. } => write!(f, "Credential({name})"),
            Self::Prompt { .. } => f.write_str("Prompt(redacted)"),
            Self::Inline(_) => f.write_str("Inline(redacted)"),
        }
    }
}

impl PinSource {
    fn prompt(key: String) -> Self {
        Self::Prompt {
            key,
            typed: Arc::new(OnceLock::new()),
        }
    }
}

/// The one source that a slot names. `key` gives a field's configuration key.
pub(super) fn pin_source(
    key: &dyn Fn(&str) -> String,
    variable: Option<String>,
    path: Option<PathBuf>,
    credential: Option<String>,
    prompt: bool,
    env: Env<'_>,
) -> Result<PinSource, ConfigError> {
    match (variable, path, credential, prompt) {
        (Some(variable), None, None, false) => {
            let key = key("pin_env");
            if env(&variable).is_none_or(|value| {
                let value = zeroize::Zeroizing::new(value);
                value.is_empty()
            }) {
                return Err(ConfigError::UnsetVariable {
                    key,
                    variable,
                    alternative: PIN_KEYS,
                });
            }
            Ok(PinSource::Env { key, variable })
        }
        (None, Some(path), None, false) => Ok(PinSource::File {
            key: key("pin_file"),
            path,
        }),
        (None, None, Some(name), false) => {
            let key = key("pin_credential");
            if name.is_empty() || name.contains('/') || name.starts_with('.') {
                return Err(ConfigError::invalid(
                    key,
                    name,
                    "is not a credential's name",
                    "write the name given to LoadCredential=, without a path",
                ));
            }
            Ok(PinSource::Credential { key, name })
        }
        (None, None, None, true) => Ok(PinSource::prompt(key("pin_prompt"))),
        (None, None, None, false) => Err(ConfigError::missing(
            key("pin_file"),
            "name the source of the token's PIN: pin_file, pin_credential, pin_env or pin_prompt",
        )),
        _ => Err(ConfigError::invalid(
            key("pin_file"),
            "(several sources)",
            "more than one source of the PIN is named",
            "keep one of pin_file, pin_credential, pin_env and pin_prompt",
        )),
    }
}

/// The PIN of v1's single slot: HSM_PIN goes before `hsm.pin`, as in v1.
pub(super) fn legacy_pin(
    pin: Option<SecretText>,
    prompt: bool,
    around: &Surroundings<'_>,
    warnings: &mut Vec<String>,
) -> Result<PinSource, ConfigError> {
    const KEY: &str = "hsm.pin";
    const VARIABLE: &str = "HSM_PIN";
    let in_env = (around.env)(VARIABLE)
        .map(zeroize::Zeroizing::new)
        .is_some_and(|pin| !pin.is_empty());
    let inline = pin.filter(|pin| !pin.0.is_empty());
    if prompt {
        let other = match (in_env, inline.is_some()) {
            (true, _) => VARIABLE,
            (false, true) => KEY,
            (false, false) => return Ok(PinSource::prompt("hsm.pin_prompt".to_owned())),
        };
        return Err(ConfigError::invalid(
            "hsm.pin_prompt",
            true,
            format!("{other} has the PIN already"),
            format!("remove {other} or hsm.pin_prompt"),
        ));
    }
    match (in_env, inline) {
        (true, _) => Ok(PinSource::Env {
            key: KEY.to_owned(),
            variable: VARIABLE.to_owned(),
        }),
        (false, Some(pin)) => {
            if let Some(mode) = around.mode.filter(|mode| mode & 0o077 != 0) {
                return Err(ConfigError::PinInOpenFile {
                    path: around.file.to_owned(),
                    mode,
                });
            }
            warnings.push(format!(
                "hsm.pin: the PIN stands in {}; hsm.slots with pin_file or pin_credential keeps \
                 it apart from the configuration",
                around.file.display()
            ));
            Ok(PinSource::Inline(Arc::new(Pin::new(pin.0.as_str().to_owned()))))
        }
        (false, None) => Err(ConfigError::UnsetVariable {
            key: KEY.to_owned(),
            variable: VARIABLE.to_owned(),
            alternative: "hsm.pin_prompt, or hsm.slots with pin_file or pin_credential",
        }),
    }
}
