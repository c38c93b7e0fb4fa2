//! `--config` and the variables of version 1, as its scripts have them. That program opened the token its configuration
//! named; this one asks nodes. So what is taken is where the node of this machine listens, which CA its certificate is
//! from and, under version 1's names, as whom to ask if nobody says so; the token, its PIN and everything else are the
//! node's, and not looked at.
//!
//! What counts, first to last: arguments, the variables `HSMCTL_…`, a profile that is named and no `--config` beside it,
//! and under version 1's names the variables `HSM_SERVER_…`, then the file.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use crate::cli::Global;
use crate::exit::usage;
use crate::files;
use crate::names::Name;
use crate::output::note;

/// Version 1's port where its file does not say.
const DEFAULT_PORT: u16 = 8443;
/// No configuration is longer.
const MAX_CONFIG: usize = 1 << 20;
/// Names the file, as an option does.
const CONFIG_PATH: &str = "CONFIG_PATH";
/// Goes before the file's `server.port`, and names a node without a file too.
const SERVER_PORT: &str = "HSM_SERVER_PORT";
/// What has to be said where the file does not.
const REMEDY: &str = "name the node with --endpoint https://host:8443 (HSMCTL_ENDPOINTS) instead";

/// What a client can use of the file. Everything else is passed over, unknown keys too.
#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    server: Option<Server>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Server {
    port: Option<Port>,
    tls: Option<Tls>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Tls {
    ca_path: Option<PathBuf>,
    cert_path: Option<PathBuf>,
    key_path: Option<PathBuf>,
}

/// Version 1's examples quote it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

/// Fills in what version 1's file and variables say and nothing else does, and says so. A variable that is empty says
/// nothing.
pub(crate) fn apply(global: &mut Global, name: Name, env: &dyn Fn(&str) -> Option<OsString>) -> Result<()> {
    let env = |variable: &str| {
        let value = name.is_v1().then(|| env(variable)).flatten();
        value.filter(|value| !value.is_empty())
    };
    let mut endpoints = global.endpoints.iter();
    if endpoints.any(|endpoint| !endpoint.trim().is_empty()) {
        // A variable may be meant for the node; the option was meant for us.
        if let Some(path) = &global.config {
            note(&format!(
                "--config {}: not read: --endpoint or HSMCTL_ENDPOINTS names the nodes",
                path.display()
            ));
        }
        return Ok(());
    }
    let file = match (&global.config, env(CONFIG_PATH)) {
        (Some(path), _) => Some((path.clone(), format!("--config {}", path.display()))),
        (None, Some(path)) => {
            let path = PathBuf::from(path);
            let shown = format!("{CONFIG_PATH} {}", path.display());
            Some((path, shown))
        }
        (None, None) => None,
    };
    let port = env(SERVER_PORT).map(|text| port_in(&text)).transpose()?;
    let (found, shown) = match file {
        Some((path, shown)) => (read(&path, &shown)?, shown),
        None if port.is_some() => (Found::default(), SERVER_PORT.to_owned()),
        None => return Ok(()),
    };
    let mut taken = Vec::new();
    let mut take = |what: &str, value: String, from: &str| taken.push(format!("{what}{value} ({from})"));
    let (number, from) = match (port, found.port) {
        (Some(port), _) => (port, SERVER_PORT),
        (None, Some(port)) => (port, "server.port"),
        (None, None) => (DEFAULT_PORT, "the default"),
    };
    let endpoint = format!("https://localhost:{number}");
    take("asks ", endpoint.clone(), from);
    global.endpoints = vec![endpoint];
    let either = |variable: &'static str, in_file: Option<PathBuf>, key: &'static str| {
        let named = env(variable).map(|path| (PathBuf::from(path), variable));
        named.or(in_file.map(|path| (path, key)))
    };
    if is_absent(&global.ca)
        && is_absent(&global.pki)
        && let Some((ca, from)) = either("HSM_SERVER_CA", found.ca, "server.tls.ca_path")
    {
        take("CA ", ca.display().to_string(), from);
        global.ca = Some(ca);
    }
    let somebody = !is_absent(&global.cert)
        || !is_absent(&global.key)
        || !is_absent(&global.pki)
        || global.profile.as_ref().is_some_and(|profile| !profile.is_empty());
    // Version 1 asked nobody, so its scripts name nobody: the node itself asks, if it was given a role.
    if name.is_v1()
        && !somebody
        && let Some((cert, from)) = either("HSM_SERVER_CERT", found.cert, "server.tls.cert_path")
        && let Some((key, _)) = either("HSM_SERVER_KEY", found.key, "server.tls.key_path")
    {
        take(
            "with the node's own certificate ",
            cert.display().to_string(),
            from,
        );
        (global.cert, global.key) = (Some(cert), Some(key));
        global.as_the_node = true;
    }
    note(&format!(
        "{shown}: {}; nothing else is read. HSMCTL_ENDPOINTS, HSMCTL_CA, HSMCTL_CERT and HSMCTL_KEY say the same \
         without it",
        taken.join(", ")
    ));
    Ok(())
}

