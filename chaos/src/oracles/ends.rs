//! No node ends by itself, and none panics. Whoever follows the processes of a run sees how each of them ended: by SIGKILL, or politely
//! because it was asked to, or otherwise; and what each says in its log. The next start would hide both, so they are written down at
//! once. A node whose disk fails, whose files were cut, whose clock is wrong or that was removed has to end rather than to go on, and
//! sled panics over damage before it is caught; nobody else may. A start that fails is told by whoever has started it: the process is
//! still that one's child then.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::Node;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::watch as signal;

use super::Found;
use super::excused::Excused;
use crate::history::{History, Moment, Recorder};
use crate::schedule::Fired;
use crate::workload::told;

pub(super) const NAME: &str = "ends";
/// In front of the number of a node and how it ended.
const MARK: &str = "ended by itself: ";
/// Between two looks: less than a node takes to start, so that none begins and ends unseen.
const EVERY: Duration = Duration::from_millis(50);
/// What Rust's runtime says of a panic.
const PANIC: &str = "panicked at";
/// In front of the number of a node and what its log says.
const PANICKED: &str = "panicked: ";
/// In front of the number of a node that a scenario has end.
const MAY_END: &str = "may end: ";

/// From now on nodes are children of this process once whoever has started them is gone: only a parent is told how they end.
///
/// # Errors
/// The kernel refuses it.
pub(crate) fn adopt_orphans() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("prctl(PR_SET_CHILD_SUBREAPER)")
}

/// A process of a node, by what its pid file says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    node: u32,
    pid: i32,
    /// Its start time, in ticks: a pid comes again, both together do not.
    started: u64,
}

impl Process {
    fn of(node: &Node) -> Option<Self> {
        let noted = std::fs::read_to_string(node.dir.join("pid")).ok()?;
        let mut words = noted.split_whitespace();
        Some(Self {
            node: node.number,
            pid: words.next()?.parse().ok()?,
            started: words.next()?.parse().ok()?,
        })
    }

    /// Whether it is there, be it as a zombie.
    fn is_there(self) -> bool {
        let stat = std::fs::read_to_string(Path::new("/proc").join(self.pid.to_string()).join("stat"));
        let started = stat.ok().and_then(|stat| {
            // Field 22 of proc(5); the second one may have spaces and brackets in it.
            let (_, rest) = stat.rsplit_once(')')?;
            rest.split_whitespace().nth(19)?.parse().ok()
        });
        started == Some(self.started)
    }

