//! `docs/cli.md`, written from the command line's own description, so that the two cannot say different things. Only
//! tests write and compare it; the program has no use for it.

use std::path::Path;

use clap::{Arg, ArgAction, Command};

use crate::cli;
use crate::exit;
use crate::names::Name;
use crate::profile;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
/// Set, the document is written; else it is compared.
const UPDATE: &str = "UPDATE_DOCS";

const HEAD: &str = "\
# hsmctl

<!-- Written by `UPDATE_DOCS=1 cargo test -p admin-cli docs` from admin-cli/src; changes made here are lost. -->

`hsmctl` administers nodes through their API. It opens a token only to initialise it (`slot init`), and decides nothing that a node
decides. `hsmctl COMMAND --help` says what stands here; `hsmctl completions SHELL` and `hsmctl man` are made from it too.

## Which nodes, and as whom

A command needs the address of at least one node, the CA of the nodes' certificates, and a client certificate with its key. With
several addresses the first that answers is asked; what is about one node (`cluster init`, `cluster join`, `slot unlock`, `key adopt`)
wants exactly one.

| what | option | variable |
|---|---|---|
| nodes | `--endpoint URL`, repeated or separated by commas | `HSMCTL_ENDPOINTS` |
| CA | `--ca FILE` | `HSMCTL_CA` |
| certificate and key | `--cert FILE --key FILE` | `HSMCTL_CERT`, `HSMCTL_KEY` |
| all of these by one name | `--profile NAME` | `HSMCTL_PROFILE` |
| the profiles' file | `--profiles FILE` | `HSMCTL_PROFILES` |
| a folder of certificates instead of it | `--pki DIR` | `HSMCTL_PKI` |

**A profile** has a name in the profiles' file, which is `hsmctl/profiles.yaml` in `$XDG_CONFIG_HOME`, else in `~/.config`:

";

