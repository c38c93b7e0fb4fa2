//! HTTP/1.1 by hand, on one TLS connection that stays open: for what no client of the API would send, and for several
//! requests that have to be on one connection.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::{Identity, Pki};

/// Whatever a node does with a connection it has done by then.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than any message of a test.
const MAX_MESSAGE: usize = 1 << 20;

/// A request or an answer.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its first line.
    pub start: String,
    /// Its header lines.
    pub lines: Vec<String>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Message {
    /// Of an answer.
    pub fn status(&self) -> Result<u16> {
        let status = self.start.split(' ').nth(1).context("no status")?;
        Ok(status.parse()?)
    }

    /// Of an answer, if it is a problem.
    #[must_use]
    pub fn code(&self) -> Option<String> {
        Some(self.json().ok()?["code"].as_str()?.to_owned())
    }

    /// The body.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| self.start.clone())
    }

    /// The first value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.lines.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// Without a header.
    pub fn remove(&mut self, name: &str) {
        self.lines.retain(|line| {
            let key = line.split_once(':').map_or("", |(key, _)| key);
            !key.eq_ignore_ascii_case(name)
        });
    }

    /// As it is sent.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut head = format!("{}\r\n", self.start);
        for line in &self.lines {
            head.push_str(line);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Messages one after the other.
pub(crate) struct Wire<S> {
    stream: S,
    read: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            read: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, message: &Message) -> Result<()> {
        self.stream.write_all(&message.bytes()).await?;
        Ok(self.stream.flush().await?)
    }

    /// The next message; nothing at the connection's end.
    pub(crate) async fn receive(&mut self) -> Result<Option<Message>> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            let mut piece = [0_u8; 4096];
            let length = self.stream.read(&mut piece).await?;
            if length == 0 {
                ensure!(self.read.is_empty(), "ended within a message");
                return Ok(None);
            }
            self.read
                .extend_from_slice(piece.get(..length).unwrap_or_default());
            ensure!(self.read.len() <= MAX_MESSAGE, "too long for a test");
        }
    }

    /// Taken off what was read.
    fn whole(&mut self) -> Result<Option<Message>> {
        let Some(end) = self.read.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
            return Ok(None);
        };
        let head = std::str::from_utf8(self.read.get(..end).unwrap_or_default())?;
        let mut lines = head.lines().map(str::to_owned);
        let mut message = Message {
            start: lines.next().unwrap_or_default(),
            lines: lines.collect(),
            body: Vec::new(),
        };
        let length = match message.header("content-length") {
            Some(length) => length.parse()?,
            None => 0,
        };
        let body = end + 4;
        if self.read.len() < body + length {
            return Ok(None);
        }
        let rest = self.read.split_off(body + length);
        message.body = self.read.split_off(body);
        self.read = rest;
        Ok(Some(message))
    }
}

/// One connection to whoever has a server certificate of the playground.
pub struct Connection(Wire<TlsStream<TcpStream>>);

impl Connection {
    /// From 127.0.0.1.
    pub async fn open(pki: &Pki, port: u16, who: &Identity) -> Result<Self> {
        Self::open_from(pki, port, who, Ipv4Addr::LOCALHOST, &[]).await
    }

    /// From another address of this machine, and with something in front of TLS.
    pub async fn open_from(
        pki: &Pki,
        port: u16,
        who: &Identity,
        from: Ipv4Addr,
        preface: &[u8],
    ) -> Result<Self> {
        Self::dial(Arc::new(client_config(pki, who)?), port, from, preface).await
    }

    async fn dial(config: Arc<ClientConfig>, port: u16, from: Ipv4Addr, preface: &[u8]) -> Result<Self> {
        let opened = async {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::from((from, 0)))?;
            let mut stream = socket
                .connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                .await?;
            stream.set_nodelay(true)?;
            stream.write_all(preface).await?;
            let name = ServerName::try_from("localhost")?;
            anyhow::Ok(TlsConnector::from(config).connect(name, stream).await?)
        };
        let stream = timeout(PATIENCE, opened).await.context("no handshake")??;
        Ok(Self(Wire::new(stream)))
    }

    /// Whether a second connection goes by what the first one has proved (RFC 8446 section 2.2).
    pub async fn is_resumed(pki: &Pki, port: u16, who: &Identity) -> Result<bool> {
        let config = Arc::new(client_config(pki, who)?);
        let mut kind = None;
        for _ in 0..2 {
            let mut connection = Self::dial(Arc::clone(&config), port, Ipv4Addr::LOCALHOST, &[]).await?;
            kind = connection.0.stream.get_ref().1.handshake_kind();
            // A ticket comes before the first answer, if one comes.
            connection.ask("GET", "/nothing", &[], &Value::Null).await?;
        }
        Ok(kind == Some(HandshakeKind::Resumed))
    }

    /// Sends one request and waits for its answer.
    pub async fn ask(&mut self, method: &str, path: &str, lines: &[String], body: &Value) -> Result<Message> {
        let body = match method {
            "GET" => Vec::new(),
            _ => body.to_string().into_bytes(),
        };
        let mut all = vec![
            "host: localhost".to_owned(),
            "content-type: application/json".to_owned(),
            format!("content-length: {}", body.len()),
        ];
        all.extend_from_slice(lines);
        let request = Message {
            start: format!("{method} {path} HTTP/1.1"),
            lines: all,
            body,
        };
        let answered = async {
            self.0.send(&request).await?;
            self.0.receive().await
        };
        let answer = timeout(PATIENCE, answered).await.context("no answer")??;
        answer.context("closed without an answer")
    }

    /// Sends what need not be HTTP; gives all that comes back until the other side closes.
    pub async fn converse(self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut stream = self.0.stream;
        let conversed = async {
            let mut answers = Vec::new();
            let mut piece = [0_u8; 4096];
            // Who has closed before all is sent has said why, and an end without a word is an end too.
            let _ = stream.write_all(bytes).await;
            let _ = stream.flush().await;
            while let Ok(length @ 1..) = stream.read(&mut piece).await {
                answers.extend_from_slice(piece.get(..length).unwrap_or_default());
                ensure!(answers.len() <= MAX_MESSAGE, "too long for a test");
            }
            anyhow::Ok(answers)
        };
        timeout(PATIENCE, conversed)
            .await
            .context("the connection is still open")?
    }

    /// Lets time pass in which nothing is asked: true if the connection is open after it, false as soon as the other side has
    /// closed it, and has said so (RFC 8446 section 6.1). Anything else that happens to it is an error.
    pub async fn rest(&mut self, time: Duration) -> Result<bool> {
        match timeout(time, self.0.receive()).await {
            Err(_) => Ok(true),
            Ok(Ok(None)) => Ok(false),
            Ok(Ok(Some(message))) => bail!("it said {message:?} without being asked"),
            Ok(Err(error)) => Err(error.context("while nothing was asked")),
        }
    }

    /// Until the other side has closed it, without being asked anything.
    pub async fn until_closed(mut self) -> Result<()> {
        match timeout(PATIENCE, self.0.receive()).await {
            Err(_) => bail!("the connection is still open"),
            Ok(Ok(Some(message))) => bail!("it said {message:?}"),
            Ok(_) => Ok(()),
        }
    }
}

pub(crate) fn client_config(pki: &Pki, who: &Identity) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.dir().join("ca.crt"))?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from(who.der()?)],
            PrivateKeyDer::from_pem_slice(who.key.as_bytes())?,
        )?)
}
