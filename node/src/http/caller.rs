//! Who a request is from: the holder of the connection's certificate, or, on a trusted proxy's connection, of the one
//! that the request shows. Everything else that concerns proxies follows from it: who may not speak of certificates,
//! what is not done through a proxy, and what the audit says of both.

use std::net::SocketAddr;

use axum::extract::Request;
use hsm_api::{ErrorCode, paths};
use tracing::Level;

use super::problem::ApiError;
use super::refusals;
use super::request_id::RequestId;
use super::respond::TurnedAway;
use super::shares::Share;
use super::trace_id::TraceId;
use super::trusted::{Via, speaks_of_certificates};
use crate::admin::audit::plain;
use crate::identity::Principal;
use crate::log_budget;
use crate::policy::Denial;

/// See the module.
pub(super) struct Caller {
    principal: Result<Principal, ApiError>,
    via: Option<Via>,
    speaks_of_certificates: bool,
}

impl Caller {
    /// Finds out, and tells the handlers by an extension of the request.
    pub(super) fn of(request: &mut Request) -> Self {
        let via = request.extensions().get::<Via>().cloned();
        let is_turned_away = request.extensions().get::<TurnedAway>().is_some();
        let principal = match &via {
            // Nothing is done for it.
            Some(_) if is_turned_away => Err(ApiError::new(ErrorCode::ClientCertMissing)),
            Some(via) => via.client(request.headers()),
            None => {
                let connected = request.extensions().get::<Principal>().cloned();
                connected.ok_or_else(|| ApiError::new(ErrorCode::NoClientCertificate))
            }
        };
        if let (Some(_), Ok(principal)) = (&via, &principal) {
            request.extensions_mut().insert(principal.clone());
        }
        Self {
            principal,
            via,
            speaks_of_certificates: speaks_of_certificates(request.headers()),
        }
    }

    /// Whoever it is.
    pub(super) fn principal(&self) -> Result<&Principal, ApiError> {
        self.principal.as_ref().map_err(ApiError::clone)
    }

    /// Refuses what its way does not allow.
    pub(super) fn check_way(&self, path: &str) -> Result<(), ApiError> {
        match &self.via {
            None if self.speaks_of_certificates => Err(ApiError::new(ErrorCode::ClientCertNotTrusted)),
            Some(_) if path.starts_with(paths::ADMIN_PREFIX) => {
                Err(ApiError::new(ErrorCode::AdminThroughProxy))
            }
            _ => Ok(()),
        }
    }

    /// A place among the requests that are in hand, where those of many clients come on few connections.
    pub(super) fn enter(&self) -> Result<Option<Share>, ApiError> {
        match (&self.via, &self.principal) {
            (Some(via), Ok(client)) => via.enter(client).map(Some),
            _ => Ok(None),
        }
    }

    /// Carries a request out. A proxy's connection goes on when one of its clients is revoked; what that one has in hand
    /// gets as long as on a connection of its own.
    pub(super) async fn carry_out<T>(
        &self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let (Some(via), Ok(client)) = (&self.via, &self.principal) else {
            return work.await;
        };
        tokio::select! {
            biased;
            done = work => done,
            () = via.expulsion(client) => Err(Denial::Revoked.into()),
        }
    }

    /// For logs.
    pub(super) fn seen(&self) -> Seen<'_> {
        Seen {
            principal: self.principal.as_ref().ok(),
            via: self.via.as_ref(),
        }
    }

    /// Tells the audit of a request that was refused for who sent it, or whose way did not allow it. Of these each caller
    /// has only so many lines.
    pub(super) fn audit(
        &self,
        error: &ApiError,
        (id, trace): (&RequestId, &TraceId),
        endpoint: &'static str,
        peer: Option<SocketAddr>,
    ) {
        let Some(action) = forbidden_way(error, endpoint) else {
            refusals::record(error, (id, trace), endpoint, self.seen(), peer);
            return;
        };
        let Ok(who) = &self.principal else { return };
        if !tracing::enabled!(target: "audit", Level::WARN) || !log_budget::audit(who) {
            return;
        }
        tracing::warn!(
            target: "audit",
            epoch = crate::logging::epoch(),
            principal = plain(&who.to_string()),
            issuer = plain(&who.issuer_dn),
            fingerprint = who.fingerprint_hex(),
            source = peer.map(|peer| peer.to_string()).unwrap_or_default(),
            proxy = self.seen().proxy_name(),
            request_id = id.as_str(),
            trace_id = trace.as_str(),
            action,
            resource = endpoint,
            place = "entry",
            outcome = "refused",
            code = error.code().as_str(),
            "request refused"
        );
    }
}

/// What the audit calls what its way did not allow. A rewrap for others has a line of its own.
fn forbidden_way(error: &ApiError, endpoint: &'static str) -> Option<&'static str> {
    match error.code() {
        ErrorCode::ClientCertNotTrusted => Some("client_cert.claim"),
        ErrorCode::AdminThroughProxy if endpoint.starts_with("/admin/v1") => Some("proxy.admin"),
        _ => None,
    }
}

/// What is known of a caller when a line is written.
#[derive(Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) principal: Option<&'a Principal>,
    pub(super) via: Option<&'a Via>,
}

impl<'a> Seen<'a> {
    /// Whose lines it is: a proxy's, while it is not known who its client is.
    pub(super) fn accountable(self) -> Option<&'a Principal> {
        self.principal.or(self.via.map(Via::proxy))
    }

    /// Empty without one.
    pub(super) fn proxy_name(self) -> &'a str {
        self.via.map_or("", Via::name)
    }
}
