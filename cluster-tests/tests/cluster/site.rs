//! A place of its own for one node that is started as its operator starts it: a folder that the relative paths of its
//! configuration point into, tokens, certificates, an environment with nothing else in it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Identity, Playground, until};
use hsm_api::Client;
use hsm_api::admin::CreateKekRequest;
use hsm_api::client::{HealthClient, Retry};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::common::softhsm_conf;
use crate::v1_service;

pub(crate) const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// Until a node listens, and until it is ready.
pub(crate) const STARTED: Duration = Duration::from_secs(60);
/// The examples' own drain is 1 s and 10 s.
const STOPPED: Duration = Duration::from_secs(60);
/// For changes: a node that has just started makes its slots' transport keys first.
pub(crate) const PATIENT: Retry = Retry::Until(Duration::from_secs(60));

/// Where one node is started.
pub(crate) struct Site {
    /// Lends certificates and ports. Its first node does not run: this one has its place, certificates and ports.
    lender: Playground,
    pub(crate) folder: PathBuf,
    pub(crate) config: String,
    env: Vec<(&'static str, String)>,
}

impl Site {
    /// The example with this name, and the playground's certificates under the names it has for them.
    pub(crate) async fn of(example: &str, certificates: &[(&str, &str)]) -> Result<Self> {
        Self::among(1, example, certificates).await
    }

