//! Revocations: listed, added, taken back. Anyone's node takes them; the leader carries them out.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use hsm_api::admin::{
    CrlInfo, RevocationMatch, RevocationsPage, RevokeCrlRequest, RevokeCrlResponse, RevokeRequest,
    RevokeResponse, UnrevokeRequest, UnrevokeResponse,
};
use hsm_api::{Base64, ErrorCode};
use raft_store::command::RequestId;
use raft_store::state::access::RevocationKey;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::access::misread;
use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, founded, json};
use crate::admin::access::{AccessBody, Changed, MAX_KEPT, revocations, spares_caller};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::{AdminBody, AdminCall, CallError, Executed};
use crate::admin::seeding::fitting;
use crate::admin::views::rfc3339;
use crate::http::ApiError;
use crate::tls::Crl;

pub(super) async fn list(
    State(state): State<AdminState>,
    caller: Caller,
    asked: Result<Query<RevocationsPage>, QueryRejection>,
) -> Result<Response, ApiError> {
    let result = page(&state, &caller, asked);
    state.record(&caller, Act::ListRevocations, "", result.as_ref().err());
    json(&result?)
}

fn page(
    state: &AdminState,
    caller: &Caller,
    asked: Result<Query<RevocationsPage>, QueryRejection>,
) -> Result<hsm_api::admin::RevocationsResponse, CallError> {
    authorise(&state.policy(), &caller.principal, Act::ListRevocations)?;
    let published = state.consensus.published();
    founded(&published)?;
    let Query(asked) = asked.map_err(misread)?;
    let after = asked.after.as_deref().map(revocations::place).transpose()?;
    Ok(revocations::page(&published.state, after.as_ref()))
}

pub(super) async fn revoke(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: RevokeRequest = state.receive(&caller, Act::Revoke, "", unread).await?;
    let reason = revocations::reason(&request.reason)?;
    let key = one_of(
        request.what.as_ref(),
        request.certificate.as_ref(),
        revocations::of_certificate,
        revocations::key,
    )?;
    let warnings = revocations::warning(&key, &state.seed.issuers);
    let what = revocations::matching(&key);
    let body = AccessBody::Revoke {
        revocations: vec![(key, reason)],
    };
    let done = state.change_access(&caller, body, &request).await?;
    let answer = RevokeResponse {
        revocations: vec![what],
        added: done.changed,
        warnings: warnings.into_iter().collect(),
    };
    state.changed(&answer, done.index)
}

pub(super) async fn unrevoke(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: UnrevokeRequest = state.receive(&caller, Act::Unrevoke, "", unread).await?;
    let keys = one_of(
        request.what.as_ref(),
        request.certificate.as_ref(),
        revocations::all_of_certificate,
        |what| revocations::key(what).map(|key| vec![key]),
    )?;
    let gone = keys.iter().map(revocations::matching).collect();
    let body = AccessBody::Unrevoke { revocations: keys };
    let done = state.change_access(&caller, body, &request).await?;
    let answer = UnrevokeResponse {
        revocations: gone,
        removed: done.changed,
    };
    state.changed(&answer, done.index)
}

/// What a request names, by one of two ways.
fn one_of<T>(
    what: Option<&RevocationMatch>,
    certificate: Option<&Base64>,
    of_certificate: impl FnOnce(&[u8]) -> Result<T, CallError>,
    of_match: impl FnOnce(&RevocationMatch) -> Result<T, CallError>,
) -> Result<T, CallError> {
    match (what, certificate) {
        (Some(what), None) => of_match(what),
        (None, Some(der)) => of_certificate(der.as_slice()),
        _ => Err(CallError::new(
            ErrorCode::InvalidArgument,
            "give one of what and certificate",
        )),
    }
}

/// A list is as many changes as it takes, in a task that outlives the caller. Each is idempotent: a repeat goes on where
/// it stopped.
pub(super) async fn crl(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let act = Act::Revoke;
    let allowed = authorise(&state.policy(), &caller.principal, act);
    if let Err(refusal) = &allowed {
        state.record(&caller, act, "a revocation list", Some(refusal));
    }
    let request: RevokeCrlRequest = unread.read(allowed, &state.uploads, &caller.principal).await?;
    let reason = revocations::reason(&request.reason)?;
    let tls = state.tls.load_full();
    let file = request.crl.into_vec();
    let read = move || (Sha256::digest(&file), tls.read_crls(&file));
    // A large list takes a moment to read.
    let read = tokio::task::spawn_blocking(read).await;
    let (digest, lists) = read.map_err(|error| ApiError::internal(error.to_string()))?;
    let lists = lists.map_err(|error| {
        let error = CallError::new(ErrorCode::InvalidArgument, format!("crl: {error}"));
        state.record(&caller, act, "a revocation list", Some(&error));
        error
    })?;
    let revoked = entries(&lists, &reason);
    check_entries(&revoked, &caller)?;
    let calls = state.calls(&caller, &revoked, &hex::encode(digest));
    // A list may have nothing to add.
    let (consensus, index) = (state.consensus.clone(), state.applied());
    let work = async move {
        let mut all = Done { changed: 0, index };
        for call in calls? {
            let done = changed(consensus.admin_call(call).await?)?;
            all.changed += done.changed;
            all.index = all.index.max(done.index);
        }
        Ok::<Done, CallError>(all)
    };
    let done = state.recorded(&caller, act, &target(&lists), work).await?;
    let answer = RevokeCrlResponse {
        lists: lists.iter().map(info).collect(),
        added: done.changed,
    };
    state.changed(&answer, done.index)
}

