//! A value of every type that is sent, with all its members and with the fewest: written out, so that a new member does
//! not compile until it is here, and fails until it is in `docs/openapi.json`.

use std::collections::BTreeMap;

use hsm_api::admin::*;
use hsm_api::data::*;
use hsm_api::{Base64, ErrorCode, Problem, SecretText};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::checker::{Names, object};

/// A type with its members.
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    /// Every member is in it.
    pub(crate) full: Value,
    /// The members that it always has.
    pub(crate) required: Names,
    /// Whether `full` could be sent: of some members only one may be.
    pub(crate) sendable: bool,
    /// Whether the type can be read from this.
    pub(crate) reads: fn(&Value) -> Result<(), String>,
}

/// Every type whose members are described.
pub(crate) fn samples() -> Vec<Sample> {
    [data(), cluster(), keys(), access()]
        .into_iter()
        .flatten()
        .collect()
}

/// Every type that is one of a few words.
pub(crate) fn words() -> Vec<(&'static str, Vec<&'static str>)> {
    macro_rules! words_of {
        ($($name:ident)+) => {
            vec![$((stringify!($name), $name::ALL.iter().map(|word| word.as_str()).collect())),+]
        };
    }
    words_of![
        Purpose DataKeyBits HealthStatus KekStatus
        NodeRole MemberRole SlotState MemberState
        KeyState KeyOrigin BindingMode
        ErrorCode
    ]
}

/// What a node reads: it must have what cannot be left out, and what the node asks for `besides`.
fn request<T: Serialize + DeserializeOwned>(name: &'static str, full: &T, besides: &[&str]) -> Sample {
    let full = value(full);
    let needed = |member: &&String| {
        let mut less = full.clone();
        less.as_object_mut().expect("an object").remove(*member);
        reads::<T>(&less).is_err()
    };
    let needed = object(&full).keys().filter(needed).cloned();
    let required = needed.chain(besides.iter().map(|member| (*member).to_owned()));
    Sample {
        name,
        required: required.collect(),
        sendable: true,
        reads: reads::<T>,
        full,
    }
}

/// What a node sends: it always has what it has if there is little to say.
fn answer<T: Serialize + DeserializeOwned>(name: &'static str, full: &T, least: &T) -> Sample {
    Sample {
        name,
        full: value(full),
        required: object(&value(least)).keys().cloned().collect(),
        sendable: true,
        reads: reads::<T>,
    }
}

/// Of some of its members only one may be sent.
fn with_alternatives(sample: Sample) -> Sample {
    Sample {
        sendable: false,
        ..sample
    }
}

pub(crate) fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).expect("every type has JSON")
}

/// From text, as it comes over the wire.
pub(crate) fn reads<T: DeserializeOwned>(value: &Value) -> Result<(), String> {
    let read = serde_json::from_str::<T>(&value.to_string());
    read.map(|_| ()).map_err(|error| error.to_string())
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn list(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| text(word)).collect()
}

fn hash() -> String {
    "ab".repeat(32)
}

fn id() -> String {
    "ab".repeat(16)
}

fn time() -> String {
    text("2030-01-01T00:00:00Z")
}

fn data() -> Vec<Sample> {
    let sealed = EncryptResponse {
        ciphertext: Base64::from(b"abc"),
        key_id: text("kek-exchange-key-v3"),
        key_version: 3,
    };
    let encrypt = EncryptRequest::new("exchange-key", b"abc").with_aad(b"x");
    let decrypt = DecryptRequest::new("exchange-key", b"abc")
        .with_key_id("kek-exchange-key-v3")
        .with_aad(b"x")
        .as_data_key();
    let rewrap = RewrapRequest::new("2fa", b"abc")
        .with_key_id("kek-2fa-v1")
        .with_aad(b"x")
        .of("2FA", "2fa-1")
        .rebound_to("2FA", "2fa-2");
    let datakey = DataKeyRequest::new("exchange-key")
        .with_aad(b"x")
        .with_bits(DataKeyBits::Bits128)
        .sealed_only();
    let principal = PrincipalName {
        ou: Some(text("2FA")),
        cn: Some(text("2fa-1")),
    };
    let opened = DecryptResponse {
        plaintext: b"abc".into(),
    };
    let key = |plaintext: Option<&[u8; 3]>| DataKeyResponse {
        ciphertext: Base64::from(b"abc"),
        key_id: text("kek-exchange-key-v3"),
        key_version: 3,
        plaintext: plaintext.map(Into::into),
    };
    let refused = ItemError {
        status: 503,
        code: text(ErrorCode::KeyVersionNotReady.as_str()),
        error: text("key version not ready"),
        detail: text("version 7 is being imported on this node"),
        retryable: true,
    };
    let health = HealthResponse {
        status: HealthStatus::Degraded,
        hsm_available: true,
        kek_status: BTreeMap::from([(text("kek-2fa-v1"), KekStatus::Unavailable)]),
    };
    let problem = Problem::new(
        ErrorCode::KeyVersionNotReady,
        "version 7 is being imported",
        "01J",
    );
    let encrypt_batch = EncryptBatch::new([encrypt.clone()]).with_context("2fa");
    let decrypt_batch = DecryptBatch::new([decrypt.clone()]).with_context("2fa");
    let rewrap_batch = RewrapBatch::new([rewrap.clone()]).with_context("2fa");
    let datakey_batch = DataKeyBatch::new([datakey.clone()]).with_context("2fa");
    vec![
        request("EncryptRequest", &encrypt, &[]),
        request("EncryptBatch", &encrypt_batch, &[]),
        answer("EncryptResponse", &sealed, &sealed),
        request("DecryptRequest", &decrypt, &[]),
        request("DecryptBatch", &decrypt_batch, &[]),
        answer("DecryptResponse", &opened, &opened),
        request("RewrapRequest", &rewrap, &[]),
        request("RewrapBatch", &rewrap_batch, &[]),
        answer::<RewrapResponse>("RewrapResponse", &sealed, &sealed),
        request("DataKeyRequest", &datakey, &[]),
        request("DataKeyBatch", &datakey_batch, &[]),
        answer("DataKeyResponse", &key(Some(b"abc")), &key(None)),
        request("PrincipalName", &principal, &[]),
        answer("ItemError", &refused, &refused),
        answer("HealthResponse", &health, &health),
        answer("Problem", &problem, &problem),
    ]
}

