//! The command line: global options, the tree of commands, and what the names of version 1 mean. It only
//! describes; nothing is carried out here.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::commands::{cluster, data, keys, rotate, slot};
use crate::dev::DevCommand;
use crate::exit;
use crate::output::Format;

/// Administers hsm-service.
#[derive(Debug, Parser)]
#[command(name = "hsmctl", version, after_help = exit::HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Global {
    /// Nodes to talk to, as https://host:port; repeat it, or separate them with commas.
    #[arg(
        long = "endpoint",
        env = "HSMCTL_ENDPOINTS",
        value_name = "URL",
        value_delimiter = ',',
        global = true
    )]
    pub(crate) endpoints: Vec<String>,
    /// Whose certificate to use: PKI/clients/PROFILE.crt and .key [default: admin].
    #[arg(long, env = "HSMCTL_PROFILE", value_name = "NAME", global = true)]
    pub(crate) profile: Option<String>,
    /// Folder with ca.crt and clients/.
    #[arg(long, env = "HSMCTL_PKI", value_name = "DIR", global = true)]
    pub(crate) pki: Option<PathBuf>,
    /// CA of the nodes' certificates [default: PKI/ca.crt].
    #[arg(long, env = "HSMCTL_CA", value_name = "FILE", global = true)]
    pub(crate) ca: Option<PathBuf>,
    /// Client certificate, instead of a profile's.
    #[arg(long, env = "HSMCTL_CERT", value_name = "FILE", global = true)]
    pub(crate) cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, env = "HSMCTL_KEY", value_name = "FILE", global = true)]
    pub(crate) key: Option<PathBuf>,
    /// How results are printed.
    #[arg(
        short,
        long,
        env = "HSMCTL_OUTPUT",
        value_enum,
        default_value_t,
        global = true
    )]
    pub(crate) output: Format,
    /// Seconds after which a command gives up; each has a default of its own.
    #[arg(
        long,
        env = "HSMCTL_TIMEOUT",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        global = true
    )]
    pub(crate) timeout: Option<u64>,
    /// Version 1's configuration file; has no meaning here.
    #[arg(short, long, value_name = "FILE", global = true, hide = true)]
    pub(crate) config: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, join and look at a cluster.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Create a key-encryption key: the first or next version of a context.
    CreateKek(keys::CreateKek),
    /// List contexts and their key versions.
    ListKek(keys::ListKek),
    /// Make a new version of a context's key; returns once it is active.
    Rotate(rotate::Rotate),
    /// Show where each context stands in its rotation.
    RotationStatus,
    /// Encrypt standard input or a file.
    Encrypt(data::Encrypt),
    /// Decrypt standard input or a file.
    Decrypt(data::Decrypt),
    /// Show who a node takes you for.
    Whoami,
    /// Prepare tokens, on the machine that has them; open slots of a node.
    #[command(subcommand)]
    Slot(slot::SlotCommand),
    /// Run a complete cluster on this machine, to play with and for tests.
    #[command(subcommand)]
    Dev(DevCommand),
}

/// The name of [`Format::Json`] in arguments.
const JSON: &str = "json";

/// How results were asked for, by arguments that do not parse: a program wants to read that too.
pub(crate) fn format_asked_for(args: &[OsString]) -> Format {
    format_in(args, &std::env::var("HSMCTL_OUTPUT").unwrap_or_default())
}

fn format_in(args: &[OsString], variable: &str) -> Format {
    let mut asked = variable == JSON;
    let mut words = args.iter().skip(1).filter_map(|arg| arg.to_str()).peekable();
    while let Some(word) = words.next() {
        let value = match word {
            // Nothing after it is an option.
            "--" => break,
            "-o" | "--output" => words.peek().copied(),
            _ => word
                .strip_prefix("--output=")
                .or_else(|| word.strip_prefix("-o=").or_else(|| word.strip_prefix("-o"))),
        };
        if let Some(value) = value {
            asked = value == JSON;
        }
    }
    if asked { Format::Json } else { Format::Table }
}

/// The arguments as this version understands them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// Called under a name of version 1.
    pub(crate) v1: bool,
    pub(crate) args: Vec<OsString>,
    pub(crate) warnings: Vec<String>,
}

/// Understands version 1's names: `hsm-admin …` and `create-kek LABEL PIN [VERSION]`. The PIN is dropped.
pub(crate) fn translate(args: impl IntoIterator<Item = OsString>) -> Invocation {
    let args: Vec<OsString> = args.into_iter().collect();
    let name = args
        .first()
        .and_then(|program| Path::new(program).file_name())
        .and_then(|name| name.to_str())
        .unwrap_or("hsmctl")
        .to_owned();
    let (program, rest) = match args.split_first() {
        Some((program, rest)) => (program.clone(), rest.to_vec()),
        None => (OsString::from("hsmctl"), Vec::new()),
    };
    let v1 = matches!(name.as_str(), "hsm-admin" | "create-kek");
    let mut rest: Vec<OsString> = match name.as_str() {
        "create-kek" => std::iter::once(OsString::from("create-kek"))
            .chain(rest)
            .collect(),
        // Go's flag package takes one dash or two.
        "hsm-admin" => rest
            .into_iter()
            .map(|arg| {
                if arg == "-config" {
                    OsString::from("--config")
                } else {
                    arg
                }
            })
            .collect(),
        _ => rest,
    };
    let mut warnings = Vec::new();
    if v1 && let Some(at) = rest.iter().position(|arg| arg == "create-kek") {
        let positional = rest.split_off(at + 1);
        rest.extend(old_create_kek(positional, &mut warnings));
    }
    let args = std::iter::once(program).chain(rest).collect();
    Invocation { v1, args, warnings }
}