    /// What has become of it; none while it runs.
    fn end(self) -> Option<End> {
        if !self.is_there() {
            return Some(End::Unseen);
        }
        match waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Some(End::Exited(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(End::Killed(signal)),
            // It runs, or is not yet a child of this process.
            Ok(_) | Err(_) => None,
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Exited(i32),
    Killed(Signal),
    /// Who had started it was still there, and was told.
    Unseen,
}

impl End {
    /// In words, unless somebody has wanted it: harness and failpoints kill with SIGKILL, and who is asked to end does so with 0.
    fn by_itself(self) -> Option<String> {
        match self {
            Self::Exited(0) | Self::Killed(Signal::SIGKILL) | Self::Unseen => None,
            Self::Exited(code) => Some(format!("exit status: {code}")),
            Self::Killed(signal) => Some(format!("signal: {signal}")),
        }
    }
}

/// A log as it grows.
#[derive(Default)]
struct Tail {
    read: u64,
    /// The beginning of a line whose end is not there yet.
    begun: Vec<u8>,
}

impl Tail {
    /// Lines since the last look that tell of a panic.
    fn panics(&mut self, log: &Path) -> Vec<String> {
        let mut new = Vec::new();
        let read = File::open(log).and_then(|mut log| {
            if log.metadata()?.len() > self.read {
                log.seek(SeekFrom::Start(self.read))?;
                log.read_to_end(&mut new)?;
            }
            Ok(())
        });
        if read.is_err() {
            return Vec::new();
        }
        self.read += new.len() as u64;
        self.begun.extend_from_slice(&new);
        let whole = self
            .begun
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |last| last + 1);
        let lines: Vec<u8> = self.begun.drain(..whole).collect();
        let lines = String::from_utf8_lossy(&lines);
        lines
            .lines()
            .filter(|line| line.contains(PANIC))
            .map(|line| line.trim().to_owned())
            .collect()
    }
}

/// To be noted before a scenario has a node end that no fault of a plan names.
pub(crate) fn may_end(node: u32) -> String {
    format!("{MAY_END}node {node},")
}

/// Follows the processes and the logs of these nodes, those that are started later too, until it is told to stop.
pub(super) async fn follow(nodes: Vec<Node>, recorder: Recorder, mut stopped: signal::Receiver<bool>) {
    let mut running: BTreeSet<Process> = BTreeSet::new();
    let mut ended: BTreeMap<u32, Process> = BTreeMap::new();
    let mut logs: Vec<Tail> = nodes.iter().map(|_| Tail::default()).collect();
    loop {
        for (node, log) in nodes.iter().zip(&mut logs) {
            for panic in log.panics(&node.dir.join("log")) {
                recorder.note(&format!("{PANICKED}node {}, {panic}", node.number));
            }
        }
        for process in nodes.iter().filter_map(Process::of) {
            if ended.get(&process.node) != Some(&process) {
                running.insert(process);
            }
        }
        running.retain(|process| {
            let Some(end) = process.end() else { return true };
            ended.insert(process.node, *process);
            if let Some(how) = end.by_itself() {
                recorder.note(&format!("{MARK}node {}, {how}", process.node));
            }
            false
        });
        if *stopped.borrow() {
            return;
        }
        // Either way there is nothing else to wait for.
        let _ = tokio::time::timeout(EVERY, told(&mut stopped)).await;
    }
}

/// Whether a node may have to end because of it.
fn may_end_a_node(kind: &str) -> bool {
    matches!(
        kind,
        "disk-full" | "failing-fsync" | "lost-writes" | "torn-tail" | "clock-step" | "join-remove"
    )
}

pub(super) fn judge(history: &History, fired: &[Fired], found: &mut Found) {
    let processes: BTreeSet<(u32, Option<i32>)> =
        history.terms.iter().map(|seen| (seen.node, seen.pid)).collect();
    found.checked(NAME, processes.len() as u64);
    let mut excused = Excused::by(fired, may_end_a_node);
    for (at, note) in &history.notes {
        if let Some(node) = note.strip_prefix(MAY_END).and_then(number) {
            excused.add(node, at / 1_000_000, u64::MAX);
        }
        let told = [MARK, PANICKED].iter().find(|mark| note.starts_with(**mark));
        let Some(rest) = told.and_then(|mark| note.strip_prefix(*mark)) else {
            continue;
        };
        let moment = Moment {
            at: *at,
            node: number(rest).unwrap_or_default(),
            text: format!(
                "{note}, {} s after the run began, and no fault was there that explains it",
                at / 1_000_000_000
            ),
        };
        if !excused.explains(&moment) {
            found.violation(NAME, moment.text);
        }
    }
}

/// Of `node 3, …`.
fn number(text: &str) -> Option<u32> {
    text.strip_prefix("node ")?.split(',').next()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::net::Ipv4Addr;
    use std::process::{ChildStdin, Command, Stdio};

    use cluster_tests::until;

    use super::super::testing::{Script, fired, told};
    use super::*;
    use crate::schedule::FaultKind;

    fn node(folder: &Path, number: u32) -> Node {
        let dir = folder.join(format!("node{number}"));
        std::fs::create_dir_all(&dir).unwrap();
        Node {
            number,
            dir,
            host: Ipv4Addr::LOCALHOST,
            api_port: 1,
            health_port: 2,
            cluster_port: 3,
        }
    }

    /// In the place of a node's process: its pid, and what it waits for.
    #[allow(clippy::zombie_processes, reason = "whoever follows it waits for it")]
    fn begins(node: &Node, script: &str) -> (u32, Option<ChildStdin>) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let started = rest.split_whitespace().nth(19).unwrap();
        std::fs::write(node.dir.join("pid"), format!("{pid} {started} boot\n")).unwrap();
        (pid, child.stdin.take())
    }

    #[tokio::test]
    async fn who_ends_otherwise_than_it_was_asked_to_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let nodes: Vec<Node> = (1..=4).map(|number| node(folder.path(), number)).collect();
        let file = folder.path().join("history");
        let recorder = Recorder::create(&file).unwrap();
        let (stop, stopped) = signal::channel(false);
        let scripts = [
            "read line; exit 0",
            "read line; exit 70",
            "read line",
            "read line",
        ];
        let begun: Vec<_> = nodes
            .iter()
            .zip(scripts)
            .map(|(node, script)| begins(node, script))
            .collect();
        let (pids, mut waiting): (Vec<u32>, Vec<_>) = begun.into_iter().unzip();
        let following = tokio::spawn(follow(nodes.clone(), recorder.clone(), stopped));
        for (pid, signal) in [(pids[2], Signal::SIGKILL), (pids[3], Signal::SIGABRT)] {
            nix::sys::signal::kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
        }
        waiting.clear();
        // Each is reaped once it has been seen.
        until("the ends of all", Duration::from_secs(30), async || {
            let gone = |pid: &u32| !Path::new(&format!("/proc/{pid}")).exists();
            pids.iter().all(gone).then_some(())
        })
        .await
        .unwrap();
        stop.send_replace(true);
        following.await.unwrap();
        let history = recorder.finish().unwrap();
        let mut notes: Vec<&str> = history.notes.iter().map(|(_, note)| note.as_str()).collect();
        notes.sort_unstable();
        assert_eq!(
            notes,
            [
                "ended by itself: node 2, exit status: 70",
                "ended by itself: node 4, signal: SIGABRT"
            ]
        );
        let said = told(|found| judge(&history, &[], found));
        assert_eq!(said.len(), 2, "{said:?}");
    }

