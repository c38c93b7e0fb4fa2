//! The cluster listener: greets peers, checks them, and hands their requests to Raft, to the leader's
//! services, or to the join procedure. A node without identity answers joins only, by having nobody to
//! greet as a member.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use raft_store::command::Op;
use raft_store::state::node::NodeStatus;
use raft_store::storage::SnapshotReceiver;
use raft_store::{Snapshot, SnapshotMeta, Vote};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::greetings::{Greeting, Greetings};
use super::handshake;
use super::link::{Link, Listener};
use super::shared::Shared;
use super::wire::{
    self, AppendFrame, FrameSaid, Hello, HelloReply, MAX_FRAME, MAX_HELLO, Request, Response, TurnedAway,
};
use crate::clock;

/// Connections of greeted peers at a time; a cluster of seven needs fewer than a hundred.
const MAX_CONNECTIONS: usize = 160;
/// Connections that are not greeted yet, beside those: whoever has no certificate gets no further. Together they
/// are the 256 descriptors that are kept for peers.
const MAX_GREETINGS: usize = 96;
/// What each of these gets in any case, when others wait: some round trips of any network that Raft works over
/// (decision 003), and short enough for a full queue of the kernel's to be through well within a dial's 2 s.
const LEAST_GREETING: Duration = Duration::from_millis(200);
/// Connections that the kernel keeps for the listener; a further one is tried again by its sender a second later.
pub(super) const BACKLOG: u32 = 128;
/// TLS and greeting, and a place among those who were greeted.
const GREETING: Duration = Duration::from_secs(3);
/// A peer that says nothing for this long has gone.
const IDLE: Duration = Duration::from_secs(120);

/// Accepts peers until the runtime ends.
pub(super) async fn serve(shared: Arc<Shared>, tls: Arc<ServerConfig>, listener: Listener) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // A network that is slow enough to need another heartbeat needs more time here too.
    let least = LEAST_GREETING.max(shared.options.timing.heartbeat);
    let greetings = Greetings::new(MAX_GREETINGS, least);
    loop {
        let Some(room) = greetings.room().await else {
            return;
        };
        let tcp = match listener.accept().await {
            Ok(tcp) => tcp,
            Err(error) => {
                tracing::warn!(%error, "cluster listener: accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let greeting = greetings.begin(room);
        let (shared, acceptor, places) = (Arc::clone(&shared), acceptor.clone(), Arc::clone(&places));
        tokio::spawn(async move {
            if let Err(error) = connection(&shared, acceptor, tcp, greeting, places).await {
                tracing::debug!(%error, "cluster connection ended");
            }
        });
    }
}

/// A greeted peer.
struct Peer {
    hello: Hello,
    /// Whether it passed as a member; otherwise it may only join.
    member: bool,
    /// Seconds since the epoch at which its certificate ends.
    not_after: i64,
    /// SubjectPublicKeyInfo (DER) of its certificate.
    spki: Vec<u8>,
}

/// A snapshot that is being received on a connection.
struct Receiving {
    vote: Vote,
    meta: SnapshotMeta,
    file: SnapshotReceiver,
}

async fn connection(
    shared: &Arc<Shared>,
    acceptor: TlsAcceptor,
    tcp: Link,
    mut greeting: Greeting,
    places: Arc<Semaphore>,
) -> std::io::Result<()> {
    tcp.set_nodelay()?;
    let greeted = async {
        let Some((stream, peer)) = greet(shared, acceptor, tcp).await? else {
            return Ok(None);
        };
        let place = places.acquire_owned().await.map_err(std::io::Error::other)?;
        Ok::<_, std::io::Error>(Some((stream, peer, place)))
    };
    let greeted = tokio::select! {
        biased;
        greeted = tokio::time::timeout(GREETING, greeted) => greeted,
        () = greeting.ended() => return Ok(()),
    };
    let Some((mut stream, peer, _place)) = greeted.map_err(|_| std::io::ErrorKind::TimedOut)?? else {
        return Ok(());
    };
    drop(greeting);
    let mut receiving = None;
    loop {
        // A connection ends with its certificate, whether it is used or not.
        let left = u64::try_from(peer.not_after.saturating_sub(now_seconds()) + 1).unwrap_or(0);
        let patience = IDLE.min(Duration::from_secs(left));
        let request = tokio::time::timeout(patience, wire::receive(&mut stream, MAX_FRAME));
        let request: Request = request.await.map_err(|_| std::io::ErrorKind::TimedOut)??;
        if now_seconds() > peer.not_after {
            return Ok(());
        }
        let Some(answer) = handle(shared, &peer, request, &mut receiving).await else {
            return Ok(());
        };
        wire::send(&mut stream, &answer).await?;
    }
}

async fn greet(
    shared: &Arc<Shared>,
    acceptor: TlsAcceptor,
    tcp: Link,
) -> std::io::Result<Option<(TlsStream<Link>, Peer)>> {
    let mut stream = acceptor.accept(tcp).await?;
    let hello: Hello = wire::receive(&mut stream, MAX_HELLO).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .cloned();
    let Some(certificate) = certificate else {
        return Ok(None);
    };
    let name = shared.options.peer_name(&certificate).unwrap_or_default();
    // A node without a cluster may ask to join; everyone else has to be a member.
    let joining = hello.raft_id == 0;
    let checked = if joining {
        handshake::check_name(&name, &hello)
    } else {
        shared.admit(&name, &hello).await
    };
    if let Err(reason) = checked {
        shared.refuse(&name, hello.raft_id, "greeting", &reason);
        wire::send(&mut stream, &HelloReply::Away(reason)).await?;
        return Ok(None);
    }
    wire::send(&mut stream, &HelloReply::Welcome(shared.hello())).await?;
    let Some((not_after, spki)) = end_and_key(&certificate) else {
        return Ok(None);
    };
    Ok(Some((
        stream,
        Peer {
            hello,
            member: !joining,
            not_after,
            spki,
        },
    )))
}

/// When a certificate ends, in seconds since the epoch, and its public key.
pub(super) fn end_and_key(certificate: &CertificateDer<'_>) -> Option<(i64, Vec<u8>)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some((
        certificate.validity().not_after.timestamp(),
        certificate.public_key().raw.to_vec(),
    ))
}

