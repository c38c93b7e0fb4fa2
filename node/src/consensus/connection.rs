//! One outgoing connection to a peer: TLS, the greeting, then one request and one answer at a time. A
//! connection whose call was interrupted is dropped: its answer would be taken for the next one's.

use std::time::Duration;

use raft_store::names::RaftId;
use raft_store::storage::{Control, Published};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::handshake;
use super::start::ConsensusOptions;
use super::wire::{self, Hello, HelloReply, MAX_FRAME, MAX_HELLO, Request, Response, TurnedAway};

/// TCP, TLS and greeting together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a call to a peer failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallFailure {
    #[error("{address}: {source}")]
    Io {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{address}: no answer in time")]
    TimedOut { address: String },
    #[error("{address}: turned away: {reason}")]
    Away { address: String, reason: TurnedAway },
}

/// An open connection.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    address: String,
    pub(super) peer: Hello,
}

impl Connection {
    /// Connects to the member `target`.
    pub(super) async fn to_member(
        options: &ConsensusOptions,
        address: &str,
        target: RaftId,
        ours: &Control,
        published: &Published,
    ) -> Result<Self, CallFailure> {
        let (mut connection, certificate) = Self::open(options, address, ours).await?;
        let checked = handshake::check_dialled(target, &connection.peer)
            .and_then(|()| handshake::check_member(ours, published, &certificate, &connection.peer));
        if let Err(reason) = checked {
            // It has to know: a node that runs with a refused identity must stop, not keep trying.
            let _ = wire::send(&mut connection.stream, &Request::GoAway(reason.clone())).await;
            return Err(CallFailure::Away {
                address: address.into(),
                reason,
            });
        }
        Ok(connection)
    }

    /// Connects as a node that belongs to no cluster yet.
    pub(super) async fn to_join(
        options: &ConsensusOptions,
        address: &str,
        ours: &Control,
    ) -> Result<Self, CallFailure> {
        let (connection, certificate) = Self::open(options, address, ours).await?;
        handshake::check_name(&certificate, &connection.peer).map_err(|reason| CallFailure::Away {
            address: address.into(),
            reason,
        })?;
        Ok(connection)
    }

    async fn open(
        options: &ConsensusOptions,
        address: &str,
        ours: &Control,
    ) -> Result<(Self, String), CallFailure> {
        let io = |source| CallFailure::Io {
            address: address.to_string(),
            source,
        };
        let Some(tls) = &options.tls else {
            return Err(io(std::io::Error::other("a standalone node has no peers")));
        };
        let dial = async {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("hsm-node.invalid").map_err(std::io::Error::other)?;
            let mut stream = TlsConnector::from(std::sync::Arc::clone(&tls.client))
                .connect(name, tcp)
                .await?;
            wire::send(&mut stream, &handshake::hello(ours)).await?;
            let reply: HelloReply = wire::receive(&mut stream, MAX_HELLO).await?;
            Ok::<_, std::io::Error>((stream, reply))
        };
        let (stream, reply) = tokio::time::timeout(CONNECT_TIMEOUT, dial)
            .await
            .map_err(|_| CallFailure::TimedOut {
                address: address.to_string(),
            })?
            .map_err(io)?;
        let peer = match reply {
            HelloReply::Welcome(peer) => peer,
            HelloReply::Away(reason) => {
                return Err(CallFailure::Away {
                    address: address.into(),
                    reason,
                });
            }
        };
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first());
        let certificate = certificate
            .and_then(|cert| options.peer_name(cert))
            .unwrap_or_default();
        Ok((
            Self {
                stream,
                address: address.to_string(),
                peer,
            },
            certificate,
        ))
    }

    /// One request, one answer. On any failure the connection must be dropped.
    pub(super) async fn call(
        &mut self,
        request: &Request,
        within: Duration,
    ) -> Result<Response, CallFailure> {
        let exchange = async {
            wire::send(&mut self.stream, request).await?;
            wire::receive(&mut self.stream, MAX_FRAME).await
        };
        match tokio::time::timeout(within, exchange).await {
            Ok(answer) => answer.map_err(|source| CallFailure::Io {
                address: self.address.clone(),
                source,
            }),
            Err(_) => Err(CallFailure::TimedOut {
                address: self.address.clone(),
            }),
        }
    }
}
