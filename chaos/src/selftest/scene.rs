//! Where a scenario plays: a cluster with its witnesses, and what scripts do over and over.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{failpoints, until};
use hsm_api::admin::ClusterStatus;

use super::{Armed, Case};
use crate::cluster::Cluster;
use crate::ending::{self, Ending, Patience, Witnesses};
use crate::folder::{self, Folder};
use crate::history::Recorder;
use crate::options::{NetworkChoice, Options};
use crate::oracles::{self, Watch, members};
use crate::schedule::PAUSE_MS;
use crate::workload::{Clients, Sealed};

/// The context of all scenarios.
pub(super) const CONTEXT: &str = "exchange-key";
/// Who asks, in the history.
pub(super) const PROCESS: u32 = 900;
/// The watch has looked at everything at least twice, on a slow machine too.
pub(super) const WATCHED: Duration = Duration::from_millis(2500);
/// Whatever a healthy cluster does takes less, on a machine that is busy.
pub(super) const SOON: Duration = Duration::from_secs(60);
/// What is not expected to happen is waited for no longer.
pub(super) const HARDLY: Duration = Duration::from_secs(12);

/// See the module.
pub(super) struct Scene {
    pub(super) cluster: Cluster,
    pub(super) clients: Clients,
    pub(super) recorder: Recorder,
    watch: Watch,
}

impl Scene {
    /// A cluster that has rotated once and has encrypted under both versions, so that every oracle has something to look at.
    pub(super) async fn start(case: &Case, seeded: bool, folder: &Folder) -> Result<Self> {
        let bug = seeded.then_some(case.bug);
        let options = Options {
            seed: 1,
            minutes: 0.0,
            nodes: case.nodes,
            faults: case.faults.iter().copied().collect(),
            pause_ms: PAUSE_MS,
            // Scripts cut single links, which needs no rights.
            network: NetworkChoice::Loopback,
            bug: bug.filter(|_| case.armed == Armed::Always),
            config: None,
            dir: folder.path().to_owned(),
        };
        let mut cluster = Cluster::start(&options).await?;
        // What is on the disk shows why, if anything is not as it should be; the folder of what is goes as a whole.
        cluster.keep();
        let recorder = Recorder::create(&folder.file(folder::HISTORY))?;
        let watch = oracles::watch_first(&cluster, &recorder);
        let clients = Clients::of(&cluster, &recorder)?;
        let scene = Self {
            cluster,
            clients,
            recorder,
            watch,
        };
        let first = scene.seal(1).await?;
        scene.rotate("the-first").await?;
        let second = scene.seal(1).await?;
        scene.open_everywhere(&[&first, &second]).await;
        members::note(&scene.cluster, &scene.recorder).await;
        if let Some(bug) = bug.filter(|_| case.armed == Armed::OnceFormed) {
            for node in scene.cluster.nodes() {
                failpoints::arm(&node, &bug.failpoint(), "return").await?;
            }
        }
        Ok(scene)
    }

    /// Heals, lets the oracles judge.
    pub(super) async fn conclude(self, patience: Patience, folder: &Folder) -> Result<Ending> {
        let Self {
            cluster,
            clients,
            recorder,
            watch,
        } = self;
        drop(clients);
        let witnesses = Witnesses {
            recorder,
            watch,
            workload: None,
        };
        ending::end(&cluster, witnesses, &[], patience, folder).await
    }

    /// Encrypts on a node, and at once, or once it can.
    pub(super) async fn seal(&self, node: u32) -> Result<Sealed> {
        until("an encryption", SOON, async || {
            self.clients.seal(PROCESS, CONTEXT, node).await
        })
        .await
    }

    /// Rotates through all nodes, and says which version was made.
    pub(super) async fn rotate(&self, key: &str) -> Result<u32> {
        let version = self.clients.rotate(PROCESS, CONTEXT, None, key).await;
        version.with_context(|| format!("the rotation under the key `{key}` was not acknowledged"))
    }