/// For a command that asks no node.
pub(crate) fn pass_over(global: &Global) {
    if let Some(path) = &global.config {
        note(&format!(
            "--config {}: not read: this command asks no node",
            path.display()
        ));
    }
}

/// An empty variable is no value.
fn is_absent(path: &Option<PathBuf>) -> bool {
    path.as_ref().is_none_or(|path| path.as_os_str().is_empty())
}

fn port_in(text: &OsStr) -> Result<u16> {
    let port = text.to_str().and_then(|text| text.trim().parse().ok());
    port.ok_or_else(|| {
        usage(format!(
            "{SERVER_PORT}={}: is not the number of a port; {REMEDY}",
            text.display()
        ))
    })
}

/// What the file says of what a client can use.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) port: Option<u16>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// The file may hold a PIN: it is wiped, never in a core dump, and no message quotes it. `shown` is who named it.
fn read(path: &Path, shown: &str) -> Result<Found> {
    files::harden()?;
    let unreadable = |why: &str| usage(format!("{shown}: {why}; {REMEDY}"));
    let file = std::fs::File::open(path).map_err(|error| unreadable(&format!("cannot be read: {error}")))?;
    let bytes =
        files::read_bounded(file, MAX_CONFIG, "it").map_err(|error| unreadable(&format!("{error:#}")))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| unreadable("is not text"))?;
    parse(text).map_err(|why| unreadable(&why))
}

