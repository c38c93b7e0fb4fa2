//! `cluster`: who this node is, how it finds its peers, and Raft's timing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use raft_store::names::NodeName;

use super::env::Env;
use super::error::ConfigError;
use super::file::{AutopilotSection, ClusterSection, ClusterTlsSection, RaftSection, ReplicationSection};
use super::server::{advertised, millis, number, socket_address};
use super::suggest::nearest;

/// The variable that holds the replication key unless another is named.
pub const DEFAULT_REPLICATION_VARIABLE: &str = "TOKEN_REPLICATION_KEY";

/// The variable that holds the key beside it, unless another is named. It need not be set.
pub const PREVIOUS_REPLICATION_VARIABLE: &str = "TOKEN_REPLICATION_KEY_PREVIOUS";

/// This node's place in its cluster.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// How the nodes share the work.
    pub mode: Mode,
    /// This node's name.
    pub node_id: NodeName,
    /// The cluster's name.
    pub name: String,
    /// The listener for peers; a standalone node may have none.
    pub peer: Option<PeerListener>,
    /// Where clients find this node's API.
    pub api_advertise: String,
    /// Raft's timing.
    pub raft: Raft,
    /// How keys reach the other nodes.
    pub replication: Replication,
    /// Silence after which a member may be left out of a rotation.
    pub fence_after: Duration,
    /// What a leader does about voters that are dead.
    pub autopilot: Autopilot,
}

/// What a leader does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Autopilot {
    /// A voter that was silent for so long is taken out; `None`: nobody ever is.
    pub remove_dead_after: Option<Duration>,
    /// Voters that are heard and have to remain.
    pub min_voters: usize,
}

/// How the nodes share the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A Raft of one.
    Standalone,
    /// Balancers are steered to the leader; standbys answer what reaches them.
    ActivePassive,
    /// Every node is ready.
    ActiveActive,
}

/// Where peers connect.
#[derive(Debug, Clone)]
pub struct PeerListener {
    /// Address to bind.
    pub listen: SocketAddr,
    /// `host:port` that peers use.
    pub advertise: String,
    /// Addresses to use for some peers instead of the advertised ones, by node_id: split networks.
    pub addresses: BTreeMap<String, String>,
    /// Certificates of the cluster CA.
    pub tls: PeerTlsFiles,
}

/// Files of the cluster listener.
#[derive(Debug, Clone)]
pub struct PeerTlsFiles {
    /// The cluster's CA.
    pub ca_path: PathBuf,
    /// This node's certificate, with SAN `URI:hsm://<cluster>/<node_id>`.
    pub cert_path: PathBuf,
    /// Its private key.
    pub key_path: PathBuf,
}

/// Raft's timing. Fail-over takes about `election_max` + an election + 1.5 heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raft {
    /// Between the leader's frames.
    pub heartbeat: Duration,
    /// Shortest silence that starts an election.
    pub election_min: Duration,
    /// Longest.
    pub election_max: Duration,
    /// Log entries between snapshots.
    pub snapshot_every: u64,
    /// Log entries kept behind a snapshot.
    pub keep_logs: u64,
}

/// Token sync.
#[derive(Debug, Clone)]
pub struct Replication {
    /// False only on a standalone node.
    pub enabled: bool,
    /// Period of the full comparison of token and state.
    pub interval: Duration,
    /// Where the key comes from.
    pub key: ReplicationKeySource,
    /// Where the key beside it comes from, while the cluster's is being replaced.
    pub previous: Option<ReplicationKeySource>,
}

/// Where the replication key is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicationKeySource {
    /// An environment variable.
    Env {
        /// The configuration key.
        key: String,
        /// The variable.
        variable: String,
    },
    /// A file that only its owner can read.
    File {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
    },
    /// `replication.key` in the data folder, made on first start; standalone nodes only.
    DataDir,
}

