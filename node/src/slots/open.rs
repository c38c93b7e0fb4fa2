//! Opening one configured slot: PIN, module, token. Says which configuration key is to blame when it
//! does not work, and never what a PIN is.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use hsm_core::{HsmError, Module, Slot, SlotError, SlotOptions, SlotState};

use crate::config::{PinSource, Slot as SlotConfig};
use crate::secrets::{SecretError, read_pin};

/// What helps where a token that this node used before does not open any more, does not come back or cannot be read.
pub(crate) const DAMAGED: &str = "if it stays so, the token is damaged or lost: put its files back from a copy, or replace the node \
     (docs/operations.md, \"A token is damaged or lost\")";

/// Why a slot could not be opened.
#[derive(Debug)]
pub enum OpenFailure {
    /// Its PIN could not be read.
    Secret(SecretError),
    /// Its module could not be loaded.
    Module(HsmError),
    /// Its token refuses.
    Slot(SlotError),
    /// It is open, and its token does not take the login again.
    Login(HsmError),
    /// The attempt has not come back.
    Hangs,
    /// Another attempt has not come back yet.
    UnderWay,
}

impl fmt::Display for OpenFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Secret(error) => error.fmt(f),
            Self::Module(error) | Self::Login(error) => error.fmt(f),
            Self::Slot(error) => error.fmt(f),
            Self::UnderWay => f.write_str("an attempt to open it is under way; ask again when it has ended"),
            Self::Hangs => f.write_str("its token or module hangs: opening it has not come back in time"),
        }
    }
}

impl OpenFailure {
    /// The state of the slot from then on.
    pub fn state(&self) -> SlotState {
        match self {
            Self::Secret(_) | Self::Login(_) => SlotState::Locked,
            Self::Hangs => SlotState::Failed {
                code: "hung",
                reason: self.to_string(),
            },
            Self::UnderWay => SlotState::Failed {
                code: "opening",
                reason: self.to_string(),
            },
            Self::Module(error) => SlotState::Failed {
                code: "open_failed",
                reason: error.to_string(),
            },
            Self::Slot(error) => error.state(),
        }
    }

    /// Whether a restart can only help once a PIN has changed.
    pub(super) fn is_about_pin(&self) -> bool {
        matches!(self, Self::Slot(error) if error.is_about_pin())
    }

    /// Whether the token may be damaged or lost, if it was open here before.
    pub(super) fn may_be_damage(&self) -> bool {
        matches!(
            self,
            Self::Slot(
                SlotError::TokenNotFound { .. }
                    | SlotError::Hsm {
                        error: HsmError::Call(_),
                        ..
                    }
            )
        )
    }

    /// Serial number of a token that this process owns already, under another slot's name.
    pub(super) fn owned_here(&self) -> Option<&str> {
        match self {
            Self::Slot(SlotError::Hsm {
                error: HsmError::Owned { serial, .. },
                ..
            }) => Some(serial),
            _ => None,
        }
    }

    /// The configuration key that is to blame, and its value.
    pub(super) fn blame(&self, config: &SlotConfig, legacy: bool) -> (String, String) {
        let label = || (label_key(config, legacy), config.label.clone());
        match self {
            Self::Secret(_) => pin_key(&config.pin),
            Self::Module(_) => {
                let key = if legacy {
                    "hsm.pkcs11_lib".to_owned()
                } else {
                    field(config, "pkcs11_lib")
                };
                (key, config.pkcs11_lib.display().to_string())
            }
            Self::Slot(error) if error.is_about_pin() => pin_key(&config.pin),
            Self::Login(_) => pin_key(&config.pin),
            Self::Slot(_) | Self::Hangs | Self::UnderWay => label(),
        }
    }
}

fn field(config: &SlotConfig, field: &str) -> String {
    format!("hsm.slots.{}.{field}", config.name)
}

/// The key that names a slot's token.
pub(super) fn label_key(config: &SlotConfig, legacy: bool) -> String {
    if legacy {
        "hsm.slot_id".to_owned()
    } else {
        field(config, "label")
    }
}

fn pin_key(source: &PinSource) -> (String, String) {
    match source {
        PinSource::Env { key, variable } => (key.clone(), variable.clone()),
        PinSource::File { key, path } => (key.clone(), path.display().to_string()),
        PinSource::Credential { key, name } => (key.clone(), name.clone()),
        PinSource::Prompt { key, .. } => (key.clone(), "true".to_owned()),
        PinSource::Inline(_) => ("hsm.pin".to_owned(), "(not shown)".to_owned()),
    }
}

