//! What is put around a node before its first start: a disk of its own with a layer that can lose writes, a shim before its
//! tokens, a configuration with logs that end soon.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Shim, shim::SOFTHSM, wall_clock};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Cluster, KEEP_LOGS, SNAPSHOT_EVERY, lock};
use crate::faults::unsynced::Layer;
use crate::schedule::FaultKind;
use crate::workload;

/// Of a disk that can be filled: a store of these runs takes a tenth of it.
const DISK: &str = "size=128m,mode=0700";
/// What fills it.
const BALLAST: &str = "ballast";

/// What one node has around it.
#[derive(Default)]
pub(crate) struct Equipment {
    shim: Option<Shim>,
    disk: Option<Disk>,
}

impl Equipment {
    /// The shim before its tokens.
    pub(crate) fn shim(&self) -> Option<&Shim> {
        self.shim.as_ref()
    }

    /// The layer under its data.
    pub(crate) fn layer(&self) -> Option<&Layer> {
        self.disk.as_ref().and_then(|disk| disk.layer.as_ref())
    }

    /// Its disk, if it has one that can be filled.
    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref().filter(|disk| disk.fills)
    }

    /// The shim obeys nobody, the layer is honest, the disk has room.
    pub(crate) fn heal(&self) -> Result<()> {
        if let Some(shim) = &self.shim {
            shim.obey(&[])?;
        }
        if let Some(layer) = self.layer() {
            layer.be_honest();
        }
        match self.disk() {
            Some(disk) => disk.make_room(),
            None => Ok(()),
        }
    }

    /// Unmounts what is mounted; what was on it stays in the folder if that is to be looked at.
    pub(crate) fn take_away(mut self, keep: bool) -> Result<()> {
        match &mut self.disk {
            Some(disk) => disk.unmount(keep),
            None => Ok(()),
        }
    }
}

/// A node's `data`, on something of its own.
pub(crate) struct Disk {
    /// `DIR/nodeI/disk`: what is really written.
    own: PathBuf,
    /// `DIR/nodeI/data`: what the node sees.
    data: PathBuf,
    /// It is a file system of its own, with an end.
    fills: bool,
    layer: Option<Layer>,
    /// Without a layer, it is there a second time.
    bound: bool,
}

impl Disk {
    fn mount(node: &Node, fills: bool, layer: bool) -> Result<Self> {
        let (own, data) = (node.dir.join("disk"), node.dir.join("data"));
        for folder in [&own, &data] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let mut disk = Self {
            own,
            data,
            fills: false,
            layer: None,
            bound: false,
        };
        if fills {
            mount(
                Some("chaos"),
                &disk.own,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(DISK),
            )
            .with_context(|| format!("mount a tmpfs on {}; this needs root", disk.own.display()))?;
            disk.fills = true;
        }
        if layer {
            disk.layer = Some(Layer::mount(&disk.own, &disk.data)?);
        } else {
            let none = None::<&Path>;
            mount(Some(&disk.own), &disk.data, none, MsFlags::MS_BIND, none)
                .with_context(|| format!("mount {} on {}", disk.own.display(), disk.data.display()))?;
            disk.bound = true;
        }
        Ok(disk)
    }

    /// Fills it to its last byte.
    pub(crate) fn fill(&self) -> Result<u64> {
        let path = self.own.join(BALLAST);
        let mut file = fs::File::create(&path).with_context(|| path.display().to_string())?;
        let mut written = 0;
        for size in [64 * 1024, 4096, 1] {
            let block = vec![0x55; size];
            loop {
                match file.write(&block) {
                    Ok(count) => written += count as u64,
                    Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).with_context(|| path.display().to_string()),
                }
            }
        }
        Ok(written)
    }

    /// Removes what fills it.
    pub(crate) fn make_room(&self) -> Result<()> {
        match fs::remove_file(self.own.join(BALLAST)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| self.own.display().to_string())
            }
            _ => Ok(()),
        }
    }

    fn unmount(&mut self, keep: bool) -> Result<()> {
        if !self.fills && !self.bound && self.layer.is_none() {
            return Ok(());
        }
        self.make_room()?;
        let mut written = self.own.clone();
        if let Some(layer) = self.layer.take() {
            written = layer.below().to_owned();
            layer.unmount()?;
        }
        if std::mem::take(&mut self.bound) {
            umount2(&self.data, MntFlags::MNT_DETACH)
                .with_context(|| format!("unmount {}", self.data.display()))?;
        }
        if keep {
            // To be looked at: the folder itself stands where the mount was.
            copy(&written.join("."), &self.data)?;
        }
        if std::mem::take(&mut self.fills) {
            umount2(&self.own, MntFlags::MNT_DETACH)
                .with_context(|| format!("unmount {}", self.own.display()))?;
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = self.unmount(false) {
            eprintln!("{error:#}");
        }
    }
}

