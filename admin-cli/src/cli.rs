//! The command line: global options and the tree of commands. It only describes; nothing is carried out here.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::commands::{
    acl, cleanup, cluster, completions, create_kek, data, export_metadata, key, key_destroy, list_kek,
    manual, node, profile, revoke, rotate, slot, update_checksums,
};
use crate::dev::DevCommand;
use crate::exit;
use crate::names::Name;
use crate::output::Format;

/// What a command can be given to end in.
pub(crate) const TIMEOUT_SECONDS: RangeInclusive<u64> = 1..=86_400;

/// Administers hsm-service.
#[derive(Debug, Parser)]
#[command(name = "hsmctl", version, after_help = exit::help())]
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
    /// Nodes, CA and certificate by one name: a profile of the profiles' file; with --pki PKI/clients/NAME.crt and .key
    /// [default: the file's default; with --pki admin].
    #[arg(long, env = "HSMCTL_PROFILE", value_name = "NAME", global = true)]
    pub(crate) profile: Option<String>,
    /// The profiles' file, instead of the variable HSMCTL_PROFILES [default: hsmctl/profiles.yaml in
    /// $XDG_CONFIG_HOME or ~/.config].
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) profiles: Option<PathBuf>,
    /// Folder with ca.crt and clients/, whose names are profiles then; the profiles' file is not read.
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
    /// How results are printed [default: table].
    #[arg(short, long, env = "HSMCTL_OUTPUT", value_enum, global = true)]
    pub(crate) output: Option<Format>,
    /// Seconds after which a command gives up; each has a default of its own.
    #[arg(
        long,
        env = "HSMCTL_TIMEOUT",
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(TIMEOUT_SECONDS),
        global = true
    )]
    pub(crate) timeout: Option<u64>,
    /// Never ask; what would be asked is an error that names the option that answers it.
    #[arg(
        long,
        env = "HSMCTL_NO_INPUT",
        action = ArgAction::SetTrue,
        value_parser = FalseyValueParser::new(),
        global = true
    )]
    pub(crate) no_input: bool,
    /// Version 1's config.yaml: without --endpoint the node on this machine is asked, at its server.port, and
    /// server.tls.ca_path is the CA unless another is named. Under version 1's names server.tls.cert_path and key_path
    /// are the certificate, unless another is named. Nothing else is read.
    #[arg(short, long, value_name = "FILE", global = true, hide_short_help = true)]
    pub(crate) config: Option<PathBuf>,
    /// Nobody has said as whom to ask, so the node's own certificate is taken, as version 1's names have it.
    #[arg(skip)]
    pub(crate) as_the_node: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, join and look at a cluster.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Create a key-encryption key: the first or next version of a context.
    CreateKek(create_kek::CreateKek),
    /// List contexts and their key versions.
    ListKek(list_kek::ListKek),
    /// Make a new version of a context's key, or of those of several contexts; returns once it is active.
    Rotate(rotate::Rotate),
    /// Show where each context stands in its rotation.
    RotationStatus,
    /// Look at single key versions, take them out of use, destroy them.
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Destroy the version of a label, as `key destroy` does: after a wait in which it can be undone.
    DeleteKek(key_destroy::DeleteKek),
    /// Disable versions that were retired long ago, are not among the newest and are not used.
    ///
    /// How long, and how many: cleanup_after_days and max_versions of each context. Nothing is ever destroyed, and
    /// `hsmctl key enable` takes it back.
    CleanupOldVersions(cleanup::Cleanup),
    /// Write contexts and key versions in the form of version 1's metadata.yaml.
    ExportMetadata(export_metadata::ExportMetadata),
    /// Show which nodes have proven that they hold each key version.
    ///
    /// Version 1's checksum was a hash of the label and proved nothing. Here every node proves each key with its
    /// check record before it acknowledges it, so there is nothing to update: this shows who has.
    UpdateChecksums(update_checksums::UpdateChecksums),
    /// Encrypt standard input or a file.
    Encrypt(data::Encrypt),
    /// Decrypt standard input or a file.
    Decrypt(data::Decrypt),
    /// Show who a node takes you for.
    Whoami,
    /// Who may do what: show it, change it, ask about somebody.
    #[command(subcommand)]
    Acl(acl::AclCommand),
    /// Revoke certificates; effective on every node that is reached within a second, on open connections too.
    Revoke(revoke::Revoke),
    /// Take a revocation back.
    Unrevoke(revoke::Unrevoke),
    /// List what is revoked.
    Revocations,
    /// Prepare tokens, on the machine that has them; open slots of a node.
    #[command(subcommand)]
    Slot(slot::SlotCommand),
    /// Work on the directory of a node that is stopped, on its machine.
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Look at the profiles: which there are, and what counts.
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Run a complete cluster on this machine, to play with and for tests.
    #[command(subcommand)]
    Dev(DevCommand),
    /// Print a script that completes this program's command line, under the name it is called by.
    Completions(completions::Completions),
    /// Print the manual page, or write one page for each command into a folder.
    Man(manual::Manual),
}

