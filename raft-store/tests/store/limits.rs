//! A command that would make a row too large is refused by every node alike, and harms none.

use std::collections::BTreeMap;

use openraft::storage::{RaftLogStorageExt, RaftStateMachine};
use raft_store::Entry;
use raft_store::command::{
    AddTransportKey, Bounded, Command, CreateContext, Invalid, Op, Outcome, PrepareVersion, Refusal,
    RegisterSlotKey, ReportNode, RequestId,
};
use raft_store::names::{Boot, ContextName, ContextUid, Incarnation, KeyUid, SlotName, TransportId};
use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy};
use raft_store::state::node::{NodeReport, SlotKey, SlotReport};
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

fn filler(length: usize) -> String {
    "x".repeat(length)
}

/// The operation of an entry, to be changed.
fn command_of(entry: &mut Entry) -> &mut Command {
    match &mut entry.payload {
        openraft::EntryPayload::Normal(command) => command,
        other => panic!("{other:?}"),
    }
}

/// Rows of every kind about as large as they may be: dozens of versions, answers and revocations among them.
fn large_rows() -> Vec<Entry> {
    let mut founding = founding();
    if let Op::CreateCluster(create) = &mut command_of(&mut founding).op {
        create.name = filler(3 << 10);
        create.acl.mappings.insert(filler(55 << 10), Default::default());
    }
    let mut ops = vec![Op::AddTransportKey(AddTransportKey {
        check: vec![7; 50 << 10],
        ..match transport(1) {
            Op::AddTransportKey(add) => add,
            other => panic!("{other:?}"),
        }
    })];
    for number in 0..24_u8 {
        let name = ContextName::new(&format!("c{number}")).unwrap();
        ops.push(Op::CreateContext(CreateContext {
            name: name.clone(),
            uid: ContextUid([number; 16]),
            slot: SlotName::new("s").unwrap(),
            binding: BindingMode::Private,
            policy: RotationPolicy::default(),
        }));
        ops.push(Op::PrepareVersion(PrepareVersion {
            context: name,
            expected_highest: 0,
            version: 1,
            key_uid: KeyUid([number; 16]),
            label: format!("kek-c{number}-v1"),
            material: KeyMaterial {
                transport_id: TransportId([1; 16]),
                sealed_key: vec![number; 31 << 10],
                check_record: vec![1; 109],
            },
        }));
    }
    let slot_report = SlotReport {
        serving: true,
        state: filler(60 << 10),
        missing_keys: 0,
    };
    ops.push(Op::ReportNode(ReportNode {
        node: 1,
        report: NodeReport {
            seq: 1,
            incarnation: Incarnation([1; 16]),
            boot: Boot([1; 16]),
            clock: 1,
            durable_index: 1,
            proven_at: None,
            feature_level: 1,
            slots: BTreeMap::from([(SlotName::new("s").unwrap(), slot_report)]),
            uses: BTreeMap::new(),
        },
    }));
    ops.extend((1..=7).map(slot_key));
    let mut entries = vec![founding];
    for op in ops {
        entries.push(command(1, entries.len() as u64, op));
    }
    for number in 0..80 {
        let mut asked = entry(1, entries.len() as u64, if number % 8 == 0 { 60_000 } else { 10 });
        command_of(&mut asked).id = RequestId::Client {
            principal: [1; 32],
            operation: "op".into(),
            key: format!("{number:04}{}", filler(1800)),
        };
        entries.push(asked);
    }
    entries
}

#[test]
fn rows_of_every_kind_at_their_most_stay_out_of_sleds_blobs_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let digest = runtime().block_on(async {
        let mut store = open(dir.path());
        for entry in large_rows() {
            store.log.blocking_append([entry.clone()]).await.unwrap();
            let outcomes = store.machine.apply([entry]).await.unwrap();
            assert!(
                outcomes.iter().all(|outcome| matches!(outcome, Outcome::Done(_))),
                "{outcomes:?}"
            );
        }
        store.machine.published().load().digest
    });
    closed(dir.path());
    let spilled = std::fs::read_dir(dir.path().join("sled/blobs")).map_or(0, Iterator::count);
    assert_eq!(spilled, 0, "sled has made files that nobody syncs");
    let store = open(dir.path());
    assert_eq!(store.machine.published().load().digest, digest);
    assert_eq!(
        store.machine.published().load().state.versions().iter().count(),
        24
    );
}
