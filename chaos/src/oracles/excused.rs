//! What a fault may explain: something that is wrong on a node while somebody breaks that node, and for a moment after.

use std::collections::BTreeSet;

use crate::history::Moment;
use crate::schedule::Fired;

/// After a fault was undone: a request that met it is answered within this time.
const AFTER_MS: u64 = 10_000;

/// A fault and whom it hit.
struct Span {
    /// Nobody is named: it may have been anybody.
    nodes: BTreeSet<u32>,
    from_ms: u64,
    to_ms: u64,
}

/// See the module.
pub(super) struct Excused(Vec<Span>);

impl Excused {
    /// By the faults of these kinds.
    pub(super) fn by(fired: &[Fired], kinds: impl Fn(&str) -> bool) -> Self {
        let fired = fired.iter().filter(|fired| kinds(fired.kind.name()));
        let spans = fired.map(|fired| Span {
            nodes: named(&fired.target),
            from_ms: fired.at_ms,
            to_ms: fired.healed_ms.saturating_add(AFTER_MS),
        });
        Self(spans.collect())
    }

    /// One node, from one millisecond to another; for no longer than that.
    pub(super) fn add(&mut self, node: u32, from_ms: u64, to_ms: u64) {
        self.0.push(Span {
            nodes: BTreeSet::from([node]),
            from_ms,
            to_ms,
        });
    }

    /// Everybody, from one millisecond to another; for no longer than that.
    pub(super) fn everybody(&mut self, from_ms: u64, to_ms: u64) {
        self.0.push(Span {
            nodes: BTreeSet::new(),
            from_ms,
            to_ms,
        });
    }

    /// By nothing that goes on from this millisecond on.
    pub(super) fn until(&mut self, ms: u64) {
        self.0.retain(|span| span.from_ms < ms);
        for span in &mut self.0 {
            span.to_ms = span.to_ms.min(ms);
        }
    }

    /// By times that a node had, from one millisecond to another.
    pub(super) fn of(times: impl IntoIterator<Item = (u32, u64, u64)>) -> Self {
        let spans = times.into_iter().map(|(node, from_ms, to_ms)| Span {
            nodes: BTreeSet::from([node]),
            from_ms,
            to_ms: to_ms.saturating_add(AFTER_MS),
        });
        Self(spans.collect())
    }

    /// Whether one of them explains it.
    pub(super) fn explains(&self, moment: &Moment) -> bool {
        let at = moment.at / 1_000_000;
        self.0.iter().any(|span| {
            let hit = span.nodes.is_empty() || span.nodes.contains(&moment.node);
            hit && (span.from_ms..=span.to_ms).contains(&at)
        })
    }
}

/// The nodes that the target of a fault names: `node 3` or `hsm-node-3`.
pub(super) fn named(target: &str) -> BTreeSet<u32> {
    let words = target.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let by_id = words
        .iter()
        .filter_map(|word| word.strip_prefix("hsm-node-")?.parse::<u32>().ok());
    let by_number = words.windows(2).filter_map(|pair| match pair {
        ["node", number] => number.parse::<u32>().ok(),
        _ => None,
    });
    by_id.chain(by_number).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::fired;
    use super::*;
    use crate::schedule::FaultKind;

    #[test]
    fn a_target_names_its_nodes() {
        for (target, nodes) in [
            ("node 3, running: true", vec![3]),
            (
                "node 2: 5 objects instead of 7; it has come back by itself",
                vec![2],
            ),
            (
                "hsm-node-4 joined, hsm-node-1 was removed; leaders killed meanwhile: Some(2) None",
                vec![1, 4],
            ),
            ("unknown", Vec::new()),
            ("node 2: 7 changes lost", vec![2]),
            ("nodes [1, 2, 3]: 7 changes lost", Vec::new()),
        ] {
            assert_eq!(named(target), BTreeSet::from_iter(nodes), "{target}");
        }
    }

    #[test]
    fn everybody_is_excused_for_a_time_and_nobody_beyond_an_end() {
        let moment = |second: u64| Moment {
            at: second * 1_000_000_000,
            node: 2,
            text: String::new(),
        };
        let mut excused = Excused::by(&[fired(FaultKind::Pause, 10_000, 20_000, "node 2")], |_| true);
        excused.everybody(40_000, 50_000);
        let explained = |excused: &Excused| {
            (0..60)
                .filter(|at| excused.explains(&moment(*at)))
                .collect::<Vec<_>>()
        };
        let both: Vec<u64> = (10..=30).chain(40..=50).collect();
        assert_eq!(explained(&excused), both);
        excused.until(25_000);
        assert_eq!(explained(&excused), (10..=25).collect::<Vec<u64>>());
    }

    #[test]
    fn a_fault_explains_what_happens_to_its_node_in_its_time() {
        let faults = [
            fired(
                FaultKind::TokenOlder,
                20_000,
                30_000,
                "node 2: 5 objects instead of 7",
            ),
            fired(FaultKind::KillAll, 0, 90_000, "nodes [1, 2, 3]"),
        ];
        let excused = Excused::by(&faults, |name| name.starts_with("token"));
        for (second, node, so) in [
            (19, 2, false),
            (20, 2, true),
            (40, 2, true),
            (41, 2, false),
            (25, 1, false),
        ] {
            let moment = Moment {
                at: second * 1_000_000_000,
                node,
                text: String::new(),
            };
            assert_eq!(excused.explains(&moment), so, "{second} {node}");
        }
        // Of one that the harness could not end nobody knows whom it hit, nor for how long.
        let open = [fired(FaultKind::TokenOlder, 20_000, u64::MAX, "unknown")];
        let moment = Moment {
            at: 3_600_000_000_000,
            node: 1,
            text: String::new(),
        };
        assert!(Excused::by(&open, |_| true).explains(&moment));
    }
}
