//! Every metric of the node, by name: helper functions, so that no call site invents a name or a
//! label. Labels have few values, fixed by configuration or by this file; nothing a caller sends
//! ever becomes one, but for the name in his certificate, if the configuration says so.

mod by_client;
mod catalogue;
mod unnamed;

use std::sync::Arc;
use std::time::Duration;

use metrics::{SharedString, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use self::catalogue::*;
pub use self::unnamed::without_names;

/// Why metrics could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("metrics could not be set up: {0}")]
pub struct MetricsError(String);

/// Upper bounds in seconds, from 50 µs: a token call takes 10 µs, a request half a millisecond.
const LATENCY_BUCKETS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    10.0,
];

/// What of the configuration is compared with the state.
pub(crate) const CONFIG_SECTIONS: [&str; 6] =
    ["acl", "roles", "revocations", "slots", "bindings", "rotation"];
const ROLES: [&str; 5] = ["leader", "follower", "learner", "candidate", "uninitialised"];
const SLOT_STATES: [&str; 4] = ["absent", "locked", "ready", "failed"];
/// Why a request that comes through a proxy, or pretends to, is refused.
const CLIENT_CERT_REASONS: [&str; 5] = ["missing", "malformed", "refused", "not_trusted", "admin"];
/// Why a connection is closed before TLS.
pub(crate) const PROXY_PROTOCOL_REFUSALS: [&str; 6] = [
    "missing",
    "incomplete",
    "too_slow",
    "version_1",
    "malformed",
    "unexpected",
];

/// The recorder of this process.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

/// Sets up the recorder of this process. [`Metrics::upkeep`] has to be called every few seconds. With `by_client`
/// requests and rate limit hits have the label `client_cn`.
///
/// # Errors
/// When another recorder is installed already.
pub fn install(by_client: bool) -> Result<Metrics, MetricsError> {
    let recorder = builder()?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| MetricsError(error.to_string()))?;
    describe();
    begin();
    if by_client {
        by_client::begin();
    }
    Ok(Metrics { handle })
}

fn builder() -> Result<PrometheusBuilder, MetricsError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &LATENCY_BUCKETS)
        .map_err(|error| MetricsError(error.to_string()))
}

impl Metrics {
    /// Prometheus text.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Moves samples into histograms; without it they pile up until somebody scrapes.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

fn result(ok: bool) -> &'static str {
    if ok { "success" } else { "error" }
}

/// Statuses are few; as texts that live for ever they cost no allocation.
fn status_text(status: u16) -> &'static str {
    match status {
        200 => "200",
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        405 => "405",
        409 => "409",
        413 => "413",
        415 => "415",
        422 => "422",
        429 => "429",
        500 => "500",
        503 => "503",
        _ => "other",
    }
}

/// A request was answered. `endpoint` is a route, never a path as it came; `common_name` is that of the client's
/// certificate, if it is known who he is.
pub fn request(endpoint: &'static str, common_name: Option<&str>, status: u16, duration: Duration) {
    request_of(endpoint, common_name.and_then(by_client::label), status);
    histogram!(REQUEST_DURATION, "endpoint" => endpoint).record(duration.as_secs_f64());
}

fn request_of(endpoint: &'static str, client: Option<SharedString>, status: u16) {
    let status = status_text(status);
    let counter = match client {
        None => counter!(REQUESTS, "endpoint" => endpoint, "status" => status),
        Some(client) => {
            counter!(REQUESTS, "endpoint" => endpoint, "client_cn" => client, "status" => status)
        }
    };
    counter.increment(1);
}

/// The access policy refused a request.
pub fn acl_failure() {
    counter!(ACL_FAILURES).increment(1);
}

/// A revoked certificate was refused.
pub fn revocation_failure() {
    counter!(REVOCATION_FAILURES).increment(1);
}

/// The principal with this common name exceeded its rate.
pub fn rate_limit_hit(common_name: &str) {
    rate_limit_hit_of(by_client::label(common_name));
}

fn rate_limit_hit_of(client: Option<SharedString>) {
    let counter = match client {
        None => counter!(RATE_LIMIT_HITS),
        Some(client) => counter!(RATE_LIMIT_HITS, "client_cn" => client),
    };
    counter.increment(1);
}

/// An answer of status 500 in `operation` (`encrypt`, `decrypt`, `rewrap`, `datakey`, `admin`).
pub fn error(operation: &'static str) {
    counter!(ERRORS, "operation" => operation).increment(1);
}

/// An encryption under a known context ended.
pub fn encryption(context: Arc<str>, ok: bool) {
    counter!(ENCRYPTIONS, "context" => context, "status" => result(ok)).increment(1);
}

/// A decryption under a known context ended.
pub fn decryption(context: Arc<str>, ok: bool) {
    counter!(DECRYPTIONS, "context" => context, "status" => result(ok)).increment(1);
}

/// A rewrapping under a known context ended.
pub fn rewrapping(context: Arc<str>, ok: bool) {
    counter!(REWRAPPINGS, "context" => context, "status" => result(ok)).increment(1);
}

