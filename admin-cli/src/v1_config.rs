//! `--config`, as scripts of version 1 have it. That program opened the token its configuration named; this one asks
//! nodes. So what is taken from the file is where the node of this machine listens and which CA its certificate is
//! from; the token, its PIN and everything else are the node's, and not looked at. What the arguments or the
//! environment say goes before it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use crate::cli::Global;
use crate::exit::usage;
use crate::files;
use crate::output::note;

/// Version 1's port where its file does not say.
const DEFAULT_PORT: u16 = 8443;
/// No configuration is longer.
const MAX_CONFIG: usize = 1 << 20;
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
}

/// Version 1's examples quote it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

/// Fills in what `--config` says and nothing else does, and says so.
pub(crate) fn apply(global: &mut Global) -> Result<()> {
    let Some(path) = global.config.clone() else {
        return Ok(());
    };
    let shown = path.display();
    if global
        .endpoints
        .iter()
        .any(|endpoint| !endpoint.trim().is_empty())
    {
        note(&format!(
            "--config {shown}: not read: --endpoint or HSMCTL_ENDPOINTS names the nodes"
        ));
        return Ok(());
    }
    let found = read(&path)?;
    let mut taken = format!("{} (server.port)", found.endpoint);
    global.endpoints = vec![found.endpoint];
    let no_ca = |named: &Option<PathBuf>| named.as_ref().is_none_or(|path| path.as_os_str().is_empty());
    if let Some(ca) = found.ca.filter(|_| no_ca(&global.ca) && no_ca(&global.pki)) {
        taken.push_str(&format!(", CA {} (server.tls.ca_path)", ca.display()));
        global.ca = Some(ca);
    }
    note(&format!(
        "--config {shown}: asks {taken}; nothing else is read from it. HSMCTL_ENDPOINTS and HSMCTL_CA, or --endpoint \
         and --ca, say the same without it"
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

struct Found {
    endpoint: String,
    ca: Option<PathBuf>,
}

/// The file may hold a PIN: it is wiped, never in a core dump, and no message quotes it.
fn read(path: &Path) -> Result<Found> {
    files::harden()?;
    let shown = path.display();
    let unreadable = |why: &str| usage(format!("--config {shown}: {why}; {REMEDY}"));
    let file = std::fs::File::open(path).map_err(|error| unreadable(&format!("cannot be read: {error}")))?;
    let bytes =
        files::read_bounded(file, MAX_CONFIG, "it").map_err(|error| unreadable(&format!("{error:#}")))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| unreadable("is not text"))?;
    parse(text).map_err(|why| unreadable(&why))
}

fn parse(text: &str) -> Result<Found, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let file: Option<File> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        format!("is not the YAML of a configuration (line {line})")
    })?;
    let server = file.unwrap_or_default().server.unwrap_or_default();
    let port = match server.port {
        None => DEFAULT_PORT,
        Some(Port::Number(port)) => port,
        Some(Port::Text(text)) => text
            .trim()
            .parse::<u16>()
            .map_err(|_| "server.port is not the number of a port".to_owned())?,
    };
    Ok(Found {
        endpoint: format!("https://localhost:{port}"),
        ca: server
            .tls
            .unwrap_or_default()
            .ca_path
            .filter(|path| !path.as_os_str().is_empty()),
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

    #[test]
    fn a_script_of_version_1_finds_its_node_and_ca() {
        let (_dir, mut global) = file(CONFIG);
        apply(&mut global).unwrap();
        assert_eq!(global.endpoints, ["https://localhost:8443"]);
        assert_eq!(global.ca, Some(PathBuf::from("pki/ca.crt")));
        assert_eq!((global.cert, global.key), (None, None));
    }

    #[test]
    fn what_is_said_otherwise_goes_before_the_file() {
        let (_dir, mut global) = file(CONFIG);
        global.pki = Some("/play/pki".into());
        apply(&mut global).unwrap();
        assert_eq!(global.ca, None, "PKI/ca.crt is meant");
        let mut named = Global {
            config: Some("/nonexistent/config.yaml".into()),
            endpoints: vec!["https://hsm-1:8443".to_owned()],
            ..Global::default()
        };
        apply(&mut named).unwrap();
        assert_eq!(named.endpoints, ["https://hsm-1:8443"]);
        apply(&mut Global::default()).unwrap();
    }

    #[test]
    fn a_port_may_be_a_number_or_a_text_or_missing() {
        for (text, endpoint) in [
            ("server: {port: \"9443\"}", "https://localhost:9443"),
            ("server: {port: 9443}", "https://localhost:9443"),
            ("server: {}", "https://localhost:8443"),
            ("server:\n", "https://localhost:8443"),
            (
                "hsm: {slot_id: hsm-token, new: [1, {a: b}]}",
                "https://localhost:8443",
            ),
        ] {
            let found = parse(text).map(|found| found.endpoint);
            assert_eq!(found.as_deref(), Ok(endpoint), "{text}");
        }
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
            let error = apply(&mut global).unwrap_err();
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
        let error = apply(&mut absent).unwrap_err().to_string();
        assert!(
            error.contains("/nonexistent/config.yaml: cannot be read"),
            "{error}"
        );
    }
}
