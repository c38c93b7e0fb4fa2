//! A node without consensus and a token without PKCS#11. The "cipher" only authenticates: its
//! tag is a hash over associated data and plaintext, which is all these tests look at.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::{Extension, Router};
use hsm_api::data::{HealthResponse, HealthStatus, KekStatus};
use hsm_api::{ErrorCode, StateIndex};
use hsm_core::envelope::{Binding, HEADER_LEN, Header, Purpose, TAG_LEN, aad_v1, aad_v2};
use hsm_core::names::KeyUid;
use hsm_core::secrets::Plaintext;
use hsm_core::{
    Ciphertext, DataKeyJob, DecryptJob, DecryptV1Job, EncryptJob, OnBatchDone, OnDone, OpError, Output,
    RewrapJob, SlotState, Work,
};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::super::*;
use crate::config::{ContextName, RateLimit};
use crate::health::{HealthSource, Readiness, ReadyQuery};
use crate::identity::{Identity, Principal};
use crate::keyring::{ActiveKey, ContextKeys, KeyRing, KeySlot, ReadableKey, TokenOps};
use crate::leases::Meter;
use crate::policy::{Acl, Op, Policy, RevocationKey, Role, RoleEntry};

pub(in crate::http) fn principal(cn: &str, ou: Option<&str>) -> Principal {
    Principal::new(Identity {
        cn: cn.to_owned(),
        ou: ou.map(str::to_owned),
        sans: Vec::new(),
        serial: "1".to_owned(),
        issuer_dn: "CN=CA".to_owned(),
        fingerprint: [1; 32],
        spki_sha256: [2; 32],
        not_after: i64::MAX,
    })
}

#[derive(Clone, Copy)]
pub(super) enum Trouble {
    Locked,
    Failed,
    QueueFull,
    Hangs,
    Gone,
    /// Every job takes so long.
    Slow(Duration),
    /// There is time for so many items of a batch, and for no single job.
    OutOfTime(usize),
}

#[derive(Default)]
pub(super) struct FakeToken {
    trouble: Mutex<Option<Trouble>>,
    /// Callbacks of jobs that hang.
    hanging: Mutex<Vec<Box<dyn std::any::Any + Send>>>,
    /// How many items each batch had.
    batches: Mutex<Vec<usize>>,
    /// How long the caller of the last batch waits.
    until: Mutex<Option<Instant>>,
}

fn tag(aad: &[u8], plaintext: &[u8]) -> [u8; TAG_LEN] {
    let hash = Sha256::new().chain_update(aad).chain_update(plaintext).finalize();
    hash[..TAG_LEN].try_into().unwrap()
}

fn open(aad: &[u8], sealed: &[u8]) -> Result<Plaintext, OpError> {
    let (plaintext, found) = sealed.split_at(sealed.len() - TAG_LEN);
    if tag(aad, plaintext) == found {
        Ok(Plaintext::new(plaintext.to_vec()))
    } else {
        Err(OpError::AuthenticationFailed)
    }
}

pub(super) fn v1_ciphertext(context: &str, x: &str, plaintext: &[u8]) -> Vec<u8> {
    let mut out = vec![9; 12];
    out.extend_from_slice(plaintext);
    out.extend_from_slice(&tag(&aad_v1(context, x), plaintext));
    out
}

/// What a new ciphertext is under and for.
struct Under<'a> {
    purpose: Purpose,
    binding: Binding,
    key_uid: KeyUid,
    version: u32,
    context: &'a str,
    binding_value: &'a str,
    aad: &'a [u8],
}

fn seal(under: &Under<'_>, plaintext: &Plaintext) -> Vec<u8> {
    let mut out = Header {
        purpose: under.purpose,
        binding: under.binding,
        key_uid: under.key_uid,
        version: under.version,
        iv: [5; 12],
    }
    .encode();
    let mut aad = aad_v2(&out, under.context, under.binding_value, under.aad);
    aad.extend_from_slice(&out[..HEADER_LEN]);
    out.extend_from_slice(plaintext.as_slice());
    out.extend_from_slice(&tag(&aad, plaintext.as_slice()));
    out
}

fn open_v2(job: &DecryptJob) -> Result<Plaintext, OpError> {
    let (header, sealed) = job.ciphertext.split_at(HEADER_LEN);
    let mut aad = aad_v2(header, &job.context, &job.binding_value, &job.aad);
    aad.extend_from_slice(header);
    open(&aad, sealed)
}

fn open_v1(job: &DecryptV1Job) -> Result<Plaintext, OpError> {
    open(&aad_v1(&job.context, &job.binding_value), &job.ciphertext[12..])
}

