//! Whether a node's ports are free, asked before anything is started: a node that dies of it says so only
//! in its log.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Result, bail};

use super::layout::Node;

/// Refuses ports that somebody listens on.
pub(crate) fn check_free(node: &Node) -> Result<()> {
    for (port, what) in [
        (node.api_port, "API"),
        (node.health_port, "health"),
        (node.cluster_port, "cluster"),
    ] {
        if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            bail!(
                "port {port} ({what} of node {}): {error}; stop what listens there \
                 (`ss -ltnp 'sport = :{port}'` names it), or make a playground in another folder with another --base-port",
                node.number
            );
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_a_remedy() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let node = Node {
            number: 2,
            dir: "/nonexistent".into(),
            api_port: port,
            health_port: port,
            cluster_port: port,
            advertised_port: port,
        };
        let error = check_free(&node).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port} (API of node 2)")), "{error}");
        assert!(error.contains("--base-port"), "{error}");
        drop(taken);
        check_free(&node).unwrap();
    }
}
