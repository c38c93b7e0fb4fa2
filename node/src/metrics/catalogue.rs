//! Which metrics there are: their names, what `/metrics` says that each means, and which of them are there before
//! anything happens.

use metrics::{Unit, counter, gauge, histogram};

use super::{
    CLIENT_CERT_REASONS, CONFIG_SECTIONS, PROXY_PROTOCOL_REFUSALS, config_differs, known_to_removed, role,
};

pub(super) const REQUESTS: &str = "hsm_requests_total";
pub(super) const REQUEST_DURATION: &str = "hsm_request_duration_seconds";
pub(super) const ACL_FAILURES: &str = "hsm_acl_failures_total";
pub(super) const REVOCATION_FAILURES: &str = "hsm_revocation_failures_total";
pub(super) const ENCRYPTIONS: &str = "hsm_encrypt_operations_total";
pub(super) const DECRYPTIONS: &str = "hsm_decrypt_operations_total";
pub(super) const REWRAPPINGS: &str = "hsm_rewrap_operations_total";
pub(super) const DATA_KEYS: &str = "hsm_datakey_operations_total";
pub(super) const RATE_LIMIT_HITS: &str = "hsm_rate_limit_hits_total";
pub(super) const ERRORS: &str = "hsm_errors_total";
pub(super) const CONNECTIONS: &str = "hsm_active_connections";
pub(super) const HANDSHAKE_FAILURES: &str = "hsm_tls_handshake_failures_total";
pub(super) const CONNECTIONS_REFUSED: &str = "hsm_connections_refused_total";
pub(super) const CLIENT_CERT_REFUSALS: &str = "hsm_client_cert_refusals_total";
pub(super) const CLIENT_CERT_VERIFICATIONS: &str = "hsm_client_cert_verifications_total";
pub(super) const PROXY_PROTOCOL: &str = "hsm_proxy_protocol_refusals_total";
pub(super) const TOKEN_CALLS: &str = "hsm_token_calls_total";
pub(super) const TOKEN_CALL_DURATION: &str = "hsm_token_call_duration_seconds";
pub(super) const SLOT_JOB_DURATION: &str = "hsm_slot_job_duration_seconds";
pub(super) const BATCH_ITEMS: &str = "hsm_batch_items_total";
pub(super) const SLOT_STATE: &str = "hsm_slot_state";
pub(super) const KEYS_MISSING: &str = "hsm_keys_missing";
pub(super) const SLOT_UNCONFIGURED: &str = "hsm_slot_unconfigured";
pub(super) const SYNC_AGE: &str = "hsm_sync_age_seconds";
pub(super) const RAFT_ROLE: &str = "hsm_raft_role";
pub(super) const RAFT_TERM: &str = "hsm_raft_term";
pub(super) const LEADER_CHANGES: &str = "hsm_raft_leader_changes_total";
pub(super) const LAST_LOG: &str = "hsm_raft_last_log_index";
pub(super) const COMMITTED: &str = "hsm_raft_committed_index";
pub(super) const APPLIED: &str = "hsm_raft_applied_index";
pub(super) const SNAPSHOT: &str = "hsm_raft_snapshot_index";
pub(super) const PEER_LAG: &str = "hsm_raft_peer_lag";
pub(super) const VOTERS: &str = "hsm_raft_voters";
pub(super) const FAILURE_TOLERANCE: &str = "hsm_raft_failure_tolerance";
pub(super) const QUORUM_ACK_AGE: &str = "hsm_raft_quorum_ack_age_seconds";
pub(super) const STALENESS: &str = "hsm_staleness_seconds";
pub(super) const PROPOSALS_PENDING: &str = "hsm_raft_proposals_pending";
pub(super) const PROPOSALS_TIMED_OUT: &str = "hsm_raft_proposals_timed_out_total";
pub(super) const FSYNC: &str = "hsm_raft_append_fsync_seconds";
pub(super) const STORE_BYTES: &str = "hsm_store_bytes";
pub(super) const STORE_LIVE_BYTES: &str = "hsm_store_live_bytes";
pub(super) const DISK_FREE: &str = "hsm_disk_free_bytes";
pub(super) const DISK_BELOW_RESERVE: &str = "hsm_disk_below_reserve";
pub(super) const READY: &str = "hsm_ready";
pub(super) const STANDBY: &str = "hsm_standby";
pub(super) const INVOCATIONS_LEASED: &str = "hsm_key_invocations_leased_ratio";
pub(super) const INVOCATIONS_DUE: &str = "hsm_key_invocations_due";
pub(super) const INVOCATIONS_LEFT: &str = "hsm_key_invocations_left";
pub(super) const CONFIG_DIFFERS: &str = "hsm_config_differs";
pub(super) const ROTATION_DUE: &str = "hsm_key_rotation_due";
pub(super) const KNOWN_TO_REMOVED: &str = "hsm_keys_known_to_removed";
pub(super) const CLOCK: &str = "hsm_clock_seconds";
pub(super) const CLOCK_ALARM: &str = "hsm_rotation_clock_alarm";
pub(super) const LOG_LINES_LOST: &str = "hsm_log_lines_lost_total";
pub(super) const AUDIT_LINES_LOST: &str = "hsm_audit_lines_lost_total";
pub(super) const CERTIFICATE_ENDS: &str = "hsm_certificate_not_after_seconds";
pub(super) const BUILD_INFO: &str = "hsm_build_info";

