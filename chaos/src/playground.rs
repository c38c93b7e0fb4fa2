//! A cluster made by `hsmctl dev` in a folder of its own. Its nodes end when it is dropped; the folder goes too, unless
//! it is to be looked at.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hsm_api::client::{Client, HealthClient, Retry};

/// See the module.
pub(crate) struct Playground {
    dir: tempfile::TempDir,
    hsmctl: PathBuf,
    pub(crate) nodes: usize,
    base_port: u16,
}

impl Playground {
    /// A folder for `nodes` nodes, in which nothing is yet.
    pub(crate) fn new(nodes: usize, base_port: u16) -> Result<Self> {
        let own = std::env::current_exe().context("path of this program")?;
        let hsmctl = own.with_file_name("hsmctl");
        ensure!(
            hsmctl.exists(),
            "{} does not exist; build the workspace first",
            hsmctl.display()
        );
        Ok(Self {
            dir: tempfile::Builder::new().prefix("hsm-chaos-").tempdir()?,
            hsmctl,
            nodes,
            base_port,
        })
    }

    /// Where everything of it lies.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves the folder for people to look at.
    pub(crate) fn keep(&mut self) {
        self.dir.disable_cleanup(true);
    }

    /// Starts the nodes; returns once all are ready.
    pub(crate) fn up(&self) -> Result<()> {
        self.dev(&[
            "up",
            "--nodes",
            &self.nodes.to_string(),
            "--base-port",
            &self.base_port.to_string(),
        ])
    }

    /// `hsmctl dev VERB --dir DIR …`, to its end: a signal to this program's group must not meet it half-way, with
    /// a node that nobody has noted yet.
    pub(crate) fn dev(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.hsmctl)
            .arg("dev")
            .args(&arguments[..1])
            .arg("--dir")
            .arg(self.dir.path())
            .args(&arguments[1..])
            .process_group(0)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {}", self.hsmctl.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "hsmctl dev {}: {}",
            arguments.join(" "),
            said.trim()
        );
        Ok(())
    }

    /// Address of a node's API; nodes count from 1.
    pub(crate) fn endpoint(&self, node: usize) -> String {
        format!(
            "https://127.0.0.1:{}",
            usize::from(self.base_port) + 10 * (node - 1)
        )
    }

    /// A client with one of the playground's certificates.
    pub(crate) fn client(&self, name: &str, endpoints: &[usize], retry: Retry) -> Result<Client> {
        let pki = self.dir.path().join("pki");
        let read = |path: PathBuf| std::fs::read(&path).with_context(|| format!("read {}", path.display()));
        let client = Client::builder()
            .endpoints(endpoints.iter().map(|node| self.endpoint(*node)))
            .ca_pem(read(pki.join("ca.crt"))?)
            .identity_pem(
                read(pki.join(format!("clients/{name}.crt")))?,
                read(pki.join(format!("clients/{name}.key")))?,
            )
            .retry(retry)
            .build()?;
        Ok(client)
    }

    /// Waits until every node is ready.
    pub(crate) async fn all_ready(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        for node in 1..=self.nodes {
            let port = usize::from(self.base_port) + 10 * (node - 1) + 1;
            let health = HealthClient::new(&format!("127.0.0.1:{port}"));
            while !health.is_ready().await {
                ensure!(
                    Instant::now() < deadline,
                    "node {node} is not ready after a minute"
                );
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }
}

impl Drop for Playground {
    fn drop(&mut self) {
        // By their pids, at once: nothing is lost with a folder that goes too.
        if let Err(error) = self.dev(&["down", "--now"]) {
            eprintln!("the cluster could not be stopped: {error:#}");
        }
    }
}