/// The making of a data key under a known context ended.
pub fn data_key(context: Arc<str>, ok: bool) {
    counter!(DATA_KEYS, "context" => context, "status" => result(ok)).increment(1);
}

/// Open connections of the API listener.
pub fn connections(open: usize) {
    gauge!(CONNECTIONS).set(lossy(open as u64));
}

/// A TLS handshake failed.
pub fn handshake_failure() {
    counter!(HANDSHAKE_FAILURES).increment(1);
}

/// A principal has as many connections as one may have.
pub fn connection_refused() {
    counter!(CONNECTIONS_REFUSED).increment(1);
}

/// A request was refused for the client's certificate that it shows or should show, or for its way: `missing`,
/// `malformed`, `refused`, `not_trusted` or `admin`.
pub fn client_cert_refusal(reason: &'static str) {
    counter!(CLIENT_CERT_REFUSALS, "reason" => reason).increment(1);
}

/// The chain of a certificate in a header was verified.
pub fn client_cert_verification() {
    counter!(CLIENT_CERT_VERIFICATIONS).increment(1);
}

/// A connection was closed before TLS: `missing`, `incomplete`, `too_slow`, `version_1`, `malformed` or `unexpected`.
pub fn proxy_protocol_refusal(reason: &'static str) {
    counter!(PROXY_PROTOCOL, "reason" => reason).increment(1);
}

/// A call of a slot's token ended; `op` is `encrypt`, `decrypt`, `decrypt_v1` or a control operation. Counted
/// where the token is called, and nowhere else.
pub fn token_call(slot: Arc<str>, op: &'static str, ok: bool, duration: Duration) {
    histogram!(TOKEN_CALL_DURATION, "slot" => Arc::clone(&slot), "op" => op).record(duration.as_secs_f64());
    counter!(TOKEN_CALLS, "slot" => slot, "op" => op, "result" => result(ok)).increment(1);
}

/// A request's job was answered, a batch's as one: `operation` is `encrypt`, `decrypt`, `rewrap` or `datakey`, the
/// time counts from its submission.
pub fn slot_job(slot: Arc<str>, operation: &'static str, duration: Duration) {
    histogram!(SLOT_JOB_DURATION, "slot" => slot, "operation" => operation).record(duration.as_secs_f64());
}

/// An item of a batch was answered: the batch itself is always a 200. `code` is `ok` or an error code, which are
/// few and fixed.
pub fn batch_item(operation: &'static str, code: &'static str) {
    counter!(BATCH_ITEMS, "operation" => operation, "code" => code).increment(1);
}

/// The state of a slot: `absent`, `locked`, `ready` or `failed`.
pub fn slot_state(slot: &Arc<str>, state: &str) {
    for known in SLOT_STATES {
        let value = f64::from(u8::from(known == state));
        gauge!(SLOT_STATE, "slot" => Arc::clone(slot), "state" => known).set(value);
    }
}

/// Keys the state names and a slot's token lacks.
pub fn keys_missing(slot: &Arc<str>, keys: usize) {
    gauge!(KEYS_MISSING, "slot" => Arc::clone(slot)).set(lossy(keys as u64));
}

/// Whether a slot that the cluster uses is needed here and not in the configuration.
pub fn slot_unconfigured(slot: &Arc<str>, lacking: bool) {
    gauge!(SLOT_UNCONFIGURED, "slot" => Arc::clone(slot)).set(f64::from(u8::from(lacking)));
}

/// Time since token and state were last compared.
pub fn sync_age(age: Duration) {
    gauge!(SYNC_AGE).set(age.as_secs_f64());
}

/// The role of this node: `leader`, `follower`, `learner`, `candidate` or `uninitialised`.
pub fn role(role: &str) {
    for known in ROLES {
        gauge!(RAFT_ROLE, "role" => known).set(f64::from(u8::from(known == role)));
    }
}

/// A new leader was seen.
pub fn leader_change() {
    counter!(LEADER_CHANGES).increment(1);
}

/// Raft's numbers, all at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct RaftIndexes {
    /// Term.
    pub term: u64,
    /// Last log entry.
    pub last_log: u64,
    /// Highest committed.
    pub committed: u64,
    /// Highest applied.
    pub applied: u64,
    /// Last snapshot.
    pub snapshot: u64,
}

/// Sets Raft's numbers.
pub fn raft_indexes(indexes: RaftIndexes) {
    gauge!(RAFT_TERM).set(lossy(indexes.term));
    gauge!(LAST_LOG).set(lossy(indexes.last_log));
    gauge!(COMMITTED).set(lossy(indexes.committed));
    gauge!(APPLIED).set(lossy(indexes.applied));
    gauge!(SNAPSHOT).set(lossy(indexes.snapshot));
}

/// How many entries a peer is behind; `peer` is a member's name. `None`, shown as -1, where this node does not
/// lead, or is that member itself: nobody else knows.
pub fn peer_lag(peer: &Arc<str>, entries: Option<u64>) {
    gauge!(PEER_LAG, "peer" => Arc::clone(peer)).set(entries.map_or(-1.0, lossy));
}