fn encrypt(job: &EncryptJob) -> Vec<u8> {
    let under = Under {
        purpose: job.purpose,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context: &job.context,
        binding_value: &job.binding_value,
        aad: &job.aad,
    };
    seal(&under, &job.plaintext)
}

fn rewrap(job: &RewrapJob) -> Result<Vec<u8>, OpError> {
    let (purpose, plaintext, context, aad) = match &job.from {
        Ciphertext::V2(from) => (from.header.purpose, open_v2(from)?, &from.context, &from.aad[..]),
        Ciphertext::V1(from) => (Purpose::Data, open_v1(from)?, &from.context, &b""[..]),
    };
    let under = Under {
        purpose,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context,
        binding_value: &job.binding_value,
        aad,
    };
    Ok(seal(&under, &plaintext))
}

fn data_key(job: &DataKeyJob) -> Output {
    let plaintext = Plaintext::new(vec![3; job.size.bytes()]);
    let under = Under {
        purpose: Purpose::DataKey,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context: &job.context,
        binding_value: &job.binding_value,
        aad: &job.aad,
    };
    Output::DataKey {
        envelope: seal(&under, &plaintext),
        plaintext: job.plaintext.then_some(plaintext),
    }
}

fn perform(work: Work) -> Result<Output, OpError> {
    match work {
        Work::Encrypt(job) => Ok(Output::Envelope(encrypt(&job))),
        Work::DecryptV2(job) => open_v2(&job).map(Output::Plaintext),
        Work::DecryptV1(job) => open_v1(&job).map(Output::Plaintext),
        Work::Rewrap(job) => rewrap(&job).map(Output::Envelope),
        Work::DataKey(job) => Ok(data_key(&job)),
    }
}

fn perform_if(in_time: bool, work: Work) -> Result<Output, OpError> {
    if in_time {
        perform(work)
    } else {
        Err(OpError::NotBegun)
    }
}

/// Of `Trading`, with the associated data `a`.
pub(super) fn sealed_under(
    context: &str,
    (key, version): (u8, u32),
    purpose: Purpose,
    plaintext: &[u8],
) -> Vec<u8> {
    let under = Under {
        purpose,
        binding: Binding::Shared,
        key_uid: uid(key),
        version,
        context,
        binding_value: "Trading",
        aad: b"a",
    };
    seal(&under, &Plaintext::new(plaintext.to_vec()))
}

pub(super) fn envelope_of_unknown_key(version: u32) -> Vec<u8> {
    envelope_of_key(0xee, version)
}

pub(super) fn envelope_of_key(uid: u8, version: u32) -> Vec<u8> {
    let mut out = Header {
        purpose: Purpose::Data,
        binding: Binding::Shared,
        key_uid: KeyUid::from_bytes([uid; 16]),
        version,
        iv: [0; 12],
    }
    .encode();
    out.extend_from_slice(&[0; TAG_LEN]);
    out
}

impl FakeToken {
    pub(super) fn trouble(&self, trouble: Option<Trouble>) {
        *self.trouble.lock().unwrap() = trouble;
    }

    /// Jobs that hang are given up.
    pub(super) fn give_up(&self) {
        self.hanging.lock().unwrap().clear();
    }

    /// How many items each batch had that came so far.
    pub(super) fn batches(&self) -> Vec<usize> {
        self.batches.lock().unwrap().clone()
    }

    /// How long the caller of the last batch waits.
    pub(super) fn until(&self) -> Option<Instant> {
        *self.until.lock().unwrap()
    }

    /// How many items there is time for.
    fn has_time_for(&self, single: bool) -> usize {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::OutOfTime(_)) if single => 0,
            Some(Trouble::OutOfTime(items)) => items,
            _ => usize::MAX,
        }
    }

    fn when_due(&self, job: impl FnOnce() + Send + 'static) {
        let trouble = *self.trouble.lock().unwrap();
        match trouble {
            Some(Trouble::Slow(time)) => {
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    job();
                });
            }
            _ => job(),
        }
    }

    /// The callback, if the job is to be done now.
    fn take<T: Send + 'static>(&self, done: T) -> Result<Option<T>, OpError> {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::QueueFull) => return Err(OpError::QueueFull),
            Some(Trouble::Hangs) => self.hanging.lock().unwrap().push(Box::new(done)),
            Some(Trouble::Gone) => drop(done),
            _ => return Ok(Some(done)),
        }
        Ok(None)
    }
}

