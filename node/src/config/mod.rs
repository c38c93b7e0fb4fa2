//! The node's configuration: one YAML file and v1's environment variables, checked once at
//! start. An unknown key is an error with a suggestion, never silence, and no message may hold
//! a secret.

mod access;
mod cluster;
mod env;
mod error;
mod file;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod hsm;
mod keys;
mod logging;
mod pin;
mod proxies;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hsm_api::suggest;
use raft_store::state::context::RotationPolicy;
use raft_store::state::lease::MAX_INVOCATIONS;
use zeroize::Zeroizing;

pub use self::access::{Acl, RevokedEntry, RoleSeed, check_issuers, parse_revoked, read_revoked};
pub use self::cluster::{
    Autopilot, Cluster, DEFAULT_REPLICATION_VARIABLE, Mode, PREVIOUS_REPLICATION_VARIABLE, PeerListener,
    PeerTlsFiles, Raft, Replication, ReplicationKeySource,
};
pub use self::env::Env;
pub use self::error::ConfigError;
pub use self::hsm::{Hsm, Slot};
pub use self::keys::{DAY, Destroy, Rotation};
pub use self::logging::{LogFormat, LogRotation, LogStream, Logging};
pub use self::pin::PinSource;
pub use self::proxies::{Network, Proxies, TrustedProxy};
pub use self::server::{ApiTlsFiles, Drain, Http2, Limits, Server};
pub(crate) use hsm_api::suggest::nearest;

pub use raft_store::names::{ContextName, NodeName, SlotName};

use self::file::{File, RateLimitSection, StalenessSection};
use self::server::{millis, number};

/// Everything the node needs to know to start. Paths are relative to the working directory, as
/// in v1.
#[derive(Debug, Clone)]
pub struct Config {
    /// Listeners of clients and probes.
    pub server: Server,
    /// Folder of the node's own state.
    pub data_dir: PathBuf,
    /// Accept certificates whose CA is marked DEV.
    pub dev: bool,
    /// Tokens.
    pub hsm: Hsm,
    /// Who may use which context; seeds `cluster init`.
    pub acl: Acl,
    /// Who may administer; seeds `cluster init`.
    pub roles: Vec<RoleSeed>,
    /// Nobody has written `roles`: they are the default.
    pub roles_by_default: bool,
    /// This node's place in its cluster.
    pub cluster: Cluster,
    /// How long a node serves without hearing of a quorum.
    pub staleness: Staleness,
    /// Serve after a restart although no quorum answers.
    pub serve_after_restart_without_quorum: bool,
    /// What destroying a key version takes.
    pub destroy: Destroy,
    /// When versions are replaced by age.
    pub rotation: Rotation,
    /// Per principal.
    pub rate_limit: RateLimit,
    /// The log.
    pub logging: Logging,
    /// Count requests by the common names of their clients.
    pub client_metrics: bool,
    /// Keys that were given and have no effect, with the reason; to be logged once.
    pub ignored: Vec<String>,
    /// Settings that are allowed and unwise; to be logged once.
    pub warnings: Vec<String>,
}

/// Bounds on the time since a leader with a quorum was last heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staleness {
    /// Beyond it the node is not ready.
    pub ready: Duration,
    /// Beyond it nothing is encrypted.
    pub encrypt: Duration,
    /// Beyond it nothing is decrypted.
    pub decrypt: Duration,
}

/// Requests of one principal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Sustained rate.
    pub requests_per_second: NonZeroU32,
    /// At once.
    pub burst: NonZeroU32,
}

/// The policy of a new context, which may have a limit of invocations of its own.
#[must_use]
pub fn policy_of(
    policy: &RotationPolicy,
    max_invocations: &BTreeMap<ContextName, u64>,
    context: &ContextName,
) -> RotationPolicy {
    RotationPolicy {
        max_invocations: max_invocations
            .get(context)
            .copied()
            .unwrap_or(policy.max_invocations),
        ..policy.clone()
    }
}

/// Options of every YAML file: errors must not quote the text around them, which may be a PIN.
pub(crate) fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! { with_snippet: false }
}

impl Config {
    /// The rotation and retention that a new context is made with.
    #[must_use]
    pub fn rotation_policy(&self) -> RotationPolicy {
        RotationPolicy {
            interval_days: self.rotation.interval_days,
            max_versions: self.hsm.max_versions,
            cleanup_after_days: self.hsm.cleanup_after_days,
            max_invocations: MAX_INVOCATIONS,
        }
    }

    /// As [`Self::rotation_policy`], of this context.
    #[must_use]
    pub fn policy_of(&self, context: &ContextName) -> RotationPolicy {
        policy_of(&self.rotation_policy(), &self.hsm.max_invocations, context)
    }