/// A file without `cluster` is a standalone node.
pub(crate) fn resolve(
    section: Option<ClusterSection>,
    api: SocketAddr,
    env: Env<'_>,
) -> Result<Cluster, ConfigError> {
    let (mode, node_id) = mode_and_name(section.as_ref())?;
    let section = section.unwrap_or_default();
    check_coordination(&section)?;
    let standalone = mode == Mode::Standalone;
    let name = section.name.unwrap_or_else(|| "hsm".to_owned());
    // The name is part of a URI in certificates: the same rule as for a node's name.
    if NodeName::new(&name).is_err() {
        return Err(ConfigError::invalid(
            "cluster.name",
            name,
            "is not a name",
            "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit",
        ));
    }
    let fence_after = millis(
        "cluster.fence_after_ms",
        section.fence_after_ms,
        8000,
        1000..=600_000,
    )?;
    Ok(Cluster {
        mode,
        node_id,
        name,
        peer: peer(
            section.tls,
            section.listen,
            section.advertise,
            section.peer_addresses,
            standalone,
        )?,
        api_advertise: api_advertise(section.api_advertise, api, standalone)?,
        raft: section.raft.resolve()?,
        replication: section.token_replication.resolve(standalone, env)?,
        fence_after,
        autopilot: section.autopilot.resolve(fence_after)?,
    })
}

impl AutopilotSection {
    /// A voter that is still waited for in a rotation is not dead yet.
    fn resolve(self, fence_after: Duration) -> Result<Autopilot, ConfigError> {
        const AFTER: &str = "cluster.autopilot.remove_dead_after_seconds";
        let remove_dead_after = match self.remove_dead_after_seconds {
            None => None,
            given => Some(Duration::from_secs(number(AFTER, given, 0, 10..=31_536_000)?)),
        };
        if let Some(after) = remove_dead_after.filter(|after| *after < fence_after) {
            return Err(ConfigError::invalid(
                AFTER,
                after.as_secs(),
                format!("is below cluster.fence_after_ms ({})", fence_after.as_millis()),
                format!("write at least {}", fence_after.as_millis().div_ceil(1000)),
            ));
        }
        Ok(Autopilot {
            remove_dead_after,
            min_voters: number("cluster.autopilot.min_voters", self.min_voters, 3, 3..=100)?,
        })
    }
}

/// How the nodes share the work, and this one's name.
pub(super) fn mode_and_name(section: Option<&ClusterSection>) -> Result<(Mode, NodeName), ConfigError> {
    const KEY: &str = "cluster.node_id";
    let enabled = section.is_some_and(|section| section.enabled.unwrap_or(true));
    let mode = match section.and_then(|section| section.mode.as_deref()) {
        _ if !enabled => Mode::Standalone,
        None => Mode::ActiveActive,
        Some(text) => mode(text)?,
    };
    let name = match section.and_then(|section| section.node_id.as_deref()) {
        Some(text) => NodeName::new(text).map_err(ConfigError::name(KEY))?,
        None if mode == Mode::Standalone => NodeName::new("hsm-node-1").map_err(ConfigError::name(KEY))?,
        None => {
            return Err(ConfigError::missing(
                KEY,
                "write this node's name, one of its own on every node, such as hsm-node-1",
            ));
        }
    };
    Ok((mode, name))
}

fn check_coordination(section: &ClusterSection) -> Result<(), ConfigError> {
    match section.coordination.kind.as_deref() {
        None | Some("raft") => Ok(()),
        Some(value @ ("etcd" | "consul")) => Err(ConfigError::Coordination {
            value: value.to_owned(),
        }),
        Some(other) => Err(ConfigError::invalid(
            "cluster.coordination.type",
            other,
            "is not known",
            "write raft: it is built in and needs nothing else",
        )),
    }
}

