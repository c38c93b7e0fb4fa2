//! One node of a playground: its process, its files, its health listener.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use hsm_api::client::HealthClient;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::metrics::Metrics;
use crate::wait::until;

/// For an answer of a health listener without which a test has failed: a machine that stands still now and then.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node by number; it may run or not.
#[derive(Clone)]
pub struct Node {
    /// From 1.
    pub number: u32,
    /// `DIR/nodeI`.
    pub dir: PathBuf,
    /// Its address.
    pub host: Ipv4Addr,
    /// Port of its API.
    pub api_port: u16,
    /// Port of its health listener.
    pub health_port: u16,
    /// Port of its cluster listener.
    pub cluster_port: u16,
}

impl Node {
    pub(crate) fn new(playground: &Path, host: Ipv4Addr, base_port: u16, number: u32) -> Self {
        // At most 16 nodes, from ports far below the highest.
        let first = base_port + 10 * u16::try_from(number - 1).unwrap_or_default();
        Self {
            number,
            dir: playground.join(format!("node{number}")),
            host,
            api_port: first,
            health_port: first + 1,
            cluster_port: first + 2,
        }
    }

    /// Its name in the cluster.
    #[must_use]
    pub fn id(&self) -> String {
        format!("hsm-node-{}", self.number)
    }

    /// `https://host:port` of its API.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("https://{}:{}", self.host, self.api_port)
    }

    /// Its health listener.
    #[must_use]
    pub fn health(&self) -> HealthClient {
        HealthClient::new(&format!("{}:{}", self.host, self.health_port))
    }

    /// The same, for an answer that has to come, however late.
    #[must_use]
    pub fn patient(&self) -> HealthClient {
        self.health().with_limit(PATIENCE)
    }

    /// Whether `/readyz` is 200; false too if it does not answer.
    pub async fn is_ready(&self) -> bool {
        self.health().is_ready().await
    }

    /// Until `/readyz` is 200; else says which check fails.
    pub async fn wait_ready(&self, limit: Duration) -> Result<()> {
        let ready = until("/readyz", limit, async || self.is_ready().await.then_some(())).await;
        match ready {
            Ok(()) => Ok(()),
            Err(error) => Err(error.context(format!("{}: {}", self.id(), self.checks().await))),
        }
    }

    /// `/readyz?verbose`.
    pub async fn checks(&self) -> String {
        match self.health().get("/readyz?verbose").await {
            Ok(answer) => answer.text(),
            Err(error) => error.to_string(),
        }
    }

    /// Its metrics now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let answer = self.patient().get("/metrics").await?;
        Metrics::parse(&answer.text()).with_context(|| format!("metrics of {}", self.id()))
    }

    /// Its pid, while the process that `hsmctl dev` started lives. A zombie is dead, a reused pid is
    /// somebody else.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        let noted = std::fs::read_to_string(self.dir.join("pid")).ok()?;
        let mut words = noted.split_whitespace();
        let (pid, started) = (words.next()?, words.next()?);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?;
        let threads: u32 = fields.nth(16)?.parse().ok()?;
        // Its first thread may have ended while others still hold its ports.
        let dead = matches!(state, "Z" | "X") && threads <= 1;
        let lives = !dead && fields.nth(1)? == started;
        lives.then(|| pid.parse().ok()).flatten()
    }

    /// Sends a signal at once, without a program in between; false if it does not run.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let Some(pid) = self.pid() else { return Ok(false) };
        match nix::sys::signal::kill(Pid::from_raw(pid), signal) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("{}: {signal}", self.id())),
        }
    }

    /// SIGKILL, and until it is gone.
    pub async fn kill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_gone(Duration::from_secs(30)).await
    }

    /// Until its process has ended.
    pub async fn wait_gone(&self, limit: Duration) -> Result<()> {
        let what = format!("the end of {}", self.id());
        until(&what, limit, async || self.pid().is_none().then_some(())).await
    }

    /// Until its process has ended, and how. Only for a test that has made itself the reaper of orphans
    /// (`PR_SET_CHILD_SUBREAPER`): the program that started the node has ended before.
    pub async fn wait_ended(&self, limit: Duration) -> Result<WaitStatus> {
        let noted = std::fs::read_to_string(self.dir.join("pid")).with_context(|| self.id())?;
        let pid = noted.split_whitespace().next().context("an empty pid file")?;
        let pid = Pid::from_raw(pid.parse().context("the pid file")?);
        self.wait_gone(limit).await?;
        waitpid(pid, Some(WaitPidFlag::WNOHANG)).with_context(|| format!("how {} ended", self.id()))
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.dir.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of its configuration.
    pub fn config(&self) -> Result<String> {
        let path = self.dir.join("config.yaml");
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// Replaces its configuration; read at its next start.
    pub fn set_config(&self, text: &str) -> Result<()> {
        let path = self.dir.join("config.yaml");
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    }
}
