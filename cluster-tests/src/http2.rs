//! HTTP/2 by hand (RFC 9113), on one TLS connection: for what no client library does, such as opening more streams than it
//! was told it may.

mod turns;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub use self::turns::Whole;
use crate::client::{Identity, Pki};
use crate::http1::client_config;

/// Whatever a node does with a connection it has done by then.
const PATIENCE: Duration = Duration::from_secs(30);
/// RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frame is no longer unless both sides have agreed (RFC 9113 section 4.2).
const MAX_PAYLOAD: usize = 16_384;

// RFC 9113 section 6: types of frames, flags, and the one setting that is looked at.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// `RST_STREAM`'s code for a stream that nothing was done for, so that it may be asked for again (RFC 9113 section 7).
pub const REFUSED_STREAM: u32 = 7;

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// What becomes of a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// An answer with this status; nothing if the table of RFC 7541 appendix A does not have it.
    Status(Option<u16>),
    /// `RST_STREAM`, with its code.
    Reset(u32),
}

/// One connection to a node's API.
pub struct Connection<S = TlsStream<TcpStream>> {
    stream: S,
    /// What was read and is no whole frame yet.
    read: Vec<u8>,
    max_streams: Option<u32>,
    /// The next of those that `ask` begins.
    next_stream: u32,
    /// The other side takes no further requests: it has sent GOAWAY.
    is_ending: bool,
}

impl Connection {
    /// Connects, and reads the settings that the node begins with.
    pub async fn open(pki: &Pki, port: u16, who: &Identity) -> Result<Self> {
        let mut config = client_config(pki, who)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let opened = async {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
            let name = ServerName::try_from("localhost")?;
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            ensure!(
                stream.get_ref().1.alpn_protocol() == Some(b"h2".as_slice()),
                "the node does not speak HTTP/2"
            );
            let mut connection = Self {
                stream,
                read: Vec::new(),
                max_streams: None,
                next_stream: 1,
                is_ending: false,
            };
            connection.stream.write_all(PREFACE).await?;
            connection.send(SETTINGS, 0, 0, &[]).await?;
            let first = connection.receive().await?;
            ensure!(
                first.kind == SETTINGS && first.flags & ACK == 0,
                "it begins with a frame of type {}",
                first.kind
            );
            connection.max_streams = max_streams(&first.payload);
            connection.send(SETTINGS, ACK, 0, &[]).await?;
            anyhow::Ok(connection)
        };
        timeout(PATIENCE, opened).await.context("no connection")?
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// How many streams the node says a client may have open; nothing if it does not say.
    #[must_use]
    pub fn max_streams(&self) -> Option<u32> {
        self.max_streams
    }

    /// Begins a POST of JSON on a stream of its own, whose body is to come. Streams of a client have odd numbers, each higher
    /// than those before.
    pub async fn begin(&mut self, stream: u32, path: &str) -> Result<()> {
        self.begin_with(stream, path, &[]).await
    }

    /// As [`Connection::begin`], with further names and values, which need not be such that HTTP/2 allows them.
    pub async fn begin_with(&mut self, stream: u32, path: &str, further: &[(&str, &str)]) -> Result<()> {
        // RFC 7541 appendix A: POST, https; then names of the table with values that are not kept.
        let mut block = vec![0x83, 0x87, 0x04];
        string(&mut block, path);
        block.push(0x01);
        string(&mut block, "localhost");
        block.extend_from_slice(&[0x0f, 0x10]);
        string(&mut block, "application/json");
        for (name, value) in further {
            block.push(0x00);
            string(&mut block, name);
            string(&mut block, value);
        }
        self.send(HEADERS, END_HEADERS, stream, &block).await
    }

    /// The whole body of a stream.
    pub async fn finish(&mut self, stream: u32, body: &[u8]) -> Result<()> {
        self.send(DATA, END_STREAM, stream, body).await
    }

    /// What becomes of a stream, once it is over. What comes of others meanwhile is passed over.
    pub async fn answer(&mut self, stream: u32) -> Result<Answer> {
        let answered = async {
            let mut said = None;
            loop {
                let frame = self.receive().await?;
                match frame.kind {
                    PING if frame.flags & ACK == 0 => self.send(PING, ACK, 0, &frame.payload).await?,
                    GOAWAY => bail!("GOAWAY: {:?}", frame.payload),
                    RST_STREAM if frame.stream == stream => {
                        let code = <[u8; 4]>::try_from(frame.payload.as_slice())?;
                        return anyhow::Ok(Answer::Reset(u32::from_be_bytes(code)));
                    }
                    HEADERS if frame.stream == stream && said.is_none() => {
                        said = Some(status(&frame.payload))
                    }
                    _ => {}
                }
                let ends = matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0;
                if ends && frame.stream == stream {
                    return anyhow::Ok(Answer::Status(said.context("DATA before HEADERS")?));
                }
            }
        };
        timeout(PATIENCE, answered)
            .await
            .with_context(|| format!("no end of stream {stream}"))?
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        ensure!(payload.len() <= MAX_PAYLOAD, "a frame of {} bytes", payload.len());
        let length = u32::try_from(payload.len())?.to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        self.stream.write_all(&frame).await?;
        Ok(self.stream.flush().await?)
    }

    async fn receive(&mut self) -> Result<Frame> {
        self.next().await?.context("the connection has ended")
    }

    /// The next frame; nothing at the connection's end. May be given up at any time.
    async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.whole()? {
                return Ok(Some(frame));
            }
            let mut piece = [0_u8; 4096];
            let length = self.stream.read(&mut piece).await?;
            if length == 0 {
                ensure!(self.read.is_empty(), "ended within a frame");
                return Ok(None);
            }
            self.read
                .extend_from_slice(piece.get(..length).unwrap_or_default());
        }
    }

    /// Taken off what was read.
    fn whole(&mut self) -> Result<Option<Frame>> {
        let Some((&[a, b, c, kind, flags, s, t, u, v], rest)) = self.read.split_first_chunk::<9>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c]))?;
        ensure!(length <= MAX_PAYLOAD, "a frame of {length} bytes");
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame {
            kind,
            flags,
            // The highest bit is reserved.
            stream: u32::from_be_bytes([s, t, u, v]) & (u32::MAX >> 1),
            payload: payload.to_vec(),
        };
        self.read.drain(..9 + length);
        Ok(Some(frame))
    }
}

