//! The audit line of an administrator's call: who asked from where for what, under which request id,
//! and how it ended. One line where the call arrived and, for changes, one on the leader that decided, with
//! the node that answers for who asked; the request id joins them. Holds no secret and no control character. Every
//! change that was allowed has its line; of reads and refusals, which anybody can repeat at will, each principal has
//! only so many.

use raft_store::names::RaftId;
use tracing::Level;

use super::authorise::Act;
use super::call::CallError;
use crate::identity::Principal;
use crate::log_budget;

/// Longest text of a line's field.
const MAX: usize = 300;

/// Where a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The node the client spoke to.
    Entry,
    /// The leader, which has the caller's name from the node that he spoke to.
    Leader {
        /// That node.
        via: RaftId,
    },
}

/// A call to be recorded.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// Where.
    pub place: Place,
    /// Who asks.
    pub principal: &'a Principal,
    /// From where.
    pub source: &'a str,
    /// The request's id.
    pub request_id: &'a str,
    /// The trace it belongs to.
    pub trace_id: &'a str,
    /// For what.
    pub act: Act,
    /// On what: a context, a node; may be empty.
    pub target: &'a str,
}

/// What a line says of the end of a call.
#[derive(Debug, PartialEq, Eq)]
struct End {
    outcome: &'static str,
    code: &'static str,
    reason: String,
}

fn end(error: Option<&CallError>) -> End {
    match error {
        None => End {
            outcome: "done",
            code: "",
            reason: String::new(),
        },
        Some(error) => End {
            outcome: if error.is_refusal() { "refused" } else { "failed" },
            code: error.code.as_str(),
            reason: plain(&error.detail),
        },
    }
}

/// One line of text, whatever a certificate or request holds.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .take(MAX)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Whether anybody with a certificate can make as many such lines as he likes.
fn is_cheap(act: Act, error: Option<&CallError>) -> bool {
    !act.changes() || error.is_some_and(CallError::is_refusal)
}

/// Writes the line.
pub fn record(subject: &Subject<'_>, error: Option<&CallError>) {
    let wanted = match error {
        None => tracing::enabled!(target: "audit", Level::INFO),
        Some(_) => tracing::enabled!(target: "audit", Level::WARN),
    };
    if !wanted || is_cheap(subject.act, error) && !log_budget::audit(subject.principal) {
        return;
    }
    let End {
        outcome,
        code,
        reason,
    } = end(error);
    let principal = plain(&subject.principal.to_string());
    let fingerprint = subject.principal.fingerprint_hex();
    let issuer = plain(&subject.principal.issuer_dn);
    let (place, via_node) = match subject.place {
        Place::Entry => ("entry", None),
        Place::Leader { via } => ("leader", Some(via)),
    };
    let (source, request_id) = (plain(subject.source), plain(subject.request_id));
    let trace_id = plain(subject.trace_id);
    let (action, target) = (subject.act.name(), plain(subject.target));
    let epoch = crate::logging::epoch();
    if error.is_none() {
        tracing::info!(
            target: "audit",
            epoch, principal, issuer, fingerprint, source, request_id, trace_id,
            action, resource = target, place, via_node, outcome,
            "admin call"
        );
    } else {
        tracing::warn!(
            target: "audit",
            epoch, principal, issuer, fingerprint, source, request_id, trace_id,
            action, resource = target, place, via_node, outcome,
            code, reason,
            "admin call"
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;

    use super::*;
    use crate::identity::Identity;
    use crate::test_log::Lines;

    fn caller(cn: &str) -> Principal {
        Principal::new(Identity {
            cn: cn.to_owned(),
            ou: Some("Admin".to_owned()),
            sans: Vec::new(),
            serial: "ab".to_owned(),
            issuer_dn: "CN=CA".to_owned(),
            fingerprint: [7; 32],
            spki_sha256: [0; 32],
            not_after: 0,
        })
    }

    fn subject(principal: &Principal, act: Act) -> Subject<'_> {
        Subject {
            place: Place::Leader { via: 2 },
            principal,
            source: "10.0.0.1:5",
            request_id: "r-1",
            trace_id: "0af7651916cd43dd8448eb211c80319c",
            act,
            target: "exchange-key",
        }
    }

    fn written(error: Option<&CallError>) -> String {
        let principal = caller("root\nforged line");
        Lines::of(|| record(&subject(&principal, Act::Rotate), error)).text()
    }

    #[test]
    fn a_line_says_who_from_where_what_and_how_it_ended() {
        let line = written(None);
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        for (field, value) in [
            ("target", "audit"),
            ("source", "10.0.0.1:5"),
            ("request_id", "r-1"),
            ("trace_id", "0af7651916cd43dd8448eb211c80319c"),
            ("action", "key.rotate"),
            ("resource", "exchange-key"),
            ("place", "leader"),
            ("outcome", "done"),
        ] {
            assert_eq!(json[field], value, "{field} in {line}");
        }
        assert!(json["principal"].as_str().unwrap().contains("OU=Admin"));
        assert_eq!(json["via_node"], 2, "who answers for the name");
        assert_eq!(line.lines().count(), 1);
        let principal = caller("root");
        let place = Place::Entry;
        let entry = Subject {
            place,
            ..subject(&principal, Act::Rotate)
        };
        let line = Lines::of(|| record(&entry, None)).text();
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["place"], "entry");
        assert!(json["via_node"].is_null(), "{line}");
    }

    #[test]
    fn a_refusal_is_told_from_a_failure_with_its_reason() {
        let refused = CallError::new(ErrorCode::RoleRequired, "needs one of the roles admin");
        let json: serde_json::Value = serde_json::from_str(&written(Some(&refused))).unwrap();
        assert_eq!(json["outcome"], "refused");
        assert_eq!(json["code"], "role_required");
        assert_eq!(json["reason"], "needs one of the roles admin");
        let failed = CallError::new(ErrorCode::NoQuorum, "x");
        let json: serde_json::Value = serde_json::from_str(&written(Some(&failed))).unwrap();
        assert_eq!(json["outcome"], "failed");
    }

    #[test]
    fn nobody_floods_the_audit_with_reads_or_refusals_and_no_change_is_left_out() {
        const ASKED: usize = 1000;
        let lines = |cn: &str, act: Act, error: Option<&CallError>| {
            let who = caller(cn);
            let written = Lines::of(|| (0..ASKED).for_each(|_| record(&subject(&who, act), error)));
            written.text().lines().count()
        };
        let refused = CallError::new(ErrorCode::RoleRequired, "needs one of the roles admin");
        let failed = CallError::new(ErrorCode::Conflict, "version 3 is pending");
        for (cn, act, error) in [
            ("reader", Act::WhoAmI, None),
            ("auditor", Act::Status, None),
            ("stranger", Act::Rotate, Some(&refused)),
        ] {
            let written = lines(cn, act, error);
            assert!((1..ASKED).contains(&written), "{cn}: {written}");
        }
        // Its reads have cost it none of these.
        assert_eq!(lines("auditor", Act::Rotate, None), ASKED);
        assert_eq!(lines("auditor", Act::Rotate, Some(&failed)), ASKED);
    }

    #[test]
    fn no_text_makes_a_second_line() {
        assert_eq!(plain("a\nb\r\u{7}c"), "a\u{fffd}b\u{fffd}\u{fffd}c");
        assert_eq!(plain(&"x".repeat(1000)).len(), MAX);
    }
}
