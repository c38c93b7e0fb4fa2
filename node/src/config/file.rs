//! The configuration file as it is written: one struct per section, one field per key, defaults
//! in the doc comments. Nothing here is checked beyond its type; `resolve` methods elsewhere
//! turn it into [`Config`](super::Config).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

/// A section written without a value (`limits:`) is null in YAML and means its defaults.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A key that is accepted because v1 had it, and has no meaning here. Its value is not kept.
#[derive(Default, Clone, Copy)]
pub(crate) struct Ignored(pub(crate) bool);

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        Ok(Self(true))
    }
}

/// A secret written in the file: wiped when dropped, never printed.
pub(crate) struct SecretText(pub(crate) Zeroizing<String>);

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// The whole file.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct File {
    #[serde(deserialize_with = "or_default")]
    pub(crate) server: ServerSection,
    /// Folder of the node's own state. Default `data`.
    pub(crate) data_dir: Option<PathBuf>,
    /// Accept certificates whose CA is marked DEV. Default false.
    pub(crate) dev: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) hsm: HsmSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) acl: AclSection,
    /// Role → who has it; seeds `cluster init`. Default: OU `Admin` is admin.
    pub(crate) roles: Option<BTreeMap<String, Option<Vec<RoleEntry>>>>,
    /// Absent: standalone, a Raft of one.
    pub(crate) cluster: Option<ClusterSection>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) staleness: StalenessSection,
    /// Serve after a restart although no quorum answers. Default false.
    pub(crate) serve_after_restart_without_quorum: bool,
    #[serde(deserialize_with = "or_default")]
    pub(crate) keys: KeysSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) rotation: RotationSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) rate_limit: RateLimitSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) logging: LoggingSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) metrics: MetricsSection,
}

/// `server`: the API listener and the health listener.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ServerSection {
    /// Address of the API. Default `0.0.0.0:8443`.
    pub(crate) listen: Option<String>,
    /// v1's form: the port alone, on all addresses.
    pub(crate) port: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) tls: TlsSection,
    /// Plain HTTP for probes and metrics. Default `127.0.0.1:8444`.
    pub(crate) health_listen: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) http2: Http2Section,
    #[serde(deserialize_with = "or_default")]
    pub(crate) drain: DrainSection,
    /// A member's API lets nobody in before the node is ready, for at most this long. Default 0.
    pub(crate) wait_ready_ms: Option<u64>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) limits: LimitsSection,
    /// Proxies that end TLS for clients. Default: none.
    pub(crate) trusted_proxies: Option<Vec<ProxyEntry>>,
    /// Addresses and networks whose connections begin with a PROXY header. Default: none.
    pub(crate) proxy_protocol_from: Option<Vec<String>>,
}

/// One entry of `server.trusted_proxies`. Both are needed.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ProxyEntry {
    /// What logs call it.
    pub(crate) name: Option<String>,
    /// SHA-256 of its certificate's SPKI, hex.
    pub(crate) spki_sha256: Option<String>,
}

/// `server.tls`: no defaults, except that there is no CA of its own for admins.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TlsSection {
    pub(crate) ca_path: Option<PathBuf>,
    pub(crate) cert_path: Option<PathBuf>,
    pub(crate) key_path: Option<PathBuf>,
    pub(crate) admin_client_ca_path: Option<PathBuf>,
}

/// `server.http2`, as v1 had it. Buffers are fixed here, so that memory stays bounded.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Http2Section {
    /// Streams a client may have open on one connection. Default 250, at most 2000.
    pub(crate) max_concurrent_streams: Option<String>,
    /// Seconds a connection is kept without a request. Default 120.
    pub(crate) idle_timeout_seconds: Option<u64>,
    pub(crate) initial_window_size: Ignored,
    pub(crate) max_frame_size: Ignored,
    pub(crate) max_header_list_size: Ignored,
    pub(crate) max_upload_buffer_per_conn: Ignored,
    pub(crate) max_upload_buffer_per_stream: Ignored,
}

