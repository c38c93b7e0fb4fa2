//! Connections that clients keep open: what is asked on them, and how they end. And that none begins without a full
//! handshake.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use cluster_tests::{Identity, Node, Playground};
use hsm_api::paths;
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::access::{IN_FORCE, SETTLED};
use crate::common::CONTEXT;

/// One connection that is kept open, asked in plain HTTP/1.1: a client of the API would open another one.
pub(crate) struct Open(TlsStream<TcpStream>);

impl Open {
    async fn connect(cluster: &Playground, node: &Node, who: &Identity) -> Result<Self> {
        Self::connect_with(Self::config(cluster, who)?, node).await
    }

    /// What keeps sessions that can be resumed, as clients do.
    fn config(cluster: &Playground, who: &Identity) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        let ca = std::fs::read(cluster.pki().dir().join("ca.crt"))?;
        roots.add(CertificateDer::from_pem_slice(&ca)?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from(who.der()?)],
                PrivateKeyDer::from_pem_slice(who.key.as_bytes())?,
            )?;
        Ok(Arc::new(config))
    }

    async fn connect_with(config: Arc<ClientConfig>, node: &Node) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", node.api_port)).await?;
        let name = ServerName::try_from("localhost")?;
        Ok(Self(TlsConnector::from(config).connect(name, stream).await?))
    }

    /// The status of one encryption; nothing if the connection has ended.
    pub(crate) async fn encrypt(&mut self) -> Option<u16> {
        let body = format!(r#"{{"context":"{CONTEXT}","plaintext":"aGVsbG8="}}"#);
        let request = format!(
            "POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            paths::ENCRYPT,
            body.len()
        );
        self.0.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        let mut piece = [0_u8; 4096];
        loop {
            let read = timeout(SETTLED, self.0.read(&mut piece)).await;
            let length = read.ok()?.ok().filter(|length| *length > 0)?;
            answer.extend_from_slice(&piece[..length]);
            if let Some(status) = whole(&answer) {
                return Some(status);
            }
        }
    }

    /// Until it is refused or closed.
    pub(crate) async fn until_refused(mut self) {
        while let Some(status) = self.encrypt().await {
            if status == 403 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Until an encryption is answered with this status; nothing if the connection has ended before.
    pub(crate) async fn until_answered(mut self, status: u16) -> Option<Self> {
        while self.encrypt().await? != status {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Some(self)
    }

    /// Until the node has closed it, without being asked anything.
    pub(crate) async fn until_closed(mut self) -> Result<()> {
        let mut byte = [0_u8; 1];
        match timeout(SETTLED, self.0.read(&mut byte)).await {
            Err(_) => bail!("the connection is still open"),
            Ok(Ok(1..)) => bail!("something was sent"),
            Ok(_) => Ok(()),
        }
    }
}

/// The status of an answer that has arrived whole.
fn whole(answer: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))?;
    let length: usize = length.trim().parse().ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    (body.len() >= length).then_some(status)
}

/// How long changes took until they were in force, without the time in which the machine stood still.
pub(crate) fn are_in_force(mut took: Vec<Duration>) -> Result<()> {
    took.sort();
    println!("in force everywhere after the answer: {took:?}");
    ensure!(took.iter().all(|took| *took < IN_FORCE), "{took:?}");
    Ok(())
}

/// An open connection to every node, each of which has been answered.
pub(crate) async fn open_everywhere(cluster: &Playground, who: &Identity) -> Result<Vec<Open>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        let mut open = Open::connect(cluster, &node, who).await?;
        ensure!(
            open.encrypt().await == Some(200),
            "{} does not encrypt",
            node.id()
        );
        all.push(open);
    }
    Ok(all)
}

/// A resumed session would go by a certificate that was looked at before: no node gives a ticket for one, and who comes
/// again shows his certificate again.
pub(crate) async fn no_handshake_is_spared(cluster: &Playground) -> Result<()> {
    let who = cluster.pki().identity("trading-1")?;
    for node in cluster.nodes() {
        let config = Open::config(cluster, &who)?;
        for attempt in 1..=2 {
            let mut open = Open::connect_with(Arc::clone(&config), &node).await?;
            // What a server has to say after the handshake has come with the answer.
            ensure!(
                open.encrypt().await == Some(200),
                "{} does not encrypt",
                node.id()
            );
            let (_, session) = open.0.get_ref();
            let (tickets, kind) = (session.tls13_tickets_received(), session.handshake_kind());
            let full = matches!(
                kind,
                Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)
            );
            ensure!(
                tickets == 0 && full,
                "{}, connection {attempt}: {tickets} tickets, {kind:?}",
                node.id()
            );
        }
    }
    Ok(())
}
