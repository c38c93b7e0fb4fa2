//! Network namespaces on a bridge, made with `ip` inside namespaces of this program.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cluster_tests::Subnet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// In a node's folder: its namespace.
pub(super) const LINK: &str = "netns";
/// Where `ip` keeps its names of namespaces; in this program's mounts it is empty and its own.
const NAMES: &str = "/run/netns";
const BRIDGE: &str = "chaos";
/// Of an address that nobody on the bridge has: what is sent there is gone without a word.
const NOBODY: &str = "02:00:00:00:00:01";

pub(super) fn subnet() -> Subnet {
    Subnet {
        prefix: [10, 77, 0],
        namespaces: NAMES.into(),
    }
}

/// Mounts of this program alone.
pub(super) fn own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    make_private()
}

fn make_private() -> Result<()> {
    mount(
        None::<&Path>,
        Path::new("/"),
        None::<&Path>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&Path>,
    )
    .context("make the mounts private")
}

/// A network and mounts of this program alone.
pub(super) fn enter() -> Result<()> {
    let before = File::open("/proc/self/ns/net").context("/proc/self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    let entered = try_out();
    if entered.is_err() {
        // Without a bridge there is no use in an empty network.
        setns(before, CloneFlags::CLONE_NEWNET).context("back to the machine's network")?;
    }
    entered
}

/// Everything that a run needs of it.
fn try_out() -> Result<()> {
    make_private()?;
    fs::create_dir_all(NAMES).context(NAMES)?;
    mount(
        Some("chaos"),
        Path::new(NAMES),
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755"),
    )
    .with_context(|| format!("a tmpfs on {NAMES}"))?;
    ip(&["link", "set", "lo", "up"])?;
    let nsenter = Command::new("nsenter").arg("--version").output();
    ensure!(
        nsenter.is_ok_and(|output| output.status.success()),
        "nsenter (util-linux) is not there"
    );
    let subnet = subnet();
    make(&subnet, 1)?;
    take_away()
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("start ip; install iproute2 with scripts/setup.sh packages")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// A bridge, and a namespace under it for each node.
pub(super) fn make(subnet: &Subnet, nodes: u32) -> Result<()> {
    ip(&["link", "add", BRIDGE, "type", "bridge"])?;
    // Its own address is the last one: it is from there that clients and relays reach the nodes.
    let address = format!("{}.254/24", subnet.text());
    ip(&["addr", "add", &address, "dev", BRIDGE])?;
    ip(&["link", "set", BRIDGE, "up"])?;
    for node in 1..=nodes {
        let name = node.to_string();
        let end = end_of(&name);
        ip(&["netns", "add", &name])?;
        ip(&[
            "link", "add", &end, "type", "veth", "peer", "name", "eth0", "netns", &name,
        ])?;
        ip(&["link", "set", &end, "master", BRIDGE, "up"])?;
        let address = format!("{}/24", subnet.host(node));
        ip(&["-n", &name, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
    }
    Ok(())
}

/// The bridge, the nodes' ends, and the namespaces' names; a namespace itself ends with the last process in it, some time
/// later, and would take the node's end with it only then.
pub(super) fn take_away() -> Result<()> {
    ip(&["link", "del", BRIDGE])?;
    for entry in fs::read_dir(NAMES).context(NAMES)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ip(&["link", "del", &end_of(&name)])?;
        ip(&["netns", "del", &name])?;
    }
    Ok(())
}

/// A node's end at the bridge.
fn end_of(name: &str) -> String {
    format!("node{name}")
}

/// Lets one node send to an address that nobody has whatever is for another. A route that refuses would tell it at once.
pub(super) fn cut(subnet: &Subnet, from: u32, to: u32) -> Result<()> {
    let (name, address) = (from.to_string(), subnet.host(to).to_string());
    ip(&[
        "-n",
        &name,
        "neigh",
        "replace",
        &address,
        "lladdr",
        NOBODY,
        "dev",
        "eth0",
        "nud",
        "permanent",
    ])
}

pub(super) fn mend(subnet: &Subnet, from: u32, to: u32) -> Result<()> {
    let (name, address) = (from.to_string(), subnet.host(to).to_string());
    ip(&["-n", &name, "neigh", "del", &address, "dev", "eth0"])
}