fn entries(lists: &[Crl], reason: &str) -> Vec<(RevocationKey, String)> {
    let of = |list: &Crl| {
        let issuer = list.issuer.clone();
        let entry = move |serial: &String| RevocationKey::Serial {
            issuer: issuer.clone(),
            serial: serial.clone(),
        };
        list.serials.iter().map(entry).collect::<Vec<_>>()
    };
    let keys = lists.iter().flat_map(of);
    keys.map(|key| (key, reason.to_owned())).collect()
}

/// What would be found out by the leader only after some of it was done.
fn check_entries(revoked: &[(RevocationKey, String)], caller: &Caller) -> Result<(), CallError> {
    if revoked.len() > MAX_KEPT {
        let detail = format!(
            "crl: names {} certificates, and at most {MAX_KEPT} are kept",
            revoked.len()
        );
        return Err(CallError::new(ErrorCode::InvalidArgument, detail));
    }
    spares_caller(revoked.iter().map(|(key, _)| key), &caller.principal)
}

fn target(lists: &[Crl]) -> String {
    let of = |list: &Crl| format!("{} certificates of {}", list.serials.len(), list.issuer);
    let lists: Vec<String> = lists.iter().map(of).collect();
    format!("a revocation list: {}", lists.join(", "))
}

fn info(list: &Crl) -> CrlInfo {
    CrlInfo {
        issuer: list.issuer.clone(),
        entries: list.serials.len() as u64,
        next_update: list.next_update.map(|at| rfc3339(at.saturating_mul(1000))),
    }
}

/// How many revocations the leader has changed, and in which state they are.
struct Done {
    changed: u64,
    index: u64,
}

fn changed(executed: Executed) -> Result<Done, CallError> {
    let answer: Changed = serde_json::from_value(executed.answer)
        .map_err(|error| CallError::new(ErrorCode::Internal, format!("the leader's answer: {error}")))?;
    Ok(Done {
        changed: answer.changed,
        index: executed.index,
    })
}

impl AdminState {
    /// A change of revocations, and how many it has changed.
    async fn change_access(
        &self,
        caller: &Caller,
        body: AccessBody,
        asked: &(impl Serialize + Sync),
    ) -> Result<Done, CallError> {
        let (act, target) = (body.act(), body.target());
        let call = self.call(caller, AdminBody::Access(body), asked);
        let consensus = self.consensus.clone();
        let work = async move { changed(consensus.admin_call(call?).await?) };
        self.recorded(caller, act, &target, work).await
    }

    /// One call for as many as fit into a command. Each has a key of its own, made of the caller's: so does each of
    /// a repeat, where the same file is taken apart in the same way.
    fn calls(
        &self,
        caller: &Caller,
        revoked: &[(RevocationKey, String)],
        file: &str,
    ) -> Result<Vec<AdminCall>, CallError> {
        let mut calls = Vec::new();
        let mut rest = revoked;
        while !rest.is_empty() {
            let (chunk, later) = rest.split_at(fitting(rest));
            let body = AdminBody::Access(AccessBody::Revoke {
                revocations: chunk.to_vec(),
            });
            let mut call = self.call(caller, body, &(file, calls.len()))?;
            if let RequestId::Client { key, .. } = &mut call.id {
                key.push_str(&format!(".{}", calls.len()));
            }
            calls.push(call);
            rest = later;
        }
        Ok(calls)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn list(issuer: &str, serials: &[&str]) -> Crl {
        Crl {
            issuer: issuer.to_owned(),
            serials: serials.iter().map(|serial| (*serial).to_owned()).collect(),
            next_update: Some(1_735_689_600),
        }
    }

    #[test]
    fn every_certificate_of_every_list_is_revoked_by_its_own_issuer() {
        let lists = [list("CN=A", &["1", "2"]), list("CN=B", &["1"])];
        let revoked = entries(&lists, "monthly");
        assert_eq!(revoked.len(), 3);
        let expected = RevocationKey::Serial {
            issuer: "CN=B".to_owned(),
            serial: "1".to_owned(),
        };
        assert_eq!(revoked[2], (expected, "monthly".to_owned()));
        assert_eq!(
            target(&lists),
            "a revocation list: 2 certificates of CN=A, 1 certificates of CN=B"
        );
        assert_eq!(
            info(&lists[0]).next_update.as_deref(),
            Some("2025-01-01T00:00:00Z")
        );
    }

    #[test]
    fn a_request_names_one_thing_by_one_way() {
        let what = RevocationMatch::default();
        let der = Base64::from(vec![1]);
        let ask = |what, der| one_of(what, der, |_| Ok("certificate"), |_| Ok("match"));
        assert_eq!(ask(Some(&what), None), Ok("match"));
        assert_eq!(ask(None, Some(&der)), Ok("certificate"));
        for (what, der) in [(None, None), (Some(&what), Some(&der))] {
            assert_eq!(ask(what, der).unwrap_err().code, ErrorCode::InvalidArgument);
        }
    }
}