/// `server.drain`: what SIGTERM does.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DrainSection {
    /// `/readyz` says no for this long while requests are still accepted. Default 1000.
    pub(crate) notice_ms: Option<u64>,
    /// Nobody new is let in then, and open connections are kept at most this long. Default 35000.
    pub(crate) timeout_ms: Option<u64>,
    /// Then those at rest are closed, and requests in hand get at most this long. Default 70000.
    pub(crate) finish_ms: Option<u64>,
}

/// `server.limits`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LimitsSection {
    /// Open connections, in which one principal has a part. Default 10000, or less where the process may
    /// not open as many file descriptors.
    pub(crate) max_connections: Option<usize>,
    /// Bytes of a request's body. Default 1048576.
    pub(crate) max_body_bytes: Option<usize>,
    /// How long a request with `X-HSM-Min-Index` waits for that state. Default 1000.
    pub(crate) min_index_wait_ms: Option<u64>,
}

/// `hsm`: tokens. Either `slots`, or v1's single slot.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct HsmSection {
    /// The PKCS#11 module of every slot that names none. Default SoftHSM's place on Debian.
    pub(crate) pkcs11_lib: Option<PathBuf>,
    pub(crate) slots: Option<BTreeMap<String, SlotSection>>,
    /// v1: label of the only token.
    pub(crate) slot_id: Option<String>,
    /// v1: that token's PIN; the variable HSM_PIN goes before it.
    pub(crate) pin: Option<SecretText>,
    /// v1: ask for that token's PIN at start. Default false.
    pub(crate) pin_prompt: bool,
    /// Context → how its ciphertexts are bound. Default `{type: aes, mode: private}`.
    pub(crate) keys: Option<BTreeMap<String, Option<KeySection>>>,
    /// v1: its list of key versions, which are adopted at the first start. Never written. Default `metadata.yaml` in the
    /// working directory, beside `slot_id`.
    pub(crate) metadata_file: Option<PathBuf>,
    /// Versions that `cleanup` keeps. Default 3.
    pub(crate) max_versions: Option<u32>,
    /// Days since retirement before `cleanup` may disable a version. Default 30.
    pub(crate) cleanup_after_days: Option<u32>,
}

/// `hsm.slots.<name>`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SlotSection {
    /// Label of the token.
    pub(crate) label: Option<String>,
    pub(crate) pin_env: Option<String>,
    pub(crate) pin_file: Option<PathBuf>,
    pub(crate) pin_credential: Option<String>,
    /// Ask for the PIN on the terminal at start. Default false.
    pub(crate) pin_prompt: bool,
    pub(crate) contexts: Option<Vec<String>>,
    /// Accept a PIN with less than 128 bits. Default false.
    pub(crate) insecure_pin: bool,
    /// OS threads, each with its own session. Default 1.
    pub(crate) threads: Option<usize>,
    /// Jobs that may wait, each item of a batch as one; at least 1000. Default 1024.
    pub(crate) queue: Option<usize>,
    pub(crate) pkcs11_lib: Option<PathBuf>,
}

/// `hsm.keys.<context>`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct KeySection {
    /// Only `aes`.
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    /// `private` (bound to the CN, the default), `shared` (to the first OU) or `none`.
    pub(crate) mode: Option<String>,
    /// Encryptions under one key version, of all nodes together. Default 4294967296, and never more.
    pub(crate) max_invocations: Option<u64>,
}

/// `acl`: seeds `cluster init`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AclSection {
    /// OU → contexts.
    pub(crate) mappings: Option<BTreeMap<String, Option<Vec<String>>>>,
    /// v1's list of revoked common names; entries are only ever added to the cluster's.
    pub(crate) revoked_file: Option<PathBuf>,
    /// Between looks at `revoked_file` while the node runs. Default 30000, as in v1.
    pub(crate) revoked_check_interval_ms: Option<u64>,
}

/// One entry of `roles.<role>`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RoleEntry {
    pub(crate) ou: Option<String>,
    pub(crate) cn: Option<String>,
    /// Issuer's name in RFC 4514 form. Default: subject of the admin CA, else of the client CA.
    pub(crate) issuer: Option<String>,
    /// SHA-256 of the certificate's SPKI, hex.
    pub(crate) spki_sha256: Option<String>,
}