fn mode(text: &str) -> Result<Mode, ConfigError> {
    match text {
        "standalone" => Ok(Mode::Standalone),
        "active-passive" => Ok(Mode::ActivePassive),
        "active-active" => Ok(Mode::ActiveActive),
        other => Err(ConfigError::invalid(
            "cluster.mode",
            other,
            "is not a known mode",
            nearest(other, ["standalone", "active-passive", "active-active"]).map_or_else(
                || "write standalone, active-passive or active-active".to_owned(),
                |word| format!("did you mean {word}?"),
            ),
        )),
    }
}

fn peer(
    tls: Option<ClusterTlsSection>,
    listen: Option<String>,
    advertise: Option<String>,
    addresses: BTreeMap<String, String>,
    standalone: bool,
) -> Result<Option<PeerListener>, ConfigError> {
    if standalone && tls.is_none() {
        return Ok(None);
    }
    let tls = tls.unwrap_or_default();
    let file = |field: &str, path: Option<PathBuf>, what: &str| {
        path.filter(|path| !path.as_os_str().is_empty()).ok_or_else(|| {
            ConfigError::missing(
                format!("cluster.tls.{field}"),
                format!("write the path of {what}, from the cluster's own CA"),
            )
        })
    };
    let tls = PeerTlsFiles {
        ca_path: file("ca_path", tls.ca_path, "the CA's certificate (PEM)")?,
        cert_path: file("cert_path", tls.cert_path, "this node's certificate (PEM)")?,
        key_path: file("key_path", tls.key_path, "this node's private key (PEM)")?,
    };
    for (name, address) in &addresses {
        let key = format!("cluster.peer_addresses.{name}");
        NodeName::new(name).map_err(ConfigError::name(key.as_str()))?;
        advertised(&key, address)?;
    }
    let text = listen.as_deref().unwrap_or("127.0.0.1:8445");
    Ok(Some(PeerListener {
        listen: socket_address("cluster.listen", text)?,
        advertise: advertised("cluster.advertise", advertise.as_deref().unwrap_or(text))?,
        addresses,
        tls,
    }))
}

fn api_advertise(given: Option<String>, api: SocketAddr, standalone: bool) -> Result<String, ConfigError> {
    const KEY: &str = "cluster.api_advertise";
    match given {
        Some(text) => advertised(KEY, &text),
        None if standalone && api.ip().is_unspecified() => Ok(format!("127.0.0.1:{}", api.port())),
        None => advertised(KEY, &api.to_string()),
    }
}

impl RaftSection {
    fn resolve(self) -> Result<Raft, ConfigError> {
        let heartbeat = millis("cluster.raft.heartbeat_ms", self.heartbeat_ms, 200, 10..=60_000)?;
        let election_min = millis(
            "cluster.raft.election_min_ms",
            self.election_min_ms,
            800,
            30..=600_000,
        )?;
        let election_max = millis(
            "cluster.raft.election_max_ms",
            self.election_max_ms,
            1200,
            40..=600_000,
        )?;
        if election_min < heartbeat * 3 {
            return Err(ConfigError::invalid(
                "cluster.raft.election_min_ms",
                election_min.as_millis(),
                format!(
                    "is less than three heartbeats (cluster.raft.heartbeat_ms: {})",
                    heartbeat.as_millis()
                ),
                format!(
                    "write at least {}, or shorten the heartbeat",
                    heartbeat.as_millis() * 3
                ),
            ));
        }
        if election_max <= election_min {
            return Err(ConfigError::invalid(
                "cluster.raft.election_max_ms",
                election_max.as_millis(),
                format!(
                    "is not above cluster.raft.election_min_ms ({}), so that candidates would \
                     collide for ever",
                    election_min.as_millis()
                ),
                format!("write {} or more", election_min.as_millis() * 3 / 2),
            ));
        }
        Ok(Raft {
            heartbeat,
            election_min,
            election_max,
            snapshot_every: number(
                "cluster.raft.snapshot_every",
                self.snapshot_every,
                1000,
                10..=10_000_000,
            )?,
            keep_logs: number("cluster.raft.keep_logs", self.keep_logs, 500, 0..=10_000_000)?,
        })
    }
}

