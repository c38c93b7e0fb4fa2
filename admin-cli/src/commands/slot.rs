//! `hsmctl slot`. `init` is the one thing done to a token directly, under the token's own lock: an
//! initialised token is destroyed only if that is asked for and its label typed again. `unlock` asks the
//! node that has the slot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use hsm_api::admin::UnlockSlotRequest;
use hsm_core::module::Module;
use hsm_core::pin::has_enough_entropy;
use hsm_core::secrets::Pin;
use hsm_core::token_init::{InitToken, init_token};
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
    /// File with the security officer's PIN; made in the same way.
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
    let answer = session
        .client_of_one(CHANGE)?
        .unlock_slot(&args.slot, &request)
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
    files::harden()?;
    let pin = pin(&args.pin_file, "PIN")?;
    let so_pin = pin_for_officer(args, &pin)?;
    let module = Module::load(&args.module)?;
    let made = init_token(
        &module,
        InitToken {
            label: &args.label,
            pin: &pin,
            so_pin: &so_pin,
            destroy_existing: args.destroy_existing,
        },
    )
    .with_context(|| format!("token {:?}", args.label))?;
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

fn pin_for_officer(args: &Init, pin_of_user: &Pin) -> Result<Pin> {
    let so_pin = pin(&args.so_pin_file, "SO PIN")?;
    if so_pin.expose() == pin_of_user.expose() {
        bail!(
            "{} and {} hold the same PIN: then whoever may use the keys may also erase them; give the security \
             officer another one",
            args.pin_file.display(),
            args.so_pin_file.display()
        );
    }
    Ok(so_pin)
}

/// Reads a PIN, or makes one that is on disk before any token has it.
fn pin(path: &Path, what: &str) -> Result<Pin> {
    if !path.exists() {
        let pin = hsm_core::generate_pin()?;
        files::write(path, pin.expose().as_bytes())?;
        note(&format!("{}: a new {what} of 140 random bits", path.display()));
        return Ok(pin);
    }
    let pin = Pin::new(files::read_secret(path)?.as_str().to_owned());
    if !has_enough_entropy(&pin) {
        bail!(
            "{}: the {what} carries fewer than 128 random bits, and a software token is only as safe as its PIN; \
             name a file that does not exist, and one is made",
            path.display()
        );
    }
    Ok(pin)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::cli::Global;

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

    #[test]
    fn a_missing_pin_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let made = pin(&path, "PIN").unwrap();
        assert_eq!(made.expose().len(), 28);
        assert_eq!(pin(&path, "PIN").unwrap().expose(), made.expose());
    }

    #[test]
    fn a_guessable_pin_is_refused_without_repeating_it() {
        let dir = tempfile::tempdir().unwrap();
        files::write(&dir.path().join("pin"), b"12345678").unwrap();
        let error = refusal(&args(dir.path()));
        assert!(
            error.contains("128 random bits") && !error.contains("12345678"),
            "{error}"
        );
    }

    #[test]
    fn one_pin_for_both_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        pin(&path, "PIN").unwrap();
        let error = refusal(&Init {
            so_pin_file: path,
            ..args(dir.path())
        });
        assert!(error.contains("same PIN"), "{error}");
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
    }
}
