//! Join tokens. Their secret is made here, goes out once in the answer, and is known to nobody else:
//! state keeps its hash. A repeated request whose answer was lost gets another token; the lost one can
//! be used by nobody and expires.

use std::time::Instant;

use hsm_api::ErrorCode;
use raft_store::command::{CreateJoinToken, Done, Op, Refusal};
use raft_store::names::{NodeName, UnixMillis};
use raft_store::state::ClusterState;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::call::CallError;
use crate::clock;
use crate::consensus::{ProposeError, join_token_text};
use crate::rotation::plan::{Asked, Attempt};
use crate::rotation::{Clocks, Cluster};

/// How long a token is good unless the caller says otherwise.
pub const DEFAULT_TTL: u64 = 3600;
/// The longest it may be.
pub const MAX_TTL: u64 = 7 * 24 * 3600;
/// Rounds of one call; each but the last met an earlier attempt of the same request.
const MAX_ROUNDS: usize = 16;

/// A token as it goes out.
pub struct Issued {
    /// Its text, with the secret.
    pub text: Zeroizing<String>,
    /// When it dies.
    pub expires_at: UnixMillis,
}

/// Checks the lifetime a caller wishes for.
///
/// # Errors
/// `invalid_argument`.
pub fn ttl(wished: Option<u64>) -> Result<u64, CallError> {
    match wished.unwrap_or(DEFAULT_TTL) {
        ttl @ 1..=MAX_TTL => Ok(ttl),
        other => Err(CallError::new(
            ErrorCode::InvalidArgument,
            format!("ttl_seconds: {other}: use 1 to {MAX_TTL}; the default is {DEFAULT_TTL}"),
        )),
    }
}

/// Makes a token on the leader.
///
/// # Errors
/// `not_ready` while the leader's clock is in doubt: it would make a token that is good for too long, or for no time. What the
/// state refuses (too many open tokens), and consensus.
pub async fn issue(
    cluster: &dyn Cluster,
    clocks: &Clocks,
    asked: &Asked,
    ttl_seconds: u64,
    node: Option<NodeName>,
) -> Result<Issued, CallError> {
    let ttl_seconds = ttl(Some(ttl_seconds))?;
    clocks.uncontradicted(cluster, Instant::now())?;
    for _ in 0..MAX_ROUNDS {
        let secret = random_secret();
        let secret_hash: [u8; 32] = Sha256::digest(*secret).into();
        // Whatever was made before has a secret that nobody knows.
        let attempt = match asked.attempt(&cluster.published().state, |_| None::<()>)? {
            Attempt::New(attempt) => attempt,
            Attempt::Settled(()) => continue,
        };
        let lifetime = UnixMillis::try_from(ttl_seconds * 1000).unwrap_or(UnixMillis::MAX);
        let expires_at = clock::unix_millis().saturating_add(lifetime);
        let op = CreateJoinToken {
            secret_hash,
            expires_at,
            node: node.clone(),
        };
        let (id, origin) = (asked.id(attempt), asked.origin.clone());
        match cluster
            .propose(id, asked.body_hash, origin, Op::CreateJoinToken(op))
            .await
        {
            Ok(Done::JoinToken { number }) => {
                // The same request may have been faster on another leader.
                if is_own(&cluster.published().state, number, &secret_hash) {
                    let text = Zeroizing::new(join_token_text(number, &secret));
                    return Ok(Issued { text, expires_at });
                }
            }
            Ok(_) => {
                return Err(CallError::new(
                    ErrorCode::Internal,
                    "unexpected outcome of a token",
                ));
            }
            Err(ProposeError::Refused(refusal @ Refusal::Conflict(_))) => return Err(refusal.into()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(CallError::new(
        ErrorCode::Conflict,
        "this Idempotency-Key was used too often; ask again with a new one",
    ))
}

fn is_own(state: &ClusterState, number: u64, secret_hash: &[u8; 32]) -> bool {
    state
        .join_tokens()
        .get(&number)
        .is_some_and(|token| token.secret_hash == *secret_hash)
}

fn random_secret() -> Zeroizing<[u8; 32]> {
    let mut secret = Zeroizing::new([0; 32]);
    secret[..16].copy_from_slice(&clock::random_id());
    secret[16..].copy_from_slice(&clock::random_id());
    secret
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{FakeCluster, World, asked, still};

    fn number_and_secret(issued: &Issued) -> (u64, [u8; 32]) {
        let mut parts = issued.text.split('.').skip(1);
        let number = parts.next().unwrap().parse().unwrap();
        let secret = hex::decode(parts.next().unwrap()).unwrap();
        (number, secret.try_into().unwrap())
    }

    #[tokio::test]
    async fn the_state_knows_the_hash_of_the_secret_and_no_more() {
        let cluster = FakeCluster::new(World::new(1));
        let node = NodeName::new("n9").unwrap();
        let issued = issue(
            &*cluster,
            &Clocks::default(),
            &asked("join-token", "k"),
            60,
            Some(node.clone()),
        )
        .await
        .ok()
        .unwrap();
        let (number, secret) = number_and_secret(&issued);
        let state = cluster.published().state.clone();
        let token = state.join_tokens().get(&number).unwrap();
        assert_eq!(token.secret_hash, <[u8; 32]>::from(Sha256::digest(secret)));
        assert_eq!(
            (token.expires_at, token.node.clone()),
            (issued.expires_at, Some(node))
        );
        assert!(issued.expires_at > clock::unix_millis() + 50_000);
    }

    #[tokio::test]
    async fn while_the_clock_is_in_doubt_there_is_no_token() {
        let cluster = FakeCluster::new(World::new(3));
        for days in [400, -400] {
            let wrong = Clocks::new(Box::new(move || days * 24 * 3600 * 1000));
            let refused = issue(&*cluster, &wrong, &asked("join-token", "k"), 60, None).await;
            assert_eq!(refused.err().unwrap().code, ErrorCode::NotReady, "{days}");
        }
        let right = still();
        let issued = issue(&*cluster, &right, &asked("join-token", "k"), 60, None).await;
        assert!(issued.is_ok());
    }

    #[tokio::test]
    async fn a_request_whose_answer_was_lost_gets_a_token_that_works() {
        let cluster = FakeCluster::new(World::new(1));
        cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::Unknown, true));
        let lost = issue(&*cluster, &Clocks::default(), &asked("join-token", "k"), 60, None).await;
        assert_eq!(lost.err().unwrap().code, ErrorCode::OutcomeUnknown);
        let issued = issue(&*cluster, &Clocks::default(), &asked("join-token", "k"), 60, None)
            .await
            .ok()
            .unwrap();
        let (number, secret) = number_and_secret(&issued);
        let state = cluster.published().state.clone();
        assert!(is_own(&state, number, &Sha256::digest(secret).into()));
    }

    #[test]
    fn a_lifetime_is_bounded() {
        assert_eq!(ttl(None), Ok(DEFAULT_TTL));
        assert_eq!(ttl(Some(1)), Ok(1));
        for bad in [0, MAX_TTL + 1, u64::MAX] {
            assert_eq!(ttl(Some(bad)).unwrap_err().code, ErrorCode::InvalidArgument);
        }
    }

    #[test]
    fn two_secrets_differ() {
        assert_ne!(*random_secret(), *random_secret());
    }
}
