//! `hsmctl slot`. `init` is the one thing done to a token directly, under the token's own lock: an
//! initialised token is destroyed only if that is asked for and its label typed again. `unlock` asks the
//! node that has the slot.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use hsm_api::admin::UnlockSlotRequest;
use hsm_core::HsmError;
use hsm_core::module::Module;
use hsm_core::secrets::Pin;
use hsm_core::token_init::{InitToken, prepare};
use serde::Serialize;

use super::{CHANGE, Session};
use crate::exit::usage;
use crate::files;
use crate::output::{self, note, or_dash};

/// Where SoftHSM is on Debian.
pub(crate) const DEFAULT_MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// Tokens, and the slots they are for.
#[derive(Debug, Subcommand)]
pub(crate) enum SlotCommand {
    /// Initialise a token and set its PINs.
    Init(Init),
    /// Have a node open one of its slots now, with the PIN it is configured with.
    Unlock(Unlock),
}

/// Arguments of `slot unlock`.
#[derive(Debug, Args)]
pub(crate) struct Unlock {
    /// The slot, as the node's configuration names it.
    #[arg(long, value_name = "SLOT")]
    slot: String,
    /// Try the PIN once although the token reports wrong PINs since the last right one.
    #[arg(long)]
    retry: bool,
}

/// Arguments of `slot init`.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Label of the new token, 1 to 32 bytes.
    #[arg(long)]
    label: String,
    /// The PKCS#11 module.
    #[arg(long, env = "HSM_PKCS11_LIB", value_name = "FILE", default_value = DEFAULT_MODULE)]
    module: PathBuf,
    /// File with the user PIN; made, mode 0600, with a random PIN if it does not exist.
    #[arg(long, value_name = "FILE")]
    pin_file: PathBuf,
    /// File with the security officer's PIN; made in the same way, but for --destroy-existing: then it is the
    /// one that the token has.
    #[arg(long, value_name = "FILE")]
    so_pin_file: PathBuf,
    /// Erase the token of this label, with every key in it. Needs --confirm-label.
    #[arg(long, requires = "confirm_label")]
    destroy_existing: bool,
    /// The label again, for --destroy-existing.
    #[arg(long, value_name = "LABEL")]
    confirm_label: Option<String>,
}

/// What was made; no PIN is in it.
#[derive(Serialize)]
struct Made<'a> {
    label: &'a str,
    serial: &'a str,
    pin_file: &'a Path,
    so_pin_file: &'a Path,
}

/// Asks the one node that is named: a slot is that node's alone.
pub(super) async fn unlock(session: &Session, args: &Unlock) -> Result<()> {
    let request = UnlockSlotRequest { retry: args.retry };
    let client = session.client_of_one(CHANGE)?;
    let what = format!("slot unlock {}", args.slot);
    let answer = session
        .ask(&client, &what, client.unlock_slot(&args.slot, &request))
        .await?;
    let slot = &answer.body;
    output::print(session.format(), slot, || {
        output::pairs([
            ("slot", slot.slot.clone()),
            ("label", slot.label.clone()),
            ("state", slot.state.to_string()),
            ("reason", or_dash(slot.reason.clone())),
            ("missing keys", slot.missing_keys.to_string()),
        ])
    })
}

pub(super) fn init(session: &Session, args: &Init) -> Result<()> {
    if args.destroy_existing && args.confirm_label.as_deref() != Some(args.label.as_str()) {
        return Err(usage(format!(
            "--confirm-label is not {:?}: every key in the token would be destroyed, so its label has to be typed \
             again",
            args.label
        )));
    }
    // One that is made here is certainly wrong, and entering it would cost one of the token's tries.
    if args.destroy_existing && !args.so_pin_file.exists() {
        return Err(usage(format!(
            "--so-pin-file {}: no such file; to erase a token its security officer's PIN is needed, the one that the \
             token has",
            args.so_pin_file.display()
        )));
    }
    files::harden()?;
    let pin = PinFile::at(&args.pin_file, "PIN")?;
    let so_pin = PinFile::at(&args.so_pin_file, "SO PIN")?;
    if pin.pin.expose() == so_pin.pin.expose() {
        bail!(
            "{} and {} hold the same PIN: then whoever may use the keys may also erase them; give the security \
             officer another one",
            args.pin_file.display(),
            args.so_pin_file.display()
        );
    }
    let module = Module::load(&args.module)?;
    let about = |error| about_token(args, error);
    let init = InitToken {
        label: &args.label,
        pin: &pin.pin,
        so_pin: &so_pin.pin,
        destroy_existing: args.destroy_existing,
    };
    let prepared = prepare(&module, init).map_err(about)?;
    // On disk before any token has them, and not before nothing else is in the way.
    pin.save()?;
    so_pin.save().inspect_err(|_| pin.discard())?;
    // The user PIN is set last. That of the security officer stays where it is: a token that says no may have
    // taken it.
    let erased = prepared.erase().inspect_err(|_| pin.discard()).map_err(about)?;
    let made = erased.set_pin().map_err(about)?;
    let made = Made {
        label: &made.label,
        serial: &made.serial,
        pin_file: &args.pin_file,
        so_pin_file: &args.so_pin_file,
    };
    output::print(session.format(), &made, || {
        output::pairs([
            ("label", made.label.to_owned()),
            ("serial", made.serial.to_owned()),
            ("PIN", made.pin_file.display().to_string()),
            ("SO PIN", made.so_pin_file.display().to_string()),
        ])
    })
}

