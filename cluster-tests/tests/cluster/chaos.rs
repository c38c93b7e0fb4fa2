//! The chaos program itself: a short run ends well, and so does what is played again of it; one that is told to stop takes its nodes
//! with it, and says what it has found until then.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{ports, until};
use hsm_api::client::HealthClient;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

const NODES: u16 = 3;
/// Beyond the time it was given: making a cluster, restarts, checking everything at the end.
const PATIENCE: Duration = Duration::from_secs(300);
/// To notice a signal and to end its nodes.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);

/// A run of chaos. One that still goes on is told to stop, so that its nodes do not outlive a failed test.
struct Run {
    child: Child,
    folder: TempDir,
    base_port: OnceCell<u16>,
}

impl Run {
    fn start(seed: u64, minutes: &str, network: &str, faults: &str) -> Result<Self> {
        Self::chaos(&["run"], seed, minutes, network, faults)
    }

    /// The same, of which the folder is kept, whatever comes of it.
    fn kept(seed: u64, minutes: &str, network: &str, faults: &str) -> Result<Self> {
        Self::chaos(&["run", "--keep"], seed, minutes, network, faults)
    }

    fn chaos(command: &[&str], seed: u64, minutes: &str, network: &str, faults: &str) -> Result<Self> {
        let (seed, nodes) = (seed.to_string(), NODES.to_string());
        let mut arguments = command.to_vec();
        arguments.extend(["--seed", &seed, "--minutes", minutes, "--nodes", &nodes]);
        arguments.extend(["--network", network, "--faults", faults]);
        Self::begin(&arguments)
    }

    /// What is in the folder of a run is played again, and kept.
    fn replay(recorded: &Path) -> Result<Self> {
        let recorded = recorded.to_str().context("folder is not UTF-8")?;
        Self::begin(&["replay", recorded, "--keep"])
    }

    fn begin(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("hsm-chaos-").tempdir()?;
        let said = File::create(folder.path().join("said"))?;
        let child = Command::new(cluster_tests::binary("chaos")?)
            .args(arguments)
            .arg("--dir")
            .arg(folder.path().join("run"))
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .context("start chaos")?;
        Ok(Self {
            child,
            folder,
            base_port: OnceCell::new(),
        })
    }

