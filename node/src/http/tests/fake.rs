//! A node without consensus, with tokens without PKCS#11.

mod token;

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::{Extension, Router};
use hsm_api::data::{HealthResponse, HealthStatus, KekStatus};
use hsm_api::{ErrorCode, StateIndex};
use hsm_core::envelope::Binding;
use hsm_core::names::KeyUid;
use tokio::sync::watch;

pub(super) use self::token::{
    FakeToken, Trouble, envelope_of_key, envelope_of_unknown_key, sealed_under, v1_ciphertext,
};
use super::super::*;
use crate::config::{ContextName, RateLimit};
use crate::health::{HealthSource, Readiness, ReadyQuery};
use crate::identity::{Identity, Principal};
use crate::keyring::{ActiveKey, ContextKeys, KeyRing, KeySlot, ReadableKey};
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

    #[cfg(feature = "failpoints")]
    fn state_hash(&self) -> (u64, u128) {
        (0, 0)
    }
}
