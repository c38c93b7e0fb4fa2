//! The files of `config-examples/`, run: each in a folder of its own that its relative paths point into, as it stands
//! but for addresses, the cluster's name, and the playground's CA, which is marked DEV.

use std::fs::{self, DirBuilder, OpenOptions};
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

use crate::common::{CONTEXT, Sealed, open, seal_under};

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// Until a node listens, and until it is ready.
const STARTED: Duration = Duration::from_secs(30);
/// The examples' own drain is 1 s and 10 s.
const STOPPED: Duration = Duration::from_secs(30);
/// For changes: a node that has just started makes its slots' transport keys first.
const PATIENT: Retry = Retry::Until(Duration::from_secs(30));

/// Where one example is started.
pub(crate) struct Site {
    /// Lends certificates and ports; its own node does not run.
    lender: Playground,
    pub(crate) folder: PathBuf,
    pub(crate) config: String,
    env: Vec<(&'static str, String)>,
}

impl Site {
    /// The example with this name, and the playground's certificates under the names it has for them.
    pub(crate) async fn of(example: &str, certificates: &[(&str, &str)]) -> Result<Self> {
        let lender = Playground::builder().nodes(1).unformed().start().await?;
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
        for (name, lent) in certificates {
            let lent = lender.pki().dir().join(lent);
            // With its mode: a private key is closed to others.
            fs::copy(&lent, folder.join("pki").join(name)).with_context(|| lent.display().to_string())?;
        }
        let softhsm = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
            folder.join("tokens").display()
        );
        fs::write(folder.join("softhsm2.conf"), softhsm)?;
        let env = vec![(
            "SOFTHSM2_CONF",
            folder.join("softhsm2.conf").display().to_string(),
        )];
        Ok(Self {
            lender,
            folder,
            config,
            env,
        })
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

