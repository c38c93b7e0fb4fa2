//! The folder of a run: what it was asked for, what was planned and has happened, what was written down and seen, the verdict,
//! and the cluster itself. It is kept unless the run passes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What the run was asked for.
pub const OPTIONS: &str = "options.json";
/// The schedule of faults.
pub const PLAN: &str = "plan.json";
/// Every call and its outcome, a line each.
pub const HISTORY: &str = "history.jsonl";
/// Every fault that was carried out, and whether it had its effect.
pub const FIRED: &str = "fired.json";
/// What every node said at the end.
pub const OBSERVED: &str = "observed.json";
/// What else the verdict goes by: nodes that did not come back, what went wrong with the run itself.
pub const ENDED: &str = "ended.json";
/// What came of it.
pub const VERDICT: &str = "verdict.json";

/// A process that is being started is seen within this time.
const QUIET: Duration = Duration::from_millis(300);
/// For a process that was sent SIGKILL.
const GONE: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// A new one: at `path`, which must not be there or be empty, or under a name of its own in the folder for temporary files.
    ///
    /// # Errors
    /// The folder has something in it, or cannot be made.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            let made = tempfile::Builder::new().prefix("hsm-chaos-").tempdir()?;
            return Self::at(&made.keep());
        };
        fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        let empty = fs::read_dir(path)
            .with_context(|| path.display().to_string())?
            .next()
            .is_none();
        ensure!(
            empty,
            "{}: something is in it already; name a folder that is not there yet",
            path.display()
        );
        Self::at(path)
    }

    /// That of an earlier run.
    ///
    /// # Errors
    /// It is not there.
    pub fn at(path: &Path) -> Result<Self> {
        let path = path
            .canonicalize()
            .with_context(|| format!("{}: no such folder of a run", path.display()))?;
        Ok(Self { path })
    }

    /// Its place.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One of its files.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes one of its files, for people to read too.
    ///
    /// # Errors
    /// As the disk says.
    pub fn write(&self, name: &str, what: &impl Serialize) -> Result<()> {
        let path = self.file(name);
        let mut text = serde_json::to_string_pretty(what).with_context(|| path.display().to_string())?;
        text.push('\n');
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// It is not there, or was written by another version of this program.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.file(name);
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// Whether a file of this name is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.file(name).exists()
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Ends what still runs in it. A run that is told to stop may leave a node whose start nobody has noted yet.
    pub fn sweep(&self) {
        let begun = Instant::now();
        let mut quiet_since = begun;
        while quiet_since.elapsed() < QUIET && begun.elapsed() < GONE {
            for pid in self.processes() {
                let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
                quiet_since = Instant::now();
            }
            std::thread::sleep(QUIET / 10);
        }
    }

    /// Removes it, and what still runs in it first.
    pub fn remove(&self) {
        self.sweep();
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("{}: cannot be removed: {error}", self.path.display());
        }
    }

    /// Nodes, and programs that start them, whose arguments name something in this folder.
    fn processes(&self) -> Vec<Pid> {
        let inside = format!("{}/", self.path.display());
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| is_ours(*pid, &inside))
            .map(Pid::from_raw)
            .collect()
    }
}

fn is_ours(pid: i32, inside: &str) -> bool {
    // Of a process that has ended and was not waited for, neither can be read.
    let Ok(program) = fs::read_link(format!("/proc/{pid}/exe")) else {
        return false;
    };
    if !is_known(&program) {
        return false;
    }
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&arguments).contains(inside)
}

/// The kernel marks a program that was built anew since it was started.
fn is_known(program: &Path) -> bool {
    let name = program.file_name().and_then(|name| name.to_str());
    let name = name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
    matches!(name, Some("hsm-node" | "hsmctl"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_something_in_it_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/run");
        let folder = Folder::create(Some(&path)).unwrap();
        assert!(folder.is_empty() && !folder.has(PLAN));
        folder.write(PLAN, &[1, 2]).unwrap();
        assert!(!folder.is_empty() && folder.has(PLAN));
        assert_eq!(folder.read::<Vec<u32>>(PLAN).unwrap(), [1, 2]);
        let error = Folder::create(Some(&path)).unwrap_err();
        assert!(error.to_string().contains("something is in it"), "{error}");
        folder.remove();
        assert!(!path.exists());
        assert!(Folder::at(&path).is_err());
    }

    #[test]
    fn nodes_are_known_though_they_were_built_anew_meanwhile() {
        for (program, known) in [
            ("/t/debug/hsm-node", true),
            ("/t/debug/hsm-node (deleted)", true),
            ("/t/debug/hsmctl (deleted)", true),
            ("/t/debug/hsm-node-old", false),
            ("/usr/bin/sleep", false),
            ("/", false),
        ] {
            assert_eq!(is_known(Path::new(program)), known, "{program}");
        }
    }
}
