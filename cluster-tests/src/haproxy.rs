//! A real HAProxy before a playground, run from one of `config-examples/` as it stands but for addresses, ports and
//! the paths of its socket and certificates. It ends with its owner, however that ends.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::leashed::Leashed;
use crate::playground::Playground;
use crate::wait::until;

/// What the examples have in the place of a test's own.
const SOCKET: &str = "/run/haproxy/admin.sock";
const BIND: [&str; 2] = ["bind :8443", "bind :8445"];
const FILES: &str = "/etc/haproxy/";
/// None of it may be left.
const LEFT: [&str; 6] = [":8443", ":8445", "port 8444", SOCKET, FILES, ".internal"];
/// Server lines of an example. Those of nodes that a playground does not have are left out.
const EXAMPLE_NODES: u32 = 3;
/// Sends a PROXY header, and so has to come from an address that nobody else comes from.
const SENDS_HEADER: &str = "send-proxy-v2";

/// Where connections of an example that sends PROXY headers come from.
pub const BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// See the module.
pub struct Haproxy {
    program: Leashed,
    socket: PathBuf,
    port: u16,
}

impl Haproxy {
    /// Starts the example of this name before all nodes; returns once it takes connections and has looked at each.
    pub async fn start(playground: &Playground, example: &str) -> Result<Self> {
        let folder = playground.scratch();
        let (config, log) = (folder.join(example), folder.join(format!("{example}.log")));
        let port = playground.balancer_port()?;
        let socket = folder.join(format!("haproxy-{port}.sock"));
        std::fs::write(&config, substituted(playground, example, &socket, port)?)?;
        let program = Leashed::start(
            "haproxy",
            |command| {
                command.args(["-db", "-f"]).arg(&config);
            },
            "KILL",
            &log,
        )?;
        let haproxy = Self {
            program,
            socket,
            port,
        };
        let looked = until(
            "haproxy's first look at every node",
            Duration::from_secs(30),
            async || {
                let servers = haproxy.servers().await.ok()?;
                let unseen = |server: &Server| server.is_checked && !server.was_looked_at;
                (!servers.is_empty() && !servers.iter().any(unseen)).then_some(())
            },
        );
        match looked.await {
            Ok(()) => Ok(haproxy),
            Err(error) => Err(error.context(haproxy.said())),
        }
    }

