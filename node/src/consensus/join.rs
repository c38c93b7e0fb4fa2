//! Joining: a node with a one-time token is registered, becomes a learner, receives state, imports and
//! proves every key, and only then votes. Every step can be repeated; a failed join never harms the cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;
use raft_store::names::{ClusterId, RaftId, SlotName};
use serde::{Deserialize, Serialize};

use super::connection::{CallFailure, Connection};
use super::wire::{JoinDeclined, Request, Response};
use super::{Consensus, Role};
use crate::admin::call::CallError;
use crate::clock;

/// From the first call until this node votes.
const JOIN_WITHIN: Duration = Duration::from_secs(60);
/// Of that, finding a leader that answers.
const ASK_WITHIN: Duration = Duration::from_secs(15);
const ATTEMPT: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(200);
/// Between looks at this node's own part, which asks nobody.
const LOOK: Duration = Duration::from_millis(25);
const TOKEN_PREFIX: &str = "hsm-join-1";

/// What an operator gives a node that shall join.
pub struct JoinRequest {
    /// The token's text.
    pub token: String,
    /// SHA-256 of the cluster CA's certificate, as `cluster token` printed it.
    pub cluster_ca_sha256: [u8; 32],
    /// Cluster addresses of members; any will do.
    pub addresses: Vec<String>,
    /// The slots this node is configured for.
    pub slots: Vec<SlotName>,
}

/// A finished join.
#[derive(Debug, Clone)]
pub struct Joined {
    /// This node's id.
    pub raft_id: RaftId,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Its part now.
    pub role: Role,
}

/// What a joining node says of itself to the leader.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct JoinDetails {
    pub(super) number: u64,
    pub(super) secret: [u8; 32],
    pub(super) api_address: String,
    pub(super) cluster_address: String,
    pub(super) slots: Vec<SlotName>,
    /// Identifies its replication key; must be the cluster's.
    pub(super) trk_id: [u8; 8],
}

/// The identity a joining node gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct JoinAccepted {
    pub(super) raft_id: RaftId,
    pub(super) cluster_id: ClusterId,
    pub(super) epoch: u64,
}

/// The text of a join token: number and secret.
pub fn join_token_text(number: u64, secret: &[u8; 32]) -> String {
    format!("{TOKEN_PREFIX}.{number}.{}", hex::encode(secret))
}

pub(super) fn parse_token(text: &str) -> Option<(u64, [u8; 32])> {
    let mut parts = text.trim().split('.');
    let (prefix, number, secret) = (parts.next()?, parts.next()?, parts.next()?);
    let secret = hex::decode(secret).ok()?.try_into().ok()?;
    (prefix == TOKEN_PREFIX && parts.next().is_none()).then_some((number.parse().ok()?, secret))
}

fn refuse(code: ErrorCode, detail: impl Into<String>) -> CallError {
    CallError {
        code,
        detail: detail.into(),
    }
}

/// Why an address gave no answer.
#[derive(Debug, PartialEq, Eq)]
enum NoAnswer {
    /// Another time it may.
    Later(String),
    /// What listens there is no member, or none that takes this node: asking again does not help.
    Never(String),
}

/// What an address that is no cluster listener's is answered with.
const OTHER_ADDRESS: &str = "give the address of cluster.listen, usually port 8445";

impl NoAnswer {
    fn of(failure: &CallFailure) -> Self {
        use rustls::{AlertDescription, Error};
        let CallFailure::Io { address, source } = failure else {
            return Self::Later(failure.to_string());
        };
        let Some(tls) = source.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
            return Self::Later(failure.to_string());
        };
        Self::Never(match tls {
            Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
                format!("{address} speaks TLS but not the cluster protocol; {OTHER_ADDRESS}")
            }
            Error::InvalidCertificate(_) => format!(
                "{address} shows a certificate that is no cluster certificate of this cluster ({tls}); {OTHER_ADDRESS}, \
                 or, if it is that one, install the cluster's CA here (cluster.tls.ca_path)"
            ),
            Error::InvalidMessage(_) => format!("{address} does not speak TLS ({tls}); {OTHER_ADDRESS}"),
            Error::AlertReceived(_) => format!(
                "{address} refuses this node's certificate ({tls}); cluster.tls.cert_path has to be from the \
                 cluster's CA and in date"
            ),
            _ => format!("{address}: TLS: {tls}"),
        })
    }
}