    /// Reads and checks a file, with the process's environment.
    ///
    /// # Errors
    /// The first thing that is wrong, naming key, value and remedy.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |reason| ConfigError::Unreadable {
            path: path.to_owned(),
            reason,
        };
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(unreadable)?);
        let mode = {
            use std::os::unix::fs::PermissionsExt;
            std::fs::metadata(path).map_err(unreadable)?.permissions().mode() & 0o7777
        };
        Self::parse(&text, path, Some(mode), &env::process_env)
    }

    /// Checks the text of a file at `path` with permission bits `mode`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path, mode: Option<u32>, env: Env<'_>) -> Result<Self, ConfigError> {
        let file = read(text, path)?;
        let mut ignored = file.ignored();
        let mut warnings = Vec::new();
        ignored.extend(file.server.http2.cut());
        let server = file.server.resolve(env)?;
        let acl = file.acl.resolve()?;
        let acl_contexts: BTreeSet<String> =
            acl.mappings.values().flatten().map(ToString::to_string).collect();
        let around = hsm::Surroundings {
            env,
            file: path,
            mode,
            acl_contexts: &acl_contexts,
        };
        let hsm = file.hsm.resolve(&around, &mut warnings)?;
        let cluster = cluster::resolve(file.cluster, server.listen, env)?;
        check_addresses(&server, &cluster)?;
        let staleness = file.staleness.resolve(&cluster)?;
        let destroy = file.keys.destroy.resolve(file.dev)?;
        if !file.dev {
            check_wait(&destroy, &cluster, &staleness)?;
        }
        let logging = file.logging.resolve(env, &mut ignored)?;
        Ok(Self {
            server,
            data_dir: data_dir(file.data_dir),
            dev: file.dev,
            hsm,
            acl,
            roles_by_default: file.roles.is_none(),
            roles: access::roles(file.roles)?,
            cluster,
            staleness,
            serve_after_restart_without_quorum: file.serve_after_restart_without_quorum,
            destroy,
            rotation: file.rotation.resolve(file.dev)?,
            rate_limit: file.rate_limit.resolve()?,
            logging,
            client_metrics: file.metrics.client_cn,
            ignored,
            warnings,
        })
    }
}

/// What work on the directory of a stopped node needs to know: no secret, and no variable but the log's.
#[derive(Debug, Clone)]
pub struct Place {
    /// Folder of the node's own state.
    pub data_dir: PathBuf,
    /// Whose it has to be.
    pub node_id: NodeName,
    /// The log, on standard error: its files are the node's.
    pub logging: Logging,
}

impl Place {
    /// Reads a file. Its keys are all checked, but only these values.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map(Zeroizing::new);
        let text = text.map_err(|reason| ConfigError::Unreadable {
            path: path.to_owned(),
            reason,
        })?;
        Self::parse(&text, path, &env::process_env)
    }

    /// Checks the text of a file at `path`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path, env: Env<'_>) -> Result<Self, ConfigError> {
        let file = read(text, path)?;
        let (_, node_id) = cluster::mode_and_name(file.cluster.as_ref())?;
        let logging = file.logging.resolve(env, &mut Vec::new())?;
        Ok(Self {
            data_dir: data_dir(file.data_dir),
            node_id,
            logging: logging.on_standard_error(),
        })
    }
}

fn data_dir(given: Option<PathBuf>) -> PathBuf {
    given.unwrap_or_else(|| PathBuf::from("data"))
}

fn read(text: &str, path: &Path) -> Result<File, ConfigError> {
    let mut failure = None;
    let parsed =
        serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), |deserializer| {
            serde_path_to_error::deserialize::<_, File>(deserializer).map_err(|error| {
                let key = key_path(error.path());
                let inner = error.into_inner();
                failure = refused(key, inner.without_snippet());
                inner
            })
        });
    parsed.map_err(|error| {
        failure.unwrap_or_else(|| ConfigError::Syntax {
            path: path.to_owned(),
            problem: error.to_string(),
        })
    })
}

fn line_of(error: &serde_saphyr::Error) -> u64 {
    error.location().map_or(0, |location| location.line())
}

/// `hsm.slots.exchange.pin_env`, `roles.admin[0].ou`.
fn key_path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut out = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => out.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    out
}

/// What the parser refused, if it was a key or a value and not the YAML itself.
fn refused(key: String, error: &serde_saphyr::Error) -> Option<ConfigError> {
    use serde_saphyr::Error;
    let line = line_of(error);
    match error {
        Error::SerdeUnknownField { field, expected, .. } => {
            // The path ends either in the field or in the section that holds it.
            let is_complete = key == *field || key.ends_with(&format!(".{field}"));
            let key = match (is_complete, key.is_empty()) {
                (true, _) => key,
                (false, true) => field.clone(),
                (false, false) => format!("{key}.{field}"),
            };
            let hint = suggest::nearest(field, expected.iter().copied()).map_or_else(
                || format!("; known here: {}", expected.join(", ")),
                |word| format!("; did you mean {word}?"),
            );
            Some(ConfigError::UnknownKey { key, line, hint })
        }
        _ if key.is_empty() => None,
        other => Some(ConfigError::WrongType {
            key,
            problem: other.to_string(),
        }),
    }
}

