//! One owner per token: two processes on one token directory fail now and then, and two nodes
//! on one token would destroy each other's keys. The lock is the kernel's, so it ends with the
//! process; its file is never removed, or two processes could lock two files of one name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc::O_NOFOLLOW;

use crate::durable;
use crate::error::HsmError;
use crate::profile::VendorProfile;

/// Where locks of hardware tokens are kept, so that two nodes of one machine share them.
const HARDWARE_LOCKS: &str = "/run/hsm-service";

/// Exclusive ownership of a token, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct TokenLock {
    _file: File,
}

impl TokenLock {
    /// Takes the token's lock, or says who holds it. Never waits.
    pub(crate) fn acquire(profile: &VendorProfile, serial: &str) -> Result<Self, HsmError> {
        Self::lock(&lock_path(profile, serial)?, serial)
    }

    /// As [`TokenLock::acquire`], for the file-based token of this serial in `token_root`.
    pub(crate) fn beside(token_root: &Path, serial: &str) -> Result<Self, HsmError> {
        Self::lock(&beside(token_root, serial), serial)
    }

    /// Says who owns a token, and writes nothing: a file that is made by whoever only looks would be in the way
    /// of the owner that comes.
    pub(crate) fn look(profile: &VendorProfile, serial: &str) -> Result<(), HsmError> {
        let path = match &profile.token_root {
            Some(root) => beside(root, serial),
            None => Path::new(HARDWARE_LOCKS).join(hardware_name(profile, serial)),
        };
        let mut file = match OpenOptions::new().read(true).custom_flags(O_NOFOLLOW).open(&path) {
            Ok(file) => file,
            // Nobody has ever owned it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(HsmError::file(&path, "open lock", &error)),
        };
        match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(owned(&mut file, &path, serial)),
            Err(TryLockError::Error(error)) => Err(HsmError::file(&path, "lock", &error)),
        }
    }

    fn lock(path: &Path, serial: &str) -> Result<Self, HsmError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(O_NOFOLLOW)
            .open(path)
            .map_err(|error| HsmError::file(path, "open lock", &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(owned(&mut file, path, serial));
            }
            Err(TryLockError::Error(error)) => return Err(HsmError::file(path, "lock", &error)),
        }
        // Only for the message above; a lock without a readable owner is a lock all the same.
        let _ = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

fn owned(file: &mut File, path: &Path, serial: &str) -> HsmError {
    HsmError::Owned {
        serial: serial.to_owned(),
        holder: holder(file),
        lock: path.display().to_string(),
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) if pid == std::process::id() => "this process".to_owned(),
        (Ok(_), Ok(pid)) => format!("process {pid}"),
        _ => "another process".to_owned(),
    }
}

fn lock_path(profile: &VendorProfile, serial: &str) -> Result<PathBuf, HsmError> {
    if let Some(root) = &profile.token_root {
        return Ok(beside(root, serial));
    }
    // A folder that two processes of this machine would not share is no place for a lock.
    let shared = Path::new(HARDWARE_LOCKS);
    durable::private_dir(shared).map_err(|error| HsmError::File {
        path: shared.display().to_string(),
        action: "make the folder of token locks",
        reason: format!(
            "{error}; without it nothing keeps two processes from one token: have the service manager make it \
             (systemd: RuntimeDirectory=hsm-service), or make it yourself, mode 0700, owned by this user"
        ),
    })?;
    Ok(shared.join(hardware_name(profile, serial)))
}

fn hardware_name(profile: &VendorProfile, serial: &str) -> String {
    format!(
        "{}.hsm-owner",
        file_name(&format!("{}-{serial}", profile.library))
    )
}

fn beside(token_root: &Path, serial: &str) -> PathBuf {
    token_root.join(format!("{}.hsm-owner", file_name(serial)))
}

/// Serial numbers are text of the token's choosing: keep them from naming other directories.
pub(crate) fn file_name(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_one_owner_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = TokenLock::beside(dir.path(), "104c30e7").unwrap();
        let error = TokenLock::beside(dir.path(), "104c30e7").unwrap_err();
        assert!(error.to_string().contains("owned by this process"), "{error}");
        TokenLock::beside(dir.path(), "another").unwrap();
        drop(first);
        TokenLock::beside(dir.path(), "104c30e7").unwrap();
    }

    #[test]
    fn a_serial_stays_inside_its_directory() {
        assert_eq!(file_name("../../etc/x y"), "______etc_x_y");
    }
}
