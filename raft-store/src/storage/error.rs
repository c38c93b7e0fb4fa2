//! Why a store cannot be opened, or stopped working.

use std::io;
use std::path::PathBuf;

/// A failure of a running store. It is final: the process must exit.
#[derive(Debug, thiserror::Error)]
pub enum StoreFailure {
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// sled refused.
    #[error("sled: {what}: {source}")]
    Sled {
        /// What was being done.
        what: String,
        /// The cause.
        #[source]
        source: sled::Error,
    },
    /// Stored bytes are not what was written.
    #[error("stored data is damaged: {0}")]
    Damaged(String),
    /// An earlier failure stopped the store.
    #[error("the store has stopped after an earlier failure")]
    Stopped,
}

impl StoreFailure {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn sled(what: &str) -> impl FnOnce(sled::Error) -> Self {
        let what = what.to_string();
        move |source| Self::Sled { what, source }
    }
}

impl From<StoreFailure> for io::Error {
    fn from(failure: StoreFailure) -> Self {
        match failure {
            StoreFailure::Io { what, source } => io::Error::new(source.kind(), format!("{what}: {source}")),
            other => io::Error::other(other.to_string()),
        }
    }
}

/// What to do with a node whose store is refused. Said with every refusal.
const REMEDY: &str = "this node cannot go on with this data directory: keep it, and join a new node under a \
     new node_id with an empty directory; the old one stays listed, because members cannot be removed yet \
     (docs/operations.md, \"A store that is refused\")";

/// Why a store was refused at open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("data_dir {0}: another process uses it; stop that one first")]
    InUse(PathBuf),
    /// The operating system or sled refused.
    #[error("data_dir {dir}: {failure}")]
    Failure {
        /// The data directory.
        dir: PathBuf,
        /// The cause.
        #[source]
        failure: StoreFailure,
    },
    /// sled panicked while opening.
    #[error("data_dir {dir}: sled could not read its files: {message}; {REMEDY}")]
    SledPanic {
        /// The data directory.
        dir: PathBuf,
        /// The panic's message.
        message: String,
    },
    /// Something acknowledged is missing.
    #[error("data_dir {dir}: {what}; {REMEDY}")]
    Lost {
        /// The data directory.
        dir: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The directory belongs to another node.
    #[error("data_dir {dir}: it belongs to node_id {found:?}, the configuration says {expected:?}")]
    OtherNode {
        /// The data directory.
        dir: PathBuf,
        /// The name in `control`.
        found: String,
        /// The configured name.
        expected: String,
    },
    /// The node was removed or rolled back and must not run again.
    #[error("data_dir {dir}: this node may not run again: {reason}; {REMEDY}")]
    Poisoned {
        /// The data directory.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
}