pub(super) fn describe() {
    use metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!(REQUESTS, "Requests by endpoint and status.");
    describe_histogram!(REQUEST_DURATION, Unit::Seconds, "Time from request to answer.");
    describe_counter!(ACL_FAILURES, "Requests refused by the access policy.");
    describe_counter!(REVOCATION_FAILURES, "Requests with a revoked certificate.");
    describe_counter!(ENCRYPTIONS, "Encryptions by context and status.");
    describe_counter!(DECRYPTIONS, "Decryptions by context and status.");
    describe_counter!(
        REWRAPPINGS,
        "Ciphertexts brought under the active key version, by context and status."
    );
    describe_counter!(DATA_KEYS, "Data keys made by context and status.");
    describe_counter!(RATE_LIMIT_HITS, "Requests above a principal's rate.");
    describe_counter!(
        ERRORS,
        "Answers of status 500 by operation: encrypt, decrypt, rewrap, datakey, admin."
    );
    describe_gauge!(CONNECTIONS, "Open connections of the API listener.");
    describe_counter!(HANDSHAKE_FAILURES, "TLS handshakes that did not succeed.");
    describe_counter!(
        CONNECTIONS_REFUSED,
        "Connections of principals that had as many as one may have."
    );
    describe_counter!(
        CLIENT_CERT_REFUSALS,
        "Requests refused for their Client-Cert header, or for the proxy they came through."
    );
    describe_counter!(
        CLIENT_CERT_VERIFICATIONS,
        "Certificates in Client-Cert headers that were verified, because they were not remembered."
    );
    describe_counter!(
        PROXY_PROTOCOL,
        "Connections closed for their PROXY header, or for the lack of one."
    );
    describe_counter!(TOKEN_CALLS, "Calls of a slot's token by operation and result.");
    describe_histogram!(
        TOKEN_CALL_DURATION,
        Unit::Seconds,
        "Time of a call in a slot's token, without the wait for it."
    );
    describe_histogram!(
        SLOT_JOB_DURATION,
        Unit::Seconds,
        "Time from a request's job to its answer, the slot's queue included."
    );
    describe_counter!(
        BATCH_ITEMS,
        "Items of batches by operation and code: ok, or the error that the item was answered with."
    );
    describe_gauge!(SLOT_STATE, "1 for the state a slot is in.");
    describe_gauge!(KEYS_MISSING, "Keys the state names and the slot's token lacks.");
    describe_gauge!(
        SLOT_UNCONFIGURED,
        "1 for a slot that the state asks of this node and that its configuration lacks."
    );
    describe_gauge!(
        SYNC_AGE,
        Unit::Seconds,
        "Time since token and state were last compared."
    );
    describe_gauge!(RAFT_ROLE, "1 for the role this node has.");
    describe_gauge!(RAFT_TERM, "Raft term.");
    describe_counter!(LEADER_CHANGES, "Leaders this node has seen come.");
    describe_gauge!(LAST_LOG, "Index of the last log entry.");
    describe_gauge!(COMMITTED, "Highest index known to be committed.");
    describe_gauge!(APPLIED, "Highest index applied.");
    describe_gauge!(SNAPSHOT, "Index of the last snapshot.");
    describe_gauge!(PEER_LAG, "Entries a peer is behind this leader.");
    describe_gauge!(VOTERS, "Members that vote.");
    describe_gauge!(
        KNOWN_TO_REMOVED,
        "Keys in use that removed nodes know: active versions, transport keys, the replication key."
    );
    describe_gauge!(
        FAILURE_TOLERANCE,
        "How many more voters may fail before the quorum is lost, as the leader knows; -1 elsewhere."
    );
    describe_gauge!(
        QUORUM_ACK_AGE,
        Unit::Seconds,
        "Time since a quorum last acknowledged this leader; -1 elsewhere."
    );
    describe_gauge!(
        STALENESS,
        Unit::Seconds,
        "Time since a leader with a quorum was last heard of; -1 before the first."
    );
    describe_gauge!(PROPOSALS_PENDING, "Proposals without an answer yet.");
    describe_counter!(PROPOSALS_TIMED_OUT, "Proposals whose outcome is unknown.");
    describe_histogram!(FSYNC, Unit::Seconds, "Time of the barrier after an append.");
    describe_gauge!(STORE_BYTES, Unit::Bytes, "Size of the store on disk.");
    describe_gauge!(
        STORE_LIVE_BYTES,
        Unit::Bytes,
        "Size of the rows in the store that there are."
    );
    describe_gauge!(
        DISK_FREE,
        Unit::Bytes,
        "What is free on the data directory's file system."
    );
    describe_gauge!(DISK_BELOW_RESERVE, "1 while that is below the reserve.");
    describe_gauge!(READY, "1 while this node is ready.");
    describe_gauge!(
        STANDBY,
        "1 while this node is not ready for no other reason than that another one leads (active-passive)."
    );
    describe_gauge!(
        INVOCATIONS_LEASED,
        "Invocations of a context's active key version that were given out, of its limit; 0.9 at most."
    );
    describe_gauge!(
        INVOCATIONS_DUE,
        "1 while a context's active key version is to be rotated because it is used up."
    );
    describe_gauge!(
        INVOCATIONS_LEFT,
        "Invocations of a context's active key version that this node was given and has not used."
    );
    describe_gauge!(
        ROTATION_DUE,
        "1 while a context's active key version is older than the context's interval, by this node's clock."
    );
    describe_gauge!(
        CONFIG_DIFFERS,
        "1 where this node's configuration differs from the cluster's state, which rules."
    );
    describe_counter!(
        LOG_LINES_LOST,
        "Log lines that a place of the log did not take, in time or at all."
    );
    describe_counter!(AUDIT_LINES_LOST, "Lines of the audit among them.");
    describe_gauge!(CLOCK, Unit::Seconds, "Unix time by this node's clock.");
    describe_gauge!(
        CLOCK_ALARM,
        "1 while this leader's clock differs from the voters' and nothing is rotated by age."
    );
    describe_gauge!(
        CERTIFICATE_ENDS,
        Unit::Seconds,
        "Unix time at which the first certificate of a listener's chain ends."
    );
    describe_gauge!(BUILD_INFO, "1, with the version.");
}

