//! A node as a process: detached from the terminal, its output in its log, known by a pid file that also
//! holds when the process began. A reused pid is never signalled. Secrets reach it by its environment only.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::Start;
use super::layout::{Layout, Node, REPLICATION_ENV, SLOTS};
use crate::files;

/// Between two looks at a process.
const POLL: Duration = Duration::from_millis(20);

/// One process for ever: pids come again, a start time within one boot does not.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    pid: i32,
    /// Clock ticks between boot and its start.
    started: u64,
    boot: String,
}

impl Identity {
    /// The living process of this pid. A zombie is dead, unless other threads of it are still ending:
    /// until they have, its ports are taken.
    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, threads, started) = parse_stat(&stat)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let dead = matches!(state, 'Z' | 'X' | 'x') && threads <= 1;
        (!dead).then(|| Self {
            pid,
            started,
            boot: boot.trim().to_owned(),
        })
    }

    fn render(&self) -> String {
        format!("{} {} {}\n", self.pid, self.started, self.boot)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let pid = words.next()?.parse::<i32>().ok().filter(|pid| *pid > 1)?;
        let started = words.next()?.parse().ok()?;
        Some(Self {
            pid,
            started,
            boot: words.next().unwrap_or_default().to_owned(),
        })
    }
}

/// State, number of threads and start time in `/proc/<pid>/stat` (proc(5): fields 3, 20 and 22). The second
/// field, the program's name, may hold anything, brackets too.
fn parse_stat(stat: &str) -> Option<(char, u32, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let threads = fields.nth(16)?.parse().ok()?;
    Some((state, threads, fields.nth(1)?.parse().ok()?))
}

/// The pid of a node's process, if it lives.
pub(crate) fn running(node: &Node) -> Option<i32> {
    let noted = Identity::parse(&std::fs::read_to_string(node.pid_file()).ok()?)?;
    (Identity::of(noted.pid)? == noted).then_some(noted.pid)
}

/// Sends a signal; false if the node does not run.
pub(crate) fn signal(node: &Node, signal: Signal) -> Result<bool> {
    let Some(pid) = running(node) else {
        return Ok(false);
    };
    match nix::sys::signal::kill(Pid::from_raw(pid), signal) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("node {} (pid {pid}): {signal}", node.number)),
    }
}

/// Waits for a node's process to end; false if it does not in time.
pub(crate) fn wait_until_gone(node: &Node, limit: Duration) -> bool {
    let begun = Instant::now();
    while running(node).is_some() {
        if begun.elapsed() >= limit {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

/// Starts a node. The child is this program, which becomes hsm-node: so that it has a session of its own and
/// its pid file is there before it does anything.
pub(crate) fn spawn(layout: &Layout, node: &Node) -> Result<Child> {
    node_binary()?;
    let shown = node.log();
    let log = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&shown)
        .with_context(|| format!("{}: cannot be opened", shown.display()))?;
    let errors = log.try_clone().context("share the log")?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command
        .args(["dev", "exec-node", "--dir"])
        .arg(layout.root())
        .args(["--node", &node.number.to_string()])
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| is_passed_on(name)))
        .env("SOFTHSM2_CONF", node.softhsm_conf())
        .env(
            REPLICATION_ENV,
            files::read_secret(&layout.replication_key_file())?.as_str(),
        )
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    for slot in &SLOTS {
        command.env(
            slot.pin_env,
            files::read_secret(&layout.pin_file(slot.name))?.as_str(),
        );
    }
    command
        .spawn()
        .with_context(|| format!("start node {}", node.number))
}

/// What the caller's environment may say to a node: everything but what would go before its configuration.
fn is_passed_on(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    if name.starts_with("HSM_LOG_") || name == NODE_BIN || name == "HSM_FAILPOINTS" {
        return true;
    }
    let configures = ["HSM_", "HSMCTL_", REPLICATION_ENV]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    !configures && !matches!(&*name, "CONFIG_PATH" | "SOFTHSM2_CONF" | "CREDENTIALS_DIRECTORY")
}

/// Names another hsm-node than the one beside this program.
const NODE_BIN: &str = "HSM_NODE_BIN";

