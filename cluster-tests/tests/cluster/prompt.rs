//! PINs and answers that people type, on a terminal of their own: `script` makes one and hands on what is written to
//! its standard input.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{JoinTokenRequest, KeyState, SlotState, SlotStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;

use crate::common::{CONTEXT, context_on};

/// From a start to the question.
const ASKED_WITHIN: Duration = Duration::from_secs(30);
/// From an answer to what it leads to.
const DONE_WITHIN: Duration = Duration::from_secs(90);
/// What SIGTERM gets.
const STOPPED_WITHIN: Duration = Duration::from_secs(20);

/// A program on a terminal.
struct Typing {
    script: Child,
    keyboard: ChildStdin,
    screen: watch::Receiver<Vec<u8>>,
    /// Of the program, while it may run.
    pid: Option<Pid>,
    terminal: PathBuf,
}

impl Typing {
    /// Starts a shell that says who and where it is, and becomes the program. Echo is on, as it is for people.
    async fn start(command: &mut Command, program: &Path, args: &[&str]) -> Result<Self> {
        let mut line = format!(
            "echo pid=$$ tty=$(tty); exec {}",
            quoted(&program.display().to_string())
        );
        for arg in args {
            line.push(' ');
            line.push_str(&quoted(arg));
        }
        let mut script = command
            .args(["--quiet", "--return", "--echo", "always", "--command"])
            .arg(line)
            .arg("/dev/null")
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .context("script: install bsdutils")?;
        let keyboard = script.stdin.take().context("no stdin")?;
        let mut output = script.stdout.take().context("no stdout")?;
        let (shown, screen) = watch::channel(Vec::new());
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer).await {
                shown.send_modify(|all| all.extend_from_slice(&buffer[..read]));
            }
        });
        let mut typing = Self {
            script,
            keyboard,
            screen,
            pid: None,
            terminal: PathBuf::new(),
        };
        let line = typing.shows("tty=", ASKED_WITHIN).await?;
        let word = |name: &str| -> Result<String> {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            Ok(found
                .with_context(|| format!("no {name} in {line:?}"))?
                .to_owned())
        };
        typing.pid = Some(Pid::from_raw(word("pid=")?.parse()?));
        typing.terminal = PathBuf::from(word("tty=")?);
        Ok(typing)
    }

    /// Everything shown so far.
    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.borrow()).into_owned()
    }

    /// Until this is on the screen; the line from there on, or all that was shown in its place.
    async fn shows(&self, text: &str, limit: Duration) -> Result<String> {
        let shown = until(text, limit, async || {
            let screen = self.screen();
            let line = screen.lines().find(|line| line.contains(text))?;
            // A line of the shell's is whole once another begins.
            (!text.ends_with('=') || screen.contains('\n')).then(|| line.to_owned())
        })
        .await;
        shown.with_context(|| self.screen())
    }

    /// Types a secret, once the terminal shows no keys any more.
    async fn types_unseen(&mut self, secret: &str) -> Result<()> {
        let terminal = self.terminal.clone();
        until("a terminal without echo", ASKED_WITHIN, async || {
            let output = Command::new("stty")
                .arg("-F")
                .arg(&terminal)
                .arg("-a")
                .output()
                .await;
            let modes = String::from_utf8(output.ok()?.stdout).ok()?;
            modes.split_whitespace().any(|mode| mode == "-echo").then_some(())
        })
        .await
        .with_context(|| self.screen())?;
        self.types(secret).await
    }

    async fn types(&mut self, text: &str) -> Result<()> {
        self.keyboard.write_all(format!("{text}\n").as_bytes()).await?;
        Ok(self.keyboard.flush().await?)
    }

    /// How the program ended.
    async fn ended(&mut self, limit: Duration) -> Result<Option<i32>> {
        match tokio::time::timeout(limit, self.script.wait()).await {
            Ok(status) => {
                self.pid = None;
                Ok(status?.code())
            }
            Err(_) => bail!("still running: {}", self.screen()),
        }
    }

    /// Asks the program to end.
    async fn stop(&mut self) -> Result<Option<i32>> {
        kill(self.pid.context("it has ended")?, Signal::SIGTERM).context("SIGTERM")?;
        self.ended(STOPPED_WITHIN).await
    }
}

