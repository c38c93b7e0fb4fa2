//! The cluster: found, let join, join, status, members. Founding and joining happen on the node that is
//! asked; everything else goes by the replicated state.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{
    ClusterInitRequest, ClusterInitResponse, ClusterStatus, JoinRequest, JoinResponse, JoinTokenRequest,
    LeaderRef, MemberRole, NodeRole, NotReadyReason, SlotFingerprint, SlotKeysResponse,
};
use raft_store::names::{NodeName, RaftId, SlotName};
use raft_store::storage::Published;

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, json, slots};
use crate::admin::authorise::{Act, authorise};
use crate::admin::call::{AdminBody, CallError};
use crate::admin::{join_token, rekey_status, views};
use crate::consensus::Role;
use crate::consensus::quorum::majority;
use crate::health::ReadyQuery;
use crate::http::ApiError;

/// Addresses a joining node may try.
const MAX_ADDRESSES: usize = 32;
/// How much of a wrong one an error repeats.
const SHOWN: usize = 80;

pub(super) async fn init(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let ClusterInitRequest {} = state.receive(&caller, Act::Init, "", unread).await?;
    let work = found(state.clone(), caller.clone());
    let founded = state.recorded(&caller, Act::Init, "", work).await?;
    state.changed(&founded, state.applied())
}

async fn found(state: AdminState, caller: Caller) -> Result<ClusterInitResponse, CallError> {
    authorise(&state.policy(), &caller.principal, Act::Init)?;
    let founded = state.seed.found(&state.consensus).await?;
    Ok(ClusterInitResponse {
        cluster_id: founded.cluster_id.to_string(),
        epoch: founded.epoch,
        raft_id: founded.raft_id,
    })
}

