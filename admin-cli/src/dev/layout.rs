//! Where everything of a playground lies, which ports its nodes have, and the few facts that are remembered
//! about it. The folder belongs to one user; another's is refused.
//!
//! ```text
//! DIR/                     0700, all files 0600
//!   playground.json        how many nodes, which ports
//!   env                    shell exports: addresses, certificates, PINs, replication key
//!   secrets/               the PINs and the replication key, one file each
//!   pki/                   ca.crt (clients and servers), cluster-ca.crt, their keys, clients/, nodes/
//!   node1/                 config.yaml, softhsm2.conf, tokens/, data/, log, pid
//! ```

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::exit::{missing, usage};
use crate::files;

/// Name of the cluster in configurations and certificates.
pub(crate) const CLUSTER: &str = "playground";
/// More nodes than one machine can usefully run.
pub(crate) const MAX_NODES: u32 = 16;
/// Between the first ports of two nodes.
const STRIDE: u32 = 10;
/// Another command may be forming the cluster.
const LOCK_WAIT: Duration = Duration::from_secs(180);

/// What may lie in a folder whose making was cut short before anything was remembered.
const OURS_BEFORE_ALL: [&str; 2] = ["lock", ".playground.json.partial"];

/// A slot of every node.
pub(crate) struct SlotSpec {
    pub(crate) name: &'static str,
    pub(crate) label: &'static str,
    /// The variable that holds its PIN.
    pub(crate) pin_env: &'static str,
    /// Contexts with their binding mode.
    pub(crate) contexts: &'static [(&'static str, &'static str)],
}

/// The slots of every node.
pub(crate) const SLOTS: [SlotSpec; 2] = [
    SlotSpec {
        name: "exchange",
        label: "slot-exchange",
        pin_env: "HSM_PIN_EXCHANGE",
        contexts: &[("exchange-key", "shared"), ("order-key", "shared")],
    },
    SlotSpec {
        name: "2fa",
        label: "slot-2fa",
        pin_env: "HSM_PIN_2FA",
        contexts: &[("2fa", "private")],
    },
];

/// The variable that holds the replication key.
pub(crate) const REPLICATION_ENV: &str = "TOKEN_REPLICATION_KEY";

/// What is remembered about a playground.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Of this file.
    pub(crate) format: u32,
    pub(crate) nodes: u32,
    pub(crate) base_port: u16,
    /// Peers are told `cluster port + this`: something that relays stands there. 0: they connect directly.
    #[serde(default)]
    pub(crate) relay_offset: u16,
    /// Node I has the address `A.B.C.I`, which whoever starts it has put there; `None`: all share the loopback address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) subnet: Option<[u8; 3]>,
}

/// One playground's folder; holds no open file.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// One node's folder and ports.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) number: u32,
    pub(crate) dir: PathBuf,
    pub(crate) host: Ipv4Addr,
    pub(crate) api_port: u16,
    pub(crate) health_port: u16,
    pub(crate) cluster_port: u16,
    /// The port that peers are told.
    pub(crate) advertised_port: u16,
}

impl Facts {
    /// Checks that every port of every node exists.
    pub(crate) fn new(nodes: u32, base_port: u16, relay_offset: u16) -> Result<Self> {
        if nodes == 0 || nodes > MAX_NODES {
            bail!("--nodes {nodes}: a playground has 1 to {MAX_NODES} nodes");
        }
        let highest = u32::from(base_port) + STRIDE * (nodes - 1) + 2 + u32::from(relay_offset);
        if base_port == 0 || highest > u32::from(u16::MAX) {
            bail!("--base-port {base_port}: {nodes} nodes need ports up to {highest}, and there are 65535");
        }
        if u32::from(relay_offset) + 2 >= STRIDE {
            bail!("--relay-offset {relay_offset}: reaches into the ports of the next node; at most 7");
        }
        Ok(Self {
            format: 1,
            nodes,
            base_port,
            relay_offset,
            subnet: None,
        })
    }

    /// Address of a node.
    pub(crate) fn host(&self, number: u32) -> Ipv4Addr {
        match (self.subnet, u8::try_from(number)) {
            (Some([a, b, c]), Ok(last)) => Ipv4Addr::new(a, b, c, last),
            // No playground has more than `MAX_NODES`.
            _ => Ipv4Addr::LOCALHOST,
        }
    }
}

