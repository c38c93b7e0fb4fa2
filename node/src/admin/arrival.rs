//! From a request to a call: who asks, under which key, and what exactly. Made once, on the node the
//! client spoke to; every repeat, on whichever node, must come out the same.

use raft_store::command::{AdminOrigin, RequestId};
use raft_store::names::RaftId;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::call::{AdminBody, AdminCall};
use crate::identity::{Identity, Principal};

/// What the node a client spoke to knows of a request.
pub struct Arrival<'a> {
    /// Whose certificate it is.
    pub principal: &'a Principal,
    /// The node itself.
    pub via_node: RaftId,
    /// The client's address.
    pub source: String,
    /// The request's id.
    pub request_id: String,
    /// The trace it belongs to.
    pub trace_id: String,
    /// The client's `Idempotency-Key`, or a fresh one.
    pub key: String,
}

impl AdminCall {
    /// A call as it arrives. `asked` is the request as the client sent it, in canonical form: what
    /// the node adds from its own configuration must not make a repeat on another node a different
    /// request.
    #[must_use]
    pub fn new(arrival: Arrival<'_>, body: AdminBody, asked: &impl Serialize) -> Self {
        let principal = arrival.principal;
        let origin = AdminOrigin {
            fingerprint: principal.fingerprint,
            cn: principal.cn.clone(),
            ou: principal.ou.clone().unwrap_or_default(),
            serial: principal.serial.clone(),
            issuer: principal.issuer_dn.clone(),
            via_node: arrival.via_node,
            evidence: None,
        };
        let operation = body.operation();
        let id = RequestId::Client {
            principal: principal_hash(&origin),
            operation: operation.clone(),
            key: arrival.key,
        };
        Self {
            id,
            body_hash: body_hash(&operation, asked),
            origin,
            spki_sha256: principal.spki_sha256,
            authorities: principal.authorities().to_vec(),
            source: arrival.source,
            request_id: arrival.request_id,
            trace_id: arrival.trace_id,
            hop: 0,
            body,
        }
    }

    /// Who asked, as policy wants it.
    #[must_use]
    pub fn principal(&self) -> Principal {
        let identity = Identity {
            cn: self.origin.cn.clone(),
            ou: Some(self.origin.ou.clone()).filter(|ou| !ou.is_empty()),
            sans: Vec::new(),
            serial: self.origin.serial.clone(),
            issuer_dn: self.origin.issuer.clone(),
            fingerprint: self.origin.fingerprint,
            spki_sha256: self.spki_sha256,
            // Checked by the TLS that saw the certificate.
            not_after: i64::MAX,
        };
        Principal::below(identity, self.authorities.clone())
    }
}

/// The certificate's identity, for idempotency: a renewed certificate is the same principal.
#[must_use]
pub fn principal_hash(origin: &AdminOrigin) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"hsm/principal/v1\0");
    for part in [&origin.issuer, &origin.ou, &origin.cn] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