/// Whether a chain begins with a certificate for this public key.
fn signed_with(chain: &[Vec<u8>], spki: &[u8]) -> bool {
    let leaf = chain.first().map(|leaf| CertificateDer::from(leaf.as_slice()));
    leaf.and_then(|leaf| end_and_key(&leaf))
        .is_some_and(|(_, signer)| signer == spki)
}

pub(super) fn now_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// Answers one request; `None` ends the connection.
async fn handle(
    shared: &Arc<Shared>,
    peer: &Peer,
    request: Request,
    receiving: &mut Option<Receiving>,
) -> Option<Response> {
    let asked = request.name();
    let refuse = |why: &str| shared.refuse(&peer.hello.name, peer.hello.raft_id, asked, why);
    if !peer.member {
        return match request {
            Request::Join(details) => Some(Response::Join(shared.accept_join(&peer.hello, *details).await)),
            _ => {
                refuse("it belongs to no cluster: it may only ask to join");
                None
            }
        };
    }
    // Membership may have changed since the greeting.
    if let Err(reason) = still_member(shared, peer) {
        refuse(&reason.to_string());
        return None;
    }
    if let Err(why) = may_ask(shared, &peer.hello, &request).await {
        refuse(&why);
        return None;
    }
    Some(match request {
        Request::Append(frame) => append(shared, frame).await,
        Request::Vote(rpc) => match shared.raft.get() {
            Some(running) => match running.raft.vote(rpc).await {
                Ok(answer) => Response::Vote(answer),
                Err(error) => Response::Failed(error.to_string()),
            },
            None => Response::Failed("raft is not running".into()),
        },
        Request::SnapshotBegin { .. } | Request::SnapshotChunk(_) | Request::SnapshotEnd => {
            snapshot(shared, request, receiving).await
        }
        Request::Admin(call) => {
            // Only the node the client spoke to may say who it was, and a call travels once.
            let (via_node, hop) = (call.origin.via_node, call.hop);
            if via_node != peer.hello.raft_id || hop != 1 {
                refuse(&format!(
                    "the caller spoke to raft id {via_node}, {hop} hops away"
                ));
                return None;
            }
            Response::Admin(shared.execute_here(*call).await.map(Into::into))
        }
        Request::Own { nonce, op } => {
            // Whoever grants trusts the signature, so the key that signed has to be the one that is here.
            if let Op::RegisterSlotKey(register) = &*op
                && !signed_with(&register.key.signer_chain, &peer.spki)
            {
                refuse("the slot key is signed with another key than its certificate's");
                return None;
            }
            let proposed = shared.propose_for_member(peer.hello.raft_id, nonce, *op).await;
            Response::Own(proposed.map_err(Into::into))
        }
        Request::Stand => shared.stand(peer.hello.raft_id).await,
        Request::Vouch(id) => Response::Vouch(shared.vouch(id)),
        Request::ReadIndex => Response::ReadIndex(shared.read_index_here().await.map_err(Into::into)),
        Request::GoAway(reason) | Request::Refused(reason) => {
            let (id, name) = (peer.hello.raft_id, peer.hello.name.as_str());
            shared.note_accusation(name, id, &reason, "a peer refuses this node's identity");
            if shared.accused(id, name, &reason) {
                shared.ask_others_than(id);
            }
            return None;
        }
        Request::Join(_) => return None,
    })
}