/// What an administrator allows when a slot is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unlock {
    /// Log in although the token reports wrong PINs. Never applies to a PIN that was refused, to the last
    /// attempt, or to a locked PIN.
    pub retry: bool,
}

/// Opens the slot. Blocks for as long as the token takes.
pub(super) fn open(config: &SlotConfig, state_dir: &Path, how: Unlock) -> Result<Slot, OpenFailure> {
    let module = Module::load(&config.pkcs11_lib).map_err(OpenFailure::Module)?;
    for file in module.take_set_aside() {
        tracing::warn!(
            file,
            "a damaged object of a token lies aside, because the module would end this process over it; what can be imported is \
             imported anew (docs/operations.md, \"A token is damaged or lost\")"
        );
    }
    let pin = read_pin(&config.pin).map_err(OpenFailure::Secret)?;
    let name = config.name.to_arc();
    let options = SlotOptions {
        insecure_pin: config.insecure_pin,
        retry_pin: how.retry,
        threads: config.threads,
        queue: config.queue,
        on_call: Some(Arc::new(move |operation, took, ok| {
            crate::metrics::token_call(Arc::clone(&name), operation, ok, took);
        })),
        ..SlotOptions::new(config.name.as_str(), &config.label, pin, state_dir.to_path_buf())
    };
    let slot = Slot::open(&module, options).map_err(OpenFailure::Slot)?;
    tell(config, &module, &slot);
    Ok(slot)
}

/// What opening the token had to repair.
fn tell(config: &SlotConfig, module: &Module, slot: &Slot) {
    let name = config.name.as_str();
    if module
        .restored_tokens()
        .iter()
        .any(|serial| serial == slot.serial())
    {
        tracing::warn!(
            slot = name,
            serial = slot.serial(),
            "the token's own file was cut short by a kill; it was restored from its copy"
        );
    }
    match slot.remove_torn_objects() {
        Ok(torn) => {
            for object in torn {
                tracing::warn!(
                    slot = name,
                    object,
                    "torn object removed; its key is imported again"
                );
            }
        }
        Err(error) => tracing::warn!(slot = name, %error, "torn objects could not be looked for"),
    }
    tracing::info!(
        slot = name,
        label = slot.label(),
        serial = slot.serial(),
        "slot open"
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use std::path::PathBuf;

    use raft_store::names::SlotName;

    use super::*;

    pub(in super::super) fn config(name: &str) -> SlotConfig {
        SlotConfig {
            name: SlotName::new(name).unwrap(),
            label: format!("slot-{name}"),
            pin: PinSource::File {
                key: format!("hsm.slots.{name}.pin_file"),
                path: PathBuf::from("/nonexistent/pin"),
            },
            contexts: Vec::new(),
            insecure_pin: false,
            threads: 1,
            queue: 16,
            pkcs11_lib: PathBuf::from("/nonexistent/libhsm.so"),
        }
    }

    #[test]
    fn blame_falls_on_the_key_that_can_be_corrected() {
        let slot = config("exchange");
        let refused = OpenFailure::Slot(SlotError::PinRefusedBefore {
            slot: "exchange".to_owned(),
            serial: "1".to_owned(),
            marker: "m".to_owned(),
        });
        assert_eq!(
            refused.blame(&slot, false),
            (
                "hsm.slots.exchange.pin_file".to_owned(),
                "/nonexistent/pin".to_owned()
            )
        );
        assert!(refused.is_about_pin());
        assert_eq!(refused.state(), SlotState::Locked);
        assert!(!refused.may_be_damage());
        let unknown = OpenFailure::Slot(SlotError::TokenNotFound {
            slot: "exchange".to_owned(),
            label: "slot-exchange".to_owned(),
            found: "no token".to_owned(),
        });
        assert_eq!(
            unknown.blame(&slot, false),
            ("hsm.slots.exchange.label".to_owned(), "slot-exchange".to_owned())
        );
        assert_eq!(unknown.blame(&slot, true).0, "hsm.slot_id");
        assert_eq!(unknown.state(), SlotState::Absent);
        assert!(unknown.may_be_damage());
    }

    #[test]
    fn a_missing_module_is_named() {
        let failure = open(&config("a"), Path::new("/nonexistent"), Unlock::default())
            .err()
            .unwrap();
        assert_eq!(
            failure.blame(&config("a"), false),
            (
                "hsm.slots.a.pkcs11_lib".to_owned(),
                "/nonexistent/libhsm.so".to_owned()
            )
        );
        assert_eq!(failure.state().name(), "failed");
        assert!(!failure.is_about_pin() && !failure.may_be_damage());
    }
}
