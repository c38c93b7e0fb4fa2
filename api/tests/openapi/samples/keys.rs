//! What is sent about keys, their rotation and their end.

use hsm_api::admin::*;

use super::{Sample, answer, id, list, request, text, time};

pub(super) fn samples() -> Vec<Sample> {
    let create = CreateKekRequest {
        context: text("exchange-key"),
        label: Some(text("kek-exchange-key-v4")),
        version: Some(4),
        size: Some(256),
    };
    let created = CreateKekResponse {
        context: text("exchange-key"),
        version: 4,
        key_id: text("kek-exchange-key-v4"),
        state: KeyState::Active,
    };
    let destruction = |over: bool| DestructionInfo {
        scheduled_at: time(),
        undone: KeyState::Disabled,
        wait_seconds: 604_800,
        elapsed_seconds: 60,
        begun_at: over.then(time),
        ended_at: over.then(time),
        owing: if over { list(&["hsm-node-3"]) } else { Vec::new() },
        joining: if over { list(&["hsm-node-3"]) } else { Vec::new() },
        remnants_sealed: true,
    };
    let invocations = Invocations {
        leased: 65_537,
        limit: 1 << 32,
    };
    let version = |long: bool| KeyVersionInfo {
        version: 3,
        key_id: text("kek-exchange-key-v3"),
        key_uid: id(),
        slot: text("exchange"),
        state: KeyState::Destroyed,
        created_at: time(),
        activated_at: long.then(time),
        retired_at: long.then(time),
        acks: list(&["hsm-node-1"]),
        origin: KeyOrigin::Adopted,
        holders: if long { list(&["hsm-node-1"]) } else { Vec::new() },
        destruction: long.then(|| destruction(true)),
        invocations: long.then_some(invocations),
    };
    let context = |active: Option<u32>| ContextInfo {
        context: text("exchange-key"),
        slot: text("exchange"),
        binding: BindingMode::Shared,
        active_version: active,
        versions: vec![version(true), version(false)],
    };
    let contexts = ListKeksResponse {
        contexts: vec![context(Some(3))],
    };
    let destroy = DestroyKeyRequest {
        wait_seconds: Some(604_800),
        override_recent_use: true,
    };
    let changed = |long: bool| KeyVersionResponse {
        context: text("exchange-key"),
        info: version(long),
    };
    let node_usage = NodeUsage {
        node_id: text("hsm-node-1"),
        last_used: time(),
    };
    let usage = |used: bool| KeyUsage {
        context: text("exchange-key"),
        version: 3,
        key_id: text("kek-exchange-key-v3"),
        state: KeyState::Active,
        encryptions: 7,
        decryptions: 8,
        last_used: used.then(time),
        nodes: vec![node_usage.clone()],
        invocations: used.then_some(invocations),
    };
    let usages = KeyUsageResponse {
        versions: vec![usage(true), usage(false)],
    };
    let cleanup = CleanupRequest {
        context: Some(text("exchange-key")),
        dry_run: true,
    };
    let cleaned = |kept: &str| CleanupVersion {
        context: text("exchange-key"),
        version: 1,
        key_id: text("kek-exchange-key-v1"),
        slot: text("exchange"),
        disabled: kept.is_empty(),
        kept_because: text(kept),
        deleted_by_v1: true,
    };
    let cleanups = CleanupResponse {
        dry_run: true,
        versions: vec![cleaned(""), cleaned("it was used")],
    };
    let adopt_key = AdoptKey {
        label: text("kek-exchange-key-v1"),
        version: Some(1),
        id: Some(text("0a0b")),
        created_at: Some(time()),
    };
    let adopt = AdoptKeysRequest {
        context: text("exchange-key"),
        keys: vec![adopt_key.clone()],
        slot: Some(text("default")),
        binding: Some(BindingMode::Shared),
        only: true,
        skip_missing: true,
        dry_run: true,
    };
    let skipped_key = |version| SkippedKey {
        key_id: text("kek-exchange-key-v0"),
        version,
    };
    let adopted_version = AdoptedVersion {
        version: 1,
        key_id: text("kek-exchange-key-v1"),
        new: true,
        proven: true,
    };
    let adopted = |active: Option<u32>| AdoptKeysResponse {
        context: text("exchange-key"),
        slot: text("default"),
        binding: BindingMode::Shared,
        dry_run: false,
        versions: vec![adopted_version.clone()],
        skipped: active.map(|_| skipped_key(Some(1))).into_iter().collect(),
        active_version: active,
    };
    let rotated = RotateResponse {
        context: text("exchange-key"),
        version: 4,
        key_id: text("kek-exchange-key-v4"),
        previous_version: 3,
    };
    let relocate = MoveKeyRequest { slot: text("2fa") };
    let relocated = |previous: Option<u32>| MoveKeyResponse {
        context: text("exchange-key"),
        slot: text("2fa"),
        version: 4,
        key_id: text("kek-exchange-key-v4"),
        previous_version: previous,
    };
    let rotation = |pending: bool| RotationStatus {
        context: text("exchange-key"),
        active_version: pending.then_some(3),
        active_since: pending.then(time),
        pending_version: pending.then_some(4),
        pending_since: pending.then(time),
        acks: list(&["hsm-node-1"]),
        missing: list(&["hsm-node-2"]),
        rotation_interval_days: 90,
        next_rotation_due: pending.then(time),
    };
    let rotations = RotationStatusResponse {
        contexts: vec![rotation(true), rotation(false)],
    };
    vec![
        request("AdoptKeysRequest", &adopt, &[]),
        request("AdoptKey", &adopt_key, &[]),
        answer("AdoptKeysResponse", &adopted(Some(2)), &adopted(None)),
        answer("AdoptedVersion", &adopted_version, &adopted_version),
        answer("SkippedKey", &skipped_key(Some(1)), &skipped_key(None)),
        request("CreateKekRequest", &create, &[]),
        answer("CreateKekResponse", &created, &created),
        answer("ListKeksResponse", &contexts, &contexts),
        answer("ContextInfo", &context(Some(3)), &context(None)),
        answer("KeyVersionInfo", &version(true), &version(false)),
        answer("DestructionInfo", &destruction(true), &destruction(false)),
        request("KeyUseRequest", &KeyUseRequest {}, &[]),
        request("DestroyKeyRequest", &destroy, &[]),
        request("UndoDestroyRequest", &UndoDestroyRequest {}, &[]),
        answer("KeyVersionResponse", &changed(true), &changed(false)),
        answer("KeyUsageResponse", &usages, &usages),
        answer("KeyUsage", &usage(true), &usage(false)),
        answer("NodeUsage", &node_usage, &node_usage),
        answer("Invocations", &invocations, &invocations),
        request("CleanupRequest", &cleanup, &[]),
        answer("CleanupResponse", &cleanups, &cleanups),
        answer("CleanupVersion", &cleaned("it was used"), &cleaned("")),
        request("RotateRequest", &RotateRequest {}, &[]),
        answer("RotateResponse", &rotated, &rotated),
        request("MoveKeyRequest", &relocate, &[]),
        answer("MoveKeyResponse", &relocated(Some(3)), &relocated(None)),
        answer("RotationStatusResponse", &rotations, &rotations),
        answer("RotationStatus", &rotation(true), &rotation(false)),
    ]
}
