//! Why a store cannot be opened, or stopped working.

use std::io;
use std::path::{Path, PathBuf};

use crate::codec::CodecError;
use crate::state::table::LoadError;

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
    /// Stored bytes are what was written, and this release does not know it.
    #[error("{0}: written by a newer release: start that release")]
    Newer(String),
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

    /// Whether another process has sled's file. sled locks it too, and gives the lock back a moment after it is dropped.
    pub(super) fn is_sleds_lock(&self) -> bool {
        matches!(
            self,
            Self::Sled { source: sled::Error::Io(source), .. }
                if source.to_string().contains("could not acquire lock")
        )
    }

    /// Whether sled's files are not as sled left them, rather than that they could not be read just now. Of its
    /// I/O errors that is what reading past the end, at a senseless place, or of a file that nothing wrote gives.
    fn is_loss(&self) -> bool {
        use io::ErrorKind::{InvalidData, InvalidInput, NotFound, UnexpectedEof};
        match self {
            Self::Sled {
                source: sled::Error::Io(source),
                ..
            } => matches!(
                source.kind(),
                InvalidData | InvalidInput | NotFound | UnexpectedEof
            ),
            Self::Sled { .. } => true,
            _ => false,
        }
    }
}

impl From<LoadError> for StoreFailure {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Damaged(what) => Self::Damaged(what),
            LoadError::Newer(what) => Self::Newer(what),
        }
    }
}

impl From<CodecError> for StoreFailure {
    fn from(error: CodecError) -> Self {
        LoadError::from(error).into()
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
     new node_id with an empty directory, or under the same one once `hsmctl cluster remove` has removed the old node \
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
    /// Nobody has ever run there: maintenance has nothing to do, and must not make anything.
    #[error("data_dir {0}: no node has run there; name the configuration of a node that has")]
    Unused(PathBuf),
    /// Something acknowledged is missing.
    #[error("data_dir {dir}: {what}; {REMEDY}")]
    Lost {
        /// The data directory.
        dir: PathBuf,
        /// What is missing.
        what: String,
    },
    /// Nothing is wrong with it, but with this release.
    #[error("data_dir {dir}: {what}: written by a newer release: start that release")]
    Newer {
        /// The data directory.
        dir: PathBuf,
        /// What this release does not know.
        what: String,
    },
    /// The directory belongs to another node.
    #[error(
        "data_dir {dir}: it belongs to node_id {found:?}, the configuration says {expected:?}; correct cluster.node_id, \
         or give this node a data_dir of its own"
    )]
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

impl OpenError {
    pub(super) fn lost(dir: &Path, what: impl Into<String>) -> Self {
        let (dir, what) = (dir.to_path_buf(), what.into());
        Self::Lost { dir, what }
    }

    /// The refusal that a failure comes to while a store is opened.
    pub(super) fn of(dir: &Path, failure: StoreFailure) -> Self {
        let dir = dir.to_path_buf();
        match failure {
            StoreFailure::Damaged(what) => Self::Lost { dir, what },
            StoreFailure::Newer(what) => Self::Newer { dir, what },
            failure if failure.is_sleds_lock() => Self::InUse(dir),
            failure if failure.is_loss() => {
                let what = failure.to_string();
                Self::Lost { dir, what }
            }
            failure => Self::Failure { dir, failure },
        }
    }

    /// With what sled said about it, which is often more than the error or panic that it ended in.
    pub(super) fn with_words_of_sled(mut self, said: &[String]) -> Self {
        if let Self::Lost { what, .. } | Self::SledPanic { message: what, .. } = &mut self
            && !said.is_empty()
        {
            *what = format!("{what} (sled said: {})", said.join("; "));
        }
        self
    }

    /// On a file system without room: what looks like damage may be what could not be written just now, and there is
    /// nothing to replace before somebody has looked again.
    pub(super) fn without_room(mut self) -> Self {
        if let Self::Lost { what, .. } | Self::SledPanic { message: what, .. } = &mut self {
            *what = format!(
                "{what} (the file system has no room left: make some and start again before anything else)"
            );
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sled_io(kind: io::ErrorKind) -> String {
        let source = sled::Error::Io(kind.into());
        let what = "read".into();
        OpenError::of(Path::new("/d"), StoreFailure::Sled { what, source }).to_string()
    }

    #[test]
    fn what_a_cut_file_gives_is_a_loss_with_its_remedy_and_a_permission_is_not() {
        let cut = sled_io(io::ErrorKind::UnexpectedEof);
        assert!(cut.contains("data_dir /d") && cut.contains(REMEDY), "{cut}");
        let shut = sled_io(io::ErrorKind::PermissionDenied);
        assert!(shut.contains("data_dir /d") && !shut.contains(REMEDY), "{shut}");
        let damaged = StoreFailure::Sled {
            what: "open".into(),
            source: sled::Error::ReportableBug("a bug".into()),
        };
        let refused = OpenError::of(Path::new("/d"), damaged).to_string();
        assert!(refused.contains("a bug") && refused.contains(REMEDY), "{refused}");
    }

    #[test]
    fn what_a_newer_release_wrote_is_not_called_damaged() {
        let refused = OpenError::of(Path::new("/d"), StoreFailure::Newer("a slot row".into())).to_string();
        assert_eq!(
            refused,
            "data_dir /d: a slot row: written by a newer release: start that release"
        );
    }

    #[test]
    fn without_room_nothing_is_replaced_before_there_is_some() {
        let lost = OpenError::lost(Path::new("/d"), "gone")
            .without_room()
            .to_string();
        assert!(
            lost.starts_with(
                "data_dir /d: gone (the file system has no room left: make some and start again"
            ),
            "{lost}"
        );
        let full = sled_io(io::ErrorKind::StorageFull);
        assert!(!full.contains(REMEDY), "{full}");
    }

    #[test]
    fn a_refusal_tells_what_sled_said() {
        let lost = OpenError::lost(Path::new("/d"), "gone").with_words_of_sled(&["crc".into(), "lsn".into()]);
        assert!(
            lost.to_string()
                .starts_with("data_dir /d: gone (sled said: crc; lsn); ")
        );
    }
}
