//! Where the nodes find each other. In the best case each has a network namespace with an address of its own on a bridge, all
//! of it inside a namespace of this program, so that nothing of the machine is touched and everything is gone with the
//! program. Where that is not permitted they share the loopback interface, and relays stand between them.

mod namespaces;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Node, Subnet};
use serde::{Deserialize, Serialize};

use crate::options::NetworkChoice;

/// What [`enter`] has found.
static ENTERED: OnceLock<Result<(), String>> = OnceLock::new();

/// Moves this program into namespaces of its own, where that is permitted and wanted. To be called before it has any threads:
/// a thread that is there already stays where it is. Mounts that are made later vanish with the program.
///
/// # Errors
/// Namespaces were asked for and are not permitted.
pub fn enter(choice: NetworkChoice) -> Result<()> {
    let entered = match choice {
        NetworkChoice::Loopback => {
            // For the mounts alone; where it is not permitted, they are undone one by one.
            let _ = namespaces::own_mounts();
            Err("the loopback interface was asked for".to_owned())
        }
        NetworkChoice::Auto | NetworkChoice::Namespaces => {
            namespaces::enter().map_err(|error| format!("{error:#}"))
        }
    };
    let failed = entered.clone().err();
    ensure!(ENTERED.set(entered).is_ok(), "namespaces are entered once");
    match (choice, failed) {
        (NetworkChoice::Namespaces, Some(why)) => bail!(
            "network namespaces: {why}; run it as root on a kernel with namespaces and bridges, or with --network loopback"
        ),
        _ => Ok(()),
    }
}

/// What the network of a run was, for its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkKind {
    /// A namespace for each node.
    Namespaces,
    /// All on 127.0.0.1, relays between them.
    Loopback,
}

/// The network of one run.
pub(crate) enum Network {
    /// A namespace for each node.
    Namespaces {
        /// Their addresses.
        subnet: Subnet,
        /// What is cut, each from one to another.
        cuts: Mutex<BTreeSet<(u32, u32)>>,
    },
    /// All on 127.0.0.1.
    Loopback {
        /// Why no namespaces.
        why: String,
    },
}

impl Network {
    /// For so many nodes.
    pub(crate) fn make(choice: NetworkChoice, nodes: u32) -> Result<Self> {
        let why = match (choice, ENTERED.get()) {
            (NetworkChoice::Loopback, _) => "the loopback interface was asked for".to_owned(),
            (_, Some(Err(why))) => why.clone(),
            (_, None) => "this program was not moved into namespaces when it began".to_owned(),
            (_, Some(Ok(()))) => {
                let subnet = namespaces::subnet();
                namespaces::make(&subnet, nodes).context("namespaces for the nodes")?;
                return Ok(Self::Namespaces {
                    subnet,
                    cuts: Mutex::default(),
                });
            }
        };
        Ok(Self::Loopback { why })
    }

    pub(crate) fn kind(&self) -> NetworkKind {
        match self {
            Self::Namespaces { .. } => NetworkKind::Namespaces,
            Self::Loopback { .. } => NetworkKind::Loopback,
        }
    }

    pub(crate) fn subnet(&self) -> Option<Subnet> {
        match self {
            Self::Namespaces { subnet, .. } => Some(subnet.clone()),
            Self::Loopback { .. } => None,
        }
    }

    /// For [`cluster_tests::Program::write`]: what takes a node into its namespace.
    pub(crate) fn before_node(&self) -> String {
        match self {
            Self::Namespaces { .. } => format!("nsenter --net=\"${{2%/*}}/{}\" ", namespaces::LINK),
            Self::Loopback { .. } => String::new(),
        }
    }

    /// Where [`Network::before_node`] finds a node's namespace.
    pub(crate) fn link_namespace(&self, node: &Node) -> Result<()> {
        let Self::Namespaces { subnet, .. } = self else {
            return Ok(());
        };
        let link = node.dir.join(namespaces::LINK);
        std::os::unix::fs::symlink(subnet.namespace(node.number), &link)
            .with_context(|| link.display().to_string())
    }

    /// Nothing of `from` reaches `to` any more, and nobody is told.
    pub(crate) fn cut_one_way(&self, from: u32, to: u32) -> Result<()> {
        let Self::Namespaces { subnet, cuts } = self else {
            bail!("without namespaces it is relays that cut");
        };
        namespaces::cut(subnet, from, to)?;
        cuts.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((from, to));
        Ok(())
    }

    pub(crate) fn heal(&self) -> Result<()> {
        let Self::Namespaces { subnet, cuts } = self else {
            return Ok(());
        };
        let mut cuts = cuts.lock().unwrap_or_else(PoisonError::into_inner);
        mend_all(&mut cuts, |from, to| namespaces::mend(subnet, from, to))
    }
}

/// All that can be mended; what cannot is still known to be cut. The first error.
fn mend_all(cuts: &mut BTreeSet<(u32, u32)>, mend: impl Fn(u32, u32) -> Result<()>) -> Result<()> {
    let mut failed = Ok(());
    cuts.retain(|(from, to)| match mend(*from, *to) {
        Ok(()) => false,
        Err(error) => {
            if failed.is_ok() {
                failed = Err(error);
            }
            true
        }
    });
    failed
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Self::Namespaces { .. } = self
            && let Err(error) = namespaces::take_away()
        {
            eprintln!("the nodes' namespaces: {error:#}");
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespaces { subnet, .. } => {
                write!(
                    f,
                    "each in a network namespace of its own at {}.I on a bridge",
                    subnet.text()
                )
            }
            Self::Loopback { why } => write!(f, "over relays on the loopback interface ({why})"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_mended_stays_cut_and_hinders_nothing_else() {
        let mut cuts = BTreeSet::from([(1, 2), (2, 1), (3, 1)]);
        let fails = |from: u32, to: u32| -> Result<()> {
            ensure!((from, to) != (1, 2), "no such device");
            Ok(())
        };
        let failed = mend_all(&mut cuts, fails).unwrap_err();
        assert_eq!(failed.to_string(), "no such device");
        assert_eq!(cuts, BTreeSet::from([(1, 2)]));
        mend_all(&mut cuts, |_, _| Ok(())).unwrap();
        assert!(cuts.is_empty());
    }
}