/// `LABEL PIN [VERSION]` as flags; anything else as it is.
fn old_create_kek(args: Vec<OsString>, warnings: &mut Vec<String>) -> Vec<OsString> {
    let is_flag = |arg: &OsString| arg.to_string_lossy().starts_with('-');
    if args.first().is_none_or(is_flag) {
        return args;
    }
    let mut args = args.into_iter();
    let label = args.next().unwrap_or_default();
    let pin = args.next();
    warnings.push(format!(
        "DEPRECATED: use 'hsmctl create-kek --label {}'",
        label.to_string_lossy()
    ));
    if pin.is_some() {
        warnings.push(
            "WARNING: the PIN was given as an argument, so every user of this machine could see it and the \
             shell may have kept it. It is not used: nodes have their PINs themselves. Change it."
                .to_owned(),
        );
    }
    let mut flags = vec![OsString::from("--label"), label];
    if let Some(version) = args.next() {
        flags.extend([OsString::from("--version"), version]);
    }
    flags.extend(args);
    flags
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use clap::{CommandFactory, ValueEnum};

    use super::*;

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

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_old_create_kek_works_and_drops_the_pin() {
        let invocation = translated(&["/usr/bin/create-kek", "kek-2fa-v3", "1234-planted", "3"]);
        assert!(invocation.v1);
        assert_eq!(
            words(&invocation),
            [
                "/usr/bin/create-kek",
                "create-kek",
                "--label",
                "kek-2fa-v3",
                "--version",
                "3"
            ]
        );
        assert_eq!(
            invocation.warnings[0],
            "DEPRECATED: use 'hsmctl create-kek --label kek-2fa-v3'"
        );
        assert!(invocation.warnings[1].contains("PIN"));
        assert!(!format!("{invocation:?}").contains("planted"));
        Cli::try_parse_from(&invocation.args).unwrap();
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
        let cli = Cli::try_parse_from(&invocation.args).unwrap();
        assert_eq!(cli.global.config, Some(PathBuf::from("c.yaml")));
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
        assert_eq!(words(&invocation), ["create-kek", "create-kek", "--help"]);
    }

    #[test]
    fn under_its_own_name_positional_arguments_are_refused() {
        let invocation = translated(&["hsmctl", "create-kek", "kek-2fa-v1", "1234"]);
        assert!(!invocation.v1 && invocation.warnings.is_empty());
        assert!(Cli::try_parse_from(&invocation.args).is_err());
    }

    #[test]
    fn json_is_recognised_in_arguments_that_do_not_parse() {
        let asked = |args: &[&str]| {
            let args: Vec<OsString> = args.iter().map(OsString::from).collect();
            format_in(&args, "")
        };
        for args in [
            &["hsmctl", "-o", "json", "no-such"][..],
            &["hsmctl", "no-such", "-ojson"],
            &["hsmctl", "no-such", "-o=json"],
            &["hsmctl", "no-such", "--output", "json"],
            &["hsmctl", "no-such", "--output=json"],
        ] {
            assert_eq!(asked(args), Format::Json, "{args:?}");
        }
        for args in [
            &["hsmctl", "no-such"][..],
            &["hsmctl", "-o", "table", "no-such"],
            &["hsmctl", "no-such", "-o"],
            &["hsmctl", "rotate", "--", "-ojson"],
        ] {
            assert_eq!(asked(args), Format::Table, "{args:?}");
        }
        assert_eq!(format_in(&[], JSON), Format::Json);
        assert_eq!(Format::Json.to_possible_value().unwrap().get_name(), JSON);
    }

    #[test]
    fn numbers_out_of_range_are_refused_as_arguments() {
        for args in [
            &["hsmctl", "--timeout", "0", "list-kek"][..],
            &["hsmctl", "dev", "up", "--dir", "d", "--nodes", "0"],
            &["hsmctl", "dev", "up", "--dir", "d", "--nodes", "17"],
            &["hsmctl", "dev", "up", "--dir", "d", "--base-port", "0"],
            &["hsmctl", "dev", "up", "--dir", "d", "--base-port", "65536"],
            &["hsmctl", "dev", "kill", "--dir", "d", "--node", "0"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
        let largest = "hsmctl dev up --dir d --nodes 16 --base-port 1";
        Cli::try_parse_from(largest.split(' ')).unwrap();
    }

    #[test]
    fn endpoints_may_be_repeated_or_separated_by_commas() {
        let cli = Cli::try_parse_from([
            "hsmctl",
            "list-kek",
            "--endpoint",
            "https://a:1,https://b:2",
            "--endpoint",
            "https://c:3",
        ])
        .unwrap();
        assert_eq!(
            cli.global.endpoints,
            ["https://a:1", "https://b:2", "https://c:3"]
        );
    }
}
