//! One outgoing connection to a peer: TLS, the greeting, then one request and one answer at a time. A
//! connection whose call was interrupted is dropped: its answer would be taken for the next one's.

use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::handshake;
use super::link::Link;
use super::server::{end_and_key, now_seconds};
use super::start::ConsensusOptions;
use super::wire::{self, Hello, HelloReply, MAX_FRAME, MAX_HELLO, Request, Response, TurnedAway};

/// TCP, TLS and greeting together; then a refusal.
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
    Away {
        address: String,
        /// The node's name in its certificate.
        name: String,
        reason: TurnedAway,
    },
}

/// An open connection.
pub(super) struct Connection {
    stream: TlsStream<Link>,
    address: String,
    pub(super) peer: Hello,
    /// Seconds since the epoch at which the peer's certificate ends.
    not_after: i64,
}

impl CallFailure {
    /// The same once more, for another who waits: what the operating system says cannot be cloned.
    pub(super) fn again(&self) -> Self {
        match self {
            CallFailure::Io { address, source } => CallFailure::Io {
                address: address.clone(),
                source: std::io::Error::new(source.kind(), source.to_string()),
            },
            CallFailure::TimedOut { address } => CallFailure::TimedOut {
                address: address.clone(),
            },
            CallFailure::Away {
                address,
                name,
                reason,
            } => CallFailure::Away {
                address: address.clone(),
                name: name.clone(),
                reason: reason.clone(),
            },
        }
    }
}

impl Connection {
    /// Tells the peer that it is refused, which ends the connection. It has to know: a node that runs with
    /// a refused identity must stop, not keep trying. That it has to go is said only by whoever has applied
    /// its tombstone.
    pub(super) async fn turn_away(mut self, name: String, reason: TurnedAway) -> CallFailure {
        let word = match &reason {
            TurnedAway::Removed { .. } => Request::GoAway(reason.clone()),
            _ => Request::Refused(reason.clone()),
        };
        // A peer that reads nothing must not hold the dial, which others wait for.
        let _ = tokio::time::timeout(CONNECT_TIMEOUT, wire::send(&mut self.stream, &word)).await;
        CallFailure::Away {
            address: self.address,
            name,
            reason,
        }
    }

    /// Connects as a node that belongs to no cluster yet.
    pub(super) async fn to_join(
        options: &ConsensusOptions,
        address: &str,
        ours: &Hello,
    ) -> Result<Self, CallFailure> {
        let (connection, certificate) = Self::open(options, address, ours).await?;
        handshake::check_name(&certificate, &connection.peer).map_err(|reason| CallFailure::Away {
            address: address.into(),
            name: certificate,
            reason,
        })?;
        Ok(connection)
    }

    /// Connects and greets; the peer and the name in its certificate are still to be checked.
    pub(super) async fn open(
        options: &ConsensusOptions,
        address: &str,
        ours: &Hello,
    ) -> Result<(Self, String), CallFailure> {
        let io = |source| CallFailure::Io {
            address: address.to_string(),
            source,
        };
        let Some(tls) = &options.tls else {
            return Err(io(std::io::Error::other("a standalone node has no peers")));
        };
        let dial = async {
            let tcp = Link::connect(address).await?;
            tcp.set_nodelay()?;
            let name = ServerName::try_from("hsm-node.invalid").map_err(std::io::Error::other)?;
            let mut stream = TlsConnector::from(std::sync::Arc::clone(&tls.client))
                .connect(name, tcp)
                .await?;
            wire::send(&mut stream, ours).await?;
            let reply: HelloReply = wire::receive(&mut stream, MAX_HELLO).await?;
            Ok::<_, std::io::Error>((stream, reply))
        };
        let (stream, reply) = tokio::time::timeout(CONNECT_TIMEOUT, dial)
            .await
            .map_err(|_| CallFailure::TimedOut {
                address: address.to_string(),
            })?
            .map_err(io)?;
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first());
        let not_after = certificate.and_then(end_and_key).map_or(0, |(end, _)| end);
        let certificate = certificate
            .and_then(|cert| options.peer_name(cert))
            .unwrap_or_default();
        let peer = match reply {
            HelloReply::Welcome(peer) => peer,
            HelloReply::Away(reason) => {
                return Err(CallFailure::Away {
                    address: address.into(),
                    name: certificate,
                    reason,
                });
            }
        };
        Ok((
            Self {
                stream,
                address: address.to_string(),
                peer,
                not_after,
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
        // As on the other side: a connection ends with the certificate that it was made with.
        if now_seconds() > self.not_after {
            return Err(CallFailure::Io {
                address: self.address.clone(),
                source: std::io::Error::other("the peer's certificate has ended; connecting anew"),
            });
        }
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