    #[test]
    fn whom_a_fault_may_have_ended_is_excused() {
        let ended = |node: u32, second: u64| {
            let mut history = Script::default().history();
            let note = format!("{MARK}node {node}, exit status: 70");
            history.notes = vec![(second * 1_000_000_000, note)];
            history
        };
        for (kind, node, second, excused) in [
            (FaultKind::FailingFsync, 2, 15, true),
            (FaultKind::FailingFsync, 3, 15, false),
            (FaultKind::FailingFsync, 2, 60, false),
            (FaultKind::LeaderInMinority, 2, 15, false),
        ] {
            let fired = [fired(kind, 10_000, 20_000, "node 2")];
            let said = told(|found| judge(&ended(node, second), &fired, found));
            assert_eq!(said.is_empty(), excused, "{kind} {node} {second}: {said:?}");
        }
    }

    #[test]
    fn a_node_that_a_scenario_has_end_may_end_from_then_on() {
        let mut history = Script::default().history();
        let ends = |node: u32| format!("{MARK}node {node}, exit status: 78");
        history.notes = vec![(1, ends(4)), (2, may_end(4)), (3, ends(4)), (4, ends(3))];
        let said = told(|found| judge(&history, &[], found));
        assert_eq!(said.len(), 2, "{said:?}");
    }

    #[test]
    fn a_panic_in_a_log_is_told_once_and_excused_as_an_end_is() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut tail = Tail::default();
        assert!(tail.panics(&log).is_empty(), "there is none yet");
        std::fs::write(&log, "{\"level\":\"info\"}\n\nthread 'x' (7) panicked at a.rs").unwrap();
        assert!(tail.panics(&log).is_empty(), "half a line");
        std::fs::write(
            &log,
            "{\"level\":\"info\"}\n\nthread 'x' (7) panicked at a.rs:1:2:\nno\n",
        )
        .unwrap();
        assert_eq!(tail.panics(&log), ["thread 'x' (7) panicked at a.rs:1:2:"]);
        assert!(tail.panics(&log).is_empty(), "told");
        let mut history = Script::default().history();
        let note = format!("{PANICKED}node 2, thread 'x' (7) panicked at a.rs:1:2:");
        history.notes = vec![(15_000_000_000, note)];
        for (kind, excused) in [(FaultKind::TornTail, true), (FaultKind::Pause, false)] {
            let fired = [fired(kind, 10_000, 20_000, "node 2")];
            let said = told(|found| judge(&history, &fired, found));
            assert_eq!(said.is_empty(), excused, "{kind}: {said:?}");
        }
    }
}
