//! `hsmctl profile`: what the profiles' file has, and what of everything counts. Nobody is asked, and no key is read.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

use super::Session;
use crate::output::{self, note, or_dash};
use crate::profile::{self, Profile};

/// The profiles.
#[derive(Debug, Subcommand)]
pub(crate) enum ProfileCommand {
    /// List the profiles of the profiles' file.
    List,
    /// Show what a command with these options would use: nodes, files, format, time.
    Show,
}

/// One profile of the file.
#[derive(Serialize)]
struct Listed<'a> {
    profile: &'a str,
    default: bool,
    endpoints: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cert: Option<PathBuf>,
}

/// What counts after options, variables and the profile.
#[derive(Serialize)]
struct Shown {
    endpoints: Vec<String>,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_seconds: Option<u64>,
}

pub(super) fn run(session: &Session, command: &ProfileCommand) -> Result<()> {
    match command {
        ProfileCommand::List => list(session),
        ProfileCommand::Show => show(session),
    }
}

fn list(session: &Session) -> Result<()> {
    let (path, profiles) = profile::file_of(&session.global)?;
    match path {
        Some(_) if !profiles.all.is_empty() => {}
        Some(path) => note(&format!("{}: has no profiles, or is not there", path.display())),
        None => note("HOME is not set, so there is no profiles' file; name one with --profiles"),
    }
    let pki = session.global.pki.as_ref();
    if pki.is_some_and(|pki| !pki.as_os_str().is_empty()) {
        note("--pki or HSMCTL_PKI is set, so these do not count: a profile is a certificate of that folder");
    }
    let listed: Vec<Listed<'_>> = profiles
        .all
        .iter()
        .map(|(name, entry)| Listed {
            profile: name,
            default: profiles.default.as_ref() == Some(name),
            endpoints: &entry.endpoints,
            ca: entry.ca.clone(),
            cert: entry.identity.clone().map(|(cert, _)| cert),
        })
        .collect();
    output::print(session.format(), &listed, || {
        let rows = listed.iter().map(|one| {
            [
                one.profile.to_owned(),
                if one.default { "yes" } else { "no" }.to_owned(),
                or_dash(Some(one.endpoints.join(",")).filter(|endpoints| !endpoints.is_empty())),
                or_dash(one.cert.as_ref().map(|cert| cert.display())),
            ]
        });
        output::table(["PROFILE", "DEFAULT", "NODES", "CERTIFICATE"], rows)
    })
}

fn show(session: &Session) -> Result<()> {
    let Profile {
        endpoints,
        ca,
        cert,
        key,
    } = Profile::resolve(&session.global)?;
    let shown = Shown {
        endpoints,
        ca,
        cert,
        key,
        output: session.format().to_string(),
        timeout_seconds: session.global.timeout,
    };
    output::print(session.format(), &shown, || {
        output::pairs([
            ("endpoints", shown.endpoints.join(",")),
            ("ca", shown.ca.display().to_string()),
            ("cert", shown.cert.display().to_string()),
            ("key", shown.key.display().to_string()),
            ("output", shown.output.clone()),
            (
                "timeout",
                shown.timeout_seconds.map_or_else(
                    || "each command's own".to_owned(),
                    |seconds| format!("{seconds} s"),
                ),
            ),
        ])
    })
}
