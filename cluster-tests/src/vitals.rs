//! What nodes look like from outside while something is done to them: how long their probes take, and how much memory
//! one of them has. Looked at from a thread of its own with nothing but sockets, so that a test that is busy does not
//! take its own waiting for a node's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::node::Node;

/// Between two rounds of probes.
const EVERY: Duration = Duration::from_millis(200);
/// A probe that takes longer is given up.
const GIVEN_UP: Duration = Duration::from_secs(5);

/// One `/readyz`.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The node's number.
    pub node: u32,
    /// When it was begun.
    pub began: Instant,
    /// From connecting to the end of the answer.
    pub took: Duration,
    /// The answer's status, or why there was none.
    pub status: Result<u16, String>,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// In the order in which they were asked.
    pub probes: Vec<Probe>,
    /// Resident bytes of the node that was watched, and when.
    pub resident: Vec<(Instant, u64)>,
}

impl Seen {
    /// The most memory that the node had from one moment to another; nothing if nobody looked.
    #[must_use]
    pub fn most_resident(&self, from: Instant, to: Instant) -> Option<u64> {
        let within = self.resident.iter().filter(|(at, _)| (from..to).contains(at));
        within.map(|(_, bytes)| *bytes).max()
    }

    /// The slowest probe.
    #[must_use]
    pub fn slowest_probe(&self) -> Option<&Probe> {
        self.probes.iter().max_by_key(|probe| probe.took)
    }
}

/// Looks until it is stopped.
pub struct Vitals {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

impl Vitals {
    /// Probes these nodes, and looks at the memory of one.
    pub fn watch(nodes: Vec<Node>, memory_of: &Node) -> Result<Self> {
        let pid = memory_of.pid().context("the node does not run")?;
        resident(pid)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("vitals".to_owned())
            .spawn(move || {
                let mut seen = Seen::default();
                while !stopped.load(Ordering::Relaxed) {
                    for node in &nodes {
                        seen.probes.push(probe(node));
                    }
                    if let Ok(bytes) = resident(pid) {
                        seen.resident.push((Instant::now(), bytes));
                    }
                    std::thread::sleep(EVERY);
                }
                seen
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Stops, and says what was seen.
    pub fn stop(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("stopped twice")?;
        let seen = thread
            .join()
            .map_err(|_| anyhow!("whoever looked has panicked"))?;
        ensure!(!seen.probes.is_empty(), "nobody looked");
        Ok(seen)
    }
}

impl Drop for Vitals {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Bytes of a process that are in memory.
pub fn resident(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kibibytes.with_context(|| format!("{path}: no VmRSS"))? << 10)
}

fn probe(node: &Node) -> Probe {
    let began = Instant::now();
    let status = readyz(node.health_port).map_err(|error| format!("{error:#}"));
    Probe {
        node: node.number,
        began,
        took: began.elapsed(),
        status,
    }
}

fn readyz(port: u16) -> Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, GIVEN_UP).context("connect")?;
    stream.set_read_timeout(Some(GIVEN_UP))?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read the answer")?;
    let status = answer.get(9..12).and_then(|status| status.parse().ok());
    status.with_context(|| format!("no answer: {answer:?}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_one_that_is_gone_has_none() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = resident(own).unwrap();
        let held = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(
            resident(own).unwrap() >= before + (32 << 20),
            "{before} bytes before"
        );
        drop(held);
        // No process has this number: `pid_max` is 2^22 at most.
        assert!(resident(i32::MAX).is_err());
    }

    #[test]
    fn the_most_is_that_of_its_time() {
        let began = Instant::now();
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let seen = Seen {
            probes: Vec::new(),
            resident: vec![(at(0), 9), (at(1), 3), (at(2), 5), (at(3), 7)],
        };
        assert_eq!(seen.most_resident(at(1), at(3)), Some(5));
        assert_eq!(seen.most_resident(at(4), at(9)), None);
    }
}
