//! A command that would make a row too large is refused by every node alike, and harms none.

use std::collections::BTreeMap;

use openraft::storage::{RaftLogStorageExt, RaftStateMachine};
use raft_store::Entry;
use raft_store::command::{AddTransportKey, Bounded, Invalid, Op, Outcome, Refusal, RegisterSlotKey};
use raft_store::names::{SlotName, TransportId};
use raft_store::state::node::SlotKey;
use raft_store::state::slot::TransportMode;
use raft_store::state::table::RowKind;

use crate::common::*;

fn transport(number: u64) -> Op {
    Op::AddTransportKey(AddTransportKey {
        slot: SlotName::new("s").unwrap(),
        id: TransportId([number as u8; 16]),
        expected_generation: number as u32 - 1,
        mode: TransportMode::Standard,
        check: vec![7; 40_000],
        grants: BTreeMap::new(),
    })
}

fn slot_key(number: u64) -> Op {
    Op::RegisterSlotKey(RegisterSlotKey {
        node: 1,
        slot: SlotName::new(&format!("s{number}")).unwrap(),
        key: SlotKey {
            spki: vec![1; 422],
            epoch: 1,
            signature: vec![1; 72],
            signer_chain: vec![vec![1; 16 << 10]],
        },
    })
}

/// A log that drives the row of a slot and that of a node over their limits, and goes on.
fn log() -> Vec<Entry> {
    let mut entries = vec![founding()];
    for number in 1..=5 {
        entries.push(command(1, entries.len() as u64, transport(number)));
    }
    for number in 1..=9 {
        entries.push(command(1, entries.len() as u64, slot_key(number)));
    }
    entries.push(entry(1, entries.len() as u64, 10));
    entries
}

fn too_large(outcome: &Outcome) -> Option<RowKind> {
    match outcome {
        Outcome::Refused(Refusal::Invalid(Invalid::TooLarge {
            what: Bounded::Row(kind),
            ..
        })) => Some(*kind),
        _ => None,
    }
}

#[test]
fn a_row_that_would_be_too_large_is_refused_the_same_on_every_node_and_after_every_restart() {
    let (one_by_one, at_once) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let digests = runtime().block_on(async {
        let mut outcomes = Vec::new();
        let mut first = open(one_by_one.path());
        for entry in log() {
            first.log.blocking_append([entry.clone()]).await.unwrap();
            outcomes.extend(first.machine.apply([entry]).await.unwrap());
        }
        let mut second = open(at_once.path());
        second.log.blocking_append(log()).await.unwrap();
        assert_eq!(second.machine.apply(log()).await.unwrap(), outcomes);
        let refused: Vec<_> = outcomes.iter().filter_map(too_large).collect();
        // Three transport keys and seven slot keys fit.
        assert_eq!(refused, [RowKind::Slot, RowKind::Node, RowKind::Node]);
        assert!(
            matches!(outcomes.last(), Some(Outcome::Done(_))),
            "the log goes on"
        );
        let published = first.machine.published().load_full();
        let state = &published.state;
        let slot = state.slots().get("s").unwrap();
        assert_eq!(slot.transport.len(), 3);
        assert_eq!(slot.current_transport().unwrap().generation, 3);
        assert_eq!(state.nodes().get(&1).unwrap().slot_keys.len(), 7);
        [&first, &second].map(|store| store.machine.published().load().digest)
    });
    assert_eq!(digests[0], digests[1]);
    for dir in [&one_by_one, &at_once] {
        let store = open(dir.path());
        assert_eq!(store.machine.published().load().digest, digests[0]);
    }
}