pub(super) async fn tokens(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let act = Act::CreateJoinToken;
    let request: JoinTokenRequest = state.receive(&caller, act, "", unread).await?;
    let invalid = |why: String| ApiError::new(ErrorCode::InvalidArgument).detail(why);
    let node = request.node_id.as_deref().map(NodeName::new).transpose();
    let node = node.map_err(|error| invalid(error.to_string()))?;
    let ttl_seconds = join_token::ttl(request.ttl_seconds)?;
    let target = request.node_id.clone().unwrap_or_default();
    let body = AdminBody::CreateJoinToken { ttl_seconds, node };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn join(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: JoinRequest = state.receive(&caller, Act::Join, "", unread).await?;
    let work = enter(state.clone(), caller.clone(), request);
    let joined = state.recorded(&caller, Act::Join, "", work).await?;
    state.changed(&joined, state.applied())
}

async fn enter(state: AdminState, caller: Caller, request: JoinRequest) -> Result<JoinResponse, CallError> {
    authorise(&state.policy(), &caller.principal, Act::Join)?;
    let request = join_request(request, &state)?;
    let joined = state.consensus.join(request).await?;
    let published = state.consensus.published();
    Ok(JoinResponse {
        raft_id: joined.raft_id,
        cluster_id: joined.cluster_id.to_string(),
        role: member_role(&published, joined.raft_id),
        slots: views::fingerprints(&published.state, joined.raft_id),
    })
}

/// The public keys that the cluster is to encrypt this node's transport keys to, for people to confirm before it
/// joins.
pub(super) async fn slot_keys(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    let work = own_keys(state.clone(), caller.clone());
    json(&state.recorded(&caller, Act::SlotKeys, "", work).await?)
}

async fn own_keys(state: AdminState, caller: Caller) -> Result<SlotKeysResponse, CallError> {
    authorise(&state.policy(), &caller.principal, Act::SlotKeys)?;
    if let Some(raft_id) = state.consensus.raft_id()
        && !matches!(state.consensus.view().role, Role::Learner | Role::Uninitialised)
    {
        let slots = views::fingerprints(&state.consensus.published().state, raft_id);
        return Ok(SlotKeysResponse { slots });
    }
    let slots = Arc::clone(&state.slots);
    // Making a key pair takes seconds, and a token as long as it takes.
    let printed = tokio::task::spawn_blocking(move || slots.fingerprints()).await;
    let printed = printed.map_err(|error| CallError::new(ErrorCode::Internal, error.to_string()))?;
    let slots = printed
        .into_iter()
        .map(fingerprint)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(SlotKeysResponse { slots })
}

/// A slot whose key cannot be shown could not join either.
fn fingerprint((slot, print): (SlotName, Result<[u8; 32], String>)) -> Result<SlotFingerprint, CallError> {
    match print {
        Ok(digest) => Ok(SlotFingerprint {
            slot: slot.to_string(),
            spki_sha256: hex::encode(digest),
        }),
        Err(why) => {
            let detail = format!("slot {slot}: its token does not say its public key: {why}");
            Err(CallError::new(ErrorCode::SlotFailed, detail))
        }
    }
}

fn join_request(
    request: JoinRequest,
    state: &AdminState,
) -> Result<crate::consensus::JoinRequest, CallError> {
    let invalid = |why: &str| CallError::new(ErrorCode::InvalidArgument, why);
    let addresses = leader_addresses(&request.leader_addresses)?;
    Ok(crate::consensus::JoinRequest {
        token: request.token.expose().to_owned(),
        cluster_ca_sha256: ca_hash(&request.cluster_ca_sha256)
            .ok_or_else(|| invalid("cluster_ca_sha256: expected 64 hex digits"))?,
        addresses,
        slots: state.slots.names(),
    })
}

/// Addresses that a connection can be made to; the first that is none is named, before anything is tried.
fn leader_addresses(given: &[String]) -> Result<Vec<String>, CallError> {
    let invalid = |why: String| CallError::new(ErrorCode::InvalidArgument, why);
    if given.is_empty() || given.len() > MAX_ADDRESSES {
        let why = "leader_addresses: give 1 to 32 cluster addresses of members, host:port";
        return Err(invalid(why.to_owned()));
    }
    let address = |text: &String| {
        let text = text.trim();
        if is_address(text) {
            return Ok(text.to_owned());
        }
        let shown: String = text.chars().take(SHOWN).collect();
        Err(invalid(format!(
            "leader_addresses: {shown:?}: is not host:port; give the address of a member's cluster.listen, such as \
             hsm-1.internal:8445"
        )))
    };
    given.iter().map(address).collect()
}

/// `host:port` with a name or an address, and a port that somebody can listen on.
fn is_address(text: &str) -> bool {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return address.port() != 0 && !address.ip().is_unspecified();
    }
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    text.rsplit_once(':').is_some_and(|(host, port)| {
        (1..=253).contains(&host.len())
            && host.chars().all(named)
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

/// Hex, with or without colons as fingerprints are often printed.
fn ca_hash(text: &str) -> Option<[u8; 32]> {
    let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
    let mut hash = [0; 32];
    hex::decode_to_slice(digits, &mut hash).ok()?;
    Some(hash)
}

fn member_role(published: &Published, id: RaftId) -> MemberRole {
    let votes = published.membership.voter_ids().any(|voter| voter == id);
    if votes {
        MemberRole::Voter
    } else {
        MemberRole::Learner
    }
}

pub(super) async fn members(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    let (view, own) = (state.consensus.view(), state.consensus.raft_id());
    let fresh = state.view.is_fresh();
    state.read(&caller, Act::Members, |published| {
        let silent = views::silent(published, &view, own, fresh);
        views::members(published, &view, own, &silent)
    })
}

pub(super) async fn status(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read(&caller, Act::Status, |published| {
        cluster_status(&state, published)
    })
}

fn cluster_status(state: &AdminState, published: &Published) -> ClusterStatus {
    let view = state.consensus.view();
    let meta = published.state.meta();
    let failing: Vec<NotReadyReason> = state
        .view
        .checks(&ReadyQuery::default())
        .into_iter()
        .filter(|check| !check.ok)
        .map(|check| NotReadyReason {
            code: check.code.into_owned(),
            detail: check.detail,
        })
        .collect();
    let voters: BTreeSet<RaftId> = published.membership.voter_ids().collect();
    let own = state.consensus.raft_id();
    let silent = views::silent(published, &view, own, state.view.is_fresh());
    let silent_voters = views::silent_voters(published, &silent);
    let failed = views::failed_voters(&view, &voters, &silent);
    let millis = |age: std::time::Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    ClusterStatus {
        cluster_id: meta.map(|meta| meta.cluster_id.to_string()).unwrap_or_default(),
        cluster_name: meta.map_or_else(|| state.cluster_name.clone(), |meta| meta.name.clone()),
        epoch: published.state.epoch(),
        node_id: state.consensus.node_name().to_string(),
        raft_id: own.unwrap_or_default(),
        role: NodeRole::from_word(view.role.as_str()),
        term: view.term,
        leader: view.leader.map(|raft_id| LeaderRef {
            raft_id,
            node_id: views::node_name(&published.state, raft_id),
        }),
        last_log_index: view.last_log,
        committed_index: view.committed,
        applied_index: view.applied,
        quorum_ack_age_ms: view.quorum_ack_age.map(millis),
        staleness_ms: view.staleness.map(millis),
        ready: failing.is_empty(),
        not_ready: failing,
        slots: state
            .slots
            .entries()
            .map(|entry| slots::status(state, entry))
            .collect(),
        failure_tolerance: views::failure_tolerance(voters.len(), failed.len()),
        voters: u32::try_from(voters.len()).unwrap_or(u32::MAX),
        majority: u32::try_from(majority(voters.len())).unwrap_or(u32::MAX),
        silent_voters,
        behind_voters: views::node_names(&published.state, failed.difference(&silent)),
        known_to_removed: rekey_status::known_to_removed(&published.state),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::World;

    #[test]
    fn a_ca_hash_may_be_written_as_fingerprints_are() {
        let expected = Some([0xab; 32]);
        assert_eq!(ca_hash(&"ab".repeat(32)), expected);
        assert_eq!(ca_hash(&["AB"; 32].join(":")), expected);
        for bad in ["", "ab", &"zz".repeat(32)] {
            assert_eq!(ca_hash(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_wrong_address_is_named_before_anything_is_tried() {
        let check = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|text| (*text).to_owned()).collect();
            leader_addresses(&given)
        };
        let good = ["127.0.0.1:8445", " hsm-1.internal:8445", "[::1]:8445", "hsm_1:1"];
        let trimmed = check(&good).unwrap();
        assert_eq!(trimmed[1], "hsm-1.internal:8445");
        for bad in [
            "hsm-1",
            "https://hsm-1:8445",
            "hsm-1:x",
            "hsm-1:0",
            ":8445",
            "0.0.0.0:8445",
            "::1:8445",
            "a b:1",
            "hsm-1:99999",
        ] {
            let error = check(&["hsm-1:8445", bad]).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.detail.contains(&format!("{bad:?}")), "{error}");
        }
        let many = vec!["hsm-1:8445"; MAX_ADDRESSES + 1];
        assert!(check(&[]).is_err() && check(&many).is_err());
    }

    #[test]
    fn a_joined_node_votes_and_a_joining_one_does_not() {
        let mut world = World::new(1);
        let learner = world.join();
        assert_eq!(member_role(&world.published(), 1), MemberRole::Voter);
        assert_eq!(member_role(&world.published(), learner), MemberRole::Learner);
    }

    #[test]
    fn a_key_is_shown_as_hex_and_a_slot_without_one_is_named() {
        let slot = |name: &str| SlotName::new(name).unwrap();
        let shown = fingerprint((slot("2fa"), Ok([0xab; 32]))).unwrap();
        assert_eq!((shown.slot.as_str(), shown.spki_sha256), ("2fa", "ab".repeat(32)));
        let error = fingerprint((slot("2fa"), Err("no token".to_owned()))).unwrap_err();
        assert_eq!(error.code, ErrorCode::SlotFailed);
        assert!(
            error.detail.starts_with("slot 2fa: ") && error.detail.ends_with("no token"),
            "{error}"
        );
    }

    #[test]
    fn every_part_of_a_node_is_a_word_of_the_api() {
        for role in [
            Role::Leader,
            Role::Follower,
            Role::Candidate,
            Role::Learner,
            Role::Uninitialised,
        ] {
            assert_ne!(NodeRole::from_word(role.as_str()), NodeRole::Unknown, "{role:?}");
        }
    }
}