/// `cluster`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClusterSection {
    /// Default true where the section exists.
    pub(crate) enabled: Option<bool>,
    /// `standalone`, `active-passive` or `active-active` (the default).
    pub(crate) mode: Option<String>,
    pub(crate) node_id: Option<String>,
    /// First part of every node's identity. Default `hsm`.
    pub(crate) name: Option<String>,
    /// Default `127.0.0.1:8445`.
    pub(crate) listen: Option<String>,
    /// Where peers find this node. Default: `listen`.
    pub(crate) advertise: Option<String>,
    /// Addresses this node uses for some peers instead of the advertised ones, by node_id.
    #[serde(deserialize_with = "or_default")]
    pub(crate) peer_addresses: BTreeMap<String, String>,
    /// Where clients find this node's API. Default: `server.listen`.
    pub(crate) api_advertise: Option<String>,
    pub(crate) tls: Option<ClusterTlsSection>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) coordination: CoordinationSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) raft: RaftSection,
    #[serde(deserialize_with = "or_default")]
    pub(crate) token_replication: ReplicationSection,
    /// Silence after which a member may be left out of a rotation. Default 8000.
    pub(crate) fence_after_ms: Option<u64>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) autopilot: AutopilotSection,
}

/// `cluster.autopilot`: what a leader does by itself about voters that are dead.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct AutopilotSection {
    /// Silence after which a voter is taken out. Default: never.
    pub(crate) remove_dead_after_seconds: Option<u64>,
    /// Voters that are heard and have to remain then. Default 3.
    pub(crate) min_voters: Option<usize>,
}

/// `cluster.tls`: the cluster's own CA, never the clients'.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClusterTlsSection {
    pub(crate) ca_path: Option<PathBuf>,
    pub(crate) cert_path: Option<PathBuf>,
    pub(crate) key_path: Option<PathBuf>,
}

/// `cluster.coordination`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CoordinationSection {
    /// Only `raft`.
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    /// Known so that a file of the earlier plan is refused for its `type`, with the reason.
    pub(crate) endpoints: Ignored,
}

/// `cluster.raft`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RaftSection {
    /// Default 200.
    pub(crate) heartbeat_ms: Option<u64>,
    /// Default 800; at least three heartbeats.
    pub(crate) election_min_ms: Option<u64>,
    /// Default 1200.
    pub(crate) election_max_ms: Option<u64>,
    /// Log entries between snapshots. Default 1000.
    pub(crate) snapshot_every: Option<u64>,
    /// Log entries kept behind a snapshot for slow followers. Default 500.
    pub(crate) keep_logs: Option<u64>,
}

/// `cluster.token_replication`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ReplicationSection {
    /// Default true.
    pub(crate) enabled: Option<bool>,
    /// Seconds between full comparisons of token and state. Default 60.
    pub(crate) interval_seconds: Option<u64>,
    /// Default `TOKEN_REPLICATION_KEY`.
    pub(crate) encryption_key_env: Option<String>,
    pub(crate) encryption_key_file: Option<PathBuf>,
    /// The key beside it while it is replaced. Default `TOKEN_REPLICATION_KEY_PREVIOUS`, if that is set.
    pub(crate) previous_encryption_key_env: Option<String>,
    pub(crate) previous_encryption_key_file: Option<PathBuf>,
}

/// `staleness`, in milliseconds since a leader with a quorum was last heard of.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct StalenessSection {
    /// Beyond it `/readyz` says no. Default 5000.
    pub(crate) ready_ms: Option<u64>,
    /// Beyond it nothing is encrypted. Default 60000.
    pub(crate) encrypt_ms: Option<u64>,
    /// Beyond it nothing is decrypted. Default 300000.
    pub(crate) decrypt_ms: Option<u64>,
}

/// `keys`: what becomes of key versions.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct KeysSection {
    #[serde(deserialize_with = "or_default")]
    pub(crate) destroy: DestroySection,
}