pub(crate) fn parse(text: &str) -> Result<Found, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let file: Option<File> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        format!("is not the YAML of a configuration (line {line})")
    })?;
    let server = file.unwrap_or_default().server.unwrap_or_default();
    let port = match server.port {
        None => None,
        Some(Port::Number(port)) => Some(port),
        Some(Port::Text(text)) => {
            let port = text.trim().parse();
            Some(port.map_err(|_| "server.port is not the number of a port".to_owned())?)
        }
    };
    let tls = server.tls.unwrap_or_default();
    let given = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
    Ok(Found {
        port,
        ca: given(tls.ca_path),
        cert: given(tls.cert_path),
        key: given(tls.key_path),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    /// As docs and examples of version 1 have it.
    const CONFIG: &str = include_str!("../../config-examples/v1.yaml");

    fn file(text: &str) -> (tempfile::TempDir, Global) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, text).unwrap();
        let global = Global {
            config: Some(path),
            ..Global::default()
        };
        (dir, global)
    }

    /// Called by a name, with these variables and no others.
    fn apply_as(name: Name, global: &mut Global, variables: &[(&str, &str)]) -> Result<()> {
        apply(global, name, &|variable| {
            let mut known = variables.iter();
            known
                .find(|(known, _)| *known == variable)
                .map(|(_, value)| OsString::from(value))
        })
    }

    fn path(text: &str) -> Option<PathBuf> {
        Some(PathBuf::from(text))
    }

    #[test]
    fn a_script_of_version_1_finds_its_node_and_ca_and_asks_as_the_node() {
        for (name, cert, key) in [
            (Name::HsmAdmin, path("pki/server.crt"), path("pki/server.key")),
            (Name::CreateKek, path("pki/server.crt"), path("pki/server.key")),
            (Name::Hsmctl, None, None),
        ] {
            let (_dir, mut global) = file(CONFIG);
            apply_as(name, &mut global, &[]).unwrap();
            assert_eq!(global.endpoints, ["https://localhost:8443"]);
            assert_eq!(global.ca, path("pki/ca.crt"));
            assert_eq!(global.as_the_node, cert.is_some(), "{name}");
            assert_eq!((global.cert, global.key), (cert, key), "{name}");
        }
    }

    const VARIABLES: [(&str, &str); 4] = [
        (SERVER_PORT, "9443"),
        ("HSM_SERVER_CA", "v.ca"),
        ("HSM_SERVER_CERT", "v.crt"),
        ("HSM_SERVER_KEY", "v.key"),
    ];

    #[test]
    fn the_variables_of_version_1_go_before_its_file_under_its_names() {
        let (_dir, mut global) = file(CONFIG);
        apply_as(Name::HsmAdmin, &mut global, &VARIABLES).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:9443"]);
        assert_eq!(global.ca, path("v.ca"));
        assert_eq!((global.cert, global.key), (path("v.crt"), path("v.key")));
        // Without a file the port says which node is meant.
        let mut global = Global::default();
        apply_as(Name::HsmAdmin, &mut global, &VARIABLES).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:9443"]);
        assert_eq!(global.cert, path("v.crt"));
        // Under its own name the program has variables of its own, and these may be a node's.
        let (_dir, mut global) = file(CONFIG);
        apply_as(Name::Hsmctl, &mut global, &VARIABLES).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:8443"]);
        assert_eq!(global.ca, path("pki/ca.crt"));
    }

    #[test]
    fn the_file_may_be_named_by_a_variable_unless_an_option_names_one() {
        let (dir, _) = file("server: {port: 9443}");
        let named = dir.path().join("config.yaml");
        let variable = [(CONFIG_PATH, named.to_str().unwrap())];
        let mut global = Global::default();
        apply_as(Name::HsmAdmin, &mut global, &variable).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:9443"]);
        let (_dir, mut global) = file(CONFIG);
        apply_as(Name::HsmAdmin, &mut global, &variable).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:8443"]);
        let mut global = Global::default();
        apply_as(Name::Hsmctl, &mut global, &variable).unwrap();
        assert!(global.endpoints.is_empty(), "another program's, perhaps");
        let absent = [(CONFIG_PATH, "/nonexistent/config.yaml")];
        let error = apply_as(Name::HsmAdmin, &mut global, &absent)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("CONFIG_PATH /nonexistent/config.yaml: cannot be read"),
            "{error}"
        );
    }

    #[test]
    fn an_empty_variable_says_nothing_and_a_wrong_port_is_refused() {
        let empty = VARIABLES.map(|(variable, _)| (variable, ""));
        let (_dir, mut global) = file(CONFIG);
        apply_as(Name::HsmAdmin, &mut global, &empty).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:8443"]);
        assert_eq!(global.cert, path("pki/server.crt"));
        let mut global = Global::default();
        apply_as(Name::HsmAdmin, &mut global, &empty).unwrap();
        assert!(global.endpoints.is_empty());
        let error = apply_as(Name::HsmAdmin, &mut global, &[(SERVER_PORT, "https")]).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(
            error.to_string().starts_with("HSM_SERVER_PORT=https: is not"),
            "{error}"
        );
    }

    #[test]
    fn what_is_said_otherwise_goes_before_the_file_and_the_variables() {
        let (_dir, mut global) = file(CONFIG);
        global.pki = Some("/play/pki".into());
        apply_as(Name::HsmAdmin, &mut global, &VARIABLES).unwrap();
        assert_eq!(global.ca, None, "PKI/ca.crt is meant");
        assert_eq!(global.cert, None, "and the certificate of a profile");
        let mut own = Global {
            cert: path("own.crt"),
            key: path("own.key"),
            ..Global::default()
        };
        apply_as(Name::HsmAdmin, &mut own, &VARIABLES).unwrap();
        assert!(!own.as_the_node);
        assert_eq!((own.cert, own.key), (path("own.crt"), path("own.key")));
        let mut named = Global {
            config: Some("/nonexistent/config.yaml".into()),
            endpoints: vec!["https://hsm-1:8443".to_owned()],
            ..Global::default()
        };
        apply_as(Name::HsmAdmin, &mut named, &VARIABLES).unwrap();
        assert_eq!(named.endpoints, ["https://hsm-1:8443"]);
        assert_eq!((named.ca, named.cert), (None, None));
        apply_as(Name::Hsmctl, &mut Global::default(), &[]).unwrap();
    }

    #[test]
    fn a_port_may_be_a_number_or_a_text_or_missing() {
        for (text, port) in [
            ("server: {port: \"9443\"}", Some(9443)),
            ("server: {port: 9443}", Some(9443)),
            ("server: {}", None),
            ("server:\n", None),
            ("hsm: {slot_id: hsm-token, new: [1, {a: b}]}", None),
        ] {
            let found = parse(text).map(|found| found.port);
            assert_eq!(found, Ok(port), "{text}");
        }
        let (_dir, mut global) = file("server: {}");
        apply_as(Name::HsmAdmin, &mut global, &[]).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:8443"]);
    }

    #[test]
    fn a_file_that_is_none_is_named_without_quoting_it() {
        for text in [
            "hsm: {pin: planted",
            "server: {port: planted}\nhsm: {pin: planted}",
            "server: [planted]",
            "server: {port: 70000}",
        ] {
            let (_dir, mut global) = file(text);
            let error = apply_as(Name::HsmAdmin, &mut global, &[]).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Usage, "{text}");
            let said = format!("{error:#}");
            assert!(
                said.contains("config.yaml") && said.contains("--endpoint") && !said.contains("planted"),
                "{said}"
            );
        }
        let mut absent = Global {
            config: Some("/nonexistent/config.yaml".into()),
            ..Global::default()
        };
        let error = apply_as(Name::HsmAdmin, &mut absent, &[])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/nonexistent/config.yaml: cannot be read"),
            "{error}"
        );
    }
}