impl Drop for Typing {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // Nothing can be done about one that cannot be killed.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn secret(cluster: &Playground, file: &str) -> Result<String> {
    let path = cluster.dir().join("secrets").join(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

/// The node's own configuration, but that the PIN of slot 2fa is asked for.
fn asking(cluster: &Playground, node: &Node) -> Result<PathBuf> {
    let config = node.config()?;
    let asking = config.replace("pin_env: HSM_PIN_2FA", "pin_prompt: true");
    ensure!(
        asking != config,
        "the playground's configuration has changed:\n{config}"
    );
    let path = cluster.scratch().join("prompt.yaml");
    std::fs::write(&path, asking)?;
    Ok(path)
}

fn environment(cluster: &Playground, node: &Node) -> Result<Vec<(&'static str, String)>> {
    Ok(vec![
        (
            "SOFTHSM2_CONF",
            node.dir.join("softhsm2.conf").display().to_string(),
        ),
        ("HSM_PIN_EXCHANGE", secret(cluster, "exchange.pin")?),
        ("TOKEN_REPLICATION_KEY", secret(cluster, "replication.key")?),
        ("PATH", std::env::var("PATH")?),
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_is_typed_at_start_and_shown_nowhere() -> Result<()> {
    let cluster = Playground::builder().nodes(1).unformed().start().await?;
    cluster.dev("down", &[]).await?;
    let node = cluster.node(1);
    let (pin, config) = (secret(&cluster, "2fa.pin")?, asking(&cluster, &node)?);
    let config = config.to_str().context("folder is not UTF-8")?;
    let hsm_node = cluster_tests::binary("hsm-node")?;

    // Nobody is asked by --check, and nobody can be asked without a terminal.
    let alone = |more: &[&str]| -> Result<std::process::Output> {
        std::process::Command::new("setsid")
            .arg("--wait")
            .arg(&hsm_node)
            .args(["--config", config])
            .args(more)
            .env_clear()
            .envs(environment(&cluster, &node)?)
            .stdin(Stdio::null())
            .output()
            .context("setsid: install util-linux")
    };
    let checked = alone(&["--check"])?;
    ensure!(checked.status.success(), "{checked:?}");
    let refused = alone(&[])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(78)
            && said.contains("hsm.slots.2fa.pin_prompt: true: there is no terminal")
            && said.contains("pin_file or pin_credential"),
        "{said}"
    );

    let mut command = Command::new("script");
    command.env_clear().envs(environment(&cluster, &node)?);
    let mut typing = Typing::start(&mut command, &hsm_node, &["--config", config]).await?;
    typing
        .shows("PIN of slot 2fa, token slot-2fa:", ASKED_WITHIN)
        .await?;
    typing.types_unseen(&pin).await?;
    let opened = until("both slots open", DONE_WITHIN, async || {
        let status = cluster.status(1).await?;
        let ready = |slot: &SlotStatus| slot.state == SlotState::Ready;
        (status.slots.len() == 2 && status.slots.iter().all(ready)).then_some(())
    })
    .await;
    opened.with_context(|| typing.screen())?;
    let code = typing.stop().await?;
    // What a terminal shows is also what the node logs: its log goes there.
    let screen = typing.screen();
    assert_eq!(code, Some(0), "{screen}");
    ensure!(
        screen.contains("slot open"),
        "the log is not on the screen: {screen}"
    );
    ensure!(!screen.contains(&pin), "the PIN was shown");
    ensure!(!node.log().contains(&pin), "the PIN is in the log");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_waits_for_a_yes_to_the_keys_it_shows() -> Result<()> {
    let cluster = Playground::builder().nodes(2).unformed().start().await?;
    let first = cluster.client_on("admin", 1)?;
    first.cluster_init().await?;
    let request = JoinTokenRequest {
        ttl_seconds: None,
        node_id: Some(cluster.node(2).id()),
    };
    let token = first.create_join_token(&request).await?.into_body();
    let file = cluster.scratch().join("join.json");
    std::fs::write(&file, serde_json::to_vec(&token)?)?;
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let (endpoint, leader) = (
        cluster.node(2).endpoint(),
        format!("127.0.0.1:{}", cluster.node(1).cluster_port),
    );
    let args = [
        "cluster",
        "join",
        "--endpoint",
        &endpoint,
        "--leader",
        &leader,
        "--token-file",
        file.to_str().context("folder is not UTF-8")?,
    ];
    let keys = cluster
        .client_on("admin", 2)?
        .slot_keys()
        .await?
        .into_body()
        .slots;
    assert_eq!(keys.len(), 2, "{keys:?}");
    for (answer, code) in [("no", 1), ("yes", 0)] {
        let mut command = Command::new("script");
        command.env("HSMCTL_PKI", cluster.dir().join("pki"));
        let mut typing = Typing::start(&mut command, &cluster_tests::binary("hsmctl")?, &args).await?;
        typing.shows("Type yes to join", ASKED_WITHIN).await?;
        for key in &keys {
            let (slot, print) = (&key.slot, &key.spki_sha256);
            ensure!(
                typing
                    .screen()
                    .contains(&format!("slot {slot}  node key {print}")),
                "{slot} is not shown: {}",
                typing.screen()
            );
        }
        typing.types(answer).await?;
        let ended = typing.ended(DONE_WITHIN).await?;
        assert_eq!(ended, Some(code), "{answer}: {}", typing.screen());
        let joined = cluster.status(2).await.context("no status")?.raft_id != 0;
        assert_eq!(joined, answer == "yes", "{}", typing.screen());
    }
    cluster.passed();
    Ok(())
}

/// hsmctl on a terminal, as the administrator.
async fn administrator(cluster: &Playground, args: &[&str]) -> Result<Typing> {
    let endpoint = cluster.node(1).endpoint();
    let args = [args, &["--endpoint", &endpoint]].concat();
    let mut command = Command::new("script");
    command
        .env("HSMCTL_PKI", cluster.dir().join("pki"))
        .env("TERM", "xterm")
        .env_remove("HSMCTL_NO_INPUT");
    Typing::start(&mut command, &cluster_tests::binary("hsmctl")?, &args).await
}

async fn state_of_the_first(cluster: &Playground) -> Result<KeyState> {
    let info = context_on(cluster, 1, CONTEXT).await?;
    let first = info.versions.iter().find(|held| held.version == 1);
    Ok(first.context("no version 1")?.state)
}

/// A rotation that takes some seconds: whoever looks is told what is waited for, a log is not.
#[cfg(feature = "failpoints")]
async fn a_long_wait_is_shown_to_people_only(cluster: &Playground) -> Result<()> {
    const TAKES: Duration = Duration::from_secs(3);
    let waiting = format!("rotate {CONTEXT}: waiting for");
    let slow = async || {
        let action = format!("1*sleep({})", TAKES.as_millis());
        cluster_tests::failpoints::arm(&cluster.node(1), "rotation::before_prepare_commit", &action).await
    };
    slow().await?;
    let mut typing = administrator(cluster, &["rotate", CONTEXT]).await?;
    typing.shows(&waiting, ASKED_WITHIN).await?;
    let code = typing.ended(DONE_WITHIN).await?;
    assert_eq!(code, Some(0), "{}", typing.screen());

    slow().await?;
    let began = std::time::Instant::now();
    let piped = cluster.hsmctl(&["rotate", CONTEXT]).await?;
    ensure!(began.elapsed() >= TAKES, "it took {:?}", began.elapsed());
    ensure!(piped.code == Some(0), "{piped:?}");
    ensure!(
        !piped.stderr.contains(&waiting) && !piped.stderr.contains(['\r', '\u{1b}']),
        "{piped:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_destroyed_is_named_by_whoever_destroys_it() -> Result<()> {
    let cluster = Playground::start(1).await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    #[cfg(feature = "failpoints")]
    a_long_wait_is_shown_to_people_only(&cluster).await?;
    let version = format!("{CONTEXT}/v1");
    for (typed, code, state) in [
        ("yes", 1, KeyState::DecryptOnly),
        ("exchange-key/v2", 1, KeyState::DecryptOnly),
        (&*version, 0, KeyState::DestroyScheduled),
    ] {
        let mut typing = administrator(&cluster, &["key", "destroy", &version, "--override"]).await?;
        let question = format!("Type {version} to go on");
        typing.shows(&question, ASKED_WITHIN).await?;
        let before = state_of_the_first(&cluster).await?;
        ensure!(before == KeyState::DecryptOnly, "{before} before it is answered");
        typing.types(typed).await?;
        let ended = typing.ended(DONE_WITHIN).await?;
        assert_eq!(ended, Some(code), "{typed}: {}", typing.screen());
        let after = state_of_the_first(&cluster).await?;
        ensure!(after == state, "{typed}: {after}: {}", typing.screen());
        let refused = typing.screen().contains("not confirmed: nothing was changed");
        ensure!(refused == (code != 0), "{typed}: {}", typing.screen());
    }
    cluster.passed();
    Ok(())
}
