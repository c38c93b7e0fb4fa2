//! `hsmctl slot init`: the one thing done to a token directly, under the token's own lock. An initialised token is
//! destroyed only if that is asked for and its label typed again.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use hsm_core::HsmError;
use hsm_core::module::Module;
use hsm_core::token_init::{self, InitToken, prepare};
use serde::Serialize;

use super::Session;
use super::pin_file::{PinFile, shown};
use super::preview::Preview;
use super::slot::DEFAULT_MODULE;
use crate::exit::usage;
use crate::files;
use crate::output;
use crate::terminal::{Destruction, Terminal};

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
    /// Erase the token of this label, with every key in it. Its label has to be typed again first.
    #[arg(long)]
    destroy_existing: bool,
    /// The label again, instead of typing it for --destroy-existing.
    #[arg(long, value_name = "LABEL", requires = "destroy_existing")]
    confirm_label: Option<String>,
    /// Look whether it could be done, and write neither to a token nor to a file.
    #[arg(long)]
    dry_run: bool,
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

pub(super) fn init(session: &Session, args: &Init) -> Result<()> {
    if args.destroy_existing {
        let warning = format!(
            "Every key in the token {} will be destroyed; what was encrypted under a key that is nowhere else is lost.",
            args.label
        );
        let destruction = Destruction {
            warning: &warning,
            name: &args.label,
            option: "--confirm-label",
            answered: args.confirm_label.as_deref(),
        };
        if args.dry_run {
            destruction.could_be_confirmed(session.questions())?;
        } else {
            destruction.confirm(session.questions())?;
        }
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
    let (pin, so_pin) = pins(session, args)?;
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
    if args.dry_run {
        token_init::foresee(&module, &init).map_err(about)?;
        return foresee(args, &pin, &so_pin).print(session);
    }
    let prepared = prepare(&module, init).map_err(about)?;
    // On disk before any token has them, and not before nothing else is in the way.
    pin.save()?;
    so_pin.save().inspect_err(|_| pin.discard())?;
    // The user PIN is set last. That of the security officer stays where it is: a token that says no may have
    // taken it.
    let erased = prepared.erase().inspect_err(|_| pin.discard()).map_err(about)?;
    let (made, node_key) = erased.set_pin_and_make_node_key().map_err(about)?;
    if let Err(error) = node_key {
        output::note(&format!(
            "token {:?} is initialised, but did not make its node key pair ({error}); the node will try again",
            args.label
        ));
    }
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

/// The PINs, from where the arguments say. A dry run asks nobody for one.
fn pins<'a>(session: &Session, args: &'a Init) -> Result<(PinFile<'a>, PinFile<'a>)> {
    let typed = args.pin_prompt || args.so_pin_prompt;
    if typed && !args.dry_run {
        let remedy = "name files with --pin-file and --so-pin-file instead";
        Terminal::open(session.questions(), remedy).map(drop)?;
    }
    let pin = match args.pin_file.as_deref() {
        Some(path) => PinFile::at(path, "PIN")?,
        None if args.dry_run => PinFile::stand_in("PIN")?,
        None => PinFile::typed("PIN", &format!("PIN for token {:?}", args.label), true)?,
    };
    let so_pin = match args.so_pin_file.as_deref() {
        Some(path) => PinFile::at(path, "SO PIN")?,
        None if args.dry_run => PinFile::stand_in("SO PIN")?,
        None => PinFile::typed(
            "SO PIN",
            &format!("security officer's PIN for token {:?}", args.label),
            // A token that has it already says itself whether it is right.
            !args.destroy_existing,
        )?,
    };
    Ok((pin, so_pin))
}

/// Everything that can be refused without touching a token has been looked at by now.
fn foresee(args: &Init, pin: &PinFile<'_>, so_pin: &PinFile<'_>) -> Preview {
    let (label, module) = (&args.label, args.module.display());
    let with = format!("{} and {}", pin.described(), so_pin.described());
    let mut preview = if args.destroy_existing {
        Preview::new(format!(
            "ERASE the token {label} of {module} with every key in it, and initialise it again with {with}"
        ))
        .not_checked("the security officer's PIN, which is entered once")
    } else {
        Preview::new(format!(
            "initialise a free token of {module} as {label}, with {with}"
        ))
    };
    if args.pin_prompt || args.so_pin_prompt {
        preview = preview.not_checked("a PIN that will be typed");
    }
    preview
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
            dry_run: false,
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
        let unsaid = Init {
            confirm_label: None,
            ..wrong
        };
        let quiet = Session::new(Global {
            no_input: true,
            ..Global::default()
        });
        let error = init(&quiet, &unsaid).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(error.to_string().contains("--confirm-label slot-test"), "{error}");
        assert!(!dir.path().join("pin").exists(), "nothing may be touched before");
    }

    #[test]
    fn without_input_no_pin_is_asked_for() {
        let typed = Init {
            pin_file: None,
            pin_prompt: true,
            ..args(Path::new("/pins"))
        };
        let quiet = Session::new(Global {
            no_input: true,
            ..Global::default()
        });
        let error = init(&quiet, &typed).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(error.to_string().contains("--pin-file"), "{error}");
    }

    #[test]
    fn a_dry_run_says_what_would_be_lost_and_where_the_pins_would_be() {
        let dir = tempfile::tempdir().unwrap();
        let erasing = Init {
            destroy_existing: true,
            dry_run: true,
            ..args(dir.path())
        };
        let session = Session::new(Global::default());
        let (pin, so_pin) = pins(&session, &erasing).unwrap();
        let text = serde_json::to_string(&foresee(&erasing, &pin, &so_pin)).unwrap();
        assert!(
            text.contains("ERASE the token slot-test") && text.contains("/pin, made anew"),
            "{text}"
        );
        let typed = Init {
            pin_file: None,
            pin_prompt: true,
            destroy_existing: false,
            ..erasing
        };
        // Nobody is asked, and nothing is written.
        let (pin, so_pin) = pins(&session, &typed).unwrap();
        let text = serde_json::to_string(&foresee(&typed, &pin, &so_pin)).unwrap();
        assert!(
            text.contains("initialise a free token") && text.contains("will be typed"),
            "{text}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
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