/// How many members vote, and how many of them may still fail; `None` where this node does not lead.
pub fn voters(voters: usize, failure_tolerance: Option<u32>) {
    gauge!(VOTERS).set(lossy(voters as u64));
    gauge!(FAILURE_TOLERANCE).set(failure_tolerance.map_or(-1.0, f64::from));
}

/// Time since a quorum last acknowledged this leader; `None` where this node does not lead.
pub fn quorum_ack_age(age: Option<Duration>) {
    gauge!(QUORUM_ACK_AGE).set(age.map_or(-1.0, |age| age.as_secs_f64()));
}

/// Time since a leader with a quorum was last heard of; `None` before the first.
pub fn staleness(age: Option<Duration>) {
    gauge!(STALENESS).set(age.map_or(-1.0, |age| age.as_secs_f64()));
}

/// Proposals without an answer yet.
pub fn proposals_pending(count: usize) {
    gauge!(PROPOSALS_PENDING).set(lossy(count as u64));
}

/// A proposal's outcome is unknown.
pub fn proposal_timed_out() {
    counter!(PROPOSALS_TIMED_OUT).increment(1);
}

/// The barrier after an append took this long.
pub fn fsync(duration: Duration) {
    histogram!(FSYNC).record(duration.as_secs_f64());
}

/// Size of the store on disk, and of the rows in it that there are.
pub fn store_bytes(bytes: u64, live: u64) {
    gauge!(STORE_BYTES).set(lossy(bytes));
    gauge!(STORE_LIVE_BYTES).set(lossy(live));
}

/// What is free on the data directory's file system, and whether that is below the reserve.
pub fn disk(free: u64, below_reserve: bool) {
    gauge!(DISK_FREE).set(lossy(free));
    gauge!(DISK_BELOW_RESERVE).set(f64::from(u8::from(below_reserve)));
}

/// Whether this node is ready, or is not for no other reason than that another one leads.
pub fn ready(ready: bool, standby: bool) {
    gauge!(READY).set(f64::from(u8::from(ready)));
    gauge!(STANDBY).set(f64::from(u8::from(standby)));
}

/// How much of the limit of a context's active key version was given out, and whether it is to be replaced.
pub fn invocations_leased(context: &Arc<str>, leased: u64, limit: u64, due: bool) {
    let ratio = lossy(leased) / lossy(limit.max(1));
    gauge!(INVOCATIONS_LEASED, "context" => Arc::clone(context)).set(ratio);
    gauge!(INVOCATIONS_DUE, "context" => Arc::clone(context)).set(f64::from(u8::from(due)));
}

/// How many invocations of a context's active key version this node has left.
pub fn invocations_left(context: &Arc<str>, left: u64) {
    gauge!(INVOCATIONS_LEFT, "context" => Arc::clone(context)).set(lossy(left));
}

/// Whether a context's active key version is older than the context's interval.
pub fn rotation_due(context: &Arc<str>, due: bool) {
    gauge!(ROTATION_DUE, "context" => Arc::clone(context)).set(f64::from(u8::from(due)));
}

/// Whether the configuration differs from the state: `acl`, `roles`, `revocations` that the state lacks; of contexts
/// `slots`, `bindings`, `rotation`.
pub fn config_differs(sections: impl IntoIterator<Item = (&'static str, bool)>) {
    for (section, differs) in sections {
        gauge!(CONFIG_DIFFERS, "section" => section).set(f64::from(u8::from(differs)));
    }
}

/// How much of what is in use removed nodes know, by `version`, `transport` and `replication`.
pub fn known_to_removed(kinds: [(&'static str, u32); 3]) {
    for (kind, count) in kinds {
        gauge!(KNOWN_TO_REMOVED, "kind" => kind).set(f64::from(count));
    }
}

/// This node's wall clock, as time since the Unix epoch.
pub fn clock(shown: Duration) {
    gauge!(CLOCK).set(shown.as_secs_f64());
}

/// When the first certificate of a listener's chain ends, in seconds since the Unix epoch; `listener` is `api` or `cluster`.
pub fn certificate_ends(listener: &'static str, at: i64) {
    gauge!(CERTIFICATE_ENDS, "listener" => listener).set(lossy(u64::try_from(at).unwrap_or(0)));
}

/// Whether this node leads with a clock that differs from the voters'.
pub fn clock_alarm(differs: bool) {
    gauge!(CLOCK_ALARM).set(f64::from(u8::from(differs)));
}

/// Log lines lost since the start.
pub fn log_lines_lost(lines: u64, audit: u64) {
    counter!(LOG_LINES_LOST).absolute(lines);
    counter!(AUDIT_LINES_LOST).absolute(audit);
}

/// Gauges are floating-point; beyond 2^53 their last digits are of no interest.
#[allow(clippy::cast_precision_loss)]
fn lossy(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
