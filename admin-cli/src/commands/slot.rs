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
use crate::terminal::{self, Terminal};

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
    #[arg(long, value_name = "FILE", required_unless_present = "pin_prompt")]
    pin_file: Option<PathBuf>,
    /// Ask for the user PIN instead, twice. For a software token it has to carry 128 random bits.
    #[arg(long, conflicts_with = "pin_file")]
    pin_prompt: bool,
    /// File with the security officer's PIN; made in the same way, but for --destroy-existing: then it is the
    /// one that the token has.
    #[arg(long, value_name = "FILE", required_unless_present = "so_pin_prompt")]
    so_pin_file: Option<PathBuf>,
    /// Ask for the security officer's PIN instead: twice, but for --destroy-existing once.
    #[arg(long, conflicts_with = "so_pin_file")]
    so_pin_prompt: bool,
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
    /// Absent if the PIN was typed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pin_file: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    so_pin_file: Option<&'a Path>,
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
    if let Some(path) = args.so_pin_file.as_deref().filter(|path| !path.exists())
        && args.destroy_existing
    {
        return Err(usage(format!(
            "--so-pin-file {}: no such file; to erase a token its security officer's PIN is needed, the one that the \
             token has",
            path.display()
        )));
    }
    files::harden()?;
    if args.pin_prompt || args.so_pin_prompt {
        Terminal::open("name files with --pin-file and --so-pin-file instead").map(drop)?;
    }
    let pin = match args.pin_file.as_deref() {
        Some(path) => PinFile::at(path, "PIN")?,
        None => PinFile::typed("PIN", &format!("PIN for token {:?}", args.label), true)?,
    };
    let so_pin = match args.so_pin_file.as_deref() {
        Some(path) => PinFile::at(path, "SO PIN")?,
        None => PinFile::typed(
            "SO PIN",
            &format!("security officer's PIN for token {:?}", args.label),
            // A token that has it already says itself whether it is right.
            !args.destroy_existing,
        )?,
    };
    if pin.pin.expose() == so_pin.pin.expose() {
        bail!(
            "{} and {}: the same PIN: then whoever may use the keys may also erase them; give the security officer \
             another one",
            pin.source(),
            so_pin.source()
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
        pin_file: args.pin_file.as_deref(),
        so_pin_file: args.so_pin_file.as_deref(),
    };
    let place =
        |path: Option<&Path>| path.map_or_else(|| "as typed".to_owned(), |path| path.display().to_string());
    output::print(session.format(), &made, || {
        output::pairs([
            ("label", made.label.to_owned()),
            ("serial", made.serial.to_owned()),
            ("PIN", place(made.pin_file)),
            ("SO PIN", place(made.so_pin_file)),
        ])
    })
}

/// A failure with the token it is about, and the file if it is about a PIN.
fn about_token(args: &Init, error: HsmError) -> anyhow::Error {
    let label = &args.label;
    let about = match &error {
        HsmError::Argument { what: "user PIN", .. } => {
            format!("{}: token {label:?}", shown(args.pin_file.as_deref(), "PIN"))
        }
        HsmError::Argument {
            what: "security officer's PIN",
            ..
        } => format!(
            "{}: token {label:?}",
            shown(args.so_pin_file.as_deref(), "SO PIN")
        ),
        _ => format!("token {label:?}"),
    };
    anyhow::Error::new(error).context(about)
}

/// Where a PIN comes from, for people.
fn shown(path: Option<&Path>, what: &str) -> String {
    path.map_or_else(
        || format!("the {what} as typed"),
        |path| path.display().to_string(),
    )
}

/// A PIN and the file that has it, or shall have it; or one that was typed, and is in no file.
struct PinFile<'a> {
    path: Option<&'a Path>,
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
            path: Some(path),
            what,
            pin,
            made,
        })
    }

    /// Asks for the PIN; twice where a slip of the hand would make a token that nobody can open.
    fn typed(what: &'static str, question: &str, twice: bool) -> Result<Self> {
        if twice {
            note(&format!(
                "{what}: a software token takes none of fewer than 128 random bits, which is 28 random characters of \
                 0-9 and A-Z; nothing is shown while you type"
            ));
        }
        let pin = terminal::secret(&format!("{question}: "))?;
        if pin.expose().is_empty() {
            return Err(usage(format!("no {what} was typed; no token was touched")));
        }
        if twice && terminal::secret(&format!("{question}, again: "))?.expose() != pin.expose() {
            return Err(usage(format!(
                "the two {what}s that were typed differ; no token was touched"
            )));
        }
        Ok(Self {
            path: None,
            what,
            pin,
            made: false,
        })
    }

    fn source(&self) -> String {
        shown(self.path, self.what)
    }

    /// Puts a PIN that was made here on disk.
    fn save(&self) -> Result<()> {
        let Some(path) = self.path.filter(|_| self.made) else {
            return Ok(());
        };
        if path.exists() {
            bail!(
                "{}: has appeared meanwhile and is left alone; no token was touched: give each PIN a file of its own",
                path.display()
            );
        }
        files::write(path, self.pin.expose().as_bytes())?;
        note(&format!(
            "{}: a new {} of 140 random bits",
            path.display(),
            self.what
        ));
        Ok(())
    }

    /// Takes back what was saved: no token has this PIN.
    fn discard(&self) {
        if let Some(path) = self.path.filter(|_| self.made)
            && std::fs::remove_file(path).is_ok()
        {
            note(&format!("{}: removed again, no token has it", path.display()));
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
            pin_file: Some(dir.join("pin")),
            pin_prompt: false,
            so_pin_file: Some(dir.join("so-pin")),
            so_pin_prompt: false,
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
        let typed = Init {
            pin_file: None,
            pin_prompt: true,
            ..args
        };
        let text = format!("{:#}", about_token(&typed, weak("user PIN")));
        assert!(
            text.starts_with("the PIN as typed: token ") && text.contains("128 random bits"),
            "{text}"
        );
    }

    #[test]
    fn each_pin_is_in_a_file_or_typed_and_not_both() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            init: Init,
        }
        let parse = |more: &[&str]| {
            let line = ["init", "--label", "a"].iter().chain(more).copied();
            <Line as clap::Parser>::try_parse_from(line)
        };
        let typed = parse(&["--pin-prompt", "--so-pin-prompt"]).unwrap().init;
        assert!(typed.pin_prompt && typed.so_pin_prompt && typed.pin_file.is_none());
        assert!(parse(&["--pin-prompt", "--so-pin-file", "so"]).is_ok());
        assert!(parse(&["--pin-file", "pin", "--so-pin-file", "so"]).is_ok());
        for wrong in [
            &["--pin-prompt", "--pin-file", "pin", "--so-pin-file", "so"][..],
            &["--pin-prompt", "--so-pin-prompt", "--so-pin-file", "so"],
            &["--pin-prompt"],
            &["--so-pin-file", "so"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn one_pin_for_both_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        PinFile::at(&path, "PIN").unwrap().save().unwrap();
        let error = refusal(&Init {
            so_pin_file: Some(path),
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