impl Command {
    /// Whether it is about nodes that were named, and so about the profile that names them.
    pub(crate) fn asks_nodes(&self) -> bool {
        !matches!(
            self,
            Self::Slot(slot::SlotCommand::Init(_))
                | Self::Profile(profile::ProfileCommand::List)
                | Self::Dev(_)
                | Self::Node(_)
                | Self::Completions(_)
                | Self::Man(_)
        )
    }
}

/// Reads the arguments, under the program's own name.
pub(crate) fn parse(name: Name, args: &[OsString]) -> Result<Cli, clap::Error> {
    let mut command = Cli::command().name(name.program());
    let mut matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// The command line of a name, for whoever describes it. `create-kek` is one command.
pub(crate) fn described(name: Name) -> clap::Command {
    let mut whole = Cli::command().name(name.program());
    if name != Name::CreateKek {
        return whole;
    }
    // Only then it has the options of every command.
    whole.build();
    let one = whole.find_subcommand(name.as_str()).cloned();
    match one {
        Some(one) => one.bin_name(name.as_str()).display_name(name.as_str()),
        None => whole,
    }
}

/// How results were asked for, by arguments that do not parse: a program wants to read that too.
pub(crate) fn format_asked_for(args: &[OsString]) -> Format {
    format_in(args, &std::env::var("HSMCTL_OUTPUT").unwrap_or_default())
}

fn format_in(args: &[OsString], variable: &str) -> Format {
    // Another word is the error itself, and said to people.
    let read = |text: &str| Format::from_str(text, false).unwrap_or_default();
    let mut asked = read(variable);
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
            asked = read(value);
        }
    }
    asked
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
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
        assert_eq!(asked(&["hsmctl", "no-such", "-o", "yaml"]), Format::Yaml);
        assert_eq!(format_in(&[], "json"), Format::Json);
        assert_eq!(format_in(&[], ""), Format::Table);
    }

    #[test]
    fn no_input_is_an_option_of_every_command() {
        let parse = |args: &str| Cli::try_parse_from(args.split(' ')).unwrap().global.no_input;
        assert!(parse("hsmctl --no-input list-kek") && parse("hsmctl cluster members --no-input"));
        assert!(!parse("hsmctl list-kek"));
    }

    #[test]
    fn create_kek_is_described_as_one_command_with_all_its_options() {
        let one = described(Name::CreateKek);
        assert_eq!(
            (one.get_name(), one.get_bin_name()),
            ("create-kek", Some("create-kek"))
        );
        assert!(one.get_subcommands().next().is_none());
        for option in ["label", "endpoint", "output"] {
            assert!(
                one.get_arguments().any(|arg| arg.get_long() == Some(option)),
                "--{option}"
            );
        }
        assert_eq!(described(Name::HsmAdmin).get_name(), "hsm-admin");
    }

    /// A secret in an argument is seen by every user of the machine, and kept by shells.
    #[test]
    fn no_argument_takes_a_secret() {
        fn check(command: &clap::Command) {
            let path = command.get_bin_name().unwrap_or_default().to_owned();
            for arg in command
                .get_arguments()
                .filter(|arg| arg.get_action().takes_values())
            {
                let name = arg.get_long().unwrap_or_else(|| arg.get_id().as_str());
                let words: Vec<&str> = name.split('-').collect();
                let names_a_secret = ["pin", "token", "secret", "password", "plaintext", "share"]
                    .iter()
                    .any(|word| words.contains(word));
                assert!(
                    !names_a_secret || words.last() == Some(&"file"),
                    "{path} --{name} takes a secret; let it name a file"
                );
            }
            command.get_subcommands().for_each(check);
        }
        let mut whole = Cli::command();
        whole.build();
        check(&whole);
    }

    /// Whoever adds a command that changes something adds `--dry-run`; one that does not is named here.
    #[test]
    fn every_command_that_changes_something_can_be_tried_first() {
        const NOTHING_TO_TRY: [&str; 26] = [
            "acl get",
            "acl test",
            "cluster members",
            "cluster rekey status",
            "cluster status",
            "completions",
            "decrypt",
            "encrypt",
            "export-metadata",
            "key list",
            "key show",
            "key usage",
            "list-kek",
            "man",
            "profile list",
            "profile show",
            "revocations",
            "rotation-status",
            "slot status",
            "whoami",
            // Of a playground, which is made to be broken.
            "dev down",
            "dev exec-node",
            "dev kill",
            "dev start",
            "dev status",
            "dev up",
        ];
        fn collect(command: &clap::Command, path: &str, without: &mut Vec<String>) {
            let mut leaf = true;
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                leaf = false;
                let path = format!("{path} {}", sub.get_name());
                collect(sub, path.trim_start(), without);
            }
            let can_be_tried = command.get_arguments().any(|arg| arg.get_id() == "dry_run");
            if leaf && !can_be_tried {
                without.push(path.to_owned());
            }
        }
        let mut without = Vec::new();
        collect(&Cli::command(), "", &mut without);
        without.sort();
        let mut named = NOTHING_TO_TRY.map(str::to_owned);
        named.sort();
        assert_eq!(without, named);
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