    /// The first port of its nodes, once its playground is there.
    fn base_port(&self) -> Option<u16> {
        if self.base_port.get().is_none()
            && let Some(port) = base_port_in(&self.folder.path().join("run"))
        {
            let _ = self.base_port.set(port);
        }
        self.base_port.get().copied()
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("said")).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("{signal} to chaos"))
    }

    async fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        let ended = until("the end of chaos", limit, async || child.try_wait().transpose()).await;
        ended.with_context(|| self.said())?.context("wait for chaos")
    }

    /// What it said by the time at which it had passed.
    async fn passes(&mut self) -> Result<String> {
        let status = self.ended(PATIENCE).await?;
        let said = self.said();
        ensure!(
            status.success() && said.contains("verdict: pass"),
            "{status}: {said}"
        );
        Ok(said)
    }

    /// Whether `/readyz` of each of its nodes is 200.
    async fn ready(&self) -> Vec<bool> {
        let mut ready = Vec::new();
        for node in 0..NODES {
            let Some(base_port) = self.base_port() else {
                return vec![false; usize::from(NODES)];
            };
            let port = base_port + 10 * node + 1;
            ready.push(HealthClient::new(&format!("127.0.0.1:{port}")).is_ready().await);
        }
        ready
    }

    /// Until the readiness of its nodes is as wanted.
    async fn until_ready(&self, what: &str, wanted: impl Fn(&[bool]) -> bool) -> Result<()> {
        until(what, PATIENCE, async || wanted(&self.ready().await).then_some(()))
            .await
            .with_context(|| self.said())
    }

    /// No node of it is left.
    async fn check_ended(&self) -> Result<()> {
        // A process is gone a moment before its sockets are.
        if let Some(base_port) = self.base_port() {
            until("free ports", STOPPED_WITHIN, async || {
                let mut used = base_port..base_port + 10 * NODES;
                used.all(ports::is_free).then_some(())
            })
            .await
            .with_context(|| self.said())?;
        }
        Ok(())
    }

    /// Nothing of it is left: no listener, no folder.
    async fn check_gone(&self) -> Result<()> {
        self.check_left(&["said"]).await
    }

    /// No listener of it is left, and beside what it said no folder but its own, which was to be kept.
    async fn check_kept(&self) -> Result<()> {
        ensure!(
            self.base_port().is_some(),
            "its cluster was not kept: {}",
            self.said()
        );
        self.check_left(&["run", "said"]).await
    }

    async fn check_left(&self, wanted: &[&str]) -> Result<()> {
        self.check_ended().await?;
        let mut left = Vec::new();
        for entry in std::fs::read_dir(self.folder.path())? {
            left.push(entry?.file_name());
        }
        left.sort();
        ensure!(left == wanted, "left behind: {left:?}, {wanted:?} wanted");
        Ok(())
    }

    /// A file of the run's folder.
    fn file(&self, name: &str) -> Result<Value> {
        let path = self.folder.path().join("run").join(name);
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// Numbers and kinds of the planned steps that were carried out. What comes besides comes while there is time.
    fn fired(&self) -> Result<BTreeSet<(u64, String)>> {
        let number = |value: &Value| value.as_u64().context("no number of a step");
        let plan = self.file("plan.json")?;
        let steps = plan["steps"].as_array().context("no steps")?.iter();
        let planned: BTreeSet<u64> = steps.map(|step| number(&step["number"])).collect::<Result<_>>()?;
        let mut fired = BTreeSet::new();
        for one in self.file("fired.json")?.as_array().context("nothing fired")? {
            let step = number(&one["step"])?;
            let kind = one["kind"].as_str().context("no kind")?;
            if planned.contains(&step) {
                fired.insert((step, kind.to_owned()));
            }
        }
        ensure!(fired.len() == planned.len(), "{fired:?} of {planned:?}");
        Ok(fired)
    }

    /// What it was stopped in has been judged, and is kept; judged again it is the same.
    async fn check_judged(&self) -> Result<()> {
        self.check_ended().await?;
        let said = self.said();
        ensure!(
            said.contains("planned faults were left out: the run was told to stop"),
            "{said}"
        );
        let folder = self.folder.path().join("run");
        for name in ["fired.json", "observed.json", "ended.json", "verdict.json"] {
            ensure!(folder.join(name).is_file(), "no {name}: {said}");
        }
        let again = Command::new(cluster_tests::binary("chaos")?)
            .arg("check")
            .arg(&folder)
            .output()
            .context("start chaos check")?;
        let again = String::from_utf8_lossy(&again.stdout).into_owned();
        let verdict = again.lines().find(|line| line.starts_with("verdict: "));
        let verdict = verdict.with_context(|| format!("no verdict: {again}"))?;
        ensure!(
            said.contains(verdict) && !verdict.contains("violation"),
            "{again}\n{said}"
        );
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// What `hsmctl dev` has noted in the playground of a run.
fn base_port_in(run: &Path) -> Option<u16> {
    let playgrounds = std::fs::read_dir(run).ok()?.flatten();
    playgrounds
        .filter_map(|entry| std::fs::read(entry.path().join("playground/playground.json")).ok())
        .filter_map(|text| serde_json::from_slice::<Value>(&text).ok())
        .find_map(|facts| facts["base_port"].as_u64()?.try_into().ok())
}

pub(crate) async fn a_short_run_of_chaos_finds_nothing_and_nor_does_its_replay() -> Result<()> {
    // One of each kind; the leader is away for two elections, so that somebody else leads before it is back.
    let faults = "kill-leader,kill-all,pause,leader-in-minority";
    let mut recorded = Run::kept(80, "0.25", "loopback", faults)?;
    recorded.passes().await?;
    recorded.check_kept().await?;
    // What is carried out again is the plan that lies there, and not what the seed gives.
    let mut plan = recorded.file("plan.json")?;
    ensure!(lengthen_pauses(&mut plan) > 0, "nobody is paused: {plan}");
    std::fs::write(
        recorded.folder.path().join("run/plan.json"),
        serde_json::to_vec(&plan)?,
    )?;
    let mut again = Run::replay(&recorded.folder.path().join("run"))?;
    let said = again.passes().await?;
    ensure!(
        said.contains("the recorded history, judged again:\nverdict: pass\n")
            && said.matches("verdict: pass").count() == 2,
        "{said}"
    );
    again.check_kept().await?;
    for name in ["plan.json", "options.json"] {
        let (then, now) = (recorded.file(name)?, again.file(name)?);
        ensure!(now == then, "{name}: {now}\nwas {then}");
    }
    let (then, now) = (recorded.fired()?, again.fired()?);
    ensure!(now == then, "carried out: {now:?}, then {then:?}");
    Ok(())
}

/// A tenth of an election time-out more for each pause; how many there are.
fn lengthen_pauses(plan: &mut Value) -> usize {
    match plan {
        Value::Object(fields) => {
            let mut found = 0;
            for (name, value) in fields {
                match value.as_u64().filter(|_| name == "tenths") {
                    Some(tenths) => {
                        *value = Value::from(tenths + 1);
                        found += 1;
                    }
                    None => found += lengthen_pauses(value),
                }
            }
            found
        }
        Value::Array(items) => items.iter_mut().map(lengthen_pauses).sum(),
        _ => 0,
    }
}

/// Where links are cut by routes: a link that could not be cut would make the run inconclusive.
pub(crate) async fn a_short_run_on_a_bridge_finds_nothing() -> Result<()> {
    if !namespaces_are_permitted()? {
        return Ok(());
    }
    let faults = "kill-leader,leader-in-minority,one-way,bridge";
    let said = passes(Run::start(81, "0.25", "namespaces", faults)?).await?;
    ensure!(said.contains("each in a network namespace of its own"), "{said}");
    Ok(())
}

/// What it said, having left nothing behind.
async fn passes(mut run: Run) -> Result<String> {
    let said = run.passes().await?;
    run.check_gone().await?;
    Ok(said)
}

/// Whether this user and this kernel let a program have a network of its own with a bridge in it. That a tool for it is missing is a
/// failure: then every run would fall back to relays, and nobody would notice.
fn namespaces_are_permitted() -> Result<bool> {
    // In namespaces of its own, which end with it.
    let tried = Command::new("unshare")
        .args(["--net", "--mount"])
        .args(["ip", "link", "add", "chaos-try", "type", "bridge"])
        .stdin(Stdio::null())
        .output()
        .context("start unshare (util-linux)")?;
    if tried.status.success() {
        return Ok(true);
    }
    let why = String::from_utf8_lossy(&tried.stderr);
    let refused = [
        "Operation not permitted",
        "Operation not supported",
        "Permission denied",
        "Unknown device type",
    ];
    ensure!(
        refused.iter().any(|text| why.contains(text)),
        "a bridge in a network namespace: {}: {why}",
        tried.status
    );
    eprintln!(
        "NOT TESTED: network namespaces: they are not permitted here: {}",
        why.trim()
    );
    Ok(false)
}

pub(crate) async fn a_signal_ends_chaos_and_its_nodes() -> Result<()> {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut run = Run::start(11, "30", "loopback", "kill-leader,kill-all")?;
        // Once while the cluster comes up, once among kills: then it ends by itself.
        run.until_ready("its first node", |nodes| nodes[0]).await?;
        if signal == Signal::SIGTERM {
            run.until_ready("all nodes", |nodes| nodes.iter().all(|ready| *ready))
                .await?;
            run.until_ready("a kill", |nodes| !nodes.iter().all(|ready| *ready))
                .await?;
        }
        run.signal(signal)?;
        let judges = signal == Signal::SIGTERM;
        let status = run.ended(if judges { PATIENCE } else { STOPPED_WITHIN }).await?;
        ensure!(status.code() == Some(code), "{signal}: {status}: {}", run.said());
        let left = if judges {
            run.check_judged().await
        } else {
            run.check_gone().await
        };
        left.with_context(|| signal.to_string())?;
    }
    Ok(())
}