impl Consensus {
    /// Joins the cluster the addresses belong to; returns once this node votes.
    ///
    /// # Errors
    /// `already_initialised`, `invalid_argument` (token, CA, slots, replication key, addresses), `conflict` (name
    /// taken), `outcome_unknown` (not a voter in time; the join goes on, ask again).
    pub async fn join(&self, request: JoinRequest) -> Result<Joined, CallError> {
        let deadline = clock::now() + JOIN_WITHIN;
        self.enter(&request).await?;
        let control = self.control().get();
        while clock::now() < deadline {
            let role = self.view().role;
            // Out of a joint configuration a majority of the old one alone would have to lead as well.
            let membership = &self.published().membership;
            let voter = membership.membership().get_joint_config().len() == 1
                && membership.voter_ids().any(|id| id == control.raft_id);
            if voter && matches!(role, Role::Follower | Role::Leader) {
                return Ok(Joined {
                    raft_id: control.raft_id,
                    cluster_id: control.cluster_id,
                    role,
                });
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(refuse(
            ErrorCode::OutcomeUnknown,
            "registered as a learner, but not a voter yet: it has to receive the state and prove every key; see \
             /readyz?verbose on this node, and ask again",
        ))
    }

    /// Gets this node its identity, if it has none yet, and starts Raft under it.
    async fn enter(&self, request: &JoinRequest) -> Result<(), CallError> {
        // Whoever founds or joins meanwhile waits, and then finds out.
        let _identity = self.shared.identity.lock().await;
        let control = self.control().get();
        let knows_the_cluster = self.published().state.meta().is_some();
        if control.raft_id == 0 || !knows_the_cluster {
            // Also where it has its id and nobody has reached it since: it may have given an address that
            // was wrong, which is corrected by asking again.
            let accepted = self.ask_to_join(request, clock::now() + ASK_WITHIN).await?;
            self.take_identity(accepted.cluster_id, accepted.epoch, accepted.raft_id)
                .await?;
        } else if self.view().role != Role::Learner {
            let detail = format!("this node belongs to cluster {} already", control.cluster_id);
            return Err(refuse(ErrorCode::AlreadyInitialised, detail));
        }
        let started = self.shared.start_raft(self.control().get().raft_id).await;
        started.map(|_| ()).map_err(|e| refuse(ErrorCode::Internal, e))
    }

    /// Makes an identity this node's own, for good: one that it has already is refused unless it is the same.
    pub(super) async fn take_identity(
        &self,
        cluster_id: ClusterId,
        epoch: u64,
        raft_id: RaftId,
    ) -> Result<(), CallError> {
        let handle = self.control();
        let taken = tokio::task::spawn_blocking(move || handle.join_cluster(cluster_id, epoch, raft_id));
        let internal = |e: &dyn std::fmt::Display| refuse(ErrorCode::Internal, e.to_string());
        if taken.await.map_err(|e| internal(&e))?.map_err(|e| internal(&e))? {
            crate::logging::note_epoch(epoch);
            return Ok(());
        }
        let detail = format!(
            "this node belongs to cluster {} already",
            self.control().get().cluster_id
        );
        Err(refuse(ErrorCode::AlreadyInitialised, detail))
    }

    async fn ask_to_join(&self, request: &JoinRequest, deadline: Instant) -> Result<JoinAccepted, CallError> {
        let Some((number, secret)) = parse_token(&request.token) else {
            return Err(refuse(
                ErrorCode::InvalidArgument,
                "the join token is malformed; copy it whole",
            ));
        };
        let options = &self.shared.options;
        let Some(tls) = &options.tls else {
            let detail =
                "cluster.listen: a standalone node cannot join; configure cluster.listen and cluster.tls";
            return Err(refuse(ErrorCode::InvalidArgument, detail));
        };
        if request.cluster_ca_sha256 != tls.ca_sha256 {
            let detail = format!(
                "cluster.tls.ca_path: its CA has SHA-256 {}, the token's cluster {}: install the cluster's CA here",
                hex::encode(tls.ca_sha256),
                hex::encode(request.cluster_ca_sha256)
            );
            return Err(refuse(ErrorCode::InvalidArgument, detail));
        }
        let mut addresses = request.addresses.clone();
        if addresses.is_empty() {
            let detail = "no address of a member was given";
            return Err(refuse(ErrorCode::InvalidArgument, detail));
        }
        loop {
            let (mut code, mut said, mut hopeless) = (ErrorCode::NoQuorum, Vec::new(), 0);
            for address in addresses.clone() {
                let details = JoinDetails {
                    number,
                    secret,
                    api_address: options.api_advertise.clone(),
                    cluster_address: options.advertise.clone(),
                    slots: request.slots.clone(),
                    trk_id: [0; 8],
                };
                match self.ask_one(&address, details).await {
                    Ok(Ok(accepted)) => return Ok(accepted),
                    Ok(Err(JoinDeclined::Refused(error))) => return Err(error),
                    Ok(Err(JoinDeclined::NotLeader(Some(leader)))) if !addresses.contains(&leader) => {
                        said.push(format!("{address} says that {leader} leads"));
                        addresses.insert(0, leader);
                        break;
                    }
                    Ok(Err(JoinDeclined::NotLeader(_))) => {
                        code = ErrorCode::NotLeader;
                        said.push(format!("{address} does not lead"));
                    }
                    Ok(Err(JoinDeclined::TryAgain(why))) => said.push(format!("{address}: {why}")),
                    Err(NoAnswer::Later(why)) => said.push(why),
                    Err(NoAnswer::Never(why)) => {
                        hopeless += 1;
                        said.push(why);
                    }
                }
            }
            if hopeless == addresses.len() {
                return Err(refuse(ErrorCode::InvalidArgument, said.join("; ")));
            }
            if clock::now() + PAUSE > deadline {
                return Err(refuse(code, said.join("; ")));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// One attempt at one address, on the consensus runtime.
    async fn ask_one(
        &self,
        address: &str,
        mut details: JoinDetails,
    ) -> Result<Result<JoinAccepted, JoinDeclined>, NoAnswer> {
        let shared = Arc::clone(&self.shared);
        let address = address.to_string();
        let asked = self.shared.runtime.spawn(async move {
            let mut connection = Connection::to_join(&shared.options, &address, &shared.joiners_hello())
                .await
                .map_err(|failure| NoAnswer::of(&failure))?;
            if connection.peer.cluster_id == ClusterId::default() {
                return Err(NoAnswer::Later(format!("{address} belongs to no cluster itself")));
            }
            let own = shared.control.get();
            // Nothing is sent that another cluster would act on: an identity is for good.
            if own.raft_id != 0 && own.cluster_id != connection.peer.cluster_id {
                return Err(NoAnswer::Never(format!(
                    "{address} belongs to cluster {}, this node to {} already; a node joins another cluster with an \
                     empty data directory",
                    connection.peer.cluster_id, own.cluster_id
                )));
            }
            details.trk_id = (shared.options.trk_id)(connection.peer.cluster_id);
            match connection.call(&Request::Join(Box::new(details)), ATTEMPT).await {
                Ok(Response::Join(answer)) => Ok(answer),
                Ok(_) => Err(NoAnswer::Later(format!("{address}: unexpected answer"))),
                Err(failure) => Err(NoAnswer::of(&failure)),
            }
        });
        asked.await.map_err(|error| NoAnswer::Later(error.to_string()))?
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_a_cut_one_does_not_parse() {
        let text = join_token_text(7, &[9; 32]);
        assert_eq!(parse_token(&format!(" {text}\n")), Some((7, [9; 32])));
        for bad in [
            "",
            "hsm-join-1.7",
            &text[..text.len() - 2],
            &format!("{text}.x"),
            &text.replace("join-1", "join-2"),
        ] {
            assert_eq!(parse_token(bad), None, "{bad}");
        }
    }

    fn failed(source: std::io::Error) -> NoAnswer {
        NoAnswer::of(&CallFailure::Io {
            address: "127.0.0.1:8443".into(),
            source,
        })
    }

    #[test]
    fn what_speaks_another_protocol_is_not_asked_again_and_is_told_from_a_member() {
        use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};
        for (error, said) in [
            (
                Error::AlertReceived(AlertDescription::NoApplicationProtocol),
                "127.0.0.1:8443 speaks TLS but not the cluster protocol; give the address of cluster.listen",
            ),
            (
                Error::InvalidCertificate(CertificateError::UnknownIssuer),
                "no cluster certificate of this cluster",
            ),
            (
                Error::InvalidCertificate(CertificateError::BadSignature),
                "install the cluster's CA here (cluster.tls.ca_path)",
            ),
            (
                Error::InvalidMessage(InvalidMessage::InvalidContentType),
                "does not speak TLS",
            ),
            (
                Error::AlertReceived(AlertDescription::UnknownCA),
                "cluster.tls.cert_path",
            ),
        ] {
            let wrapped = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            match failed(wrapped) {
                NoAnswer::Never(why) => assert!(why.contains(said), "{why}"),
                NoAnswer::Later(why) => panic!("asked again: {why}"),
            }
        }
    }

    #[test]
    fn whoever_cannot_be_reached_now_is_asked_again() {
        for kind in [
            std::io::ErrorKind::ConnectionRefused,
            std::io::ErrorKind::UnexpectedEof,
        ] {
            assert!(matches!(failed(kind.into()), NoAnswer::Later(_)), "{kind}");
        }
        let silent = CallFailure::TimedOut {
            address: "127.0.0.1:8443".into(),
        };
        assert!(matches!(NoAnswer::of(&silent), NoAnswer::Later(_)));
    }
}
