//! Ports for one playground, chosen anew by every test.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use crate::wait::until;

/// Ports of one playground: ten a node.
const BLOCK: u16 = 100;
/// Blocks from 20000 on, below the ports that the kernel gives to outgoing connections.
const BLOCKS: u32 = 115;
/// So many of them are given out. The others are those of playgrounds whose addresses were decided long ago
/// (`scripts/fixture.sh`): what a process was given it keeps until it ends, and one of its tests would wait for another.
const GIVEN: u32 = 110;

/// Longer than any test has its ports.
const OTHERS_END: Duration = Duration::from_secs(600);

/// The blocks that this process has; the kernel gives them back when it ends, however that is.
static TAKEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Those among them that were waited for: one playground of this process after the other may have them.
static KEPT: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// True if no other test has this block, nor this process another time: between choosing ports and listening on
/// them, two tests that start at once would not see each other.
fn take(block: u32) -> Result<bool> {
    let path = std::env::temp_dir().join(format!("hsm-test-ports-{block}.lock"));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let taken = file.try_lock().is_ok();
    if taken {
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    }
    Ok(taken)
}

/// A base port whose ten ports a node are free, and stay this process's as far as other tests are concerned.
pub fn free_base_port(nodes: u32) -> Result<u16> {
    // One more: tests add a node.
    let ports = 10 * u16::try_from(nodes + 1).unwrap_or(u16::MAX / 10);
    ensure!(ports <= BLOCK, "{nodes} nodes need more than {BLOCK} ports");
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    let mut pick = nanos ^ std::process::id().rotate_left(16);
    for _ in 0..200 {
        // Any full-period generator will do.
        pick = pick.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let block = (pick >> 16) % GIVEN;
        let base = 20_000 + u16::try_from(block).unwrap_or_default() * BLOCK;
        if (base..base + ports).all(is_free) && take(block)? {
            return Ok(base);
        }
    }
    bail!("no free range of ports between 20000 and 31000: is something listening on all of them?")
}

/// Waits until no other test has the block that begins with this port: that of a playground whose addresses were decided
/// long ago.
pub async fn wait_for(base: u16) -> Result<()> {
    let block = u32::from(base.saturating_sub(20_000) / BLOCK);
    ensure!(
        base >= 20_000 && (GIVEN..BLOCKS).contains(&block) && (base - 20_000).is_multiple_of(BLOCK),
        "no block of ports that is never given out begins with {base}"
    );
    if kept().contains(&block) {
        return Ok(());
    }
    let what = format!("the ports from {base} on, which other tests have");
    until(&what, OTHERS_END, async || match take(block) {
        Ok(false) => None,
        taken => Some(taken.map(drop)),
    })
    .await??;
    kept().push(block);
    Ok(())
}

fn kept() -> MutexGuard<'static, Vec<u32>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
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
            (20_000..31_000).contains(&base) && base.is_multiple_of(10),
            "{base}"
        );
        let others: Vec<u16> = (0..20).map(|_| free_base_port(5).unwrap()).collect();
        assert!(!others.contains(&base), "{base} was given out twice: {others:?}");
    }

    #[tokio::test]
    async fn a_block_that_is_waited_for_is_none_that_is_given_out_and_may_be_had_again() {
        let last = 20_000 + BLOCK * u16::try_from(BLOCKS - 1).unwrap();
        wait_for(last).await.unwrap();
        wait_for(last).await.unwrap();
        for other in [
            last + 10,
            last + BLOCK,
            20_000 + BLOCK * u16::try_from(GIVEN - 1).unwrap(),
            80,
        ] {
            let said = wait_for(other).await.unwrap_err();
            assert!(said.to_string().contains("never given out"), "{other}: {said}");
        }
    }

    #[test]
    fn a_port_is_taken_while_somebody_listens() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
    }
}
