//! Nodes with addresses of their own: each in a network namespace that somebody has made, under a bridge. Without it they
//! share the loopback interface.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Where the nodes' namespaces are.
#[derive(Debug, Clone)]
pub struct Subnet {
    /// Node I has the address `A.B.C.I`.
    pub prefix: [u8; 3],
    /// Folder of the namespaces, each under its node's number.
    pub namespaces: PathBuf,
}

impl Subnet {
    /// A node's address.
    #[must_use]
    pub fn host(&self, node: u32) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, u8::try_from(node).unwrap_or(u8::MAX))
    }

    /// `A.B.C`, as `hsmctl dev up --subnet` takes it.
    #[must_use]
    pub fn text(&self) -> String {
        let [a, b, c] = self.prefix;
        format!("{a}.{b}.{c}")
    }

    /// A node's namespace.
    #[must_use]
    pub fn namespace(&self, node: u32) -> PathBuf {
        self.namespaces.join(node.to_string())
    }

    pub(crate) fn node_at(&self, address: IpAddr) -> Result<u32> {
        match address {
            IpAddr::V4(address) if address.octets()[..3] == self.prefix => Ok(u32::from(address.octets()[3])),
            other => bail!("{other}: no node has this address"),
        }
    }

    /// Listens at a node's own address, in its namespace: a socket stays in the one in which it was made.
    pub(crate) fn listen(&self, node: u32, port: u16) -> Result<TcpListener> {
        let (namespace, host) = (self.namespace(node), self.host(node));
        let bound = std::thread::spawn(move || {
            let file = std::fs::File::open(&namespace).with_context(|| namespace.display().to_string())?;
            // This thread alone is moved, and ends.
            setns(file, CloneFlags::CLONE_NEWNET).with_context(|| namespace.display().to_string())?;
            let listener = TcpListener::bind((host, port)).with_context(|| format!("{host}:{port}"))?;
            listener.set_nonblocking(true)?;
            anyhow::Ok(listener)
        });
        bound
            .join()
            .map_err(|_| anyhow!("the thread that listens has panicked"))?
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_known_by_its_address() {
        let subnet = Subnet {
            prefix: [10, 77, 0],
            namespaces: "/run/netns".into(),
        };
        assert_eq!(subnet.host(3), Ipv4Addr::new(10, 77, 0, 3));
        assert_eq!(subnet.node_at(subnet.host(3).into()).unwrap(), 3);
        assert_eq!(subnet.text(), "10.77.0");
        assert_eq!(subnet.namespace(3).to_str(), Some("/run/netns/3"));
        assert!(subnet.node_at("10.78.0.3".parse().unwrap()).is_err());
    }
}
