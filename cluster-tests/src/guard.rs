//! What kills the nodes of a test that was killed itself.

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
        const SCRIPT: &str = "cat >/dev/null; [ -d \"$2\" ] || exit 0; \"$1\" dev down --now --dir \"$3\"; \
                              [ -n \"$HSM_TEST_KEEP\" ] || rm -rf \"$2\"";
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
}