impl ReplicationSection {
    fn resolve(self, standalone: bool, env: Env<'_>) -> Result<Replication, ConfigError> {
        let enabled = self.enabled.unwrap_or(true);
        if !enabled && !standalone {
            return Err(ConfigError::invalid(
                "cluster.token_replication.enabled",
                false,
                "would make keys that the other nodes never get",
                "remove it, or write cluster.mode: standalone",
            ));
        }
        let interval = number(
            "cluster.token_replication.interval_seconds",
            self.interval_seconds,
            60,
            1..=86_400,
        )?;
        Ok(Replication {
            enabled,
            interval: Duration::from_secs(interval),
            key: key_source(self.encryption_key_env, self.encryption_key_file, standalone, env)?,
            previous: previous_source(
                self.previous_encryption_key_env,
                self.previous_encryption_key_file,
                env,
            )?,
        })
    }
}

fn key_source(
    variable: Option<String>,
    path: Option<PathBuf>,
    standalone: bool,
    env: Env<'_>,
) -> Result<ReplicationKeySource, ConfigError> {
    const ENV_KEY: &str = "cluster.token_replication.encryption_key_env";
    const FILE_KEY: &str = "cluster.token_replication.encryption_key_file";
    let is_set = |variable: &str| {
        env(variable)
            .map(zeroize::Zeroizing::new)
            .is_some_and(|value| !value.is_empty())
    };
    match (variable, path) {
        (Some(variable), Some(path)) => Err(ConfigError::invalid(
            FILE_KEY,
            path.display(),
            format!("set together with {ENV_KEY} ({variable})"),
            "keep one of them",
        )),
        (None, Some(path)) => Ok(ReplicationKeySource::File {
            key: FILE_KEY.to_owned(),
            path,
        }),
        (given, None) => {
            let explicit = given.is_some();
            let variable = given.unwrap_or_else(|| DEFAULT_REPLICATION_VARIABLE.to_owned());
            if is_set(&variable) {
                Ok(ReplicationKeySource::Env {
                    key: ENV_KEY.to_owned(),
                    variable,
                })
            } else if standalone && !explicit {
                Ok(ReplicationKeySource::DataDir)
            } else {
                Err(ConfigError::UnsetVariable {
                    key: ENV_KEY.to_owned(),
                    variable,
                    alternative: "encryption_key_file",
                })
            }
        }
    }
}

/// The key beside the first one. Most of the time there is none.
fn previous_source(
    variable: Option<String>,
    path: Option<PathBuf>,
    env: Env<'_>,
) -> Result<Option<ReplicationKeySource>, ConfigError> {
    const ENV_KEY: &str = "cluster.token_replication.previous_encryption_key_env";
    const FILE_KEY: &str = "cluster.token_replication.previous_encryption_key_file";
    let is_set = |variable: &str| {
        env(variable)
            .map(zeroize::Zeroizing::new)
            .is_some_and(|value| !value.is_empty())
    };
    let in_environment = |variable: String| ReplicationKeySource::Env {
        key: ENV_KEY.to_owned(),
        variable,
    };
    match (variable, path) {
        (Some(variable), Some(path)) => Err(ConfigError::invalid(
            FILE_KEY,
            path.display(),
            format!("set together with {ENV_KEY} ({variable})"),
            "keep one of them",
        )),
        (None, Some(path)) => Ok(Some(ReplicationKeySource::File {
            key: FILE_KEY.to_owned(),
            path,
        })),
        (Some(variable), None) if is_set(&variable) => Ok(Some(in_environment(variable))),
        (Some(variable), None) => Err(ConfigError::UnsetVariable {
            key: ENV_KEY.to_owned(),
            variable,
            alternative: "previous_encryption_key_file",
        }),
        (None, None) => {
            let variable = PREVIOUS_REPLICATION_VARIABLE.to_owned();
            Ok(is_set(&variable).then(|| in_environment(variable)))
        }
    }
}