    /// The same, beside further nodes of a playground, which do not run yet.
    pub(crate) async fn among(nodes: u32, example: &str, certificates: &[(&str, &str)]) -> Result<Self> {
        let lender = Playground::builder().nodes(nodes).unformed().start().await?;
        lender.dev("down", &["--now"]).await?;
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../config-examples")
            .join(example);
        let config = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let folder = lender.scratch().join("site");
        for name in ["pki", "secrets", "credentials", "tokens"] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder.join(name))?;
        }
        softhsm_conf(&folder.join("softhsm2.conf"), &folder.join("tokens"))?;
        let env = vec![(
            "SOFTHSM2_CONF",
            folder.join("softhsm2.conf").display().to_string(),
        )];
        let site = Self {
            lender,
            folder,
            config,
            env,
        };
        site.lend(certificates)?;
        Ok(site)
    }

    /// Further certificates of the playground, each under a name of its own in `pki`.
    pub(crate) fn lend(&self, certificates: &[(&str, &str)]) -> Result<()> {
        for (name, lent) in certificates {
            let lent = self.lender.pki().dir().join(lent);
            // With its mode: a private key is closed to others.
            let place = self.folder.join("pki").join(name);
            fs::copy(&lent, place).with_context(|| lent.display().to_string())?;
        }
        Ok(())
    }

    /// The playground, in which this node is node 1.
    pub(crate) fn playground(&self) -> &Playground {
        &self.lender
    }

    /// A file that only its owner reads.
    pub(crate) fn keep(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        file.write_all(text.as_bytes())?;
        Ok(path)
    }

    /// With something replaced that has to be there.
    pub(crate) fn with(mut self, from: &str, to: &str) -> Result<Self> {
        ensure!(
            self.config.contains(from),
            "the example has no {from:?}:\n{}",
            self.config
        );
        self.config = self.config.replace(from, to);
        Ok(self)
    }

    pub(crate) fn with_env(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    fn address(port: u16) -> String {
        format!("127.0.0.1:{port}")
    }

    pub(crate) fn api(&self) -> String {
        Self::address(self.lender.node(1).api_port)
    }

    pub(crate) fn health(&self) -> String {
        Self::address(self.lender.node(1).health_port)
    }

    pub(crate) fn cluster(&self) -> String {
        Self::address(self.lender.node(1).cluster_port)
    }

    /// A token, made as the documents say. Returns its PIN.
    pub(crate) fn token(&self, label: &str, pin_file: &str) -> Result<String> {
        let output = std::process::Command::new(cluster_tests::binary("hsmctl")?)
            .args(["slot", "init", "--label", label, "--module", MODULE])
            .args(["--pin-file", pin_file, "--so-pin-file", &format!("{pin_file}.so")])
            .current_dir(&self.folder)
            .env("SOFTHSM2_CONF", self.folder.join("softhsm2.conf"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "hsmctl slot init: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(fs::read_to_string(self.folder.join(pin_file))?)
    }

    pub(crate) fn command(&self) -> Result<Command> {
        fs::write(self.folder.join("config.yaml"), &self.config)?;
        let mut command = self.hsm_node()?;
        command.args(["--config", "config.yaml"]);
        Ok(command)
    }

    /// With nothing on its command line.
    pub(crate) fn hsm_node(&self) -> Result<Command> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.folder.join("log"))?;
        let mut command = Command::new(cluster_tests::binary("hsm-node")?);
        command
            .current_dir(&self.folder)
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (*name, value.as_str())))
            .stdin(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        Ok(command)
    }

    /// `hsm-node --check` finds nothing wrong and makes nothing.
    pub(crate) async fn check(&self) -> Result<()> {
        // It takes both outputs.
        let output = self.command()?.arg("--check").output().await?;
        ensure!(
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("config.yaml: ok"),
            "--check: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(!self.folder.join("data").exists(), "--check made a data folder");
        ensure!(
            !self.folder.join("logs").exists(),
            "--check made a folder of the log"
        );
        Ok(())
    }

    /// Starts the node; returns once it listens.
    pub(crate) async fn start(&self) -> Result<Child> {
        self.started(self.command()?).await
    }

    pub(crate) async fn started(&self, mut command: Command) -> Result<Child> {
        let mut node = command.stdout(Stdio::null()).spawn()?;
        let health = HealthClient::new(&self.health());
        let listens = until("/livez", STARTED, async || {
            if let Some(status) = node.try_wait().ok()? {
                return Some(Err(status));
            }
            health.get("/livez").await.ok().map(|_| Ok(()))
        })
        .await?;
        match listens {
            Ok(()) => Ok(node),
            Err(status) => bail!("it ended with {status}"),
        }
    }

    pub(crate) async fn wait_ready(&self) -> Result<()> {
        let health = HealthClient::new(&self.health());
        let ready = until("/readyz", STARTED, async || health.is_ready().await.then_some(()));
        let Err(error) = ready.await else { return Ok(()) };
        let checks = health.get("/readyz?verbose").await;
        Err(error.context(checks.map_or_else(|gone| gone.to_string(), |checks| checks.text())))
    }

    /// SIGTERM, and an end that a supervisor takes for one.
    pub(crate) async fn stop(&self, mut node: Child) -> Result<()> {
        let pid = i32::try_from(node.id().context("it has ended by itself")?)?;
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let status = tokio::time::timeout(STOPPED, node.wait())
            .await
            .context("it does not end")??;
        ensure!(status.code() == Some(0), "after SIGTERM it ended with {status}");
        Ok(())
    }

    /// A client that sends each request once, on connections of its own.
    pub(crate) fn client(&self, profile: &str) -> Result<Client> {
        self.client_of(&self.lender.pki().identity(profile)?)
    }

    /// The same, with a further certificate.
    pub(crate) fn client_named(&self, common: &str, unit: Option<&str>) -> Result<Client> {
        self.client_of(&self.lender.pki().issue(common, unit)?)
    }

    fn client_of(&self, identity: &Identity) -> Result<Client> {
        let endpoint = format!("https://{}", self.api());
        self.lender.pki().client(Some(identity), &[endpoint])
    }

    /// The first keys of these contexts.
    pub(crate) async fn create(&self, contexts: &[&str]) -> Result<()> {
        let admin = self.client("admin")?.with_retry(PATIENT);
        for context in contexts {
            let made = admin.create_kek(&CreateKekRequest::new(*context), None).await?;
            ensure!(made.version == 1, "{context}: version {}", made.version);
        }
        Ok(())
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }

    /// What it has said on standard error and in the files of its log.
    pub(crate) fn log(&self) -> String {
        ["log", "logs/error.log", "logs/audit.log"]
            .map(|name| self.read(name))
            .concat()
    }

    pub(crate) fn passed(self) {
        self.lender.passed();
    }
}

/// Version 1's example on its own token, which has a PIN that anybody can guess.
pub(crate) async fn version_1s_site() -> Result<Site> {
    version_1s_site_among(1).await
}

/// The same, beside further nodes of a playground.
pub(crate) async fn version_1s_site_among(nodes: u32) -> Result<Site> {
    let site = Site::among(
        nodes,
        "v1.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("server.crt", "nodes/hsm-node-1/server.crt"),
            ("server.key", "nodes/hsm-node-1/server.key"),
        ],
    )
    .await?;
    fs::write(site.folder.join("pki/revoked.yaml"), "revoked: []\n")?;
    v1_service::make_token(&site.folder.join("softhsm2.conf"))?;
    let ports = format!(
        "port: \"{}\"\n  health_listen: {}\n",
        site.lender.node(1).api_port,
        site.health()
    );
    Ok(site
        .with("port: \"8443\"\n", &ports)?
        .with("\nhsm:\n", "\ndev: true\nhsm:\n")?
        .with_env("HSM_PIN", v1_service::PIN))
}
