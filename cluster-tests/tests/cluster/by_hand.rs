//! hsm-node started by hand, with one configuration and the playground's secrets: how it starts, and how it ends.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;

/// A node that cannot start says so at once; opening two tokens takes a moment.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);
/// From a start to an answer of the API.
pub(crate) const STARTED_WITHIN: Duration = Duration::from_secs(60);

/// How a start ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) said: String,
}

/// hsm-node, started by hand with one configuration and the playground's secrets.
pub(crate) struct Start {
    config: String,
    env: BTreeMap<String, String>,
}

impl Start {
    pub(crate) fn of(cluster: &Playground, node: &Node) -> Result<Self> {
        let secret = |file: &str| -> Result<String> {
            let path = cluster.dir().join("secrets").join(file);
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok(text.trim().to_owned())
        };
        let env = BTreeMap::from([
            (
                "SOFTHSM2_CONF".to_owned(),
                node.dir.join("softhsm2.conf").display().to_string(),
            ),
            ("HSM_PIN_EXCHANGE".to_owned(), secret("exchange.pin")?),
            ("HSM_PIN_2FA".to_owned(), secret("2fa.pin")?),
            ("TOKEN_REPLICATION_KEY".to_owned(), secret("replication.key")?),
        ]);
        Ok(Self {
            config: node.config()?,
            env,
        })
    }

    /// With something replaced that has to be there.
    pub(crate) fn with(mut self, from: &str, to: &str) -> Result<Self> {
        ensure!(
            self.config.contains(from),
            "the playground's configuration has no {from:?}:\n{}",
            self.config
        );
        self.config = self.config.replace(from, to);
        Ok(self)
    }

    /// With an empty data folder of its own: a store that never saw a slot ready.
    pub(crate) fn with_fresh_data(self, node: &Node, data: &Path) -> Result<Self> {
        let old = node.dir.join("data").display().to_string();
        self.with(&old, &data.display().to_string())
    }

    pub(crate) fn with_env(mut self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.env.insert(name.to_owned(), value.to_owned()),
            None => self.env.remove(name),
        };
        self
    }

    pub(crate) fn spawn(&self, scratch: &Path) -> Result<Started> {
        let config = scratch.join("startup.yaml");
        std::fs::write(&config, &self.config)?;
        let mut child = tokio::process::Command::new(cluster_tests::binary("hsm-node")?)
            .arg("--config")
            .arg(&config)
            .env_clear()
            .envs(&self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut stderr = child.stderr.take().context("no stderr")?;
        let said = tokio::spawn(async move {
            let mut bytes = Vec::new();
            let _ = stderr.read_to_end(&mut bytes).await;
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Ok(Started { child, said })
    }

    /// It does not start, and says all of this.
    pub(crate) async fn refused(&self, scratch: &Path, named: &[&str]) -> Result<Ended> {
        let ended = self.spawn(scratch)?.ended(REFUSED_WITHIN).await?;
        ensure!(
            ended.code.is_some_and(|code| code != 0),
            "{named:?}: it started: {}",
            ended.said
        );
        for word in named {
            ensure!(ended.said.contains(word), "{word:?} is not named: {}", ended.said);
        }
        Ok(ended)
    }
}

/// A process of it.
pub(crate) struct Started {
    child: tokio::process::Child,
    said: JoinHandle<String>,
}

impl Started {
    /// Until it is ready; false if it has ended by itself instead.
    pub(crate) async fn gets_ready(&mut self, node: &Node) -> Result<bool> {
        let what = "readiness, or the end of the process";
        let probe = async || match self.child.try_wait() {
            Ok(None) => node.is_ready().await.then_some(Ok(true)),
            Ok(Some(_)) => Some(Ok(false)),
            Err(error) => Some(Err(error)),
        };
        until(what, STARTED_WITHIN, probe).await?.context(what)
    }

    /// Kills it; what it has said.
    pub(crate) async fn kill(mut self) -> Result<String> {
        self.child.kill().await?;
        Ok(self.said.await?)
    }

    /// How it ends by itself; it is killed if it does not in time.
    pub(crate) async fn ended(mut self, limit: Duration) -> Result<Ended> {
        let code = match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(status) => status?.code(),
            Err(_) => {
                self.child.kill().await?;
                None
            }
        };
        Ok(Ended {
            code,
            said: self.said.await?,
        })
    }

    /// Asks it to end.
    pub(crate) fn stop(&self) -> Result<()> {
        let pid = self.child.id().context("it has ended by itself")?;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM).context("SIGTERM")
    }
}