/// RFC 9113 section 6.5.1: two bytes of a setting's number, four of its value.
fn max_streams(settings: &[u8]) -> Option<u32> {
    settings.chunks_exact(6).find_map(|entry| match *entry {
        [a, b, v, w, x, y] if u16::from_be_bytes([a, b]) == MAX_CONCURRENT_STREAMS => {
            Some(u32::from_be_bytes([v, w, x, y]))
        }
        _ => None,
    })
}

/// RFC 7541 section 5.2, without Huffman's code; the length is an integer of section 5.1 with a prefix of 7 bits.
fn string(block: &mut Vec<u8>, text: &str) {
    let length = text.len();
    if length < 127 {
        block.push(length.to_le_bytes()[0]);
    } else {
        block.push(127);
        let mut rest = length - 127;
        while rest >= 128 {
            block.push(rest.to_le_bytes()[0] | 0x80);
            rest /= 128;
        }
        block.push(rest.to_le_bytes()[0]);
    }
    block.extend_from_slice(text.as_bytes());
}

/// RFC 7541 appendix A: the statuses that are one byte, with which an answer begins.
fn status(mut block: &[u8]) -> Option<u16> {
    // New sizes of the table may stand before it, the smallest and the last (sections 4.2 and 6.3).
    while let [0x20..=0x3e, rest @ ..] = block {
        block = rest;
    }
    match block.first()? {
        0x88 => Some(200),
        0x89 => Some(204),
        0x8a => Some(206),
        0x8b => Some(304),
        0x8c => Some(400),
        0x8d => Some(404),
        0x8e => Some(500),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    /// RFC 7541 appendix C.1: 10 fits into its prefix, 1337 does not; there it is one of 5 bits.
    #[test]
    fn lengths_are_integers_with_a_prefix() {
        for (length, head) in [
            (10, &[10][..]),
            (126, &[126]),
            (127, &[127, 0]),
            (254, &[127, 127]),
            (255, &[127, 0x80, 1]),
            (1337, &[127, 0xba, 9]),
        ] {
            let mut block = Vec::new();
            string(&mut block, &"x".repeat(length));
            assert_eq!(&block[..head.len()], head, "{length}");
            assert_eq!(block.len(), head.len() + length);
        }
    }

    #[test]
    fn a_status_may_follow_new_sizes_of_the_table() {
        assert_eq!(status(&[0x88]), Some(200));
        assert_eq!(status(&[0x20, 0x8c]), Some(400));
        assert_eq!(status(&[0x20, 0x3e, 0x88]), Some(200));
        assert_eq!(status(&[0x08, 0x03, b'4', b'0', b'3']), None);
        assert_eq!(status(&[]), None);
    }
}
