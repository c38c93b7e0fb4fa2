//! What comes before TLS: from balancers that are listed a PROXY header, from everybody else nothing. So nobody gives
//! himself an address, and no balancer's clients go by the balancer's without anybody noticing.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::proxy_protocol::{self, HEAD, Head, HeaderError, SIGNATURE, Source};

/// A balancer sends its header with the first segment; a lost one is sent again within this time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a connection is closed before TLS.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrefaceError {
    /// Ended, or failed.
    #[error("ended within its PROXY header: {0}")]
    Incomplete(#[from] io::Error),
    /// Nothing, or not all of it.
    #[error("sent no whole PROXY header within {} seconds", PATIENCE.as_secs())]
    TooSlow,
    /// Something else.
    #[error("{0}")]
    Header(#[from] HeaderError),
    /// From somebody who is not listed.
    #[error(
        "begins with a PROXY header, and its address is not listed in server.proxy_protocol_from: list it there, or \
         let the balancer send none"
    )]
    Unexpected,
}

impl PrefaceError {
    /// For the metric: one of [`PROXY_PROTOCOL_REFUSALS`](crate::metrics::PROXY_PROTOCOL_REFUSALS).
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Incomplete(_) => "incomplete",
            Self::TooSlow => "too_slow",
            Self::Header(HeaderError::Missing) => "missing",
            Self::Header(HeaderError::Version1) => "version_1",
            Self::Header(_) => "malformed",
            Self::Unexpected => "unexpected",
        }
    }
}

/// The address that a connection counts as coming from. Takes nothing from the stream but a header.
pub(super) async fn source(
    stream: &mut TcpStream,
    peer: SocketAddr,
    is_listed: bool,
) -> Result<SocketAddr, PrefaceError> {
    source_within(PATIENCE, stream, peer, is_listed).await
}

async fn source_within(
    patience: Duration,
    stream: &mut TcpStream,
    peer: SocketAddr,
    is_listed: bool,
) -> Result<SocketAddr, PrefaceError> {
    if !is_listed {
        // Looked at only: the bytes are TLS's, and so is an error.
        let mut first = [0; SIGNATURE.len()];
        let seen = stream.peek(&mut first).await.unwrap_or(0);
        return match first.get(..seen) {
            Some(bytes) if proxy_protocol::begins(bytes) => Err(PrefaceError::Unexpected),
            _ => Ok(peer),
        };
    }
    match timeout(patience, read(stream)).await {
        Ok(read) => Ok(match read? {
            Source::Client(address) => address,
            Source::Own => peer,
        }),
        Err(_) => Err(PrefaceError::TooSlow),
    }
}

async fn read(stream: &mut TcpStream) -> Result<Source, PrefaceError> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head).await?;
    let head = Head::parse(&head)?;
    let mut rest = vec![0; head.rest()];
    stream.read_exact(&mut rest).await?;
    Ok(head.source(&rest)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::super::proxy_protocol::tests::encode;
    use super::*;
    use crate::metrics::PROXY_PROTOCOL_REFUSALS;

    /// What becomes of a connection that begins with these bytes and then ends, and what is left for TLS.
    async fn begun(bytes: &[u8], is_listed: bool) -> (Result<Option<SocketAddr>, &'static str>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, peer) = listener.accept().await.unwrap();
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let source = source(&mut stream, peer, is_listed).await;
        let mut left = Vec::new();
        stream.read_to_end(&mut left).await.unwrap();
        let source = source.map(|address| (address != peer).then_some(address));
        (source.map_err(|error| error.label()), left)
    }

    #[tokio::test]
    async fn a_header_is_taken_off_and_nothing_behind_it() {
        let address = "192.0.2.7:5".parse().unwrap();
        let sent = [&encode(address, &[4, 0, 1, 0])[..], b"TLS"].concat();
        assert_eq!(begun(&sent, true).await, (Ok(Some(address)), b"TLS".to_vec()));
        // LOCAL.
        let own = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0TLS";
        assert_eq!(begun(own, true).await, (Ok(None), b"TLS".to_vec()));
    }

    #[tokio::test]
    async fn whoever_is_listed_has_to_send_one_and_nobody_else_may() {
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 0, 0, 0, 0, 0, 0];
        assert_eq!(begun(&hello, false).await, (Ok(None), hello.to_vec()));
        assert_eq!(begun(b"", false).await, (Ok(None), Vec::new()));
        let header = encode("192.0.2.7:5".parse().unwrap(), &[]);
        let text = b"PROXY TCP4 192.0.2.7 192.0.2.1 5 8443\r\n";
        for (bytes, is_listed, label) in [
            (&header[..], false, "unexpected"),
            (&text[..], false, "unexpected"),
            (&hello[..], true, "missing"),
            (&text[..], true, "version_1"),
            (&header[..20], true, "incomplete"),
            (&header[..0], true, "incomplete"),
            (&b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\0"[..], true, "malformed"),
        ] {
            let (source, _) = begun(bytes, is_listed).await;
            assert_eq!(source, Err(label), "{bytes:?}");
            assert!(PROXY_PROTOCOL_REFUSALS.contains(&label));
        }
        assert!(PROXY_PROTOCOL_REFUSALS.contains(&PrefaceError::TooSlow.label()));
    }

    #[tokio::test]
    async fn a_header_that_does_not_come_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, peer) = listener.accept().await.unwrap();
        client.write_all(&SIGNATURE).await.unwrap();
        let source = source_within(Duration::from_millis(20), &mut stream, peer, true).await;
        assert!(matches!(source, Err(PrefaceError::TooSlow)), "{source:?}");
    }
}
