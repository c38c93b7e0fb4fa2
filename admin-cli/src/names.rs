//! The names this program is called by, and what arguments mean under those of version 1: `hsm-admin …`, and
//! `create-kek LABEL PIN [VERSION]`, whose PIN is dropped unread.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::Path;

use clap::ValueEnum;

use crate::output::Format;

/// The command that had a program of its own.
const CREATE_KEK: &str = "create-kek";
/// The command whose `--output` names a file, as in version 1.
const EXPORT_METADATA: &str = "export-metadata";
/// What it is here, where `--output` is how results look.
const FILE_OPTION: &str = "--file";
/// Commands that are about the program itself: they go by every name.
const OF_EVERY_NAME: [&str; 2] = ["completions", "man"];
/// Version 1's options. Go's flag package takes each with one dash or two.
const GO_FLAGS: [&str; 10] = [
    "config", "label", "context", "version", "size", "verbose", "confirm", "output", "dry-run", "force",
];

/// Those of them that have no value.
const GO_SWITCHES: [&str; 4] = ["verbose", "confirm", "dry-run", "force"];

/// What the program was called by; whatever else a link may be called is its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    Hsmctl,
    HsmAdmin,
    CreateKek,
}

impl Name {
    /// Of the first argument.
    fn of(program: Option<&OsString>) -> Self {
        match program.and_then(|program| Path::new(program).file_name()) {
            Some(name) if name == Self::HsmAdmin.as_str() => Self::HsmAdmin,
            Some(name) if name == CREATE_KEK => Self::CreateKek,
            _ => Self::Hsmctl,
        }
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Hsmctl => "hsmctl",
            Self::HsmAdmin => "hsm-admin",
            Self::CreateKek => CREATE_KEK,
        }
    }

    /// The program in usage texts. `create-kek` was one command, which is `hsmctl`'s now.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::CreateKek => Self::Hsmctl.as_str(),
            other => other.as_str(),
        }
    }

    /// Whether version 1 had it.
    pub(crate) fn is_v1(self) -> bool {
        self != Self::Hsmctl
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The arguments as this version understands them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Invocation {
    pub(crate) name: Name,
    pub(crate) args: Vec<OsString>,
    pub(crate) warnings: Vec<String>,
}

/// Understands what version 1's users type, under its names and under this one.
pub(crate) fn translate(args: impl IntoIterator<Item = OsString>) -> Invocation {
    let mut args = args.into_iter();
    let called = args.next();
    let name = Name::of(called.as_ref());
    let mut rest: Vec<OsString> = args.collect();
    let program = match (name, called) {
        (Name::CreateKek, _) | (_, None) => OsString::from(name.program()),
        (_, Some(called)) => called,
    };
    let of_the_program = |first: &OsString| OF_EVERY_NAME.iter().any(|command| first == command);
    if name == Name::CreateKek && !rest.first().is_some_and(of_the_program) {
        rest.insert(0, OsString::from(CREATE_KEK));
    }
    let mut warnings = Vec::new();
    if name.is_v1() {
        rest = rest.into_iter().filter_map(two_dashes).collect();
        if let Some(at) = rest.iter().position(|arg| arg == CREATE_KEK) {
            let own = rest.split_off(at + 1);
            rest.extend(old_create_kek(own, &mut warnings));
        }
    }
    let args = std::iter::once(program).chain(output_file(rest)).collect();
    Invocation { name, args, warnings }
}

/// `-label` as `--label`, if version 1 had it. A switch may have its value behind it in Go, `-verbose=true`: here it
/// is there or not.
fn two_dashes(arg: OsString) -> Option<OsString> {
    let Some(text) = arg.to_str() else {
        return Some(arg);
    };
    let flag = text.strip_prefix('-').unwrap_or_default();
    let flag = flag.strip_prefix('-').unwrap_or(flag);
    let (name, value) = flag
        .split_once('=')
        .map_or((flag, None), |(name, value)| (name, Some(value)));
    if text.starts_with("--") && name == "c" {
        // clap has one dash for one letter, Go has either.
        return Some(OsString::from(format!("-{flag}")));
    }
    match value {
        _ if !text.starts_with('-') || !GO_FLAGS.contains(&name) => Some(arg),
        Some("true" | "1" | "t" | "T") if GO_SWITCHES.contains(&name) => {
            Some(OsString::from(format!("--{name}")))
        }
        Some("false" | "0" | "f" | "F") if GO_SWITCHES.contains(&name) => None,
        _ => Some(OsString::from(format!("--{flag}"))),
    }
}

/// `LABEL PIN [VERSION]` as flags; flags as they are.
fn old_create_kek(args: Vec<OsString>, warnings: &mut Vec<String>) -> Vec<OsString> {
    let is_flag = |arg: &OsString| arg.to_string_lossy().starts_with('-');
    let mut args = args.into_iter().peekable();
    let mut flags = Vec::new();
    if let Some(label) = args.next_if(|arg| !is_flag(arg)) {
        warnings.push(format!(
            "DEPRECATED: use 'hsmctl create-kek --label {}'",
            label.to_string_lossy()
        ));
        // Where a flag stands in its place, none was given.
        if args.next_if(|arg| !is_flag(arg)).is_some() {
            warnings.push(
                "WARNING: the PIN was given as an argument, so every user of this machine could see it and the \
                 shell may have kept it. It is not used: nodes have their PINs themselves. Change it."
                    .to_owned(),
            );
        }
        flags.extend([OsString::from("--label"), label]);
        if let Some(version) = args.next_if(|arg| !is_flag(arg)) {
            flags.extend([OsString::from("--version"), version]);
        }
    }
    // What stands behind no flag may be a PIN in the wrong place, and whoever refuses it would show it.
    let mut is_value = false;
    for arg in args {
        if is_flag(&arg) {
            let text = arg.to_string_lossy();
            is_value = !text.contains('=') && !GO_SWITCHES.contains(&text.trim_start_matches('-'));
            flags.push(arg);
        } else if std::mem::take(&mut is_value) {
            flags.push(arg);
        } else {
            warnings.push("WARNING: an argument that belongs to no option was passed over".to_owned());
        }
    }
    flags
}

/// `export-metadata --output FILE` as `--file FILE`. A format's name stays what it is for every other command; a file
/// of that name is `./json`.
fn output_file(args: Vec<OsString>) -> Vec<OsString> {
    let mut words = args.into_iter().peekable();
    let mut out = Vec::with_capacity(words.len());
    let mut exporting = false;
    while let Some(word) = words.next() {
        if word == "--" {
            out.push(word);
            break;
        }
        exporting |= word == EXPORT_METADATA;
        let attached = word.to_str().and_then(|text| text.strip_prefix("--output="));
        let translated = match attached {
            Some(value) if exporting && !is_format(OsStr::new(value)) => {
                Some(OsString::from(format!("{FILE_OPTION}={value}")))
            }
            None if exporting
                && word == "--output"
                && words.peek().is_some_and(|value| !is_format(value)) =>
            {
                Some(OsString::from(FILE_OPTION))
            }
            _ => None,
        };
        out.push(translated.unwrap_or(word));
    }
    out.extend(words);
    out
}

fn is_format(value: &OsStr) -> bool {
    value
        .to_str()
        .is_some_and(|text| Format::from_str(text, false).is_ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::cli;

    fn translated(args: &[&str]) -> Invocation {
        translate(args.iter().map(OsString::from))
    }

    fn words(invocation: &Invocation) -> Vec<String> {
        invocation
            .args
            .iter()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect()
    }

    fn parsed(invocation: &Invocation) -> Result<cli::Cli, clap::Error> {
        cli::parse(invocation.name, &invocation.args)
    }

    #[test]
    fn a_name_is_that_of_the_file_wherever_it_lies() {
        for (program, name) in [
            ("hsmctl", Name::Hsmctl),
            ("./hsm-admin", Name::HsmAdmin),
            ("/usr/local/bin/create-kek", Name::CreateKek),
            ("/opt/hsmctl-2.0", Name::Hsmctl),
            ("hsm-admin/", Name::HsmAdmin),
            ("", Name::Hsmctl),
        ] {
            assert_eq!(translated(&[program]).name, name, "{program}");
        }
        let nothing = translate([]);
        assert_eq!(
            (nothing.name, words(&nothing)),
            (Name::Hsmctl, vec!["hsmctl".to_owned()])
        );
    }

    #[test]
    fn the_old_create_kek_works_and_drops_the_pin() {
        let invocation = translated(&["/usr/bin/create-kek", "kek-2fa-v3", "1234-planted", "3"]);
        assert!(invocation.name.is_v1());
        assert_eq!(
            words(&invocation),
            ["hsmctl", "create-kek", "--label", "kek-2fa-v3", "--version", "3"]
        );
        assert_eq!(
            invocation.warnings[0],
            "DEPRECATED: use 'hsmctl create-kek --label kek-2fa-v3'"
        );
        assert!(invocation.warnings[1].contains("PIN"));
        assert!(!format!("{invocation:?}").contains("planted"));
        parsed(&invocation).unwrap();
    }

    #[test]
    fn options_after_the_old_arguments_stay_options() {
        let invocation = translated(&[
            "create-kek",
            "kek-2fa-v3",
            "1234",
            "-config",
            "c.yaml",
            "-size=256",
        ]);
        assert_eq!(
            words(&invocation)[2..],
            ["--label", "kek-2fa-v3", "--config", "c.yaml", "--size=256"]
        );
        parsed(&invocation).unwrap();
        let alone = translated(&["create-kek", "kek-2fa-v3"]);
        assert_eq!(words(&alone)[2..], ["--label", "kek-2fa-v3"]);
        assert_eq!(alone.warnings.len(), 1, "there was no PIN: {:?}", alone.warnings);
    }

    #[test]
    fn the_old_form_works_as_hsm_admins_verb_too() {
        let invocation = translated(&[
            "hsm-admin",
            "-config",
            "c.yaml",
            "create-kek",
            "kek-2fa-v1",
            "1234",
        ]);
        assert_eq!(
            words(&invocation),
            [
                "hsm-admin",
                "--config",
                "c.yaml",
                "create-kek",
                "--label",
                "kek-2fa-v1"
            ]
        );
        let cli = parsed(&invocation).unwrap();
        assert_eq!(cli.global.config, Some(PathBuf::from("c.yaml")));
    }

    #[test]
    fn one_dash_is_enough_for_version_1s_options_under_its_names() {
        let invocation = translated(&[
            "hsm-admin",
            "create-kek",
            "-label",
            "kek-a-v1",
            "-context=a",
            "-version",
            "1",
        ]);
        assert_eq!(
            words(&invocation)[2..],
            ["--label", "kek-a-v1", "--context=a", "--version", "1"]
        );
        parsed(&invocation).unwrap();
        // Not what it never had, and not under this name.
        let invocation = translated(&["hsm-admin", "-o", "json", "list-kek", "-verbose"]);
        assert_eq!(words(&invocation)[1..], ["-o", "json", "list-kek", "--verbose"]);
        let invocation = translated(&["hsmctl", "list-kek", "-verbose"]);
        assert_eq!(words(&invocation)[1..], ["list-kek", "-verbose"]);
    }

    #[test]
    fn flags_are_left_alone_under_every_name() {
        for program in ["hsmctl", "hsm-admin"] {
            let invocation = translated(&[program, "create-kek", "--label", "l", "--context", "c"]);
            assert_eq!(
                words(&invocation)[1..],
                ["create-kek", "--label", "l", "--context", "c"]
            );
            assert!(invocation.warnings.is_empty());
        }
        let invocation = translated(&["create-kek", "--help"]);
        assert_eq!(words(&invocation), ["hsmctl", "create-kek", "--help"]);
    }

    #[test]
    fn under_its_own_name_positional_arguments_are_refused() {
        let invocation = translated(&["hsmctl", "create-kek", "kek-2fa-v1", "1234"]);
        assert!(!invocation.name.is_v1() && invocation.warnings.is_empty());
        assert!(parsed(&invocation).is_err());
    }

    #[test]
    fn what_is_about_the_program_goes_by_every_name() {
        for program in ["hsmctl", "hsm-admin", "create-kek"] {
            for args in [&["completions", "bash"][..], &["man"]] {
                let invocation = translated(&[&[program][..], args].concat());
                assert_eq!(words(&invocation)[1..], *args, "{program}");
                assert!(invocation.warnings.is_empty(), "{program}");
                parsed(&invocation).unwrap();
            }
        }
    }

    #[test]
    fn an_exports_output_is_a_file_unless_it_is_a_format() {
        for (args, expected) in [
            ("export-metadata --output m.yaml", "export-metadata --file m.yaml"),
            ("export-metadata --output=m.yaml", "export-metadata --file=m.yaml"),
            ("export-metadata --output ./json", "export-metadata --file ./json"),
            ("export-metadata --output json", "export-metadata --output json"),
            ("export-metadata --output=yaml", "export-metadata --output=yaml"),
            ("export-metadata -o yaml", "export-metadata -o yaml"),
            ("--output json export-metadata", "--output json export-metadata"),
            ("list-kek --output x", "list-kek --output x"),
        ] {
            let args: Vec<&str> = std::iter::once("hsmctl").chain(args.split(' ')).collect();
            assert_eq!(words(&translated(&args))[1..].join(" "), expected);
        }
        let v1 = translated(&["hsm-admin", "export-metadata", "-output", "m.yaml"]);
        assert_eq!(words(&v1)[1..], ["export-metadata", "--file", "m.yaml"]);
        parsed(&v1).unwrap();
    }

    #[test]
    fn a_pin_in_the_wrong_place_is_shown_to_nobody() {
        for args in [
            &["create-kek", "kek-a-v3", "-size", "256", "1234"][..],
            &["hsm-admin", "create-kek", "--label", "kek-a-v3", "1234"],
            &["create-kek", "kek-a-v3", "1234", "2", "1234"],
        ] {
            let invocation = translated(args);
            let words = words(&invocation);
            assert!(!words.contains(&"1234".to_owned()), "{words:?}");
            assert!(invocation.warnings.iter().all(|text| !text.contains("1234")));
            assert!(words.contains(&"kek-a-v3".to_owned()), "{words:?}");
        }
        let sized = words(&translated(&["create-kek", "kek-a-v3", "-size", "256"]));
        assert_eq!(&sized[2..], ["--label", "kek-a-v3", "--size", "256"]);
    }

    #[test]
    fn switches_of_go_may_have_their_value_behind_them() {
        let args = |args: &[&str]| words(&translated(args))[1..].to_vec();
        assert_eq!(
            args(&["hsm-admin", "list-kek", "-verbose=true"]),
            ["list-kek", "--verbose"]
        );
        assert_eq!(args(&["hsm-admin", "list-kek", "--verbose=false"]), ["list-kek"]);
        assert_eq!(
            args(&["hsm-admin", "rotate", "c", "-config=x.yaml"]),
            ["rotate", "c", "--config=x.yaml"]
        );
        for form in [
            &["-c", "x.yaml"][..],
            &["--c", "x.yaml"],
            &["--c=x.yaml"],
            &["-c=x.yaml"],
        ] {
            let whole = [&["hsm-admin"][..], form, &["list-kek"]].concat();
            let cli = parsed(&translated(&whole)).unwrap();
            assert_eq!(cli.global.config, Some(PathBuf::from("x.yaml")), "{form:?}");
        }
    }

    #[test]
    fn usage_says_the_programs_own_name() {
        for (program, usage) in [
            ("/bin/hsmctl", "Usage: hsmctl rotate"),
            ("/bin/hsm-admin", "Usage: hsm-admin rotate"),
        ] {
            let error = parsed(&translated(&[program, "rotate"])).unwrap_err().to_string();
            assert!(error.contains(usage), "{error}");
        }
        let help = parsed(&translated(&["/bin/create-kek", "--help"]))
            .unwrap_err()
            .to_string();
        assert!(help.contains("Usage: hsmctl create-kek"), "{help}");
        let version = parsed(&translated(&["hsm-admin", "--version"]))
            .unwrap_err()
            .to_string();
        assert!(version.starts_with("hsm-admin "), "{version}");
    }
}
