//! `X-HSM-Min-Index`: a request that is to be answered only from a state at least as new as one that its caller has
//! seen. It waits for that before its body is read, a moment and in bounded numbers, woken by the entry that brings
//! the state there.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, Uri};
use hsm_api::{ErrorCode, StateIndex, headers, paths};
use tokio::time::timeout;

use super::problem::ApiError;
use super::service::ApiState;
use super::shares::{Full, Share, Shares};
use crate::identity::Principal;
use crate::policy::{Op, Policy};

/// No node is this far behind and still fit to answer: nobody waits for it.
const MOST_AHEAD: u64 = 10_000;
/// Requests that may wait at a time, from callers whom the policy of this node knows.
const WAITERS: usize = 224;
/// And from others: the state that they wait for may be the one that lets them in.
const STRANGERS: usize = 32;
/// One principal gets this part of them.
const PRINCIPALS_PART: usize = 4;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    index: StateIndex,
    /// What it wants to do, if it is of the data plane.
    op: Option<Op>,
}

/// Reads what a request asks for. Probes, metrics and the description of the API are answered from no state.
pub(super) fn wanted(uri: &Uri, given: &HeaderMap) -> Result<Option<Wanted>, ApiError> {
    let op = match uri.path() {
        paths::ENCRYPT => Some(Op::Encrypt),
        paths::DECRYPT => Some(Op::Decrypt),
        paths::REWRAP => Some(Op::Rewrap),
        paths::DATAKEY => Some(Op::DataKey),
        path if path.starts_with(paths::ADMIN_PREFIX) => None,
        _ => return Ok(None),
    };
    let mut values = given.get_all(headers::X_HSM_MIN_INDEX).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let text = value.to_str().ok().filter(|_| values.next().is_none());
    let index = text.and_then(|text| text.parse().ok());
    let index = index.ok_or_else(|| {
        ApiError::new(ErrorCode::InvalidArgument)
            .detail("X-HSM-Min-Index: send one, <epoch>.<index> as X-HSM-Index had it")
    })?;
    Ok(Some(Wanted { index, op }))
}

/// Whether a state is new enough.
///
/// # Errors
/// If it never will be, or not soon.
fn judge(wanted: StateIndex, now: StateIndex) -> Result<bool, ApiError> {
    // No cluster has this epoch: the index is worth keeping.
    if now.epoch == 0 {
        let detail = format!("X-HSM-Min-Index: {wanted}: this node has no state of a cluster yet");
        return Err(ApiError::new(ErrorCode::Uninitialised).detail(detail));
    }
    if wanted.epoch != now.epoch {
        let detail = format!(
            "X-HSM-Min-Index: {wanted} is of epoch {}, this node of epoch {}: forget the index",
            wanted.epoch, now.epoch
        );
        return Err(ApiError::new(ErrorCode::IndexEpochChanged).detail(detail));
    }
    if wanted.index > now.index.saturating_add(MOST_AHEAD) {
        let detail =
            format!("X-HSM-Min-Index: {wanted} is more than {MOST_AHEAD} ahead of this node's {now}");
        return Err(ApiError::new(ErrorCode::MinIndexTooFar).detail(detail));
    }
    Ok(wanted.index <= now.index)
}

/// The requests that wait.
pub(super) struct Waiting {
    patience: Duration,
    known: Arc<Shares>,
    strangers: Arc<Shares>,
}

impl Waiting {
    /// Each waits this long at most.
    pub(super) fn new(patience: Duration) -> Self {
        let places = |most: usize| Shares::new(most, most / PRINCIPALS_PART);
        Self {
            patience,
            known: places(WAITERS),
            strangers: places(STRANGERS),
        }
    }

    /// A place among them. It is given back when it is dropped: whoever hangs up keeps none.
    fn place(&self, policy: &Policy, principal: &Principal) -> Result<Share, ApiError> {
        let is_known = policy.unit(principal).is_ok() || !policy.roles_of(principal).is_empty();
        let places = if is_known { &self.known } else { &self.strangers };
        let mut place = places.open(principal);
        let whose = match place.take(1) {
            Ok(()) => return Ok(place),
            Err(Full::Everybody) => "too many requests wait",
            Err(Full::Principal) => "too many of this client's requests wait",
        };
        Err(not_reached(&format!("{whose} for a newer state on this node")))
    }
}

fn not_reached(why: &str) -> ApiError {
    ApiError::new(ErrorCode::MinIndexNotReached).detail(format!("X-HSM-Min-Index: {why}"))
}