fn body_hash(operation: &str, asked: &impl Serialize) -> [u8; 32] {
    // The API's request types have fixed members in a fixed order, so their JSON is canonical.
    let body = serde_json::to_vec(asked).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(b"hsm/admin-body/v1\0");
    hash.update((operation.len() as u64).to_be_bytes());
    hash.update(operation.as_bytes());
    hash.update(&body);
    hash.finalize().into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::admin::{CreateKekRequest, RotateRequest};
    use raft_store::names::{ContextName, SlotName};
    use raft_store::state::context::BindingMode;

    use super::*;
    use crate::identity::Authority;

    fn principal(serial: &str, fingerprint: u8) -> Principal {
        Principal::new(Identity {
            cn: "root".to_owned(),
            ou: Some("Admin".to_owned()),
            sans: Vec::new(),
            serial: serial.to_owned(),
            issuer_dn: "CN=Client CA".to_owned(),
            fingerprint: [fingerprint; 32],
            spki_sha256: [9; 32],
            not_after: 0,
        })
    }

    fn rotate(principal: &Principal, key: &str, context: &str) -> AdminCall {
        let arrival = Arrival {
            principal,
            via_node: 2,
            source: "127.0.0.1:5".to_owned(),
            request_id: "r".to_owned(),
            trace_id: "t".to_owned(),
            key: key.to_owned(),
        };
        let body = AdminBody::Rotate {
            context: ContextName::new(context).unwrap(),
        };
        AdminCall::new(arrival, body, &RotateRequest {})
    }

    fn create(request: &CreateKekRequest, slot: Option<&str>) -> AdminCall {
        let arrival = Arrival {
            principal: &principal("1", 1),
            via_node: 2,
            source: String::new(),
            request_id: String::new(),
            trace_id: String::new(),
            key: "k".to_owned(),
        };
        let body = AdminBody::CreateKey {
            context: ContextName::new(&request.context).unwrap(),
            label: request.label.clone(),
            version: request.version,
            slot: slot.map(|slot| SlotName::new(slot).unwrap()),
            binding: BindingMode::Private,
        };
        AdminCall::new(arrival, body, request)
    }

    #[test]
    fn a_renewed_certificate_repeats_its_own_request() {
        let (old, new) = (principal("1", 1), principal("2", 2));
        assert_eq!(rotate(&old, "k", "a").id, rotate(&new, "k", "a").id);
        assert_eq!(rotate(&old, "k", "a").body_hash, rotate(&new, "k", "a").body_hash);
    }

    #[test]
    fn key_operation_and_principal_tell_requests_apart() {
        let caller = principal("1", 1);
        let first = rotate(&caller, "k", "a");
        assert_ne!(first.id, rotate(&caller, "k2", "a").id);
        assert_ne!(first.id, rotate(&caller, "k", "b").id);
        let other = Principal::new(Identity {
            cn: "other".to_owned(),
            ..(*caller).clone()
        });
        assert_ne!(first.id, rotate(&other, "k", "a").id);
    }

    #[test]
    fn a_repeat_on_a_node_with_another_configuration_is_the_same_request() {
        let request = CreateKekRequest::new("a");
        assert_eq!(
            create(&request, Some("s")).body_hash,
            create(&request, None).body_hash
        );
        let numbered = CreateKekRequest {
            version: Some(7),
            ..CreateKekRequest::new("a")
        };
        assert_eq!(create(&request, None).id, create(&numbered, None).id);
        assert_ne!(
            create(&request, None).body_hash,
            create(&numbered, None).body_hash
        );
    }

    #[test]
    fn parts_of_a_name_cannot_be_moved_into_another_part() {
        let origin = |ou: &str, cn: &str| AdminOrigin {
            fingerprint: [0; 32],
            cn: cn.to_owned(),
            ou: ou.to_owned(),
            serial: String::new(),
            issuer: String::new(),
            via_node: 0,
            evidence: None,
        };
        assert_ne!(
            principal_hash(&origin("ab", "c")),
            principal_hash(&origin("a", "bc"))
        );
    }

    #[test]
    fn a_call_survives_its_journey() {
        let authority = Authority {
            serial: "2".to_owned(),
            issuer_dn: "CN=Root".to_owned(),
            fingerprint: [3; 32],
        };
        let below = Principal::below((*principal("1", 1)).clone(), vec![authority]);
        let call = rotate(&below, "k", "a");
        let bytes = raft_store::codec::encode(&call).unwrap();
        let read: AdminCall = raft_store::codec::decode(&bytes).unwrap();
        assert_eq!(
            (read.id, read.body, read.hop),
            (call.id.clone(), call.body.clone(), 0)
        );
        assert_eq!((read.request_id.as_str(), read.trace_id.as_str()), ("r", "t"));
        assert_eq!(read.authorities, below.authorities());
        let (was, is) = (principal("1", 1), call.principal());
        assert_eq!(
            (&is.cn, &is.ou, &is.issuer_dn, is.spki_sha256, is.fingerprint),
            (&was.cn, &was.ou, &was.issuer_dn, was.spki_sha256, was.fingerprint)
        );
    }
}
