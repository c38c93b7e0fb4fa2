//! Why a node does not start, and the exit code that tells a supervisor whether to try again.

use raft_store::storage::{LogHookTaken, RecoverError};

use super::maintenance;
use crate::config::ConfigError;
use crate::consensus::StartError;
use crate::http::ListenError;
use crate::logging::LoggingError;
use crate::metrics::MetricsError;
use crate::secrets::SecretError;
use crate::slots::SlotStartError;
use crate::tls::TlsError;

/// Store or Raft have stopped; a restart may help (`EX_SOFTWARE`).
pub(super) const FATAL: u8 = 70;
/// A PIN was refused: list it in `RestartPreventExitStatus`, or a supervisor locks the token (`EX_NOPERM`).
const PIN: u8 = 77;
/// The configuration or what it names must be corrected first (`EX_CONFIG`).
const CONFIG: u8 = 78;

/// See the module. Every message names key, value and remedy.
#[derive(Debug, thiserror::Error)]
pub enum StartFailure {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The log.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// A PIN or the replication key.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The replication key is not the cluster's.
    #[error("{0}")]
    ReplicationKey(String),
    /// The cluster certificate's key.
    #[error("cluster.tls.key_path: {0}")]
    Signer(String),
    /// A token.
    #[error(transparent)]
    Slot(#[from] SlotStartError),
    /// An address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Store or Raft.
    #[error(transparent)]
    Consensus(#[from] StartError),
    /// What sled logs would go unheard.
    #[error(transparent)]
    LogHook(#[from] LogHookTaken),
    /// Metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A thread or runtime.
    #[error("the operating system refuses a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The cluster of one could not be founded.
    #[error("a standalone node founds its own cluster at the first start: {0}")]
    Found(String),
    /// Keys of version 1 that cannot be adopted.
    #[error("hsm.metadata_file: {0}")]
    V1Keys(String),
    /// Keys of version 1 that were not adopted this time; a restart goes on.
    #[error("hsm.metadata_file: the keys of version 1 are not all adopted yet: {0}; the next start goes on")]
    Adopting(String),
    /// It ran, and was removed from its cluster.
    #[error(
        "{0}; its tokens still hold the cluster's keys: erase them, or keep them for as long as what they opened is worth \
         anything; to join again, begin with an empty data_dir (docs/operations.md, \"Removing a node\")"
    )]
    Removed(String),
    /// There is no quorum to recover here.
    #[error("recover-quorum: {0}")]
    Recover(#[from] RecoverError),
    /// Nobody has said that it is meant.
    #[error(
        "recover-quorum loses every change that this node's log does not have, and ends the epoch of all other nodes for \
         good; look at it with --dry-run, and if it is meant, say --confirm {0}"
    )]
    Unconfirmed(String),
    /// A fail point that is none.
    #[cfg(feature = "failpoints")]
    #[error("{0}")]
    Failpoints(String),
}

impl StartFailure {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            StartFailure::Slot(error) if error.about_pin => PIN,
            StartFailure::Consensus(StartError::Listen(_)) => CONFIG,
            StartFailure::Recover(error) if maintenance::is_fatal(error) => FATAL,
            StartFailure::Consensus(_)
            | StartFailure::Thread(_)
            | StartFailure::LogHook(_)
            | StartFailure::Metrics(_)
            | StartFailure::Adopting(_)
            | StartFailure::Found(_) => FATAL,
            _ => CONFIG,
        }
    }
}