    /// Where it finds the certificates that an example has in `/etc/haproxy`; to be filled before the start.
    #[must_use]
    pub fn files(playground: &Playground) -> PathBuf {
        playground.scratch().join("haproxy")
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

    /// What it has said.
    #[must_use]
    pub fn said(&self) -> String {
        self.program.said()
    }

    /// All servers of all backends, as its statistics have them.
    async fn servers(&self) -> Result<Vec<Server>> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(b"show stat\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        parse(&text)
    }

    /// Until these nodes of a backend are up, and no others.
    pub async fn wait_up(&self, backend: &str, nodes: &[u32], limit: Duration) -> Result<()> {
        let wanted: Vec<String> = nodes.iter().map(|number| format!("hsm-{number}")).collect();
        let what = format!("{wanted:?} up in haproxy's backend {backend}");
        let up = until(&what, limit, async || {
            let servers = self.servers().await.ok()?;
            let mut up: Vec<String> = servers
                .into_iter()
                .filter(|server| server.backend == backend && server.is_checked && server.is_up)
                .map(|server| server.name)
                .collect();
            up.sort();
            (up == wanted).then_some(())
        });
        match up.await {
            Ok(()) => Ok(()),
            Err(error) => Err(error.context(self.said())),
        }
    }
}

/// The example with what has to be changed in it, each of which has to be there.
fn substituted(playground: &Playground, example: &str, socket: &Path, port: u16) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../config-examples")
        .join(example);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let socket = socket.to_str().context("folder is not UTF-8")?;
    let files = Haproxy::files(playground).join("");
    let files = files.to_str().context("folder is not UTF-8")?;
    let nodes = playground.nodes();
    let known = u32::try_from(nodes.len())?;
    let is_left_out = |line: &&str| {
        let names = |number: u32| line.contains(&format!("hsm-{number}:"));
        !line.trim_start().starts_with('#') && (known + 1..=EXAMPLE_NODES).any(names)
    };
    let line = |line: &str| {
        if line.trim_start().starts_with('#') {
            return line.to_owned();
        }
        let bound = format!("bind 127.0.0.1:{port}");
        let mut line = BIND
            .iter()
            .fold(line.to_owned(), |line, bind| line.replace(bind, &bound))
            .replace(SOCKET, socket)
            .replace(FILES, files)
            .replace(SENDS_HEADER, &format!("{SENDS_HEADER} source {BALANCER}"));
        for node in &nodes {
            let (name, host) = (format!("hsm-{}:", node.number), "127.0.0.1:");
            if line.contains(&name) {
                line = line
                    .replace(&format!("{name}8443"), &format!("{host}{}", node.api_port))
                    .replace(&format!("{name}8445"), &format!("{host}{}", node.cluster_port))
                    .replace("port 8444", &format!("port {}", node.health_port))
                    .replace(
                        &format!("verifyhost hsm-{}.internal", node.number),
                        "verifyhost localhost",
                    );
            }
        }
        line
    };
    let repeated = text.lines().filter(|line| !is_left_out(line)).flat_map(|text| {
        // A larger cluster has a line more for each node beyond those of the example.
        let last = format!("hsm-{EXAMPLE_NODES}");
        let is_last = !text.trim_start().starts_with('#') && text.contains(&format!("{last}:"));
        let more = EXAMPLE_NODES + 1..=if is_last { known } else { EXAMPLE_NODES };
        let others = more.map(move |number| text.replace(&last, &format!("hsm-{number}")));
        std::iter::once(text.to_owned()).chain(others)
    });
    let lines: Vec<String> = repeated.map(|text| line(&text)).collect();
    let left = lines
        .iter()
        .find(|line| !line.trim_start().starts_with('#') && LEFT.iter().any(|part| line.contains(part)));
    if let Some(left) = left {
        bail!("{example}: not replaced: {left}");
    }
    let bound = lines.iter().any(|line| line.contains(&format!(":{port}")));
    ensure!(
        bound && text.contains(SOCKET),
        "{example} has none of {BIND:?} or no {SOCKET}"
    );
    Ok(lines.join("\n") + "\n")
}

/// A line of `show stat` about a server.
#[derive(Debug)]
struct Server {
    backend: String,
    name: String,
    is_up: bool,
    /// Has checks of its own; those that follow another one have none.
    is_checked: bool,
    /// The first of them is over.
    was_looked_at: bool,
}

/// CSV with a line of names, as <https://docs.haproxy.org/2.6/management.html#9.1> has it.
fn parse(text: &str) -> Result<Vec<Server>> {
    let mut lines = text.lines();
    let names = lines.next().and_then(|line| line.strip_prefix("# "));
    let names: Vec<&str> = names.context("no statistics")?.split(',').collect();
    let place = |name: &str| {
        let found = names.iter().position(|known| *known == name);
        found.with_context(|| format!("haproxy's statistics have no {name}"))
    };
    let (backend, name, status, check) = (
        place("pxname")?,
        place("svname")?,
        place("status")?,
        place("check_status")?,
    );
    let mut servers = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let fields: Vec<&str> = line.split(',').collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default();
        if matches!(field(name), "FRONTEND" | "BACKEND") {
            continue;
        }
        servers.push(Server {
            backend: field(backend).to_owned(),
            name: field(name).to_owned(),
            is_up: field(status).starts_with("UP"),
            is_checked: !field(name).ends_with("-standby"),
            was_looked_at: !matches!(field(check), "" | "INI"),
        });
    }
    Ok(servers)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_by_the_names_of_their_columns() {
        let text = "# pxname,svname,scur,status,check_status,\nhsm,FRONTEND,0,OPEN,,\n\
                    fresh,hsm-1,0,UP 1/2,L7OK,\nfresh,hsm-2,0,DOWN,INI,\nfresh,hsm-1-standby,0,UP,,\n\
                    fresh,BACKEND,0,UP,,\n\n";
        let servers = parse(text).unwrap();
        let seen: Vec<_> = servers
            .iter()
            .map(|server| (server.name.as_str(), server.is_up, server.was_looked_at))
            .collect();
        let expected = [
            ("hsm-1", true, true),
            ("hsm-2", false, false),
            ("hsm-1-standby", true, false),
        ];
        assert_eq!(seen, expected);
        assert!(servers[0].is_checked && !servers[2].is_checked);
        assert!(parse("Unknown command").is_err());
    }
}