impl TokenOps for FakeToken {
    fn state(&self) -> SlotState {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::Locked) => SlotState::Locked,
            Some(Trouble::Failed) => SlotState::Failed {
                code: "hung",
                reason: "for the test".to_owned(),
            },
            _ => SlotState::Ready,
        }
    }

    fn run(&self, work: Work, _until: Instant, done: OnDone) -> Result<(), OpError> {
        let in_time = self.has_time_for(true) > 0;
        if let Some(done) = self.take(done)? {
            self.when_due(move || done(perform_if(in_time, work)));
        }
        Ok(())
    }

    fn run_batch(&self, works: Vec<Work>, until: Instant, done: OnBatchDone) -> Result<(), OpError> {
        self.batches.lock().unwrap().push(works.len());
        *self.until.lock().unwrap() = Some(until);
        let in_time = self.has_time_for(false);
        if let Some(done) = self.take(done)? {
            let works = works.into_iter().enumerate();
            let outcomes = works.map(move |(place, work)| perform_if(place < in_time, work));
            self.when_due(move || done(outcomes.collect()));
        }
        Ok(())
    }
}

struct State {
    revoked: Vec<RevocationKey>,
    /// Units with a mapping of their own.
    admitted: Vec<String>,
    degraded: bool,
    refusal: Option<ErrorCode>,
    above: AboveKnown,
}

#[derive(Clone)]
pub(super) struct FakeNode {
    pub(super) token: Arc<FakeToken>,
    /// Of the slot that `order-key` is in, and the versions of `moved-key` after its first.
    pub(super) orders: Arc<FakeToken>,
    /// Questions about versions above the known ones.
    pub(super) asked: Arc<AtomicUsize>,
    pub(super) drain: Arc<DrainControl>,
    /// How long requests wait for the state that they ask for.
    min_index_wait: Duration,
    index: watch::Sender<StateIndex>,
    /// What is left of every key that encrypts.
    pub(super) meter: Arc<Meter>,
    state: Arc<Mutex<State>>,
}

fn uid(byte: u8) -> KeyUid {
    KeyUid::from_bytes([byte; 16])
}

impl FakeNode {
    pub(super) fn new() -> Self {
        Self {
            token: Arc::default(),
            orders: Arc::default(),
            asked: Arc::default(),
            drain: Arc::default(),
            min_index_wait: Duration::from_millis(100),
            index: watch::Sender::new(StateIndex { epoch: 3, index: 42 }),
            meter: Meter::holding(1 << 40),
            state: Arc::new(Mutex::new(State {
                revoked: Vec::new(),
                admitted: Vec::new(),
                degraded: false,
                refusal: None,
                above: AboveKnown::Unknown,
            })),
        }
    }

    /// One whose requests wait this long for the state that they ask for.
    pub(super) fn patient(min_index_wait: Duration) -> Self {
        Self {
            min_index_wait,
            ..Self::new()
        }
    }

    /// With so many invocations left.
    pub(super) fn with_invocations(count: u64) -> Self {
        Self {
            meter: Meter::holding(count),
            ..Self::new()
        }
    }

    pub(super) fn revoke(&self, key: RevocationKey) {
        self.state.lock().unwrap().revoked.push(key);
    }

    pub(super) fn stale(&self, degraded: bool) {
        self.state.lock().unwrap().degraded = degraded;
    }

    pub(super) fn refuse(&self, code: ErrorCode) {
        self.state.lock().unwrap().refusal = Some(code);
    }

    /// Something is applied.
    pub(super) fn apply(&self, epoch: u64, index: u64) {
        self.index.send_replace(StateIndex { epoch, index });
    }

    /// Applies an entry that maps one more unit.
    pub(super) fn admit(&self, ou: &str) {
        self.state.lock().unwrap().admitted.push(ou.to_owned());
        self.index.send_modify(|at| at.index += 1);
    }

    pub(super) fn above_known(&self, answer: AboveKnown) {
        self.state.lock().unwrap().above = answer;
    }

    pub(super) fn router(&self) -> Router {
        self.limited_router(100_000)
    }

    pub(super) fn limited_router(&self, burst: u32) -> Router {
        Self::routes(self.api(burst))
    }

    pub(super) fn state_and_router(&self, burst: u32) -> (ApiState, Router) {
        let state = self.api(burst);
        (state.clone(), Self::routes(state))
    }

    fn api(&self, burst: u32) -> ApiState {
        ApiState::new(ApiParts {
            data: Arc::new(self.clone()),
            health: Arc::new(self.clone()),
            rate_limit: RateLimit {
                requests_per_second: NonZeroU32::MIN,
                burst: NonZeroU32::new(burst).unwrap(),
            },
            max_body_bytes: 1 << 20,
            token_timeout: Duration::from_millis(100),
            min_index_wait: self.min_index_wait,
            drain: self.drain.signal(),
        })
    }

    fn routes(state: ApiState) -> Router {
        let whoami = |Extension(who): Extension<Principal>, Extension(id): Extension<RequestId>| async move {
            format!("{} {id}", who.cn)
        };
        let admin = Routes::default().get("/admin/v1/whoami", whoami).into_router();
        router(state, admin)
    }

