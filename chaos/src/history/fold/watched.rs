//! What the samples of the watch say: who was ready without a key that another ready node has just used, who was ready
//! before it had caught up, whose state differs from another's at the same index.

use std::collections::{BTreeMap, VecDeque};

use super::super::event::{Held, Probe, Sample, Seen};
use super::{Few, Moment, Moments};

/// A node is ready while it has heard within this time, of a leader that had a quorum, and a little more for who looks: a
/// commit that is younger may be missing on one that is cut off together with an old leader.
const FRESH: u64 = 6_000_000_000;
/// For as long is remembered what was known to be committed.
const REMEMBERED: u64 = 600_000_000_000;
/// Who was ready no longer ago than this has not been silent for long: readiness ends after five seconds of silence, and whoever
/// has been silent for eight is not waited for. A look at who lacks a key takes more than a second.
const JUST_NOW: u64 = 2_800_000_000;
/// Digests that are compared with later ones.
const DIGESTS: usize = 4096;
/// So much is committed before a node is ready, and it has applied it: as a node whose disk is slow on purpose is given with
/// revocations.
const KNOWN: u64 = 16_000_000_000;
/// Refusals that wait for the next look, at most.
const SUSPECTS: usize = 64;

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Looks at all nodes.
    pub samples: u64,
    /// Answers of ready nodes to what another one had just encrypted, or one of them before.
    pub probed: u64,
    /// A ready node lacked the key.
    pub lacking: Moments,
    /// A node that had just been ready lacked the key of a version that others use.
    pub lost: Moments,
    /// A node refused to decrypt what had been put back into use long before it was ready.
    pub withheld: Few<String>,
    /// Whenever a node had another process, term or part than before.
    pub terms: Vec<TermSeen>,
    /// Looks at ready nodes whose process was started during the run.
    pub restarted: u64,
    /// A node was ready before it had applied what was committed before it was started.
    pub early: Few<String>,
    /// Digests that were compared with one of the same index.
    pub compared: u64,
    /// Two nodes had different states at one index.
    pub unlike: Few<String>,
}

/// What a node said of its term when that, its part or its process was another one than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TermSeen {
    /// When.
    pub at: u64,
    /// Which node.
    pub node: u32,
    /// Its process.
    pub pid: Option<i32>,
    /// Its term.
    pub term: u64,
    /// Whether it led.
    pub leads: bool,
}

/// The process of a node.
struct Process {
    pid: Option<i32>,
    /// It was started after this time; zero is before the run.
    since: u64,
    /// When it was looked at last.
    seen: u64,
}

/// A refusal that is wrong if it came from the process that was seen before, and is the same at the next look.
struct Suspect {
    node: u32,
    text: String,
}

/// See the module.
#[derive(Default)]
pub(super) struct Watched {
    found: Findings,
    processes: BTreeMap<u32, Process>,
    /// What was known to be committed, and when.
    known: VecDeque<(u64, u64)>,
    digests: BTreeMap<u64, (String, u32)>,
    /// When the look began in which a node was ready last, and its process.
    ready: BTreeMap<u32, (u64, Option<i32>)>,
    suspects: Vec<Suspect>,
    terms: BTreeMap<u32, TermSeen>,
}

impl Watched {
    /// `at` is the time of the line, which is written when all nodes were asked.
    pub(super) fn sample(&mut self, at: u64, sample: &Sample) {
        self.found.samples += 1;
        for seen in &sample.nodes {
            self.same_process(seen);
            self.holding(at, (sample.probe.as_ref(), "encrypts"), &seen.held, seen);
            self.holding(at, (sample.older.as_ref(), "has encrypted"), &seen.older, seen);
            self.losing(at, sample, seen);
            self.caught_up(at, seen);
            self.digest(seen);
            self.term(at, seen);
        }
        self.suspects.clear();
        self.known.push_back((at, sample.known));
        while self.known.front().is_some_and(|(then, _)| then + REMEMBERED < at) {
            self.known.pop_front();
        }
    }

