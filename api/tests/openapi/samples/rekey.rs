//! What is sent about replacing transport keys and the replication key.

use hsm_api::admin::*;

use super::{Sample, answer, id, list, request, text, time};

pub(super) fn samples() -> Vec<Sample> {
    let trk = || "ab".repeat(8);
    let wish = RekeyTransportRequest {
        slot: text("exchange"),
        restart: true,
    };
    let begun = RekeyTransportResponse {
        slot: text("exchange"),
        generation: 1,
    };
    let replaced = RekeyReplicationResponse {
        key: trk(),
        former: trk(),
    };
    let key = TransportKeyInfo {
        id: id(),
        generation: 2,
        state: TransportKeyState::Offered,
        created_at: time(),
        versions: 0,
        waiting_for: list(&["hsm-node-3"]),
    };
    let slot = |known_to_removed: &[&str]| SlotRekey {
        slot: text("exchange"),
        phase: RekeyPhase::Granting,
        transport_keys: vec![key.clone()],
        contexts_to_rotate: list(&["exchange-key"]),
        known_to_removed: list(known_to_removed),
        next: text("every member has to take the new transport key"),
    };
    let gone: [&str; 1] = ["hsm-node-4"];
    let node = NodeReplicationKeys {
        node_id: text("hsm-node-1"),
        keys: vec![trk()],
    };
    let replication = |open: bool| ReplicationRekey {
        key: trk(),
        former: open.then(trk),
        records_left: 3,
        nodes: vec![node.clone()],
        known_to_removed: list(if open { &gone } else { &[] }),
        next_key: open.then(trk),
        next: text("nothing to do"),
    };
    let status = |open: bool| RekeyStatus {
        slots: vec![slot(&gone)],
        replication: replication(open),
    };
    vec![
        request("RekeyTransportRequest", &wish, &[]),
        answer("RekeyTransportResponse", &begun, &begun),
        request("RekeyReplicationRequest", &RekeyReplicationRequest {}, &[]),
        answer("RekeyReplicationResponse", &replaced, &replaced),
        answer("RekeyStatus", &status(true), &status(false)),
        answer("SlotRekey", &slot(&gone), &slot(&[])),
        answer("TransportKeyInfo", &key, &key),
        answer("ReplicationRekey", &replication(true), &replication(false)),
        answer("NodeReplicationKeys", &node, &node),
    ]
}
