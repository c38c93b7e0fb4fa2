//! A real nginx before a playground, run from one of `config-examples/` as it stands but for addresses, ports and paths,
//! and without anything outside the test's folder. It ends with its owner, however that ends.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::net::TcpStream;

use crate::leashed::Leashed;
use crate::playground::Playground;
use crate::wait::until;

/// What the examples have in the place of a test's own.
const LISTEN: &str = "listen 8443";
const FILES: &str = "/etc/nginx";
const NAME: &str = "hsm.internal";
/// None of it may be left.
const LEFT: [&str; 5] = [":8443", "listen 8443", FILES, ".internal", "10.0.0."];
/// Server lines of an example. Those of nodes that a playground does not have are left out.
const EXAMPLE_NODES: u32 = 3;
/// Begins what only an example for HTTP has.
const HTTP: &str = "http {";
/// The script that such an example needs.
const SCRIPT: &str = "nginx-client-cert.js";
/// Folders that nginx makes at its start, whether it needs them or not.
const FOLDERS: [&str; 5] = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];

/// See the module.
pub struct Nginx {
    program: Leashed,
    errors: PathBuf,
    port: u16,
}

impl Nginx {
    /// Starts the example of this name before all nodes; returns once it takes connections.
    pub async fn start(playground: &Playground, example: &str) -> Result<Self> {
        let (folder, files) = (playground.scratch(), Self::files(playground));
        std::fs::create_dir_all(&files)?;
        let at = |end: &str| folder.join(format!("{example}{end}"));
        let (config, errors) = (at(""), at(".errors"));
        let port = playground.balancer_port()?;
        let text = substituted(playground, example, &files, port)?;
        std::fs::write(&config, text)?;
        if example_has(example, SCRIPT)? {
            std::fs::copy(path_of(SCRIPT), files.join(SCRIPT))?;
        }
        // Its workers have to reach the test's folder; of an unprivileged master they are the master's anyway.
        let globals = format!(
            "daemon off; user root; pid {}; error_log {} warn;",
            at(".pid").display(),
            errors.display()
        );
        let program = Leashed::start(
            "nginx",
            |command| {
                command.arg("-e").arg(&errors).arg("-c").arg(&config);
                command.arg("-g").arg(globals);
            },
            "TERM",
            &at(".log"),
        )?;
        let nginx = Self {
            program,
            errors,
            port,
        };
        let listens = until("nginx", Duration::from_secs(30), async || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()
        });
        match listens.await {
            Ok(_) => Ok(nginx),
            Err(error) => Err(error.context(nginx.said())),
        }
    }

    /// Where it finds what an example has in `/etc/nginx`; to be filled before the start.
    #[must_use]
    pub fn files(playground: &Playground) -> PathBuf {
        playground.scratch().join("nginx")
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `https://host:port` that it listens on.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Warnings and errors so far.
    #[must_use]
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// All that it has said.
    #[must_use]
    pub fn said(&self) -> String {
        format!("{}{}", self.program.said(), self.errors())
    }
}

fn path_of(example: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../config-examples")
        .join(example)
}

fn read(example: &str) -> Result<String> {
    let path = path_of(example);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn example_has(example: &str, part: &str) -> Result<bool> {
    let is_one = |line: &str| !is_comment(line) && line.contains(part);
    Ok(read(example)?.lines().any(is_one))
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with('#')
}

/// The example with what has to be changed in it, each of which has to be there.
fn substituted(playground: &Playground, example: &str, files: &Path, port: u16) -> Result<String> {
    let text = read(example)?;
    let folder = files.to_str().context("folder is not UTF-8")?;
    let nodes = playground.nodes();
    let known = u32::try_from(nodes.len())?;
    let address = |number: u32| format!("10.0.0.{number}:8443");
    let mut lines = Vec::new();
    let last = address(EXAMPLE_NODES);
    let all = text.lines().filter(|line| !is_comment(line)).flat_map(|text| {
        // A larger cluster has a line more for each node beyond those of the example.
        let more = EXAMPLE_NODES + 1..=if text.contains(&last) {
            known
        } else {
            EXAMPLE_NODES
        };
        let others = more.map(|number| text.replace(&last, &address(number)));
        std::iter::once(text.to_owned()).chain(others.collect::<Vec<_>>())
    });
    for line in all {
        if (known + 1..=EXAMPLE_NODES).any(|number| line.contains(&address(number))) {
            continue;
        }
        let mut line = line
            .replace(LISTEN, &format!("listen 127.0.0.1:{port}"))
            .replace(FILES, folder)
            .replace(NAME, "localhost");
        for node in &nodes {
            line = line.replace(&address(node.number), &format!("127.0.0.1:{}", node.api_port));
        }
        if let Some(left) = LEFT.iter().find(|part| line.contains(**part)) {
            bail!("{example}: {left} is not replaced: {line}");
        }
        let begins_http = line == HTTP;
        lines.push(line);
        if begins_http {
            lines.push("access_log off;".to_owned());
            lines.extend(FOLDERS.map(|name| format!("{name}_temp_path {folder}/{name};")));
        }
    }
    let text = lines.join("\n") + "\n";
    ensure!(
        text.contains(&format!("127.0.0.1:{port}")),
        "{example} has no {LISTEN:?}"
    );
    for node in &nodes {
        let part = format!("127.0.0.1:{}", node.api_port);
        ensure!(text.contains(&part), "{example} has no {}", address(node.number));
    }
    Ok(text)
}
