//! What is sent about a cluster, its members and their slots.

use hsm_api::SecretText;
use hsm_api::admin::*;

use super::{Sample, answer, hash, id, list, request, text, time};

pub(super) fn samples() -> Vec<Sample> {
    let fingerprint = SlotFingerprint {
        slot: text("exchange"),
        spki_sha256: hash(),
    };
    let who = |ou: Option<&str>| WhoAmI {
        cn: text("admin"),
        ou: ou.map(text),
        roles: list(&["admin"]),
        contexts: list(&["exchange-key"]),
    };
    let init = ClusterInitResponse {
        cluster_id: id(),
        epoch: 1,
        raft_id: 1,
    };
    let token_wish = JoinTokenRequest {
        ttl_seconds: Some(600),
        node_id: Some(text("hsm-node-4")),
    };
    let token = JoinTokenResponse {
        token: SecretText::from("secret"),
        cluster_ca_sha256: hash(),
        expires_at: time(),
    };
    let join = JoinRequest {
        token: SecretText::from("secret"),
        cluster_ca_sha256: hash(),
        leader_addresses: list(&["127.0.0.1:8445"]),
    };
    let joined = JoinResponse {
        raft_id: 4,
        cluster_id: id(),
        role: MemberRole::Voter,
        slots: vec![fingerprint.clone()],
    };
    let own_keys = SlotKeysResponse {
        slots: vec![fingerprint.clone()],
    };
    let leader = LeaderRef {
        raft_id: 1,
        node_id: text("hsm-node-1"),
    };
    let reason = NotReadyReason {
        code: text("slot:exchange"),
        detail: text("locked"),
    };
    let slot = |reason: Option<&str>| SlotStatus {
        slot: text("exchange"),
        label: text("slot-exchange"),
        state: SlotState::Locked,
        reason: reason.map(text),
        missing_keys: 2,
    };
    let member_slot = MemberSlot {
        slot: text("exchange"),
        state: SlotState::Ready,
    };
    let leaving = |told: bool| Leaving {
        since: time(),
        successor: told.then(|| text("hsm-node-4")),
    };
    let removed = |told: bool| RemovedMember {
        node_id: text("hsm-node-3"),
        raft_id: 3,
        removed_at: time(),
        held: if told { list(&["exchange-key"]) } else { Vec::new() },
    };
    let removal = RemoveNodeRequest {
        successor: Some(text("hsm-node-4")),
        lose_keys: true,
        dry_run: true,
    };
    let left = |told: bool| RemoveNodeResponse {
        node_id: text("hsm-node-3"),
        raft_id: 3,
        state: RemovalState::Waiting,
        successor: told.then(|| text("hsm-node-4")),
        held: list(&["exchange-key"]),
        voters: 2,
        majority: 2,
        failure_tolerance: 0,
    };
    let kept = KeepNodeResponse {
        node_id: text("hsm-node-3"),
        raft_id: 3,
    };
    let transfer = TransferLeaderRequest {
        from: Some(1),
        to: Some(text("hsm-node-2")),
    };
    let led = TransferLeaderResponse {
        leader: text("hsm-node-2"),
        raft_id: 2,
        before: text("hsm-node-1"),
    };
    let member = |told: bool| Member {
        node_id: text("hsm-node-1"),
        raft_id: 1,
        role: MemberRole::Voter,
        state: told.then_some(MemberState::Heard),
        api_address: text("127.0.0.1:8443"),
        cluster_address: text("127.0.0.1:8445"),
        is_leader: true,
        matched_index: told.then_some(42),
        lag: told.then_some(0),
        last_seen_ms: told.then_some(50),
        slots: vec![member_slot.clone()],
        held_back: told
            .then(|| text("slot exchange: no member has granted it the transport key"))
            .into_iter()
            .collect(),
        leaving: told.then(|| leaving(true)),
        joined_at: time(),
    };
    let known = KnownToRemoved {
        versions: 2,
        transport_keys: 1,
        replication_key: true,
    };
    let status = |told: bool| ClusterStatus {
        cluster_id: id(),
        cluster_name: text("playground"),
        epoch: 1,
        node_id: text("hsm-node-1"),
        raft_id: 1,
        role: NodeRole::Leader,
        term: 3,
        leader: told.then(|| leader.clone()),
        last_log_index: 42,
        committed_index: 42,
        applied_index: 42,
        quorum_ack_age_ms: told.then_some(50),
        staleness_ms: told.then_some(50),
        ready: false,
        not_ready: vec![reason.clone()],
        slots: vec![slot(Some("its PIN is missing"))],
        failure_tolerance: 1,
        voters: 3,
        majority: 2,
        silent_voters: list(&["hsm-node-3"]),
        behind_voters: list(&["hsm-node-2"]),
        known_to_removed: known,
    };
    let members = |told: bool| MembersResponse {
        members: vec![member(true), member(false)],
        removed: if told {
            vec![removed(true), removed(false)]
        } else {
            Vec::new()
        },
    };
    vec![
        answer("WhoAmI", &who(Some("Admin")), &who(None)),
        request("ClusterInitRequest", &ClusterInitRequest {}, &[]),
        answer("ClusterInitResponse", &init, &init),
        request("JoinTokenRequest", &token_wish, &[]),
        answer("JoinTokenResponse", &token, &token),
        request("JoinRequest", &join, &[]),
        answer("JoinResponse", &joined, &joined),
        answer("SlotKeysResponse", &own_keys, &own_keys),
        answer("SlotFingerprint", &fingerprint, &fingerprint),
        answer("ClusterStatus", &status(true), &status(false)),
        answer("LeaderRef", &leader, &leader),
        answer("KnownToRemoved", &known, &known),
        answer("NotReadyReason", &reason, &reason),
        answer("SlotStatus", &slot(Some("its PIN is missing")), &slot(None)),
        request("UnlockSlotRequest", &UnlockSlotRequest { retry: true }, &[]),
        answer("MembersResponse", &members(true), &members(false)),
        answer("RemovedMember", &removed(true), &removed(false)),
        answer("Leaving", &leaving(true), &leaving(false)),
        request("RemoveNodeRequest", &removal, &[]),
        answer("RemoveNodeResponse", &left(true), &left(false)),
        request("KeepNodeRequest", &KeepNodeRequest {}, &[]),
        answer("KeepNodeResponse", &kept, &kept),
        request("TransferLeaderRequest", &transfer, &[]),
        answer("TransferLeaderResponse", &led, &led),
        answer("Member", &member(true), &member(false)),
        answer("MemberSlot", &member_slot, &member_slot),
    ]
}
