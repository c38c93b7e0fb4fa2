//! The audit of requests that were refused for who sent them (401 and 403): who asked for what, and why not. Whoever is
//! refused can ask again at will. So the first refusal of a kind has its line at once, and of those that follow it is said
//! every few seconds how many there were. They are counted apart from every other budget of lines, so that nobody's
//! refusals cost the audit anything else.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::{LazyLock, Mutex, PoisonError};

use hsm_api::{ErrorCode, paths};
use tracing::Level;

use super::caller::Seen;
use super::problem::ApiError;
use super::request_id::RequestId;
use super::trace_id::TraceId;
use crate::admin::audit::plain;
use crate::identity::Principal;

/// Kinds of one caller that are told apart until they are counted.
const KINDS: usize = 32;
/// Lines at once, of all callers together, until they are counted. With the counts, of which there are at most twice as
/// many, that is less than half of what the log keeps room for (`logging::writer`), however many certificates
/// somebody has.
const LINES: usize = 1024;

/// One for the process, as there is one log.
static REFUSALS: LazyLock<Mutex<Refusals>> = LazyLock::new(Mutex::default);

/// Writes the line of a refused request, or counts it. `endpoint` is the route.
pub(super) fn record(
    error: &ApiError,
    (id, trace): (&RequestId, &TraceId),
    endpoint: &'static str,
    seen: Seen<'_>,
    peer: Option<SocketAddr>,
) {
    let refused = matches!(error.status().as_u16(), 401 | 403) && !error.has_its_line();
    if !refused || !tracing::enabled!(target: "audit", Level::WARN) {
        return;
    }
    let (action, resource) = asked(endpoint);
    let kind = Kind {
        action,
        resource: plain(error.resource().unwrap_or(resource)),
        code: error.code(),
    };
    let reason = plain(error.operator_detail().unwrap_or(error.caller_detail()));
    if !lock().note(seen.accountable(), seen, &kind, &reason) {
        return;
    }
    let Who {
        principal,
        issuer,
        fingerprint,
        proxy,
    } = Who::of(seen);
    let source = peer.map(|peer| peer.to_string()).unwrap_or_default();
    tracing::warn!(
        target: "audit",
        epoch = crate::logging::epoch(),
        principal,
        issuer,
        fingerprint,
        source,
        proxy,
        request_id = id.as_str(),
        trace_id = trace.as_str(),
        action = kind.action,
        resource = kind.resource,
        place = "entry",
        outcome = "refused",
        code = kind.code.as_str(),
        reason,
        "request refused"
    );
}

/// Says how many were left out since the last time. To be called every few seconds, and at the end.
pub(crate) fn say_refusals_left_out() {
    let taken = std::mem::take(&mut *lock());
    taken.say();
}

fn lock() -> std::sync::MutexGuard<'static, Refusals> {
    REFUSALS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a request asks for, and of what, as far as its path says so.
fn asked(endpoint: &'static str) -> (&'static str, &'static str) {
    match endpoint {
        paths::ENCRYPT => ("data.encrypt", ""),
        paths::DECRYPT => ("data.decrypt", ""),
        paths::REWRAP => ("data.rewrap", ""),
        paths::DATAKEY => ("data.datakey", ""),
        other => ("request", other),
    }
}

/// Refusals that are counted as one. No text that a caller can choose is part of it: of contexts only those that there
/// are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kind {
    action: &'static str,
    resource: String,
    code: ErrorCode,
}

/// Whose refusals they are, as lines say it.
#[derive(Default)]
struct Who {
    principal: String,
    issuer: String,
    fingerprint: String,
    proxy: String,
}

impl Who {
    fn of(seen: Seen<'_>) -> Self {
        let principal = seen.principal;
        Self {
            principal: principal.map(|who| plain(&who.to_string())).unwrap_or_default(),
            issuer: principal.map(|who| plain(&who.issuer_dn)).unwrap_or_default(),
            fingerprint: principal.map(Principal::fingerprint_hex).unwrap_or_default(),
            proxy: seen.proxy_name().to_owned(),
        }
    }
}

/// A kind that has its line, and how many came after it.
struct Told {
    kind: Kind,
    reason: String,
    left_out: u64,
}

struct Caller {
    who: Who,
    told: Vec<Told>,
    /// Of further kinds.
    left_out: u64,
}

/// What was told and counted since the last time.
#[derive(Default)]
struct Refusals {
    /// Remembered by a hash, as in `log_budget`.
    hasher: RandomState,
    callers: HashMap<u64, Caller>,
    lines: usize,
    /// Of callers for whom there was no line.
    left_out: u64,
}

