//! The access log: a line for each request that was answered, where the log has a place for such lines. It says who
//! asked for what and how it ended, never what was in the request or in the answer.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::Request;
use tracing::Level;

use super::caller::Seen;
use super::request_id::RequestId;
use super::trace_id::TraceId;
use crate::admin::audit::plain;

/// What is gone once the request is handed on.
pub(super) struct Asked {
    method: String,
    path: Cow<'static, str>,
}

/// How it ended.
pub(super) struct Answered<'a> {
    pub(super) id: &'a RequestId,
    pub(super) trace: &'a TraceId,
    pub(super) seen: Seen<'a>,
    pub(super) peer: Option<SocketAddr>,
    pub(super) status: u16,
    /// Of an error, else empty.
    pub(super) code: &'static str,
    pub(super) took: Duration,
}

impl Asked {
    /// Nothing where no such line is written: then it costs nothing.
    pub(super) fn of(request: &Request, endpoint: &'static str) -> Option<Self> {
        if !tracing::enabled!(target: "access", Level::INFO) {
            return None;
        }
        // A path that is none of ours can be anything, what should have been in a body too.
        let path = if endpoint.starts_with("/admin/v1") {
            Cow::Owned(plain(request.uri().path()))
        } else {
            Cow::Borrowed(endpoint)
        };
        Some(Self {
            method: plain(request.method().as_str()),
            path,
        })
    }

    /// Writes the line. Its fields have version 1's names.
    pub(super) fn record(&self, end: &Answered<'_>) {
        let (client_cn, client_ou) = end.seen.principal.map_or_else(Default::default, |who| {
            (plain(&who.cn), plain(who.ou.as_deref().unwrap_or_default()))
        });
        let remote_addr = end.peer.map(|peer| peer.to_string()).unwrap_or_default();
        let micros = u32::try_from(end.took.as_micros()).unwrap_or(u32::MAX);
        tracing::info!(
            target: "access",
            request_id = end.id.as_str(),
            trace_id = end.trace.as_str(),
            method = self.method,
            path = &*self.path,
            status = end.status,
            code = end.code,
            client_cn,
            client_ou,
            remote_addr,
            proxy = end.seen.proxy_name(),
            duration_ms = f64::from(micros) / 1000.0,
            "request"
        );
    }
}