    /// What a node made of this probe, and what that one's maker does or has done.
    fn holding(&mut self, at: u64, (probe, does): (Option<&Probe>, &str), held: &Held, seen: &Seen) {
        let Some(probe) = probe.filter(|_| seen.ready) else {
            return;
        };
        let lacks = match held {
            Held::NotAsked | Held::Silent => return,
            Held::Opened => None,
            Held::Wrong => Some("decrypts it to something else"),
            Held::Refused { code } => match code.as_str() {
                "key_version_not_ready"
                | "unknown_key_version"
                | "key_not_on_this_node"
                | "authentication_failed" => Some(code.as_str()),
                // Busy, its slot has just failed, or the version was taken out of use meanwhile: that is no word on its keys.
                _ => return,
            },
        };
        self.found.probed += 1;
        if let Some(lacks) = lacks {
            let text = format!(
                "node {} is ready, and node {} {does} under version {} of {}: {lacks}",
                seen.node, probe.made_on, probe.version, probe.context
            );
            let node = seen.node;
            self.found.lacking.push(Moment { at, node, text });
        }
    }

    /// A node refuses what was put back into use at a time: wrong if it was ready long enough after that.
    pub(super) fn suspect(&mut self, node: u32, back: u64, text: String) {
        let knew = self.ready.get(&node);
        let knew = knew.is_some_and(|(began, _)| *began >= back.saturating_add(KNOWN));
        if knew && self.suspects.len() < SUSPECTS {
            self.suspects.push(Suspect { node, text });
        }
    }

    /// One that was started in between may have refused before it had caught up.
    fn same_process(&mut self, seen: &Seen) {
        let was = self.ready.get(&seen.node).map(|(_, pid)| *pid);
        if seen.pid.is_some() && was == Some(seen.pid) {
            for suspect in self.suspects.iter().filter(|suspect| suspect.node == seen.node) {
                self.found.withheld.push(suspect.text.clone());
            }
        }
    }

    /// Whoever served a moment ago has been heard by the leader, and nothing is activated without him. Told once, until he is
    /// ready again.
    fn losing(&mut self, at: u64, sample: &Sample, seen: &Seen) {
        let was = self.ready.get(&seen.node).copied();
        if seen.ready {
            self.ready.insert(seen.node, (sample.began, seen.pid));
            return;
        }
        let (Some(probe), Some((then, pid))) = (&sample.probe, was) else {
            return;
        };
        let lacks = matches!(&seen.held, Held::Refused { code } if code == "key_version_not_ready");
        // From before it was ready until after the version was active: no longer than that in truth, however long a look takes.
        if lacks && pid == seen.pid && probe.at.saturating_sub(then) < JUST_NOW {
            let text = format!(
                "version {} of {} was activated although node {}, which served until then, did not hold it",
                probe.version, probe.context, seen.node
            );
            let node = seen.node;
            self.found.lost.push(Moment { at, node, text });
            self.ready.remove(&node);
        }
    }

    fn term(&mut self, at: u64, seen: &Seen) {
        let Some(term) = seen.term else { return };
        let now = TermSeen {
            at,
            node: seen.node,
            pid: seen.pid,
            term,
            leads: seen.leads,
        };
        let before = self.terms.insert(seen.node, now);
        if before.is_none_or(|before| TermSeen { at, ..before } != now) {
            self.found.terms.push(now);
        }
    }

    fn caught_up(&mut self, at: u64, seen: &Seen) {
        let process = self.processes.entry(seen.node).or_insert(Process {
            pid: seen.pid,
            since: 0,
            seen: 0,
        });
        if process.pid != seen.pid {
            (process.pid, process.since) = (seen.pid, process.seen);
        }
        process.seen = at;
        let since = process.since;
        let (true, Some(index)) = (seen.ready && since > 0, seen.index) else {
            return;
        };
        self.found.restarted += 1;
        // What was known by then was committed before the look began, and that one came before the process.
        let limit = since.min(at.saturating_sub(FRESH));
        let known = self.known.iter().take_while(|(then, _)| *then <= limit);
        let floor = known.map(|(_, known)| *known).max().unwrap_or_default();
        if index < floor {
            let text = format!(
                "node {} is ready at index {index}, and {floor} was committed before its process was started",
                seen.node
            );
            self.found.early.push(text);
        }
    }

    fn digest(&mut self, seen: &Seen) {
        let Some((index, digest)) = &seen.digest else {
            return;
        };
        if let Some((other, node)) = self.digests.get(index) {
            if *node != seen.node {
                self.found.compared += 1;
            }
            if other != digest {
                let text = format!(
                    "at index {index} the state of node {} has the digest {digest}, that of node {node} {other}",
                    seen.node
                );
                self.found.unlike.push(text);
            }
            return;
        }
        self.digests.insert(*index, (digest.clone(), seen.node));
        if self.digests.len() > DIGESTS {
            self.digests.pop_first();
        }
    }