fn check_addresses(server: &Server, cluster: &Cluster) -> Result<(), ConfigError> {
    let Some(peer) = &cluster.peer else { return Ok(()) };
    let taken = [
        (server.listen, server.listen_key),
        (server.health_listen, "server.health_listen"),
    ];
    match taken
        .iter()
        .find(|(address, _)| *address == peer.listen && address.port() != 0)
    {
        None => Ok(()),
        Some((_, other)) => Err(ConfigError::invalid(
            "cluster.listen",
            peer.listen,
            format!("is the address of {other} too"),
            "give peers a port of their own, such as 8445",
        )),
    }
}

impl StalenessSection {
    fn resolve(self, cluster: &Cluster) -> Result<Staleness, ConfigError> {
        let most = 0..=86_400_000;
        let staleness = Staleness {
            ready: millis("staleness.ready_ms", self.ready_ms, 5000, 100..=600_000)?,
            encrypt: millis("staleness.encrypt_ms", self.encrypt_ms, 60_000, most.clone())?,
            decrypt: millis("staleness.decrypt_ms", self.decrypt_ms, 300_000, most)?,
        };
        check_fence(cluster, &staleness)?;
        for (key, bound) in [
            ("staleness.encrypt_ms", staleness.encrypt),
            ("staleness.decrypt_ms", staleness.decrypt),
        ] {
            if bound < staleness.ready {
                return Err(ConfigError::invalid(
                    key,
                    bound.as_millis(),
                    "is below staleness.ready_ms: a ready node would refuse requests",
                    format!("write at least {}", staleness.ready.as_millis()),
                ));
            }
        }
        Ok(staleness)
    }
}

/// A node that is cut off goes on encrypting for its bound under a version that the others may have retired: what it
/// encrypts then must not be destroyed before it has heard of it.
fn check_wait(destroy: &Destroy, cluster: &Cluster, staleness: &Staleness) -> Result<(), ConfigError> {
    let least = staleness.encrypt + cluster.fence_after;
    if cluster.mode == Mode::Standalone || destroy.min_wait >= least {
        return Ok(());
    }
    Err(ConfigError::invalid(
        "keys.destroy.min_wait_hours",
        destroy.min_wait.as_secs() / 3600,
        format!(
            "is below staleness.encrypt_ms ({}) + cluster.fence_after_ms ({}): a node that is cut off could still \
             encrypt under a version that is destroyed",
            staleness.encrypt.as_millis(),
            cluster.fence_after.as_millis()
        ),
        format!("write at least {}", least.as_secs().div_ceil(3600)),
    ))
}

/// A member that is left out of a rotation must have left readiness before. It counts from the last frame that
/// it read, and a frame may have waited on its way for as long as its leader went on without an answer and the
/// member without an election: its own lease each, and a tick.
fn check_fence(cluster: &Cluster, staleness: &Staleness) -> Result<(), ConfigError> {
    if cluster.mode == Mode::Standalone {
        return Ok(());
    }
    let raft = cluster.raft;
    let least = staleness.ready + raft.election_max * 2 + raft.heartbeat * 3 / 2;
    if cluster.fence_after >= least {
        return Ok(());
    }
    Err(ConfigError::invalid(
        "cluster.fence_after_ms",
        cluster.fence_after.as_millis(),
        format!(
            "is below staleness.ready_ms ({}) + 2 × cluster.raft.election_max_ms ({}) + 1.5 × \
             cluster.raft.heartbeat_ms ({}): a node could still serve when it is left out of a rotation",
            staleness.ready.as_millis(),
            raft.election_max.as_millis(),
            raft.heartbeat.as_millis()
        ),
        format!("write at least {}, or shorten one of these", least.as_millis()),
    ))
}

impl RateLimitSection {
    fn resolve(self) -> Result<RateLimit, ConfigError> {
        let at_least_one = |key: &str, value, default| -> Result<NonZeroU32, ConfigError> {
            let value: u32 = number(key, value, default, 1..=10_000_000)?;
            Ok(NonZeroU32::new(value).unwrap_or(NonZeroU32::MIN))
        };
        Ok(RateLimit {
            requests_per_second: at_least_one(
                "rate_limit.requests_per_second",
                self.requests_per_second,
                50_000,
            )?,
            burst: at_least_one("rate_limit.burst", self.burst, 5000)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