/// With everything that belongs to it.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp")
        .arg("-a")
        .args([from, to])
        .output()
        .context("start cp")?;
    ensure!(
        output.status.success(),
        "cp -a {} {}: {}",
        from.display(),
        to.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

impl Cluster {
    /// Puts around a node what the faults of this run need. It has never run.
    pub(crate) fn equip(&self, node: &Node) -> Result<()> {
        let wants = |fits: fn(FaultKind) -> bool| self.kinds.iter().copied().any(fits);
        let fills = self.kinds.contains(&FaultKind::DiskFull);
        let layer = wants(FaultKind::needs_layer);
        let mut equipment = Equipment::default();
        if fills || layer {
            equipment.disk = Some(Disk::mount(node, fills, layer)?);
        }
        let mut config = node.config()?;
        if wants(FaultKind::needs_shim) {
            let shim = Shim::build(&node.dir, "shim", Path::new(SOFTHSM))?;
            config = with_module(&config, shim.library())?;
            equipment.shim = Some(shim);
        }
        // From here on it is taken away with the cluster, whatever else fails.
        lock(&self.equipment).insert(node.number, equipment);
        // Some failpoints are where snapshots are made.
        if self.tries(FaultKind::IsolateUntilSnapshot) || self.tries(FaultKind::Failpoint) {
            config = with_short_logs(&config)?;
        }
        config = workload::configured(&config);
        if let Some(change) = self.config {
            config = change(&config);
        }
        node.set_config(&config)?;
        if self.kinds.contains(&FaultKind::ClockStep) {
            wall_clock::set(node, "+0d")?;
        }
        self.network.link_namespace(node)
    }

    /// A new node, made as the others were.
    pub(crate) async fn prepare_node(&self) -> Result<Node> {
        let node = self.playground.prepare_node().await?;
        self.equip(&node)?;
        Ok(node)
    }
}

fn with_module(config: &str, library: &Path) -> Result<String> {
    let named = serde_json::to_string(library)?;
    let mut found = false;
    let lines: Vec<String> = config
        .lines()
        .map(|line| match line.strip_prefix("  pkcs11_lib: ") {
            Some(_) => {
                found = true;
                format!("  pkcs11_lib: {named}")
            }
            None => line.to_owned(),
        })
        .collect();
    ensure!(
        found,
        "the playground's configuration names no pkcs11_lib:\n{config}"
    );
    Ok(lines.join("\n") + "\n")
}

fn with_short_logs(config: &str) -> Result<String> {
    let raft = format!(
        "cluster:\n  raft: {{snapshot_every: {SNAPSHOT_EVERY}, keep_logs: {KEEP_LOGS}}}\n  enabled: true\n"
    );
    let changed = config.replace("cluster:\n  enabled: true\n", &raft);
    ensure!(
        changed != config,
        "the playground's configuration has another cluster section:\n{config}"
    );
    Ok(changed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const CONFIG: &str = "hsm:\n  pkcs11_lib: \"/usr/lib/x.so\"\n  slots: {}\ncluster:\n  enabled: true\n  mode: active-active\n";

    #[test]
    fn a_configuration_gets_its_module_and_its_short_logs() {
        let changed = with_module(CONFIG, Path::new("/it's/a.so")).unwrap();
        assert!(
            changed.contains("  pkcs11_lib: \"/it's/a.so\"\n  slots"),
            "{changed}"
        );
        assert!(!changed.contains("x.so"));
        let changed = with_short_logs(CONFIG).unwrap();
        assert!(
            changed.contains("snapshot_every: 100, keep_logs: 50"),
            "{changed}"
        );
        assert!(with_module("hsm: {}\n", Path::new("/a")).is_err());
        assert!(with_short_logs("cluster: {}\n").is_err());
    }
}
