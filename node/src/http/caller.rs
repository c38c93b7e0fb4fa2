//! Who a request is from: the holder of the connection's certificate, or, on a trusted proxy's connection, of the one
//! that the request shows. Everything else that concerns proxies follows from it: who may not speak of certificates,
//! what is not done through a proxy, and what the audit says of both.

use std::net::SocketAddr;

use axum::extract::Request;
use hsm_api::{ErrorCode, paths};
use tracing::Level;

use super::problem::ApiError;
use super::rate_limit::Allowance;
use super::request_id::RequestId;
use super::respond::TurnedAway;
use super::service::ApiState;
use super::trace_id::TraceId;
use super::trusted::{Via, speaks_of_certificates};
use crate::admin::audit::plain;
use crate::identity::Principal;
use crate::log_budget;

/// See the module.
pub(super) struct Caller {
    principal: Result<Principal, ApiError>,
    via: Option<Via>,
    speaks_of_certificates: bool,
}

impl Caller {
    /// Finds out, and tells the handlers by an extension of the request. `counted` is the allowance of a proxy that pays
    /// for a certificate which was not seen before.
    pub(super) fn of(state: &ApiState, request: &mut Request, counted: &mut Option<Allowance>) -> Self {
        let via = request.extensions().get::<Via>().cloned();
        let is_turned_away = request.extensions().get::<TurnedAway>().is_some();
        let principal = match &via {
            // Nothing is done for it.
            Some(_) if is_turned_away => Err(ApiError::new(ErrorCode::ClientCertMissing)),
            Some(via) => via.client(request.headers(), || {
                state.limit(via.proxy(), request.uri().path(), counted)
            }),
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

    /// For logs.
    pub(super) fn seen(&self) -> Seen<'_> {
        Seen {
            principal: self.principal.as_ref().ok(),
            via: self.via.as_ref(),
        }
    }

    /// Writes the audit's line of a request that its way did not allow. Of those each caller has only so many.
    pub(super) fn audit(
        &self,
        error: &ApiError,
        (id, trace): (&RequestId, &TraceId),
        endpoint: &'static str,
        peer: Option<SocketAddr>,
    ) {
        let action = match error.code() {
            ErrorCode::ClientCertNotTrusted => "client_cert.claim",
            // That of a rewrap for others has a line of its own.
            ErrorCode::AdminThroughProxy if endpoint.starts_with("/admin/v1") => "proxy.admin",
            _ => return,
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
