//! Whether a node's ports are free, asked before anything is started: a node that dies of it says so only
//! in its log.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::layout::Node;

/// A node that was just killed is gone from the process table a moment before the last of its threads has
/// given its sockets back.
const GIVEN_BACK: Duration = Duration::from_secs(3);

/// Refuses ports that somebody listens on. Of another address than this machine's loopback, only whoever has put it there
/// can say.
pub(crate) fn check_free(node: &Node) -> Result<()> {
    if !node.host.is_loopback() {
        return Ok(());
    }
    for (port, what) in [
        (node.api_port, "API"),
        (node.health_port, "health"),
        (node.cluster_port, "cluster"),
    ] {
        if let Err(error) = bind(port) {
            bail!(
                "port {port} ({what} of node {}): {error}; stop what listens there \
                 (`ss -ltnp 'sport = :{port}'` names it), or make a playground in another folder with another --base-port",
                node.number
            );
        }
    }
    Ok(())
}

fn bind(port: u16) -> std::io::Result<TcpListener> {
    let deadline = Instant::now() + GIVEN_BACK;
    loop {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
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
            host: Ipv4Addr::LOCALHOST,
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
