//! Clients that rotate: each asks one node after the other under the same `Idempotency-Key` until it knows what became of its
//! request, and now and then asks once more what it knows already.

use std::sync::Arc;
use std::time::Duration;

use hsm_api::admin::{CreateKekRequest, RotateRequest};
use raft_store::names::ContextName;
use raft_store::state::context::BindingMode;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::chance::Chance;
use super::node::Node;
use super::oracle::{Acknowledged, Oracle, Violations};
use crate::admin::arrival::Arrival;
use crate::admin::call::{AdminBody, AdminCall, CallError, Executed};
use crate::identity::{Identity, Principal};
use crate::rotation::testing::{ISSUER, context as name, slot};

/// Longer than a node takes to say that it does not know.
const PATIENCE: Duration = Duration::from_secs(20);
/// Attempts at one request; then the client goes on with another, and never learns.
const ATTEMPTS: u32 = 12;

type Answer = oneshot::Receiver<Result<Executed, CallError>>;

/// See the module.
pub(super) struct Client {
    number: usize,
    context: ContextName,
    request: u64,
    attempts: u32,
    /// What this request was answered before.
    told: Option<u32>,
    served: u64,
    waiting: Option<(Answer, Duration)>,
    next: Duration,
    violations: Arc<Violations>,
}

impl Client {
    pub(super) fn new(number: usize, context: &str, violations: Arc<Violations>) -> Self {
        Self {
            number,
            context: name(context),
            request: 0,
            attempts: 0,
            told: None,
            served: 0,
            waiting: None,
            next: Duration::ZERO,
            violations,
        }
    }

    /// Goes on, without waiting.
    pub(super) fn step(
        &mut self,
        nodes: &[Arc<Node>],
        oracle: &mut Oracle,
        chance: &mut Chance,
        now: Duration,
    ) {
        if let Some((answer, since)) = &mut self.waiting {
            let heard = match answer.try_recv() {
                Ok(heard) => Some(heard),
                Err(TryRecvError::Closed) => None,
                Err(TryRecvError::Empty) if now.saturating_sub(*since) > PATIENCE => None,
                Err(TryRecvError::Empty) => return,
            };
            self.waiting = None;
            self.hear(heard, oracle, chance);
            self.next = now + chance.millis(20, 600);
            return;
        }
        if now < self.next {
            return;
        }
        let node = &nodes[chance.index(nodes.len())];
        let body = AdminBody::Rotate {
            context: self.context.clone(),
        };
        let key = format!("{}-{}", self.number, self.request);
        match ask(node, &key, body, &RotateRequest {}) {
            Some(answer) => {
                self.attempts += 1;
                self.waiting = Some((answer, now));
            }
            // It is down.
            None => self.next = now + chance.millis(20, 200),
        }
    }

    fn hear(&mut self, heard: Option<Result<Executed, CallError>>, oracle: &mut Oracle, chance: &mut Chance) {
        match heard {
            Some(Ok(executed)) => {
                let version = executed.answer["version"].as_u64().unwrap_or(0) as u32;
                let label = executed.answer["key_id"].as_str().unwrap_or_default().to_owned();
                if self.told.is_some_and(|told| told != version) {
                    let what = format!("{}: version {:?}, then {version}", self.context, self.told);
                    self.violations.add("one request makes one version", what);
                }
                if self.told.replace(version).is_none() {
                    self.served += 1;
                }
                oracle.acknowledged.push(Acknowledged {
                    context: self.context.clone(),
                    version,
                    label,
                    index: executed.index,
                });
                if !chance.one_in(4) {
                    self.go_on();
                }
            }
            // Abandoned: whoever asks again under this key is told so again.
            Some(Err(error)) if error.code == hsm_api::ErrorCode::KeyVersionNotReady => {
                if let Some(told) = self.told {
                    let what = format!("{}: version {told}, then {error}", self.context);
                    self.violations.add("one request makes one version", what);
                }
                self.go_on();
            }
            _ if self.attempts >= ATTEMPTS => self.go_on(),
            _ => {}
        }
    }

    fn go_on(&mut self) {
        self.request += 1;
        self.attempts = 0;
        self.told = None;
    }

    /// How many of its requests made a version that it was told of.
    pub(super) fn served(&self) -> u64 {
        self.served
    }
}

/// Asks for the first version of a context, which is made with it.
pub(super) fn create(node: &Node, context: &str) -> Option<Answer> {
    let body = AdminBody::CreateKey {
        context: name(context),
        label: None,
        version: None,
        slot: Some(slot("s")),
        binding: BindingMode::Shared,
    };
    ask(
        node,
        &format!("create-{context}"),
        body,
        &CreateKekRequest::new(context),
    )
}

fn ask(node: &Node, key: &str, body: AdminBody, asked: &impl serde::Serialize) -> Option<Answer> {
    let published = node.published()?;
    let mut nodes = published.state.nodes().iter();
    let via_node = nodes
        .find(|(_, known)| known.name.as_str() == node.name)
        .map(|(id, _)| *id)?;
    let arrival = Arrival {
        principal: &administrator(),
        via_node,
        source: "192.0.2.1:1".to_owned(),
        request_id: "r".to_owned(),
        trace_id: "0af7651916cd43dd8448eb211c80319c".to_owned(),
        key: key.to_owned(),
    };
    let call = AdminCall::new(arrival, body, asked);
    node.ask(move |consensus| async move { consensus.admin_call(call).await })
}

fn administrator() -> Principal {
    Principal::new(Identity {
        cn: "ann".to_owned(),
        ou: Some("Admin".to_owned()),
        sans: Vec::new(),
        serial: "0b".to_owned(),
        issuer_dn: ISSUER.to_owned(),
        fingerprint: [1; 32],
        spki_sha256: [2; 32],
        not_after: 0,
    })
}
