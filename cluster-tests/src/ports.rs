//! Ports for one playground, chosen anew by every test.

use std::net::{Ipv4Addr, TcpListener};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

/// A base port whose ten ports a node are free, below those that the kernel gives to outgoing connections.
pub fn free_base_port(nodes: u32) -> Result<u16> {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    let mut pick = nanos ^ std::process::id().rotate_left(16);
    for _ in 0..200 {
        // Any full-period generator will do.
        pick = pick.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let base = 20_000 + u16::try_from((pick >> 16) % 1150).unwrap_or_default() * 10;
        // One more: tests add a node.
        let ports = 10 * u16::try_from(nodes + 1).unwrap_or_default();
        if (base..base + ports).all(is_free) {
            return Ok(base);
        }
    }
    bail!("no free range of ports between 20000 and 32000: is something listening on all of them?")
}

/// Whether nobody listens on this port of 127.0.0.1.
#[must_use]
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_base_port_leaves_room_for_its_nodes() {
        let base = free_base_port(5).unwrap();
        assert!(
            (20_000..31_500).contains(&base) && base.is_multiple_of(10),
            "{base}"
        );
    }

    #[test]
    fn a_port_is_taken_while_somebody_listens() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
    }
}
