//! A program that is not ours, run for a test. It ends with its owner, however that ends.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// Ended by the end of the pipe that the shell reads. Debian's place for servers is on the path of root only.
const SCRIPT: &str = "PATH=\"$PATH:/usr/sbin\"; signal=$1; shift; \"$@\" & pid=$!; cat >/dev/null; \
                      kill -s \"$signal\" $pid; wait $pid";

/// See the module.
pub(crate) struct Leashed {
    shell: Child,
    name: &'static str,
    log: PathBuf,
}

impl Leashed {
    /// Starts a program that is to be ended with this signal. What it says goes to the log.
    pub(crate) fn start(
        name: &'static str,
        args: impl FnOnce(&mut Command),
        signal: &str,
        log: &Path,
    ) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT, "sh", signal, name]);
        args(&mut command);
        let shell = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(log).with_context(|| log.display().to_string())?)
            // A signal to the test's group must not reach it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start a shell for {name}"))?;
        Ok(Self {
            shell,
            name,
            log: log.to_owned(),
        })
    }

    /// What it has said.
    pub(crate) fn said(&self) -> String {
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!("{} said:\n{said}", self.name)
    }
}

impl Drop for Leashed {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_its_owner_and_what_it_said_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let (told, ended) = (dir.path().join("told"), dir.path().join("ended"));
        let script = "trap 'echo bye >&2; : >\"$2\"; exit' TERM; : >\"$1\"; while :; do sleep 0.01; done";
        let leashed = Leashed::start(
            "sh",
            |command| {
                command.args(["-c", script, "sh"]).args([&told, &ended]);
            },
            "TERM",
            &log,
        )
        .unwrap();
        while !told.exists() {
            std::thread::yield_now();
        }
        assert!(!ended.exists());
        drop(leashed);
        assert!(ended.exists());
        assert_eq!(std::fs::read_to_string(log).unwrap(), "bye\n");
    }
}