    pub(super) fn into_findings(self) -> Findings {
        self.found
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn node(node: u32) -> Seen {
        Seen {
            node,
            pid: Some(100),
            ready: true,
            index: Some(10),
            held: Held::NotAsked,
            older: Held::NotAsked,
            digest: None,
            term: None,
            leads: false,
        }
    }

    fn sample(known: u64, nodes: Vec<Seen>) -> Sample {
        Sample {
            began: 0,
            known,
            probe: Some(Probe {
                context: "c".to_owned(),
                version: 7,
                made_on: 1,
                at: 0,
            }),
            older: None,
            nodes,
        }
    }

    /// One that began at a time, and encrypted at once.
    fn begun(began: u64, nodes: Vec<Seen>) -> Sample {
        let mut sample = sample(1, nodes);
        sample.began = began;
        sample.probe.as_mut().unwrap().at = began;
        sample
    }

    fn held(held: Held, ready: bool) -> Seen {
        Seen {
            held,
            ready,
            ..node(2)
        }
    }

    fn refused(code: &str) -> Held {
        Held::Refused {
            code: code.to_owned(),
        }
    }

    #[test]
    fn only_a_ready_node_that_says_that_it_lacks_the_key_is_told() {
        for (seen, lacking, probed) in [
            (held(Held::Opened, true), 0, 1),
            (held(Held::Silent, true), 0, 0),
            (held(refused("slot_failed"), true), 0, 0),
            (held(refused("key_version_disabled"), true), 0, 0),
            (held(refused("key_version_not_ready"), false), 0, 0),
            (held(refused("key_version_not_ready"), true), 1, 1),
            (held(refused("unknown_key_version"), true), 1, 1),
            (held(Held::Wrong, true), 1, 1),
        ] {
            let mut watched = Watched::default();
            watched.sample(MS, &sample(1, vec![seen.clone()]));
            let found = watched.into_findings();
            assert_eq!(
                (found.lacking.kept.len(), found.probed),
                (lacking, probed),
                "{seen:?}"
            );
        }
    }

    #[test]
    fn a_ready_node_that_lacks_an_older_key_is_told_too() {
        for (ready, answer, lacking) in [
            (true, Held::Opened, 0),
            (false, refused("key_not_on_this_node"), 0),
            (true, refused("key_version_disabled"), 0),
            (true, refused("key_not_on_this_node"), 1),
        ] {
            let mut watched = Watched::default();
            let mut sample = sample(
                1,
                vec![Seen {
                    older: answer,
                    ..held(Held::Opened, ready)
                }],
            );
            sample.older = sample.probe.clone().map(|probe| Probe { version: 2, ..probe });
            watched.sample(MS, &sample);
            let found = watched.into_findings().lacking.kept;
            assert_eq!(found.len(), lacking, "{sample:?}");
            assert!(
                found.iter().all(|one| one.text.contains("under version 2 of c")),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_restarted_node_is_ready_only_with_what_was_committed_before() {
        let with = |pid, ready, index| Seen {
            pid,
            ready,
            index: Some(index),
            ..node(2)
        };
        let at = |second: u64| second * 1000 * MS;
        let mut watched = Watched::default();
        watched.sample(at(1), &sample(10, vec![with(Some(1), true, 10)]));
        watched.sample(at(10), &sample(50, vec![with(None, false, 0)]));
        // Not ready yet; then ready, and everything that was known before the new process is there.
        watched.sample(at(11), &sample(60, vec![with(Some(2), false, 10)]));
        watched.sample(at(17), &sample(70, vec![with(Some(2), true, 50)]));
        let mut good = Watched::default();
        std::mem::swap(&mut good, &mut watched);
        let found = good.into_findings();
        assert_eq!((found.early.total, found.restarted), (0, 1), "{:?}", found.early);

        let mut watched = Watched::default();
        watched.sample(at(1), &sample(10, vec![with(Some(1), true, 10)]));
        watched.sample(at(10), &sample(50, vec![with(None, false, 0)]));
        // Ready at once, as it was before; too soon to say that it missed the newest.
        watched.sample(at(12), &sample(60, vec![with(Some(2), true, 9)]));
        watched.sample(at(17), &sample(60, vec![with(Some(2), true, 49)]));
        let found = watched.into_findings();
        assert_eq!(found.early.total, 2, "{:?}", found.early);
    }

    #[test]
    fn a_process_that_was_there_from_the_start_owes_nothing_to_this_rule() {
        let mut watched = Watched::default();
        for second in 1..20_u64 {
            watched.sample(second * 1000 * MS, &sample(second * 10, vec![node(2)]));
        }
        let found = watched.into_findings();
        assert_eq!((found.early.total, found.restarted), (0, 0));
    }

    #[test]
    fn who_served_a_moment_ago_must_hold_what_others_use() {
        let not_ready = |pid| Seen {
            pid: Some(pid),
            ..held(refused("key_version_not_ready"), false)
        };
        for (then, pid, lost) in [(MS, 100, 1), (MS, 101, 0), (5000 * MS, 100, 0)] {
            let mut watched = Watched::default();
            watched.sample(2 * MS, &begun(MS, vec![node(2)]));
            watched.sample(MS + then, &begun(MS + then, vec![not_ready(pid)]));
            let lost_now = watched.into_findings().lost;
            assert_eq!(lost_now.kept.len(), lost, "{then} {pid}");
        }
        // Looks that take long say no more than when they began: it may have been silent since the first one.
        let mut watched = Watched::default();
        watched.sample(5000 * MS, &begun(MS, vec![node(2)]));
        watched.sample(5300 * MS, &begun(5200 * MS, vec![not_ready(100)]));
        assert!(watched.into_findings().lost.kept.is_empty());
        // It is one loss until it is ready again.
        let mut watched = Watched::default();
        watched.sample(2 * MS, &begun(MS, vec![node(2)]));
        for at in [3 * MS, 4 * MS] {
            watched.sample(at, &begun(at, vec![not_ready(100)]));
        }
        let lost = watched.into_findings().lost.kept;
        assert_eq!((lost.len(), lost[0].node, lost[0].at), (1, 2, 3 * MS));
    }

    #[test]
    fn who_refuses_what_is_in_use_again_is_told_if_it_knew_and_was_not_started_since() {
        let (back, second) = (MS, 1000 * MS);
        for (ready_at, pid, withheld) in [
            (20 * second, 100, 1),
            (20 * second, 101, 0),
            // It need not know yet.
            (10 * second, 100, 0),
        ] {
            let mut watched = Watched::default();
            watched.sample(ready_at, &begun(ready_at, vec![node(2)]));
            watched.suspect(2, back, "refused".to_owned());
            watched.suspect(3, back, "by one that was never seen".to_owned());
            let now = Seen {
                pid: Some(pid),
                ..node(2)
            };
            for later in [1, 2] {
                let at = ready_at + later * MS;
                watched.sample(at, &begun(at, vec![now.clone()]));
            }
            assert_eq!(
                watched.into_findings().withheld.total,
                withheld,
                "{ready_at} {pid}"
            );
        }
    }

    #[test]
    fn of_terms_the_changes_are_kept() {
        let with = |term, leads| Seen {
            term: Some(term),
            leads,
            ..node(1)
        };
        let mut watched = Watched::default();
        for (at, seen) in (1..).zip([
            with(1, true),
            with(1, true),
            node(1),
            with(1, false),
            with(2, false),
        ]) {
            watched.sample(at, &sample(1, vec![seen]));
        }
        let terms: Vec<(u64, u64, bool)> = watched
            .into_findings()
            .terms
            .iter()
            .map(|seen| (seen.at, seen.term, seen.leads))
            .collect();
        assert_eq!(terms, [(1, 1, true), (4, 1, false), (5, 2, false)]);
    }

    #[test]
    fn one_index_has_one_digest() {
        let with = |number, index: u64, digest: &str| Seen {
            digest: Some((index, digest.to_owned())),
            ..node(number)
        };
        let mut watched = Watched::default();
        watched.sample(
            MS,
            &sample(1, vec![with(1, 5, "a"), with(2, 5, "a"), with(3, 6, "b")]),
        );
        watched.sample(
            2 * MS,
            &sample(1, vec![with(1, 6, "b"), with(2, 6, "c"), with(3, 6, "b")]),
        );
        let found = watched.into_findings();
        assert_eq!((found.compared, found.unlike.total), (3, 1), "{:?}", found.unlike);
        assert!(found.unlike.first[0].contains("node 2"), "{:?}", found.unlike);
    }
}
