//! Reading what must not be known: PINs and the replication key. Every source is checked before
//! it is trusted, no value is ever part of an error, and the process cannot be dumped before the
//! first secret is read.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod prompt;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hsm_core::replication::{ReplicationKey, ReplicationKeyError};
use hsm_core::secrets::{Pin, RandomError};
use nix::sys::resource::{Resource, setrlimit};
use zeroize::Zeroizing;

pub use self::prompt::ask_pins;
use crate::config::{PinSource, ReplicationKeySource};

/// The file a standalone node keeps its replication key in, inside the data folder.
pub const REPLICATION_KEY_FILE: &str = "replication.key";

/// Longest secret file. PINs have tens of bytes.
const MAX_SECRET: usize = 4096;

/// Why a secret could not be read. Names the source and the remedy, never the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The kernel refused to protect the process.
    #[error("{what} failed: {reason}; without it a crash could write secrets to a core dump")]
    Hardening {
        /// The call.
        what: &'static str,
        /// The kernel's reason.
        reason: nix::Error,
    },
    /// The variable does not exist or is empty.
    #[error("{key}: environment variable {variable} is not set; export it")]
    UnsetVariable {
        /// The configuration key.
        key: String,
        /// The variable.
        variable: String,
    },
    /// The file cannot be opened or read.
    #[error("{key}: {path}: {reason}; give a readable file")]
    Unreadable {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// Others than its owner may read the file.
    #[error("{key}: {path} has mode {mode:04o}, so others can read the secret; chmod 600 {path}")]
    OpenToOthers {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Neither this user nor root owns the file.
    #[error("{key}: {path} belongs to user {owner}, who could change it; chown it to the user of this node")]
    ForeignOwner {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Not a text of a secret's length.
    #[error("{key}: {path}: {problem}")]
    Content {
        /// The configuration key.
        key: String,
        /// The file.
        path: PathBuf,
        /// What is wrong, without the content.
        problem: &'static str,
    },
    /// A systemd credential is named, but systemd passed none.
    #[error(
        "{key}: {name}: CREDENTIALS_DIRECTORY is not set; start the node as a systemd service \
         with LoadCredential={name}:PATH"
    )]
    NoCredentials {
        /// The configuration key.
        key: String,
        /// The credential.
        name: String,
    },
    /// A PIN is to be typed, and nobody is there.
    #[error(
        "{key}: true: there is no terminal to ask for the PIN on ({terminal}: {reason}); start the node on one, or \
         give the slot pin_file or pin_credential instead"
    )]
    NoTerminal {
        /// The configuration key.
        key: String,
        /// The terminal's file.
        terminal: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// What was typed is no PIN, or typing was given up.
    #[error("{key}: true: {problem}; start the node again and type the PIN")]
    NotTyped {
        /// The configuration key.
        key: String,
        /// What is wrong, without what was typed.
        problem: String,
    },
    /// The text is no replication key.
    #[error("{key}: {source}")]
    ReplicationKey {
        /// Where it came from.
        key: String,
        /// How it is wrong.
        source: ReplicationKeyError,
    },
    /// The key that this node made for itself cannot be read any more. Another one would open nothing.
    #[error(
        "{0}; put the copy back that was kept of it: every key of this node is sealed under it, so no other one is made"
    )]
    OwnReplicationKey(Box<SecretError>),
    /// No key could be made.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The new key could not be stored.
    #[error("{path}: the new replication key could not be stored: {reason}")]
    NotStored {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
}

/// The replication key, and whether this start made it.
pub struct LoadedReplicationKey {
    /// The key.
    pub key: ReplicationKey,
    /// Set if it was made just now, in this file: to be said once, loudly.
    pub created: Option<PathBuf>,
}

/// No core dumps and no other process of this user reading this one's memory. To be called
/// before any secret is read.
///
/// # Errors
/// When the kernel refuses.
pub fn harden_process() -> Result<(), SecretError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|reason| SecretError::Hardening {
        what: "setrlimit(RLIMIT_CORE, 0)",
        reason,
    })?;
    nix::sys::prctl::set_dumpable(false).map_err(|reason| SecretError::Hardening {
        what: "prctl(PR_SET_DUMPABLE, 0)",
        reason,
    })
}

/// Reads a token's PIN.
///
/// # Errors
/// A source that is missing, empty, or readable by others.
pub fn read_pin(source: &PinSource) -> Result<Pin, SecretError> {
    match source {
        PinSource::Env { key, variable } => read_env(key, variable).map(pin),
        PinSource::File { key, path } => read_file(key, path, Access::OwnerOnly).map(pin),
        PinSource::Credential { key, name } => {
            read_file(key, &credential(key, name)?, Access::Systemd).map(pin)
        }
        PinSource::Prompt { key, typed } => typed
            .get()
            .map(|pin| Pin::new(pin.expose().to_owned()))
            .ok_or_else(|| SecretError::NotTyped {
                key: key.clone(),
                problem: "the PIN was not asked for".to_owned(),
            }),
        PinSource::Inline(pin) => Ok(Pin::new(pin.expose().to_owned())),
    }
}

/// Looks at a PIN's source without reading the PIN, or asking for it.
///
/// # Errors
/// As [`read_pin`], but for what is in a file.
pub fn check_pin(source: &PinSource) -> Result<(), SecretError> {
    match source {
        PinSource::Env { key, variable } => read_env(key, variable).map(drop),
        PinSource::File { key, path } => open_file(key, path, Access::OwnerOnly).map(drop),
        PinSource::Credential { key, name } => {
            open_file(key, &credential(key, name)?, Access::Systemd).map(drop)
        }
        PinSource::Prompt { .. } | PinSource::Inline(_) => Ok(()),
    }
}