/// Waits until what a request is to be answered from is new enough; gives how new that is. It says nothing about
/// what may come of the request: policy and keys are looked at afterwards, as they are then.
pub(super) async fn reach(
    state: &ApiState,
    principal: Option<&Principal>,
    wanted: Option<Wanted>,
) -> Result<StateIndex, ApiError> {
    let data = state.data();
    let now = data.index();
    let (Some(Wanted { index, op }), Some(principal)) = (wanted, principal) else {
        return Ok(now);
    };
    let judged = judge(index, now);
    if matches!(judged, Ok(true)) {
        return Ok(now);
    }
    // Of a node that may not answer at all, neither a wait nor a word about epochs would help anybody.
    if let Some(op) = op {
        data.freshness(op)?;
    }
    judged?;
    let waiting = state.waiting();
    let _place = waiting.place(&data.policy(), principal)?;
    let mut reached = data.reached();
    let there = reached.wait_for(|now| now.epoch != index.epoch || now.index >= index.index);
    let now = match timeout(waiting.patience, there).await {
        Ok(Ok(now)) => *now,
        // The node ends.
        Ok(Err(_)) => data.index(),
        Err(_) => {
            let millis = waiting.patience.as_millis();
            let now = data.index();
            return Err(not_reached(&format!(
                "{index} was not reached within {millis} ms; this node is at {now}"
            )));
        }
    };
    if judge(index, now)? {
        return Ok(now);
    }
    Err(not_reached("this node ends"))
}

#[cfg(test)]
impl Waiting {
    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.known.taken().0 + self.strangers.taken().0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn asked(path: &'static str, values: &[&[u8]]) -> Result<Option<Wanted>, ErrorCode> {
        let mut given = HeaderMap::new();
        for value in values {
            given.append(headers::X_HSM_MIN_INDEX, HeaderValue::from_bytes(value).unwrap());
        }
        wanted(&Uri::from_static(path), &given).map_err(|error| error.code())
    }

    fn at(epoch: u64, index: u64) -> StateIndex {
        StateIndex { epoch, index }
    }

    #[test]
    fn one_index_is_read_and_anything_else_is_refused() {
        let index = at(1, 42);
        for (path, op) in [
            ("/encrypt", Some(Op::Encrypt)),
            ("/decrypt?x=1", Some(Op::Decrypt)),
            ("/rewrap", Some(Op::Rewrap)),
            ("/datakey", Some(Op::DataKey)),
            ("/admin/v1/keys", None),
        ] {
            assert_eq!(asked(path, &[b"1.42"]), Ok(Some(Wanted { index, op })), "{path}");
            assert_eq!(asked(path, &[]), Ok(None));
            let wrong: [&[&[u8]]; 8] = [
                &[b""],
                &[b"42"],
                &[b"1.42 "],
                &[b"-1.42"],
                &[b"1,42"],
                &[b"1.42", b"1.42"],
                &[b"1.42\xff"],
                &[b"1.18446744073709551616"],
            ];
            for bad in wrong {
                assert_eq!(
                    asked(path, bad),
                    Err(ErrorCode::InvalidArgument),
                    "{path} {bad:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_answered_from_no_state_asks_for_none() {
        for path in ["/health", "/metrics", "/openapi.json", "/nowhere"] {
            assert_eq!(asked(path, &[b"nonsense"]), Ok(None), "{path}");
        }
    }

    #[test]
    fn another_epoch_and_one_far_ahead_are_not_waited_for() {
        let judged = |wanted, now| judge(wanted, now).map_err(|error| error.code());
        for (wanted, now, expected) in [
            (at(2, 5), at(2, 5), Ok(true)),
            (at(2, 0), at(2, 5), Ok(true)),
            (at(2, 6), at(2, 5), Ok(false)),
            (at(2, 10_005), at(2, 5), Ok(false)),
            (at(2, 10_006), at(2, 5), Err(ErrorCode::MinIndexTooFar)),
            (at(2, u64::MAX), at(2, 5), Err(ErrorCode::MinIndexTooFar)),
            (at(2, u64::MAX), at(2, u64::MAX - 1), Ok(false)),
            (at(1, 0), at(2, 5), Err(ErrorCode::IndexEpochChanged)),
            (at(3, 5), at(2, 5), Err(ErrorCode::IndexEpochChanged)),
            (at(1, 1), at(0, 0), Err(ErrorCode::Uninitialised)),
            (at(0, 0), at(0, 0), Err(ErrorCode::Uninitialised)),
            (at(0, 1), at(1, 1), Err(ErrorCode::IndexEpochChanged)),
        ] {
            assert_eq!(judged(wanted, now), expected, "{wanted} at {now}");
        }
    }

    proptest! {
        #[test]
        fn no_header_is_a_fault(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut given = HeaderMap::new();
                given.append(headers::X_HSM_MIN_INDEX, value.clone());
                match wanted(&Uri::from_static("/encrypt"), &given) {
                    // What is taken is what `X-HSM-Index` writes, but for zeros before a number.
                    Ok(read) => {
                        let index = read.unwrap().index;
                        let written = index.to_string();
                        let text = value.to_str().unwrap();
                        prop_assert!(text == written || text.len() > written.len());
                        prop_assert_eq!(text.parse::<StateIndex>().unwrap(), index);
                    }
                    Err(error) => prop_assert_eq!(error.code(), ErrorCode::InvalidArgument),
                }
            }
        }

        #[test]
        fn what_is_written_is_read(epoch: u64, index: u64) {
            let written = at(epoch, index).to_string();
            let read = asked("/encrypt", &[written.as_bytes()]).unwrap().unwrap();
            prop_assert_eq!(read.index, at(epoch, index));
        }
    }
}