/// Every metric without a label of its own exists from the start: what is absent cannot be told
/// from what is zero.
pub(super) fn begin() {
    for name in [
        ACL_FAILURES,
        REVOCATION_FAILURES,
        RATE_LIMIT_HITS,
        HANDSHAKE_FAILURES,
        CONNECTIONS_REFUSED,
        CLIENT_CERT_VERIFICATIONS,
        LEADER_CHANGES,
        PROPOSALS_TIMED_OUT,
        LOG_LINES_LOST,
        AUDIT_LINES_LOST,
    ] {
        counter!(name).increment(0);
    }
    for name in [
        CONNECTIONS,
        RAFT_TERM,
        LAST_LOG,
        COMMITTED,
        APPLIED,
        SNAPSHOT,
        PROPOSALS_PENDING,
        STORE_BYTES,
        STORE_LIVE_BYTES,
        DISK_FREE,
        DISK_BELOW_RESERVE,
        READY,
        STANDBY,
        SYNC_AGE,
        VOTERS,
        CLOCK,
        CLOCK_ALARM,
    ] {
        gauge!(name).set(0.0);
    }
    gauge!(FAILURE_TOLERANCE).set(-1.0);
    gauge!(QUORUM_ACK_AGE).set(-1.0);
    gauge!(STALENESS).set(-1.0);
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    for reason in CLIENT_CERT_REASONS {
        counter!(CLIENT_CERT_REFUSALS, "reason" => reason).increment(0);
    }
    for reason in PROXY_PROTOCOL_REFUSALS {
        counter!(PROXY_PROTOCOL, "reason" => reason).increment(0);
    }
    for operation in ["encrypt", "decrypt", "rewrap", "datakey", "admin"] {
        counter!(ERRORS, "operation" => operation).increment(0);
    }
    for operation in ["encrypt", "decrypt", "rewrap", "datakey"] {
        counter!(BATCH_ITEMS, "operation" => operation, "code" => "ok").increment(0);
    }
    for endpoint in ["/encrypt", "/decrypt", "/rewrap", "/datakey"] {
        counter!(REQUESTS, "endpoint" => endpoint, "status" => "200").increment(0);
        let _ = histogram!(REQUEST_DURATION, "endpoint" => endpoint);
    }
    let _ = histogram!(FSYNC);
    role("uninitialised");
    config_differs(CONFIG_SECTIONS.map(|section| (section, false)));
    known_to_removed(["version", "transport", "replication"].map(|kind| (kind, 0)));
}
