//! The audit line of a rewrap for others: who did it, for whom, under which versions, and how it ended. Nothing of
//! the data, and one line for each ciphertext.

use tracing::Level;

use super::asking::{Asking, Bound};
use super::problem::ApiError;
use super::trusted::Via;
use super::{PeerAddr, RequestId, TraceId};
use crate::admin::audit::plain;
use crate::log_budget;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Named {
    context: String,
    /// Whom it was encrypted for, if that was named.
    principal: String,
    /// Whom it is for from now on, if that was named.
    rebind: String,
    /// The version it came from and the one it goes to, once they are known.
    versions: Option<(u32, u32)>,
}

/// Characters of a name that are shown. An X.509 name has at most 64 (RFC 5280, ub-common-name).
const SHOWN: usize = 128;

/// Each name in quotes, and cut by itself: no name can be written so that another one seems to follow, or so that
/// one that follows is cut away.
fn who(bound: Option<Bound<'_>>) -> String {
    let Some(Bound { ou, cn }) = bound else {
        return String::new();
    };
    format!("CN={} OU={}", quoted(cn), quoted(ou))
}

fn quoted(name: &str) -> String {
    let shown: String = name.chars().take(SHOWN).collect();
    let cut = if shown.len() < name.len() { " (cut)" } else { "" };
    format!("{:?}{cut}", plain(&shown))
}

impl Named {
    pub(super) fn new(context: &str, principal: Option<Bound<'_>>, rebind: Option<Bound<'_>>) -> Self {
        Self {
            context: plain(context),
            principal: who(principal),
            rebind: who(rebind),
            versions: None,
        }
    }

    pub(super) fn versions(&mut self, from: u32, to: u32) {
        self.versions = Some((from, to));
    }

    /// Writes the line. Of refusals, which anybody can repeat at will, each caller has only so many.
    pub(super) fn record(&self, asking: &Asking<'_>, error: Option<&ApiError>) {
        let refused = error.is_some_and(|error| error.status().as_u16() == 403);
        let wanted = match error {
            None => tracing::enabled!(target: "audit", Level::INFO),
            Some(_) => tracing::enabled!(target: "audit", Level::WARN),
        };
        if !wanted || refused && !log_budget::audit(asking.principal) {
            return;
        }
        let principal = plain(&asking.principal.to_string());
        let issuer = plain(&asking.principal.issuer_dn);
        let fingerprint = asking.principal.fingerprint_hex();
        let request = asking.request;
        let source = request.get::<PeerAddr>().map(|peer| peer.0.to_string());
        let source = source.unwrap_or_default();
        let proxy = request.get::<Via>().map_or("", Via::name);
        let request_id = plain(request.get::<RequestId>().map_or("", RequestId::as_str));
        let trace_id = plain(request.get::<TraceId>().map_or("", TraceId::as_str));
        let (action, resource) = ("data.rewrap", self.context.as_str());
        let (encrypted_for, rebound_to) = (self.principal.as_str(), self.rebind.as_str());
        let versions = self.versions.map(|(from, to)| format!("{from} to {to}"));
        let versions = versions.unwrap_or_default();
        let epoch = crate::logging::epoch();
        match error {
            None => tracing::info!(
                target: "audit",
                epoch, principal, issuer, fingerprint, source, proxy, request_id, trace_id,
                action, resource, encrypted_for, rebound_to, versions,
                outcome = "done",
                "rewrap for others"
            ),
            Some(error) => tracing::warn!(
                target: "audit",
                epoch, principal, issuer, fingerprint, source, proxy, request_id, trace_id,
                action, resource, encrypted_for, rebound_to, versions,
                outcome = if refused { "refused" } else { "failed" },
                code = error.code().as_str(),
                reason = plain(error.operator_detail().unwrap_or(error.caller_detail())),
                "rewrap for others"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_hides_or_imitates_the_other() {
        let long = "x".repeat(5000);
        let cut = who(Some(Bound {
            ou: "Evil",
            cn: &long,
        }));
        assert!(cut.ends_with("(cut) OU=\"Evil\"") && cut.len() < 200, "{cut}");
        let quoted = who(Some(Bound {
            ou: "Evil",
            cn: "2fa-1\" OU=\"2FA",
        }));
        assert_eq!(quoted, r#"CN="2fa-1\" OU=\"2FA" OU="Evil""#);
        assert_eq!(who(None), "");
    }
}