    /// Every synchronisation on the disks of these nodes takes so much longer from now on.
    pub(super) fn slow_disks(&self, nodes: &[u32], each: Duration) -> Result<()> {
        let mut nodes = nodes.iter();
        nodes.try_for_each(|node| self.cluster.with_layer(*node, |layer| layer.delay(each)))
    }

    /// Asks every node for these; what it answers is for the oracles.
    pub(super) async fn open_everywhere(&self, all: &[&Sealed]) {
        for node in self.cluster.nodes() {
            for sealed in all {
                let _ = self.clients.open(PROCESS, node.number, sealed).await;
            }
        }
    }

    /// The same of one, on these nodes.
    pub(super) async fn open_on(&self, nodes: &[u32], sealed: &Sealed) {
        for node in nodes {
            let _ = self.clients.open(PROCESS, *node, sealed).await;
        }
    }

    /// Who leads.
    pub(super) async fn leader(&self) -> Result<u32> {
        self.leader_but(&[]).await
    }

    /// Who leads, if none of these does.
    pub(super) async fn leader_but(&self, others: &[u32]) -> Result<u32> {
        until("a leader", SOON, async || {
            let leader = self.cluster.leader_now().await?.node;
            (!others.contains(&leader)).then_some(leader)
        })
        .await
    }

    /// All members but these.
    pub(super) fn others(&self, but: &[u32]) -> Vec<u32> {
        let members = self.cluster.members().into_iter();
        members.filter(|member| !but.contains(member)).collect()
    }

    /// What a node says of itself, once it answers.
    pub(super) async fn status(&self, node: u32) -> Result<ClusterStatus> {
        let what = format!("the status of node {node}");
        until(&what, SOON, async || self.cluster.status(node).await).await
    }

    /// Until these are ready.
    pub(super) async fn ready(&self, nodes: &[u32]) -> Result<()> {
        for number in nodes {
            self.cluster.node(*number).wait_ready(SOON).await?;
        }
        Ok(())
    }

    /// Whether these are ready within a time.
    pub(super) async fn ready_within(&self, nodes: &[u32], limit: Duration) -> bool {
        until("nodes that may never be ready", limit, async || {
            self.all_ready(nodes).await.then_some(())
        })
        .await
        .is_ok()
    }

    /// Whether these are ready now.
    pub(super) async fn all_ready(&self, nodes: &[u32]) -> bool {
        for number in nodes {
            if !self.cluster.node(*number).is_ready().await {
                return false;
            }
        }
        true
    }

    /// SIGKILL to these, and whoever brings others back lets them lie.
    pub(super) async fn kill(&self, nodes: &[u32]) -> Result<()> {
        for number in nodes {
            self.cluster.hold_down(*number, true);
            self.cluster.node(*number).kill().await?;
        }
        Ok(())
    }

    /// Starts one that was killed; returns once it listens.
    pub(super) async fn start_node(&self, number: u32) -> Result<()> {
        self.cluster.hold_down(number, false);
        self.cluster.start_node(number).await
    }

    /// Arms a failpoint on these.
    pub(super) async fn arm(&self, nodes: &[u32], point: &str, action: &str) -> Result<()> {
        for number in nodes {
            failpoints::arm(&self.cluster.node(*number), point, action).await?;
        }
        Ok(())
    }

    /// A command of operators, which has to succeed.
    pub(super) async fn hsmctl(&self, arguments: &[&str]) -> Result<()> {
        let output = self.cluster.playground().hsmctl(arguments).await?;
        let said = output.ok();
        said.map(drop)
            .with_context(|| format!("hsmctl {}", arguments.join(" ")))
    }
}

/// Copies a folder with all that is in it.
pub(super) fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &place)?;
        } else {
            std::fs::copy(entry.path(), &place).with_context(|| place.display().to_string())?;
        }
    }
    Ok(())
}

/// Puts one folder in another's place.
pub(super) fn replace_folder(place: &Path, with: &Path) -> Result<()> {
    ensure!(with.is_dir(), "{}: not there", with.display());
    std::fs::remove_dir_all(place).with_context(|| place.display().to_string())?;
    copy_folder(with, place)
}