impl Layout {
    /// The playground in `dir`, which has to be there.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Facts)> {
        let layout = Self::at(dir)?;
        match layout.facts()? {
            Some(facts) => Ok((layout, facts)),
            None => Err(no_playground(dir)),
        }
    }

    /// The folder `dir`, made if need be: empty, or a playground already.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        if dir.exists() {
            files::check_owner(dir)?;
            let foreign = std::fs::read_dir(dir)
                .with_context(|| format!("{}: cannot be read", dir.display()))?
                .filter_map(std::result::Result::ok)
                .any(|entry| !OURS_BEFORE_ALL.iter().any(|ours| entry.file_name() == *ours));
            if foreign && !dir.join("playground.json").is_file() {
                bail!(
                    "{}: neither empty nor a playground; name another folder, nothing in this one was touched",
                    dir.display()
                );
            }
        }
        files::private_dir(dir)?;
        Self::at(dir)
    }

    fn at(dir: &Path) -> Result<Self> {
        let root = match dir.canonicalize() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(no_playground(dir)),
            root => root.with_context(|| format!("{}: cannot be looked at", dir.display()))?,
        };
        // It holds PINs, and commands that trust what stands in it.
        files::check_owner(&root)?;
        Ok(Self { root })
    }

    /// What is remembered, if anything was yet.
    pub(crate) fn facts(&self) -> Result<Option<Facts>> {
        let path = self.root.join("playground.json");
        let shown = path.display();
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("{shown}: cannot be read"))?;
        let facts: Facts = serde_json::from_str(&text).with_context(|| format!("{shown}: is damaged"))?;
        if facts.format != 1 {
            bail!(
                "{shown}: format {}, made by a later version; this one knows format 1",
                facts.format
            );
        }
        Facts::new(facts.nodes, facts.base_port, facts.relay_offset)
            .with_context(|| format!("{shown}: is damaged"))?;
        Ok(Some(facts))
    }

    pub(crate) fn remember(&self, facts: Facts) -> Result<()> {
        let text = serde_json::to_string_pretty(&facts).context("encode playground.json")?;
        files::write(&self.root.join("playground.json"), text.as_bytes())
    }

    /// Keeps other commands out for as long as the file lives; the kernel lets go when the process ends.
    pub(crate) fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let shown = path.display();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("{shown}: cannot be opened"))?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(std::fs::TryLockError::WouldBlock) if begun.elapsed() < LOCK_WAIT => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(std::fs::TryLockError::WouldBlock) => {
                    bail!(
                        "{shown}: another hsmctl dev command has been at work for {LOCK_WAIT:?}; wait for it, or end it"
                    );
                }
                Err(std::fs::TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("{shown}: cannot be locked"));
                }
            }
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn env_file(&self) -> PathBuf {
        self.root.join("env")
    }

    pub(crate) fn secrets(&self) -> PathBuf {
        self.root.join("secrets")
    }

    pub(crate) fn pin_file(&self, slot: &str) -> PathBuf {
        self.secrets().join(format!("{slot}.pin"))
    }

    pub(crate) fn so_pin_file(&self, slot: &str) -> PathBuf {
        self.secrets().join(format!("{slot}.so-pin"))
    }

    pub(crate) fn replication_key_file(&self) -> PathBuf {
        self.secrets().join("replication.key")
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.root.join("pki")
    }

    /// Folder of a node's certificates.
    pub(crate) fn node_pki(&self, number: u32) -> PathBuf {
        self.pki().join("nodes").join(node_id(number))
    }

    pub(crate) fn node(&self, facts: Facts, number: u32) -> Result<Node> {
        if number == 0 || number > facts.nodes {
            return Err(usage(format!(
                "--node {number}: this playground has nodes 1 to {}",
                facts.nodes
            )));
        }
        // `Facts::new` has checked that these fit.
        let first = facts.base_port + u16::try_from(STRIDE * (number - 1)).unwrap_or_default();
        Ok(Node {
            number,
            dir: self.root.join(format!("node{number}")),
            host: facts.host(number),
            api_port: first,
            health_port: first + 1,
            cluster_port: first + 2,
            advertised_port: first + 2 + facts.relay_offset,
        })
    }

    pub(crate) fn nodes(&self, facts: Facts) -> Result<Vec<Node>> {
        (1..=facts.nodes).map(|number| self.node(facts, number)).collect()
    }
}

fn no_playground(dir: &Path) -> anyhow::Error {
    let dir = dir.display();
    missing(format!(
        "{dir}: no playground; make one with: hsmctl dev up --dir {dir}"
    ))
}

/// The node's name in the cluster.
pub(crate) fn node_id(number: u32) -> String {
    format!("hsm-node-{number}")
}

impl Node {
    pub(crate) fn id(&self) -> String {
        node_id(self.number)
    }

    /// `https://host:port` of its API.
    pub(crate) fn endpoint(&self) -> String {
        format!("https://{}:{}", self.host, self.api_port)
    }

    /// `host:port` of its health listener.
    pub(crate) fn health(&self) -> String {
        format!("{}:{}", self.host, self.health_port)
    }

    /// `host:port` at which peers find it.
    pub(crate) fn advertised(&self) -> String {
        format!("{}:{}", self.host, self.advertised_port)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.dir.join("tokens")
    }