fn credential(key: &str, name: &str) -> Result<PathBuf, SecretError> {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").filter(|folder| !folder.is_empty());
    match folder {
        Some(folder) => Ok(Path::new(&folder).join(name)),
        None => Err(SecretError::NoCredentials {
            key: key.to_owned(),
            name: name.to_owned(),
        }),
    }
}

/// Reads the replication key; a standalone node without one makes it, synced before it is used,
/// so that no key is ever made that could not be replicated later.
///
/// # Errors
/// As [`read_pin`], and when a new key cannot be made or stored.
pub fn read_replication_key(
    source: &ReplicationKeySource,
    data_dir: &Path,
) -> Result<LoadedReplicationKey, SecretError> {
    let parsed = |key: &str, text: &str| {
        ReplicationKey::parse(text)
            .map(|key| LoadedReplicationKey { key, created: None })
            .map_err(|source| SecretError::ReplicationKey {
                key: key.to_owned(),
                source,
            })
    };
    match source {
        ReplicationKeySource::Env { key, variable } => {
            let text = read_env(key, variable)?;
            parsed(&format!("{key} ({variable})"), &text)
        }
        ReplicationKeySource::File { key, path } => {
            let text = read_file(key, path, Access::OwnerOnly)?;
            parsed(&format!("{key} ({})", path.display()), &text)
        }
        ReplicationKeySource::DataDir => {
            let path = data_dir.join(REPLICATION_KEY_FILE);
            if path.exists() {
                let read = read_file("data_dir", &path, Access::OwnerOnly)
                    .and_then(|text| parsed(&path.display().to_string(), &text));
                return read.map_err(|error| match error {
                    SecretError::Content { .. } | SecretError::ReplicationKey { .. } => {
                        SecretError::OwnReplicationKey(Box::new(error))
                    }
                    other => other,
                });
            }
            let key = ReplicationKey::generate()?;
            store_new(data_dir, &path, key.to_hex().as_bytes()).map_err(|reason| SecretError::NotStored {
                path: path.clone(),
                reason,
            })?;
            Ok(LoadedReplicationKey {
                key,
                created: Some(path),
            })
        }
    }
}

/// Reads the replication key and forgets it; makes none.
///
/// # Errors
/// As [`read_replication_key`].
pub fn check_replication_key(source: &ReplicationKeySource, data_dir: &Path) -> Result<(), SecretError> {
    match source {
        ReplicationKeySource::DataDir if !data_dir.join(REPLICATION_KEY_FILE).exists() => Ok(()),
        source => read_replication_key(source, data_dir).map(drop),
    }
}

/// Written beside, synced, renamed, folder synced: a crash leaves the whole key or none.
fn store_new(folder: &Path, path: &Path, content: &[u8]) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let partial = folder.join(".replication.key.partial");
    match std::fs::remove_file(&partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&partial, path)?;
    File::open(folder)?.sync_all()
}

fn pin(text: Zeroizing<String>) -> Pin {
    Pin::new(text.as_str().to_owned())
}

fn read_env(key: &str, variable: &str) -> Result<Zeroizing<String>, SecretError> {
    std::env::var(variable)
        .map(Zeroizing::new)
        .ok()
        .filter(|text| !text.is_empty())
        .ok_or_else(|| SecretError::UnsetVariable {
            key: key.to_owned(),
            variable: variable.to_owned(),
        })
}

/// Which permission bits a secret file may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// None for group and others.
    OwnerOnly,
    /// systemd grants its credentials by an ACL, whose mask shows as the group's bits.
    Systemd,
}

fn unreadable(key: &str, path: &Path) -> impl Fn(std::io::Error) -> SecretError {
    let (key, path) = (key.to_owned(), path.to_owned());
    move |reason| SecretError::Unreadable {
        key: key.clone(),
        path: path.clone(),
        reason,
    }
}

fn content(key: &str, path: &Path, problem: &'static str) -> SecretError {
    SecretError::Content {
        key: key.to_owned(),
        path: path.to_owned(),
        problem,
    }
}

/// Opens a file that may hold a secret.
fn open_file(key: &str, path: &Path, access: Access) -> Result<File, SecretError> {
    let unreadable = unreadable(key, path);
    // Checked on the open file, so that it cannot be swapped in between. Not blocking: opening
    // a pipe must not hang the start.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(&unreadable)?;
    let metadata = file.metadata().map_err(&unreadable)?;
    if !metadata.is_file() {
        return Err(content(key, path, "is not a regular file"));
    }
    let mode = metadata.mode() & 0o7777;
    let forbidden = match access {
        Access::OwnerOnly => 0o077,
        Access::Systemd => 0o007,
    };
    if mode & forbidden != 0 {
        return Err(SecretError::OpenToOthers {
            key: key.to_owned(),
            path: path.to_owned(),
            mode,
        });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        return Err(SecretError::ForeignOwner {
            key: key.to_owned(),
            path: path.to_owned(),
            owner,
        });
    }
    Ok(file)
}

fn read_file(key: &str, path: &Path, access: Access) -> Result<Zeroizing<String>, SecretError> {
    let mut file = open_file(key, path, access)?;
    let content = |problem| content(key, path, problem);
    // Reserved at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    (&mut file)
        .take(MAX_SECRET as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable(key, path))?;
    let text = secret_in(&bytes).map_err(content)?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// The secret in a file of these contents, or what is wrong with them, without repeating any.
fn secret_in(contents: &[u8]) -> Result<&str, &'static str> {
    if contents.len() > MAX_SECRET {
        return Err("is longer than 4096 bytes, so it is not the secret");
    }
    let text = std::str::from_utf8(contents).map_err(|_| "is not UTF-8 text")?;
    // Editors end a file with a newline that is not part of the secret. Spaces may be.
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err("is empty");
    }
    Ok(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
