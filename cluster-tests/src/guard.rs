//! What kills the nodes of a test that was killed itself.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};

/// A shell that waits for this process to end, however it does, and then kills the nodes: a runner that has
/// lost patience kills a test without asking it.
pub(crate) struct Guard {
    child: Child,
}

impl Guard {
    pub(crate) fn start(hsmctl: &Path, root: &Path, dir: &Path) -> Result<Self> {
        // Of the mounts in a folder, the innermost come first.
        const SCRIPT: &str = "keep=; read -r keep; cat >/dev/null; [ -d \"$2\" ] || exit 0; \
                              \"$1\" dev down --now --dir \"$3\"; \
                              cut -d ' ' -f 2 /proc/self/mounts | grep -F \"$2/\" | sort -r | xargs -r -n 1 umount -l; \
                              [ -n \"$HSM_TEST_KEEP$keep\" ] || rm -rf \"$2\"";
        let child = std::process::Command::new("sh")
            .args(["-c", SCRIPT, "sh"])
            .args([hsmctl, root, dir])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A signal to the test's group must not reach it.
            .process_group(0)
            .spawn()
            .context("start the guard")?;
        Ok(Self { child })
    }

    /// Leaves the folder where it is.
    pub(crate) fn keep(&mut self) {
        if let Some(stdin) = self.child.stdin.as_mut() {
            // A guard that is gone removes nothing.
            let _ = stdin.write_all(b"keep\n");
        }
    }

    /// Lets it find nothing to do, and waits for it.
    pub(crate) fn end(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_ends_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let mut guard = Guard::start(Path::new("true"), &path.join("gone"), &path).unwrap();
        guard.end();
        assert!(path.is_dir());
    }

    #[test]
    fn a_folder_that_is_to_be_kept_is_kept() {
        for keep in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut guard = Guard::start(Path::new("true"), dir.path(), dir.path()).unwrap();
            if keep {
                guard.keep();
            }
            guard.end();
            assert_eq!(
                dir.path().is_dir(),
                keep || std::env::var_os("HSM_TEST_KEEP").is_some()
            );
        }
    }
}
