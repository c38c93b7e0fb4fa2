//! Everything that can be wrong with a configuration, in one enum. Each message names the key,
//! the value where it is no secret, and the remedy.

use std::path::PathBuf;

use raft_store::names::InvalidName;

/// Why the node does not start with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself cannot be read.
    #[error("config: {path}: cannot be read: {reason}; give a readable file with --config")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// The file is not YAML of the expected kind.
    #[error("config: {path}: {problem}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser found, and where.
        problem: String,
    },
    /// A key nobody reads. Silence here would mean a setting that has no effect.
    #[error("config: {key}: unknown key (line {line}){hint}")]
    UnknownKey {
        /// Full path of the key.
        key: String,
        /// Line, from 1; 0 when unknown.
        line: u64,
        /// `; did you mean …?` or the list of known keys.
        hint: String,
    },
    /// A value of the wrong type.
    #[error("config: {key}: {problem}")]
    WrongType {
        /// Full path of the key.
        key: String,
        /// What was found, what was expected, and where.
        problem: String,
    },
    /// A key that has no default is absent.
    #[error("config: {key}: is not set; {remedy}")]
    Missing {
        /// Full path of the key.
        key: String,
        /// What to write.
        remedy: String,
    },
    /// A value of the right type that cannot be used.
    #[error("config: {key}: {value}: {problem}; {remedy}")]
    Invalid {
        /// Full path of the key.
        key: String,
        /// The value; never a secret.
        value: String,
        /// Why it cannot be used.
        problem: String,
        /// What to write instead.
        remedy: String,
    },
    /// Something named with characters or a length that are not allowed.
    #[error("config: {key}: {source}")]
    Name {
        /// Full path of the key.
        key: String,
        /// Which name and why.
        source: InvalidName,
    },
    /// A secret is to come from an environment variable that does not exist or is empty.
    #[error("config: {key}: environment variable {variable} is not set; export it, or use {alternative}")]
    UnsetVariable {
        /// Full path of the key that names the variable.
        key: String,
        /// The variable.
        variable: String,
        /// The keys that could name a better source.
        alternative: &'static str,
    },
    /// Two slots claim one context: which of them would encrypt is undefined.
    #[error(
        "config: hsm.slots.{second}.contexts: context {context} already belongs to \
         hsm.slots.{first}; name it in one slot only"
    )]
    ContextInTwoSlots {
        /// The context.
        context: String,
        /// The slot that has it.
        first: String,
        /// The slot that claims it too.
        second: String,
    },
    /// Legacy single-slot mode and multi-slot mode together.
    #[error(
        "config: hsm.slot_id: {value}: set together with hsm.slots; keep hsm.slots and remove \
         hsm.slot_id (and the variable HSM_SLOT_ID), or keep hsm.slot_id alone"
    )]
    TwoSlotModes {
        /// The token label of the legacy mode.
        value: String,
    },
    /// An external coordinator, as earlier plans had it.
    #[error(
        "config: cluster.coordination.type: {value}: every node has Raft built in and needs no \
         external coordinator, whose outage would stop the cluster; write `type: raft` and remove \
         `endpoints`"
    )]
    Coordination {
        /// `etcd` or `consul`.
        value: String,
    },
    /// A PIN stands in a file that others can read.
    #[error(
        "config: hsm.pin: {path} has mode {mode:04o}, so others can read the PIN in it; \
         chmod 600 {path}, or move the PIN to HSM_PIN or hsm.slots.<name>.pin_file"
    )]
    PinInOpenFile {
        /// The configuration file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

impl ConfigError {
    pub(crate) fn invalid(
        key: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            key: key.into(),
            value: value.to_string(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn missing(key: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Missing {
            key: key.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn name(key: impl Into<String>) -> impl FnOnce(InvalidName) -> Self {
        let key = key.into();
        move |source| Self::Name { key, source }
    }
}