    pub(crate) fn softhsm_conf(&self) -> PathBuf {
        self.dir.join("softhsm2.conf")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// How long its log is now: where the lines of a start that follows begin.
    pub(crate) fn log_end(&self) -> u64 {
        std::fs::metadata(self.log()).map_or(0, |metadata| metadata.len())
    }

    /// The last lines of its log from `begun` on, for error messages.
    pub(crate) fn log_tail(&self, lines: usize, begun: u64) -> String {
        let mut bytes = Vec::new();
        let read = File::open(self.log()).and_then(|mut log| {
            log.seek(SeekFrom::Start(begun))?;
            log.read_to_end(&mut bytes)
        });
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        let shown = self.log();
        let shown = shown.display();
        if read.is_err() || all.is_empty() {
            return format!("nothing is in {shown} of this start");
        }
        let tail = all[all.len().saturating_sub(lines)..].join("\n  ");
        format!("last lines of {shown}:\n  {tail}")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::exit::Exit;

    #[test]
    fn ports_are_where_the_documents_say() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(&dir.path().join("play")).unwrap();
        let facts = Facts::new(3, 8443, 0).unwrap();
        let node = layout.node(facts, 3).unwrap();
        assert_eq!(
            (node.api_port, node.health_port, node.cluster_port),
            (8463, 8464, 8465)
        );
        assert_eq!(
            (node.id().as_str(), node.endpoint().as_str()),
            ("hsm-node-3", "https://127.0.0.1:8463")
        );
        assert_eq!(node.advertised(), "127.0.0.1:8465");
        assert!(layout.node(facts, 0).is_err() && layout.node(facts, 4).is_err());
        let apart = Facts {
            subnet: Some([10, 77, 0]),
            ..facts
        };
        let node = layout.node(apart, 3).unwrap();
        assert_eq!(
            (
                node.endpoint().as_str(),
                node.health().as_str(),
                node.advertised().as_str()
            ),
            ("https://10.77.0.3:8463", "10.77.0.3:8464", "10.77.0.3:8465")
        );
        let relayed = Facts::new(2, 8443, 5).unwrap();
        assert_eq!(layout.node(relayed, 2).unwrap().advertised(), "127.0.0.1:8460");
    }

    #[test]
    fn ports_that_do_not_exist_are_refused() {
        assert!(Facts::new(3, 65_513, 0).is_ok());
        assert!(
            Facts::new(3, 65_514, 0)
                .unwrap_err()
                .to_string()
                .contains("65535")
        );
        assert!(Facts::new(1, 0, 0).is_err());
        assert!(Facts::new(0, 8443, 0).is_err() && Facts::new(17, 8443, 0).is_err());
        assert!(Facts::new(3, 8443, 8).is_err());
    }

    #[test]
    fn a_playground_is_remembered_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/play");
        let layout = Layout::create(&root).unwrap();
        assert_eq!(layout.facts().unwrap(), None);
        let facts = Facts::new(5, 9000, 0).unwrap();
        layout.remember(facts).unwrap();
        assert_eq!(Layout::open(&root).unwrap().1, facts);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&root), 0o700);
        assert_eq!(mode(&root.join("playground.json")), 0o600);
        Layout::create(&root).unwrap();
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
        let error = Layout::create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("neither empty nor a playground"), "{error}");
    }

    #[test]
    fn what_is_no_playground_says_how_to_make_one() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("absent")] {
            let error = Layout::open(&path).unwrap_err();
            let text = error.to_string();
            let remedy = format!("hsmctl dev up --dir {}", path.display());
            assert!(text.contains(&remedy), "{text}");
            assert_eq!(Exit::of(&error), Exit::Conflict);
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_a_wrong_argument() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let error = layout.node(Facts::new(3, 8443, 0).unwrap(), 4).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
    }

    #[test]
    fn a_damaged_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for text in [
            "{",
            r#"{"format": 2, "nodes": 3, "base_port": 8443}"#,
            r#"{"format": 1, "nodes": 0, "base_port": 1}"#,
        ] {
            std::fs::write(dir.path().join("playground.json"), text).unwrap();
            assert!(Layout::open(dir.path()).is_err(), "{text}");
        }
    }

    #[test]
    fn the_lock_is_free_again_once_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        drop(layout.lock().unwrap());
        layout.lock().unwrap();
    }

    #[test]
    fn a_log_tail_is_the_end_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let node = layout.node(Facts::new(1, 8443, 0).unwrap(), 1).unwrap();
        assert!(node.log_tail(2, 0).contains("log"));
        assert_eq!(node.log_end(), 0);
        std::fs::create_dir(&node.dir).unwrap();
        std::fs::write(node.log(), "one\ntwo\nthree\n").unwrap();
        let tail = node.log_tail(2, 0);
        assert!(!tail.contains("one") && tail.ends_with("two\n  three"), "{tail}");
    }

    #[test]
    fn lines_of_an_earlier_start_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let node = layout.node(Facts::new(1, 8443, 0).unwrap(), 1).unwrap();
        std::fs::create_dir(&node.dir).unwrap();
        std::fs::write(node.log(), "an old fault\n").unwrap();
        let begun = node.log_end();
        let tail = node.log_tail(20, begun);
        assert!(!tail.contains("old fault") && tail.contains("nothing"), "{tail}");
        std::fs::write(node.log(), "an old fault\nthe new one\n").unwrap();
        let tail = node.log_tail(20, begun);
        assert!(
            !tail.contains("old fault") && tail.ends_with("the new one"),
            "{tail}"
        );
    }
}