/// Whether a peer may ask for this. Raft's own messages speak for their sender only, and see
/// [`Shared::may_speak_raft`]. What a node asks for itself, and what a learner is sent anyway, needs one that this
/// node's state has as registered; whatever acts in somebody's name, or could end this node, a member.
async fn may_ask(shared: &Arc<Shared>, peer: &Hello, request: &Request) -> Result<(), String> {
    if let Some(id) = request.vote().and_then(|vote| vote.leader_id.voted_for())
        && id != peer.raft_id
    {
        return Err(format!("the message speaks for raft id {id}"));
    }
    let status = standing(shared, peer);
    let enough = match request {
        Request::Append(_)
        | Request::Vote(_)
        | Request::SnapshotBegin { .. }
        | Request::SnapshotChunk(_)
        | Request::SnapshotEnd => shared.may_speak_raft(peer).await,
        Request::Own { .. } | Request::ReadIndex | Request::Vouch(_) => status.is_some(),
        Request::Admin(_) | Request::Stand | Request::GoAway(_) | Request::Refused(_) => {
            matches!(status, Some(NodeStatus::Member | NodeStatus::Leaving { .. }))
        }
        Request::Join(_) => return Err("it belongs to the cluster already".to_owned()),
    };
    match (enough, status) {
        (true, _) => request.vote().map_or(Ok(()), |vote| shared.check_term(vote)),
        (false, None) => Err("this node's state does not have it".to_owned()),
        (false, Some(_)) => Err("it is no member yet".to_owned()),
    }
}

/// What the state says of a peer under this name and incarnation, unless it was removed.
fn standing(shared: &Shared, hello: &Hello) -> Option<NodeStatus> {
    let published = shared.published.load();
    let node = published.state.nodes().get(&hello.raft_id)?;
    let same = node.name.as_str() == hello.name && node.incarnation == hello.incarnation;
    let stays = same && !matches!(node.status, NodeStatus::Removed { .. });
    stays.then(|| node.status.clone())
}

fn still_member(shared: &Shared, peer: &Peer) -> Result<(), TurnedAway> {
    let published = shared.published.load();
    let applied = published.applied.map_or(0, |id| id.index);
    match published.state.nodes().get(&peer.hello.raft_id) {
        Some(node) if matches!(node.status, NodeStatus::Removed { .. }) => {
            Err(TurnedAway::Unknown(peer.hello.raft_id))
        }
        // Its registration should be here by now.
        None if applied >= peer.hello.raft_id && published.state.meta().is_some() => {
            Err(TurnedAway::Unknown(peer.hello.raft_id))
        }
        _ => Ok(()),
    }
}

async fn append(shared: &Arc<Shared>, frame: AppendFrame) -> Response {
    let received = clock::now();
    let Some(running) = shared.raft.get() else {
        return Response::Failed("raft is not running".into());
    };
    let said = FrameSaid {
        quorum_ack_age: frame.quorum_ack_age_ms.map(Duration::from_millis),
        silent: frame.silent,
        commit: frame.rpc.leader_commit.map_or(0, |id| id.index),
    };
    match running.raft.append_entries(frame.rpc).await {
        Ok(answer) => {
            use openraft::raft::AppendEntriesResponse::{PartialSuccess, Success};
            // A frame of a deposed leader, or one that does not continue this log, says nothing about how
            // much of what is committed is here.
            if matches!(answer, Success | PartialSuccess(_)) {
                shared.note_frame(received, &said);
            }
            Response::Append(answer)
        }
        Err(error) => Response::Failed(error.to_string()),
    }
}

async fn snapshot(shared: &Arc<Shared>, request: Request, receiving: &mut Option<Receiving>) -> Response {
    let failed = |what: &str| Response::Failed(what.to_string());
    match request {
        Request::SnapshotBegin { vote, meta } => {
            match SnapshotReceiver::create(&shared.control.snapshot_dir(), &meta) {
                Ok(file) => {
                    *receiving = Some(Receiving { vote, meta, file });
                    Response::More
                }
                Err(error) => failed(&error.to_string()),
            }
        }
        Request::SnapshotChunk(bytes) => match receiving {
            Some(snapshot) => snapshot
                .file
                .push(&bytes)
                .map_or_else(|e| failed(&e.to_string()), |()| Response::More),
            None => failed("no snapshot was begun"),
        },
        _ => {
            let (Some(Receiving { vote, meta, file }), Some(running)) = (receiving.take(), shared.raft.get())
            else {
                return failed("no snapshot was begun");
            };
            // Durable under its final name before openraft hears of it: it purges the log right away.
            let finished = tokio::task::spawn_blocking(move || file.finish()).await;
            let file = match finished {
                Ok(Ok(file)) => file,
                Ok(Err(error)) => return failed(&error.to_string()),
                Err(error) => return failed(&error.to_string()),
            };
            match running
                .raft
                .install_full_snapshot(
                    vote,
                    Snapshot {
                        meta,
                        snapshot: Box::new(file),
                    },
                )
                .await
            {
                Ok(answer) => Response::Snapshot(answer),
                Err(error) => failed(&error.to_string()),
            }
        }
    }
}