    fn keys(&self, name: &str, keys: &[(u8, u32)]) -> (ContextName, ContextKeys) {
        let label = |version: u32| format!("kek-{name}-v{version}");
        let slot = |version: u32| {
            let (ops, name) = match name {
                "order-key" => (&self.orders, "orders"),
                "moved-key" if version > 1 => (&self.orders, "orders"),
                _ => (&self.token, "exchange"),
            };
            KeySlot {
                name: name.into(),
                ops: ops.clone(),
            }
        };
        let binding = match name {
            "2fa" => Binding::Private,
            _ => Binding::Shared,
        };
        let keys = ContextKeys {
            binding,
            active: keys.last().map(|(u, version)| ActiveKey {
                slot: slot(*version),
                key_uid: uid(*u),
                version: *version,
                key_id: label(*version),
                meter: Arc::clone(&self.meter),
            }),
            readable: keys
                .iter()
                .map(|(u, v)| {
                    (
                        uid(*u),
                        ReadableKey {
                            slot: slot(*v),
                            version: *v,
                            key_id: label(*v),
                        },
                    )
                })
                .collect(),
            by_key_id: keys.iter().map(|(u, v)| (label(*v), uid(*u))).collect(),
            highest_known: keys.iter().map(|(_, v)| *v).max().unwrap_or(0),
            missing: HashMap::new(),
            retired: HashMap::new(),
        };
        (ContextName::new(name).unwrap(), keys)
    }
}

impl DataPlane for FakeNode {
    fn policy(&self) -> Arc<Policy> {
        let set = |names: &[&str]| -> BTreeSet<ContextName> {
            names.iter().map(|name| ContextName::new(name).unwrap()).collect()
        };
        let state = self.state.lock().unwrap();
        let admitted = state
            .admitted
            .iter()
            .map(|ou| (ou.clone(), set(&["exchange-key"])));
        let mappings = [
            (
                "Trading".to_owned(),
                set(&["exchange-key", "order-key", "empty-key", "moved-key"]),
            ),
            ("2FA".to_owned(), set(&["2fa"])),
        ];
        let acl = Acl {
            mappings: mappings.into_iter().chain(admitted).collect(),
            // Of principals that are made up, and of those whose certificates are.
            roles: ["CN=CA", "CN=Clients"]
                .iter()
                .flat_map(|issuer| {
                    [(Role::Operator, "Operator"), (Role::Metrics, "Watch")].map(|(role, unit)| RoleEntry {
                        role,
                        issuer: (*issuer).to_owned(),
                        ou: Some(unit.to_owned()),
                        cn: None,
                        spki_sha256: None,
                    })
                })
                .collect(),
            ..Acl::default()
        };
        Arc::new(Policy::new(&acl, state.revoked.clone()))
    }

    fn freshness(&self, _op: Op) -> Result<Freshness, ApiError> {
        let state = self.state.lock().unwrap();
        match state.refusal {
            Some(code) => Err(ApiError::new(code)),
            None => Ok(Freshness {
                degraded: state.degraded,
            }),
        }
    }

    fn keyring(&self) -> Arc<KeyRing> {
        Arc::new(KeyRing::new(HashMap::from([
            self.keys("exchange-key", &[(1, 1), (2, 2)]),
            self.keys("order-key", &[(3, 1)]),
            self.keys("moved-key", &[(5, 1), (6, 2)]),
            self.keys("empty-key", &[]),
            self.keys("2fa", &[(4, 1)]),
        ])))
    }

    fn index(&self) -> StateIndex {
        *self.index.borrow()
    }

    fn reached(&self) -> watch::Receiver<StateIndex> {
        self.index.subscribe()
    }

    fn node_id(&self) -> &str {
        "hsm-node-1"
    }

    fn version_above_known<'a>(
        &'a self,
        _context: &'a str,
        _version: u32,
    ) -> Pin<Box<dyn Future<Output = AboveKnown> + Send + 'a>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let answer = self.state.lock().unwrap().above;
        Box::pin(async move { answer })
    }
}

impl HealthSource for FakeNode {
    fn readiness(&self, _query: &ReadyQuery) -> Readiness {
        Readiness::of(Vec::new())
    }

    fn v1_health(&self) -> HealthResponse {
        HealthResponse {
            status: HealthStatus::Healthy,
            hsm_available: true,
            kek_status: [("kek-2fa-v1".to_owned(), KekStatus::Available)].into(),
        }
    }

    fn render_metrics(&self) -> String {
        "hsm_things_total{context=\"2fa\",status=\"success\"} 3\n".to_owned()
    }
}