/// Read by a test, as the program would.
const EXAMPLE: &str = "\
default: prod                          # where no profile is named; may be left out
profiles:
  prod:
    endpoints: [https://hsm-1.example:8443, https://hsm-2.example:8443]
    ca: prod/ca.crt
    cert: prod/operator.crt
    key: prod/operator.key
  test:
    endpoints: [https://hsm-test.example:8443]
    ca: test/ca.crt
    cert: test/operator.crt
    key: ~/secret/test-operator.key
    output: yaml                       # as --output
    timeout: 120                       # as --timeout, in seconds
";

const AFTER_EXAMPLE: &str = "\
Every key of a profile may be left out. Paths are relative to the file's folder; `~/` is the home folder. The file names files and never
holds a key itself, so others may read it; a certificate or a key in it is refused, and so is what is misspelt.

An option goes before its variable, a variable before the profile, the profile before a command's own default, each value by itself;
certificate and key are one value. `hsmctl profile show` says what counts, `hsmctl profile list` what the file has.

**With `--pki`** the file is not read, and a profile is a certificate of that folder: `clients/NAME.crt` and `.key`, `admin` unless one is
named, and `ca.crt` is the CA unless another is. So it is in a playground, whose `DIR/env` sets `HSMCTL_PKI`: to use the file again,
`unset HSMCTL_PKI HSMCTL_CA HSMCTL_ENDPOINTS`.

## What it prints

Results go to standard output, everything else to standard error: `-o table` for people and for awk, `-o json`, `-o yaml`. Progress is
drawn on standard error, only where that is a terminal, and only for what takes longer than a second.

**Questions** are asked on the terminal, whatever the standard streams are. With `--no-input` nothing is asked: what would be is an
error that names the option that answers it. What destroys something has its name typed first.

**`--dry-run`** says what a change would do, from what the nodes say now, and changes nothing. What would be refused is the failure
it would be, with its exit code; what only the change itself finds out is listed as `not checked`.

**Secrets** are never arguments, which every user of a machine can see: PINs and join tokens come from files, from standard input, or
are typed.

";

const V1: &str = "\
## For users of version 1

Called as `hsm-admin` it is the same program under its own name; called as `create-kek` it is `hsmctl create-kek`. A link is enough:
`ln -s hsmctl hsm-admin`. Under both names every failure ends with 1, and version 1's options may have one dash (`-label`).

| version 1 | here |
|---|---|
| `create-kek LABEL PIN [VERSION]` | works, and warns: `DEPRECATED: use 'hsmctl create-kek --label …'`. The PIN is not used, and was visible to every user of the machine: change it |
| `-config PATH`, `-c PATH`, `CONFIG_PATH` | version 1 opened the token that its configuration names. This program asks a node, so it takes from the file what a client can use: `server.port` (the node of this machine is asked, at `https://localhost:PORT`) and `server.tls.ca_path` (unless `--ca` or `--pki` says otherwise). Nothing else is read, the PIN least of all, and with `--endpoint` or `HSMCTL_ENDPOINTS` the file is not opened. Version 1's scripts name no certificate: under its two names, where nothing else does, `server.tls.cert_path` and `key_path` are taken, the node's own. It may administrate if `roles` gives it a role and it was issued for clients too |
| `HSM_SERVER_PORT`, `HSM_SERVER_CA`, `HSM_SERVER_CERT`, `HSM_SERVER_KEY` | under its two names they go before what the file says, and the port is enough without a file. Options, the variables `HSMCTL_…` and a profile that is named go before all of them, and before `CONFIG_PATH`. Called as `hsmctl`, none is looked at, nor `CONFIG_PATH` |
| `create-kek --label --context --version --size` | as it was; the number can only be the next one, the size only 256 |
| `list-kek [--verbose]`, `rotate CONTEXT`, `rotation-status` | as they were; a rotation needs no restart |
| `export-metadata [--output F]` | the same file, from the cluster's state; an extract that nothing reads back. `checksum` is empty. `--output json` and `yaml` are formats here: a file of that name is `./json` |
| `update-checksums [--dry-run]` | version 1's checksum was a hash of the label and proved nothing. It shows which nodes have proven each key with its check record; changes nothing and ends with 0 |
| `delete-kek --label L --confirm` | `key destroy` of that version, and says so: it is out of use at once, and destroyed on every node after the nodes' default wait (7 days); until then `key undo-destroy` takes it back. Without `--confirm` the label is asked for. A version that is active, or was used in the last days, is refused |
| `cleanup-old-versions [--dry-run] [--force]` | version 1 deleted what was *made* long ago, which is the version just retired. Here versions are disabled, never destroyed, once they have been retired for `cleanup_after_days`, are beyond the newest `max_versions` and have not been used for as long; what version 1 would have deleted is said. `--force` changes nothing: nothing is asked |

";

/// The whole document.
fn document() -> String {
    let mut whole = cli::described(Name::Hsmctl).disable_help_subcommand(true);
    whole.build();
    let mut out = format!("{HEAD}```yaml\n{EXAMPLE}```\n\n{AFTER_EXAMPLE}");
    out.push_str(&exit_codes());
    out.push_str(V1);
    out.push_str("## Options of every command\n\n");
    options(&mut out, whole.get_arguments().filter(|arg| arg.is_global_set()));
    out.push_str("## Commands\n\n");
    for command in shown(&whole) {
        section(&mut out, command);
    }
    // Sections end with an empty line; a file does not.
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn exit_codes() -> String {
    let mut out = "## Exit codes\n\nThey are stable: a code never gets another meaning.\n\n".to_owned();
    out.push_str("| code | in JSON | meaning |\n|---|---|---|\n");
    for (exit, meaning) in exit::TABLE {
        out.push_str(&format!("| {} | `{}` | {meaning} |\n", exit as u8, exit.word()));
    }
    out.push_str(&format!("\n{}\n\n", exit::NOTES));
    out.push_str("Where a node gave a code of its own, that one stands in JSON: [errors.md](errors.md).\n\n");
    out
}

fn shown(command: &Command) -> Vec<&Command> {
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .collect()
}

/// A command and those below it.
fn section(out: &mut String, command: &Command) {
    let subs = shown(command);
    if subs.is_empty() {
        let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
        out.push_str(&format!("### {name}\n\n"));
        let about = command.get_long_about().or_else(|| command.get_about());
        if let Some(about) = about {
            out.push_str(&format!("{about}\n\n"));
        }
        let usage = command.clone().render_usage().to_string();
        let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).trim_end();
        out.push_str(&format!("```\n{usage}\n```\n\n"));
        options(out, command.get_arguments().filter(|arg| !arg.is_global_set()));
    }
    for sub in subs {
        section(out, sub);
    }
}

/// A list; nothing if there is none.
fn options<'a>(out: &mut String, args: impl Iterator<Item = &'a Arg>) {
    let before = out.len();
    for arg in args.filter(|arg| !arg.is_hide_set() && !is_automatic(arg)) {
        out.push_str(&option(arg));
    }
    if out.len() > before {
        out.push('\n');
    }
}

/// `--help` and `--version`.
fn is_automatic(arg: &Arg) -> bool {
    matches!(
        arg.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    )
}

fn option(arg: &Arg) -> String {
    let value = arg.get_action().takes_values().then(|| value_name(arg));
    let mut names: Vec<String> = Vec::new();
    names.extend(arg.get_short().map(|short| format!("-{short}")));
    names.extend(arg.get_long().map(|long| format!("--{long}")));
    let mut term = names.join(", ");
    if let Some(value) = value {
        if !term.is_empty() {
            term.push(' ');
        }
        term.push_str(&value);
    }
    let help = arg.get_long_help().or_else(|| arg.get_help());
    // Paragraphs of one item.
    let help = help
        .map(ToString::to_string)
        .unwrap_or_default()
        .replace('\n', " ");
    let mut text = format!("- `{term}`: {help}");
    let notes = notes(arg);
    if !notes.is_empty() {
        text.push_str(&format!(" ({})", notes.join("; ")));
    }
    text.push('\n');
    text
}

/// `<FILE>`.
fn value_name(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let names: Vec<String> = names.iter().map(|name| format!("<{name}>")).collect();
    if names.is_empty() {
        format!("<{}>", arg.get_id().as_str().to_uppercase())
    } else {
        names.join(" ")
    }
}

fn notes(arg: &Arg) -> Vec<String> {
    let mut notes = Vec::new();
    if !arg.get_action().takes_values() {
        notes.extend(variable(arg));
        return notes;
    }
    if arg.is_required_set() && !arg.is_positional() {
        notes.push("required".to_owned());
    }
    let words: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    if !words.is_empty() {
        notes.push(words.join(", "));
    }
    let defaults: Vec<String> = arg
        .get_default_values()
        .iter()
        .map(|value| format!("`{}`", value.to_string_lossy()))
        .collect();
    if !defaults.is_empty() {
        notes.push(format!("default {}", defaults.join(", ")));
    }
    notes.extend(variable(arg));
    notes
}

fn variable(arg: &Arg) -> Option<String> {
    arg.get_env()
        .map(|name| format!("variable `{}`", name.to_string_lossy()))
}

/// The first line that differs, with what it should be.
fn difference(there: &str, right: &str) -> Option<String> {
    if there == right {
        return None;
    }
    let same = there
        .lines()
        .zip(right.lines())
        .take_while(|(a, b)| a == b)
        .count();
    let line = |text: &str| text.lines().nth(same).unwrap_or("(the end)").to_owned();
    Some(format!(
        "line {}: {:?} should be {:?}",
        same + 1,
        line(there),
        line(right)
    ))
}

#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_document_says_what_the_program_says() {
        let right = document();
        if std::env::var_os(UPDATE).is_some_and(|value| !value.is_empty()) {
            std::fs::write(PATH, &right).unwrap();
            return;
        }
        let there = std::fs::read_to_string(PATH).unwrap_or_default();
        let difference = difference(&there, &right);
        assert!(
            difference.is_none(),
            "docs/cli.md is not what the program says; write it with: {UPDATE}=1 cargo test -p admin-cli docs\n{}",
            difference.unwrap_or_default()
        );
    }

    #[test]
    fn every_command_and_every_option_is_in_it() {
        let document = document();
        for text in [
            "### hsmctl create-kek\n",
            "### hsmctl cluster join\n",
            "### hsmctl dev up\n",
            "### hsmctl profile show\n",
            "`-o, --output <OUTPUT>`: How results are printed",
            "`table`, `json`, `yaml`",
            "- `<CONTEXT>`: The context whose key gets a new version",
            "variable `HSMCTL_ENDPOINTS`",
            "| 6 | `outcome_unknown` |",
        ] {
            assert!(document.contains(text), "{text}");
        }
        for hidden in ["exec-node", "relay-offset", "### hsmctl cluster\n"] {
            assert!(!document.contains(hidden), "{hidden}");
        }
    }

    #[test]
    fn the_example_of_profiles_is_one() {
        let folder = Path::new("/etc/hsm");
        let profiles = profile::parse_file(EXAMPLE, folder, Some(Path::new("/home/op"))).unwrap();
        assert_eq!(profiles.default.as_deref(), Some("prod"));
        let test = profiles.named("test").unwrap();
        let (cert, key) = test.identity.clone().unwrap();
        assert_eq!(cert, folder.join("test/operator.crt"));
        assert_eq!(key, Path::new("/home/op/secret/test-operator.key"));
        assert_eq!(test.timeout, Some(120));
    }

    #[test]
    fn a_difference_is_shown_by_its_line() {
        assert_eq!(difference("a\nb\n", "a\nb\n"), None);
        let shown = difference("a\nb\n", "a\nc\n").unwrap();
        assert_eq!(shown, "line 2: \"b\" should be \"c\"");
        assert!(difference("", "a\n").unwrap().contains("(the end)"));
    }
}