/// A failure with the token it is about, and the file if it is about a PIN.
fn about_token(args: &Init, error: HsmError) -> anyhow::Error {
    let label = &args.label;
    let about = match &error {
        HsmError::Argument { what: "user PIN", .. } => {
            format!("{}: token {label:?}", args.pin_file.display())
        }
        HsmError::Argument {
            what: "security officer's PIN",
            ..
        } => format!("{}: token {label:?}", args.so_pin_file.display()),
        _ => format!("token {label:?}"),
    };
    anyhow::Error::new(error).context(about)
}

/// A PIN and the file that has it, or shall have it.
struct PinFile<'a> {
    path: &'a Path,
    what: &'static str,
    pin: Pin,
    /// There was no file: the PIN was made here.
    made: bool,
}

impl<'a> PinFile<'a> {
    /// Reads the PIN, or makes one and leaves it in memory.
    fn at(path: &'a Path, what: &'static str) -> Result<Self> {
        let made = !path.exists();
        let pin = if made {
            hsm_core::generate_pin()?
        } else {
            Pin::new(files::read_secret(path)?.as_str().to_owned())
        };
        Ok(Self {
            path,
            what,
            pin,
            made,
        })
    }

    /// Puts a PIN that was made here on disk.
    fn save(&self) -> Result<()> {
        if !self.made {
            return Ok(());
        }
        if self.path.exists() {
            bail!(
                "{}: has appeared meanwhile and is left alone; no token was touched: give each PIN a file of its own",
                self.path.display()
            );
        }
        files::write(self.path, self.pin.expose().as_bytes())?;
        note(&format!(
            "{}: a new {} of 140 random bits",
            self.path.display(),
            self.what
        ));
        Ok(())
    }

    /// Takes back what was saved: no token has this PIN.
    fn discard(&self) {
        if self.made && std::fs::remove_file(self.path).is_ok() {
            note(&format!(
                "{}: removed again, no token has it",
                self.path.display()
            ));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::cli::Global;
    use crate::exit::Exit;

    fn args(dir: &Path) -> Init {
        Init {
            label: "slot-test".to_owned(),
            module: "/nonexistent/module.so".into(),
            pin_file: dir.join("pin"),
            so_pin_file: dir.join("so-pin"),
            destroy_existing: false,
            confirm_label: None,
        }
    }

    fn refusal(args: &Init) -> String {
        format!("{:#}", init(&Session::new(Global::default()), args).unwrap_err())
    }

    fn weak(what: &'static str) -> HsmError {
        HsmError::Argument {
            what,
            reason: "carries fewer than 128 random bits".to_owned(),
        }
    }

    #[test]
    fn a_missing_pin_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        assert!(
            made.made && !path.exists(),
            "nothing is written before all is well"
        );
        made.save().unwrap();
        assert_eq!(made.pin.expose().len(), 28);
        let again = PinFile::at(&path, "PIN").unwrap();
        assert!(!again.made);
        assert_eq!(again.pin.expose(), made.pin.expose());
    }

    #[test]
    fn what_was_there_before_is_neither_replaced_nor_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        files::write(&path, b"somebody else's").unwrap();
        let error = made.save().unwrap_err().to_string();
        assert!(error.contains("a file of its own"), "{error}");
        PinFile::at(&path, "PIN").unwrap().discard();
        assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
    }

    #[test]
    fn a_saved_pin_that_no_token_has_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = PinFile::at(&path, "PIN").unwrap();
        made.save().unwrap();
        made.discard();
        assert!(!path.exists());
    }

    #[test]
    fn a_refused_pin_is_named_by_its_file() {
        let args = args(Path::new("/pins"));
        for (what, file) in [
            ("user PIN", "/pins/pin: "),
            ("security officer's PIN", "/pins/so-pin: "),
        ] {
            let text = format!("{:#}", about_token(&args, weak(what)));
            assert!(text.starts_with(file) && text.contains("slot-test"), "{text}");
        }
        let text = format!("{:#}", about_token(&args, weak("label")));
        assert!(!text.contains("/pins"), "{text}");
    }

    #[test]
    fn one_pin_for_both_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        PinFile::at(&path, "PIN").unwrap().save().unwrap();
        let error = refusal(&Init {
            so_pin_file: path,
            ..args(dir.path())
        });
        assert!(error.contains("same PIN"), "{error}");
    }

    #[test]
    fn erasing_needs_the_officers_pin_that_the_token_has() {
        let dir = tempfile::tempdir().unwrap();
        let args = Init {
            destroy_existing: true,
            confirm_label: Some("slot-test".to_owned()),
            ..args(dir.path())
        };
        let error = init(&Session::new(Global::default()), &args).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(error.to_string().contains("--so-pin-file"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn destroying_needs_the_label_typed_again() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = Init {
            destroy_existing: true,
            confirm_label: Some("slot-tset".to_owned()),
            ..args(dir.path())
        };
        assert!(refusal(&wrong).contains("--confirm-label"));
        assert!(!dir.path().join("pin").exists(), "nothing may be touched before");
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(&args(dir.path())).contains("/nonexistent/module.so"));
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "PINs were left behind"
        );
    }
}