impl Refusals {
    /// Whether it is the first of its kind, whose line is to be written. Counts it otherwise.
    fn note(&mut self, accountable: Option<&Principal>, seen: Seen<'_>, kind: &Kind, reason: &str) -> bool {
        let account = self.hasher.hash_one(accountable.map(Principal::account));
        let full = self.lines >= LINES;
        match self.callers.get_mut(&account) {
            Some(caller) => {
                if let Some(told) = caller.told.iter_mut().find(|told| told.kind == *kind) {
                    told.left_out += 1;
                    return false;
                }
                if full || caller.told.len() >= KINDS {
                    caller.left_out += 1;
                    return false;
                }
            }
            None if full => {
                self.left_out += 1;
                return false;
            }
            None => {}
        }
        self.lines += 1;
        let caller = self.callers.entry(account).or_insert_with(|| Caller {
            who: Who::of(seen),
            told: Vec::new(),
            left_out: 0,
        });
        caller.told.push(Told {
            kind: kind.clone(),
            reason: reason.to_owned(),
            left_out: 0,
        });
        true
    }

    fn say(self) {
        for Caller { who, told, left_out } in self.callers.into_values() {
            for Told {
                kind,
                reason,
                left_out,
            } in told.into_iter().filter(|told| told.left_out > 0)
            {
                say(&who, Some((&kind, reason.as_str())), left_out);
            }
            if left_out > 0 {
                say(&who, None, left_out);
            }
        }
        if self.left_out > 0 {
            say(&Who::default(), None, self.left_out);
        }
    }
}

/// How many of one kind, of further kinds of one caller, or of further callers.
fn say(who: &Who, kind: Option<(&Kind, &str)>, left_out: u64) {
    let Who {
        principal,
        issuer,
        fingerprint,
        proxy,
    } = who;
    let (action, resource, code, reason) = kind.map_or(("", "", "", ""), |(kind, reason)| {
        (kind.action, kind.resource.as_str(), kind.code.as_str(), reason)
    });
    tracing::warn!(
        target: "audit",
        epoch = crate::logging::epoch(),
        principal,
        issuer,
        fingerprint,
        proxy,
        action,
        resource,
        place = "entry",
        outcome = "refused",
        code,
        reason,
        left_out,
        "further requests refused"
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::tests::fake::principal;
    use super::*;
    use crate::test_log::Lines;

    fn seen(who: &Principal) -> Seen<'_> {
        Seen {
            principal: Some(who),
            via: None,
        }
    }

    fn kind(resource: &str) -> Kind {
        Kind {
            action: "data.encrypt",
            resource: resource.to_owned(),
            code: ErrorCode::AccessDenied,
        }
    }

    fn note(refusals: &mut Refusals, who: &Principal, resource: &str) -> bool {
        refusals.note(Some(who), seen(who), &kind(resource), "why")
    }

    #[test]
    fn the_first_of_each_kind_is_told_and_the_others_are_counted() {
        let (mut refusals, who) = (Refusals::default(), principal("a", Some("Trading")));
        let told = (0..1000).filter(|_| note(&mut refusals, &who, "2fa")).count();
        assert_eq!(told, 1);
        assert!(note(&mut refusals, &who, "order-key"), "another context");
        let other = principal("b", Some("Trading"));
        assert!(note(&mut refusals, &other, "2fa"), "another caller");
        let lines = Lines::of(|| refusals.say()).all();
        assert_eq!(lines.len(), 1, "{lines:#?}");
        for (field, value) in [
            ("target", "audit"),
            ("action", "data.encrypt"),
            ("resource", "2fa"),
            ("code", "access_denied"),
            ("outcome", "refused"),
            ("reason", "why"),
            ("issuer", "CN=CA"),
        ] {
            assert_eq!(lines[0][field], value, "{field}");
        }
        assert_eq!(lines[0]["left_out"], 999);
        assert!(lines[0]["principal"].as_str().unwrap().contains("CN=a "));
    }

    #[test]
    fn one_caller_has_only_so_many_kinds_and_all_of_them_together_so_many_lines() {
        let mut refusals = Refusals::default();
        let inventive = principal("inventive", None);
        let asked = 10 * KINDS;
        let told = (0..asked).filter(|n| note(&mut refusals, &inventive, &n.to_string()));
        assert_eq!(told.count(), KINDS);
        let many = (0..10 * LINES).filter(|n| note(&mut refusals, &principal(&n.to_string(), None), "2fa"));
        assert_eq!(many.count(), LINES - KINDS);
        assert!(refusals.callers.len() <= LINES);
        // Who has a line is counted by himself even now.
        assert!(!note(&mut refusals, &principal("0", None), "2fa"));
        let lines = Lines::of(|| refusals.say()).all();
        let left_out = |cn: &str| {
            let of = |line: &&serde_json::Value| line["principal"].as_str().unwrap().starts_with(cn);
            let counts = lines
                .iter()
                .filter(of)
                .map(|line| line["left_out"].as_u64().unwrap());
            counts.collect::<Vec<_>>()
        };
        assert_eq!(left_out("CN=inventive "), [(asked - KINDS) as u64]);
        assert_eq!(left_out("CN=0 "), [1]);
        let strangers: Vec<_> = lines.iter().filter(|line| line["principal"] == "").collect();
        assert_eq!(strangers.len(), 1, "{lines:#?}");
        assert_eq!(strangers[0]["left_out"], (9 * LINES + KINDS) as u64);
        assert_eq!(lines.len(), 3);
    }
}