    fn cluster(&self) -> String {
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
    fn hsm_node(&self) -> Result<Command> {
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
    async fn check(&self) -> Result<()> {
        // It takes both outputs.
        let output = self.command()?.arg("--check").output().await?;
        ensure!(
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("config.yaml: ok"),
            "--check: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(!self.folder.join("data").exists(), "--check made a data folder");
        Ok(())
    }

    /// Starts the node; returns once it listens.
    pub(crate) async fn start(&self) -> Result<Child> {
        self.started(self.command()?).await
    }

    async fn started(&self, mut command: Command) -> Result<Child> {
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
    async fn create(&self, contexts: &[&str]) -> Result<()> {
        let admin = self.client("admin")?.with_retry(PATIENT);
        for context in contexts {
            let made = admin.create_kek(&CreateKekRequest::new(*context), None).await?;
            ensure!(made.version == 1, "{context}: version {}", made.version);
        }
        Ok(())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    pub(crate) fn passed(self) {
        self.lender.passed();
    }
}

/// Encrypts, rotates, is killed, comes back with everything, and ends when it is told to.
async fn serves_alone(site: &Site) -> Result<()> {
    site.check().await?;
    let mut node = site.start().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let (trading, other) = (site.client("trading-1")?, site.client("2fa-1")?);
    let code = seal_under(&other, "2fa", b"123456", 1).await?;
    let before = seal_under(&trading, CONTEXT, b"before", 1).await?;
    let rotated = site
        .client("admin")?
        .with_retry(PATIENT)
        .rotate(CONTEXT, None)
        .await?;
    ensure!(rotated.version == 2, "rotated to version {}", rotated.version);
    let after = seal_under(&trading, CONTEXT, b"after", 2).await?;

    node.kill().await?;
    let node = site.start().await?;
    site.wait_ready().await?;
    let (trading, other) = (site.client("trading-1")?, site.client("2fa-1")?);
    for sealed in [&before, &after] {
        open(&trading, CONTEXT, sealed).await?;
    }
    open(&other, "2fa", &code).await?;
    drop((trading, other));
    site.stop(node).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_standalone_example_founds_itself_and_survives_a_kill() -> Result<()> {
    let site = Site::of(
        "standalone.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("server.crt", "nodes/hsm-node-1/server.crt"),
            ("server.key", "nodes/hsm-node-1/server.key"),
        ],
    )
    .await?;
    site.token("slot-exchange", "secrets/exchange.pin")?;
    site.token("slot-2fa", "credentials/hsm-pin-2fa")?;
    let (api, health) = (site.api(), site.health());
    let credentials = site.folder.join("credentials").display().to_string();
    let site = site
        .with("127.0.0.1:8443", &api)?
        .with("127.0.0.1:8444", &health)?
        .with("data_dir: data\n", "data_dir: data\ndev: true\n")?
        .with_env("CREDENTIALS_DIRECTORY", credentials);
    serves_alone(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

async fn founds(site: &Site) -> Result<()> {
    site.check().await?;
    let node = site.start().await?;
    site.client("admin")?.with_retry(PATIENT).cluster_init().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let trading = site.client("trading-1")?;
    let sealed = seal_under(&trading, CONTEXT, b"text", 1).await?;
    open(&trading, CONTEXT, &sealed).await?;
    drop(trading);
    site.stop(node).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_a_clusters_node_founds_one() -> Result<()> {
    let site = Site::of(
        "cluster-node.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("node1.crt", "nodes/hsm-node-1/server.crt"),
            ("node1.key", "nodes/hsm-node-1/server.key"),
            ("cluster-ca.crt", "cluster-ca.crt"),
            ("node1-cluster.crt", "nodes/hsm-node-1/cluster.crt"),
            ("node1-cluster.key", "nodes/hsm-node-1/cluster.key"),
        ],
    )
    .await?;
    let exchange = site.token("slot-exchange", "secrets/exchange.pin")?;
    let two_factor = site.token("slot-2fa", "secrets/2fa.pin")?;
    let (api, health, cluster) = (site.api(), site.health(), site.cluster());
    let site = site
        .with("127.0.0.1:8443", &api)?
        .with("127.0.0.1:8444", &health)?
        .with("127.0.0.1:8445", &cluster)?
        .with("\ndev: false\n", "\ndev: true\n")?
        .with("name: production", "name: playground")?
        .with_env("HSM_PIN_EXCHANGE", exchange)
        .with_env("HSM_PIN_2FA", two_factor)
        .with_env("TOKEN_REPLICATION_KEY", "5a".repeat(32));
    founds(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}

/// What version 1's users have: one token with a PIN that anybody can guess.
async fn serves_as_version_1_did(site: &Site) -> Result<()> {
    site.check().await?;
    let node = site.start().await?;
    site.wait_ready().await?;
    site.create(&[CONTEXT, "2fa"]).await?;
    let trading = site.client("trading-1")?;
    let sealed = seal_under(&trading, CONTEXT, b"text", 1).await?;
    open(&trading, CONTEXT, &sealed).await?;
    drop(trading);
    site.stop(node).await?;
    let log = site.log();
    for warned in [
        "its PIN may be short, as in v1",
        "metadata_file",
        "initial_window_size",
    ] {
        ensure!(log.contains(warned), "no word of {warned:?}");
    }
    serves_by_variables(site, &sealed).await
}

/// The same node, told by version 1's variables. What its file says of the same things it could not start with.
async fn serves_by_variables(site: &Site, sealed: &Sealed) -> Result<()> {
    let at = |name: &str| site.folder.join(name);
    // Under names that only the variables have.
    std::os::unix::fs::symlink(MODULE, at("module.so"))?;
    for (name, of_the_example) in [
        ("a.crt", "ca.crt"),
        ("s.crt", "server.crt"),
        ("s.key", "server.key"),
    ] {
        fs::rename(at("pki").join(of_the_example), at(name))?;
    }
    let config = format!(
        "dev: true\nserver:\n  listen: 127.0.0.1:1\n  health_listen: {}\n  \
         tls: {{ca_path: absent, cert_path: absent, key_path: absent}}\n\
         hsm:\n  pkcs11_lib: /absent\n  slot_id: absent\n  keys: {{exchange-key: {{mode: shared}}, 2fa: {{}}}}\n\
         logging: {{level: error, format: json}}\n",
        site.health()
    );
    fs::write(at("by-variables.yaml"), config)?;
    fs::remove_file(at("config.yaml"))?;
    let port = site.lender.node(1).api_port.to_string();
    let before = site.log().len();
    let mut command = site.hsm_node()?;
    command.envs([
        ("CONFIG_PATH", "by-variables.yaml"),
        ("HSM_SERVER_PORT", port.as_str()),
        ("HSM_SERVER_CERT", "s.crt"),
        ("HSM_SERVER_KEY", "s.key"),
        ("HSM_SERVER_CA", "a.crt"),
        ("HSM_PKCS11_LIB", "./module.so"),
        ("HSM_SLOT_ID", "hsm-token"),
        ("HSM_PIN", "1234"),
        ("HSM_LOG_LEVEL", "info,hsm_node=debug"),
        ("HSM_LOG_FORMAT", "text"),
    ]);
    let node = site.started(command).await?;
    site.wait_ready().await?;
    let trading = site.client("trading-1")?;
    open(&trading, CONTEXT, sealed).await?;
    seal_under(&trading, CONTEXT, b"by variables", 1).await?;
    drop(trading);
    site.stop(node).await?;
    let log = site.log();
    let lines: Vec<&str> = log.get(before..).unwrap_or_default().lines().collect();
    let first = lines.first().context("it has logged nothing")?;
    ensure!(!first.starts_with('{'), "that is JSON: {first}");
    ensure!(
        lines
            .iter()
            .any(|line| line.contains("DEBUG") && line.contains("hsm_node")),
        "nothing of level debug"
    );
    Ok(())
}

/// Version 1's example on its own token, which has a PIN that anybody can guess.
pub(crate) async fn version_1s_site() -> Result<Site> {
    let site = Site::of(
        "v1.yaml",
        &[
            ("ca.crt", "ca.crt"),
            ("server.crt", "nodes/hsm-node-1/server.crt"),
            ("server.key", "nodes/hsm-node-1/server.key"),
        ],
    )
    .await?;
    fs::write(site.folder.join("pki/revoked.yaml"), "revoked: []\n")?;
    let made = std::process::Command::new("softhsm2-util")
        .args(["--init-token", "--free", "--label", "hsm-token"])
        .args(["--so-pin", "12345678", "--pin", "1234"])
        .env("SOFTHSM2_CONF", site.folder.join("softhsm2.conf"))
        .output()
        .context("softhsm2-util: install softhsm2")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ports = format!(
        "port: \"{}\"\n  health_listen: {}\n",
        site.lender.node(1).api_port,
        site.health()
    );
    Ok(site
        .with("port: \"8443\"\n", &ports)?
        .with("\nhsm:\n", "\ndev: true\nhsm:\n")?
        .with_env("HSM_PIN", "1234"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_1s_example_warns_and_serves() -> Result<()> {
    let site = version_1s_site().await?;
    serves_as_version_1_did(&site).await.with_context(|| site.log())?;
    site.passed();
    Ok(())
}