/// `keys.destroy`. The leader's values count.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DestroySection {
    /// How long a destruction can be undone, unless it is said. Default 168.
    pub(crate) default_wait_hours: Option<u64>,
    /// The shortest wait. Default 24.
    pub(crate) min_wait_hours: Option<u64>,
    /// In its place, with `dev: true` only.
    pub(crate) min_wait_seconds: Option<u64>,
    /// A version that was used within so many days is destroyed only by an override. Default 7.
    pub(crate) recent_use_days: Option<u32>,
}

/// `rotation`: by age. The leader's values count.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RotationSection {
    /// Whether this node rotates by age while it leads. Default true.
    pub(crate) enabled: Option<bool>,
    /// Days after activation at which a new version of a new context is due; 0 = never. Default 90.
    pub(crate) interval_days: Option<u32>,
    /// Between two looks at what is due. Default 60.
    pub(crate) check_interval_seconds: Option<u64>,
    /// Length of a day in milliseconds, with `dev: true` only. Default 86400000.
    pub(crate) day_ms: Option<u64>,
}

/// `rate_limit`, per principal.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RateLimitSection {
    /// Default 50000.
    pub(crate) requests_per_second: Option<u32>,
    /// Default 5000.
    pub(crate) burst: Option<u32>,
}

/// `logging`: to standard error, and to files where paths are given. The keys are version 1's.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LoggingSection {
    /// `error`, `warn`, `info` (default), `debug`, `trace`, or a filter such as `info,hsm_node=debug`.
    pub(crate) level: Option<String>,
    /// `json` (default) or `text`.
    pub(crate) format: Option<String>,
    /// File of everything that is neither of the audit nor a line of a request. Default: standard error.
    pub(crate) error_path: Option<PathBuf>,
    /// File of the audit. Default: standard error.
    pub(crate) audit_path: Option<PathBuf>,
    /// File with a line for each request. Default: none is written.
    pub(crate) access_path: Option<PathBuf>,
    /// Mebibytes of a file before it is put aside. Default 100.
    pub(crate) max_size_mb: Option<u64>,
    /// Files put aside that are kept. Default 10.
    pub(crate) max_backups: Option<u64>,
    /// Days for which they are kept. Default 30.
    pub(crate) max_age_days: Option<u64>,
    /// Compress them (gzip). Default true.
    pub(crate) compress: Option<bool>,
    /// What goes to `error_path` goes to standard output too. Default true beside `error_path`.
    pub(crate) error_to_stdout: Option<bool>,
    /// What goes to `audit_path` goes to standard output too. Default true beside `audit_path`.
    pub(crate) audit_to_stdout: Option<bool>,
    /// What goes to `access_path` goes to standard output too. Default true beside `access_path`.
    pub(crate) access_to_stdout: Option<bool>,
    /// At level `debug` what goes to `audit_path` goes where `error_path` goes too. Default true.
    pub(crate) audit_mirror_to_error_on_debug: Option<bool>,
}

/// `metrics`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct MetricsSection {
    /// v1's label: count requests and rate limit hits by the client's common name. Default false.
    pub(crate) client_cn: bool,
}

impl File {
    /// Keys that were given and have no effect, with the reason, for one line each in the log.
    pub(crate) fn ignored(&self) -> Vec<String> {
        let http2 = &self.server.http2;
        let bounded = "buffers have a fixed size, so that memory stays bounded";
        let coordination = self.cluster.as_ref().map(|c| c.coordination.endpoints);
        let keys = [
            (
                "server.http2.initial_window_size",
                http2.initial_window_size,
                bounded,
            ),
            ("server.http2.max_frame_size", http2.max_frame_size, bounded),
            (
                "server.http2.max_header_list_size",
                http2.max_header_list_size,
                bounded,
            ),
            (
                "server.http2.max_upload_buffer_per_conn",
                http2.max_upload_buffer_per_conn,
                bounded,
            ),
            (
                "server.http2.max_upload_buffer_per_stream",
                http2.max_upload_buffer_per_stream,
                bounded,
            ),
            (
                "cluster.coordination.endpoints",
                coordination.unwrap_or_default(),
                "Raft is built in",
            ),
        ];
        keys.into_iter()
            .filter(|(_, given, _)| given.0)
            .map(|(key, _, why)| format!("{key}: {why}"))
            .collect()
    }
}