fn cluster() -> Vec<Sample> {
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
        joined_at: time(),
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
        silent_voters: list(&["hsm-node-3"]),
    };
    let members = MembersResponse {
        members: vec![member(true), member(false)],
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
        answer("NotReadyReason", &reason, &reason),
        answer("SlotStatus", &slot(Some("its PIN is missing")), &slot(None)),
        request("UnlockSlotRequest", &UnlockSlotRequest { retry: true }, &[]),
        answer("MembersResponse", &members, &members),
        answer("Member", &member(true), &member(false)),
        answer("MemberSlot", &member_slot, &member_slot),
    ]
}

fn keys() -> Vec<Sample> {
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

/// Both forms of a mapping.
pub(crate) fn mappings() -> [AclMapping; 2] {
    let mapping = |operations| AclMapping {
        contexts: list(&["exchange-key"]),
        operations,
    };
    [mapping(None), mapping(Some(list(&["decrypt"])))]
}

fn access() -> Vec<Sample> {
    let issuer = || Some(text("CN=Clients"));
    let who = AclWho {
        issuer: issuer(),
        ou: Some(text("Trading")),
        cn: Some(text("batch")),
    };
    let rule = AclRule {
        who: who.clone(),
        contexts: list(&["2fa"]),
        operations: list(&["rewrap"]),
    };
    let role = AclRole {
        issuer: issuer(),
        ou: Some(text("Admin")),
        cn: Some(text("admin")),
        spki_sha256: Some(hash()),
    };
    let [everything, some] = mappings();
    let acl = AclDocument {
        digest: Some(hash()),
        mappings: BTreeMap::from([(text("Trading"), everything), (text("Reports"), some)]),
        rules: vec![rule.clone()],
        roles: BTreeMap::from([(text("admin"), vec![role.clone()])]),
    };
    let set = SetAclRequest {
        acl: acl.clone(),
        dry_run: true,
    };
    let was_set = SetAclResponse { digest: hash() };
    let said = AclAnswer {
        allowed: true,
        reason: text("allowed by mappings.Trading"),
        operations: list(&["encrypt"]),
    };
    let by_name = RevocationMatch {
        cn: Some(text("gone")),
        ..RevocationMatch::default()
    };
    let every_way = RevocationMatch {
        cn: Some(text("gone")),
        serial: Some(text("12ab")),
        issuer: issuer(),
        fingerprint: Some(hash()),
    };
    let certificate = || Some(Base64::from(b"abc"));
    let revoke = RevokeRequest {
        what: Some(by_name.clone()),
        certificate: certificate(),
        reason: text("lost"),
    };
    let revoked = |warnings: &[&str]| RevokeResponse {
        revocations: vec![by_name.clone()],
        added: 1,
        warnings: list(warnings),
    };
    let unrevoke = UnrevokeRequest {
        what: Some(by_name.clone()),
        certificate: certificate(),
    };
    let unrevoked = UnrevokeResponse {
        revocations: vec![by_name.clone()],
        removed: 1,
    };
    let crl = RevokeCrlRequest {
        crl: Base64::from(b"abc"),
        reason: text("monthly"),
    };
    let crl_info = |next_update: Option<String>| CrlInfo {
        issuer: text("CN=Clients"),
        entries: 2,
        next_update,
    };
    let crl_revoked = RevokeCrlResponse {
        lists: vec![crl_info(Some(time()))],
        added: 2,
    };
    let revocation = RevocationInfo {
        what: by_name.clone(),
        reason: text("lost"),
        revoked_at: time(),
    };
    let page = |next: Option<&str>| RevocationsResponse {
        revocations: vec![revocation.clone()],
        total: 1001,
        next: next.map(text),
    };
    vec![
        request("AclDocument", &acl, &[]),
        request("AclRule", &rule, &[]),
        request("AclWho", &who, &[]),
        request("AclRole", &role, &["issuer"]),
        request("SetAclRequest", &set, &[]),
        answer("SetAclResponse", &was_set, &was_set),
        answer("AclAnswer", &said, &said),
        with_alternatives(request("RevocationMatch", &every_way, &[])),
        with_alternatives(request("RevokeRequest", &revoke, &[])),
        answer("RevokeResponse", &revoked(&["an intermediate CA"]), &revoked(&[])),
        with_alternatives(request("UnrevokeRequest", &unrevoke, &[])),
        answer("UnrevokeResponse", &unrevoked, &unrevoked),
        request("RevokeCrlRequest", &crl, &[]),
        answer("RevokeCrlResponse", &crl_revoked, &crl_revoked),
        answer("CrlInfo", &crl_info(Some(time())), &crl_info(None)),
        answer("RevocationsResponse", &page(Some("00ab")), &page(None)),
        answer("RevocationInfo", &revocation, &revocation),
    ]
}