/// The node's program: beside this one, unless another is named.
pub(crate) fn node_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(NODE_BIN).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return path
            .canonicalize()
            .with_context(|| format!("{NODE_BIN}={}", path.display()));
    }
    let beside = std::env::current_exe()
        .context("find this program")?
        .with_file_name("hsm-node");
    if !beside.is_file() {
        bail!(
            "{}: no such program; build it, or name it in {NODE_BIN}",
            beside.display()
        );
    }
    Ok(beside)
}

/// The hidden command: note who this is, and become the node under the same pid.
pub(super) fn become_node(args: &Start) -> Result<()> {
    let (layout, facts) = Layout::open(&args.place.dir)?;
    let node = layout.node(facts, args.node)?;
    let binary = node_binary()?;
    // Fails only for the leader of a process group, which has no terminal to lose.
    let _ = nix::unistd::setsid();
    nix::sys::stat::umask(Mode::from_bits_truncate(0o077));
    let pid = i32::try_from(std::process::id()).context("pid")?;
    let own = Identity::of(pid).context("/proc/self/stat cannot be read")?;
    files::write(&node.pid_file(), own.render().as_bytes())?;
    let error = Command::new(&binary)
        .arg("--config")
        .arg(node.config())
        .current_dir(&node.dir)
        .exec();
    Err(error).with_context(|| format!("start {}", binary.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::Path;

    use super::*;

    fn node(dir: &Path) -> Node {
        Node {
            number: 1,
            dir: dir.to_owned(),
            host: std::net::Ipv4Addr::LOCALHOST,
            api_port: 1,
            health_port: 2,
            cluster_port: 3,
            advertised_port: 3,
        }
    }

    #[test]
    fn the_name_of_a_program_cannot_confuse() {
        let stat = "7 (a) Z 1 (b) S 1 7 7 0 -1 4194304 100 0 0 0 1 2 0 0 20 0 1 0 4711 1 2";
        assert_eq!(parse_stat(stat), Some(('S', 1, 4711)));
        assert_eq!(parse_stat("7 (a) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_pid_file_reads_back() {
        let own = Identity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert_eq!(Identity::parse(&own.render()).unwrap(), own);
        for text in ["", "x 1 b", "7", "0 1 b", "1 1 b", "-1 1 b"] {
            assert_eq!(Identity::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_process_is_followed_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        assert_eq!(running(&node), None);
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        std::fs::write(node.pid_file(), Identity::of(pid).unwrap().render()).unwrap();
        assert_eq!(running(&node), Some(pid));
        assert!(!wait_until_gone(&node, Duration::from_millis(50)));
        assert!(signal(&node, Signal::SIGKILL).unwrap());
        // Nobody has waited for it yet: it is a zombie, and as dead as it gets.
        assert!(wait_until_gone(&node, Duration::from_secs(10)));
        assert!(!signal(&node, Signal::SIGKILL).unwrap());
        child.wait().unwrap();
    }

    #[test]
    fn a_pid_that_came_again_is_somebody_else() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut noted = Identity::of(pid).unwrap();
        noted.started -= 1;
        std::fs::write(node.pid_file(), noted.render()).unwrap();
        assert!(!signal(&node, Signal::SIGKILL).unwrap());
        noted.started += 1;
        noted.boot.push('x');
        std::fs::write(node.pid_file(), noted.render()).unwrap();
        assert!(!signal(&node, Signal::SIGKILL).unwrap());
        assert!(child.try_wait().unwrap().is_none(), "it must still live");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_would_override_a_nodes_configuration_does_not_reach_it() {
        for name in [
            "HSM_SERVER_PORT",
            "HSM_PIN",
            "HSM_PIN_EXCHANGE",
            "HSMCTL_PKI",
            "CONFIG_PATH",
            "SOFTHSM2_CONF",
            "TOKEN_REPLICATION_KEY",
            "TOKEN_REPLICATION_KEY_PREVIOUS",
        ] {
            assert!(!is_passed_on(OsStr::new(name)), "{name}");
        }
        for name in [
            "PATH",
            "HSM_LOG_LEVEL",
            "HSM_NODE_BIN",
            "RUST_BACKTRACE",
            "FAILPOINTS",
            "LLVM_PROFILE_FILE",
        ] {
            assert!(is_passed_on(OsStr::new(name)), "{name}");
        }
    }
}
