//! A cluster made by `hsmctl dev` in a folder of its own, gone when dropped.

use std::path::PathBuf;
use std::process::Command;
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
    /// Starts `nodes` nodes; returns once all are ready.
    pub(crate) fn up(nodes: usize, base_port: u16) -> Result<Self> {
        let own = std::env::current_exe().context("path of this program")?;
        let hsmctl = own.with_file_name("hsmctl");
        ensure!(
            hsmctl.exists(),
            "{} does not exist; build the workspace first",
            hsmctl.display()
        );
        let dir = tempfile::tempdir()?;
        let this = Self {
            dir,
            hsmctl,
            nodes,
            base_port,
        };
        this.dev(&[
            "up",
            "--nodes",
            &nodes.to_string(),
            "--base-port",
            &base_port.to_string(),
        ])?;
        Ok(this)
    }

    /// `hsmctl dev VERB --dir DIR …`.
    pub(crate) fn dev(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.hsmctl)
            .arg("dev")
            .args(&arguments[..1])
            .arg("--dir")
            .arg(self.dir.path())
            .args(&arguments[1..])
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
        if let Err(error) = self.dev(&["down"]) {
            eprintln!("the cluster could not be stopped: {error:#}");
        }
    }
}
