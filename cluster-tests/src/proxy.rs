//! A proxy that ends TLS in front of one node, as operators run them: it shows the node each client's certificate
//! (`Client-Cert`, RFC 9440) and has one connection to it for all of its clients. Which certificates are any good it leaves
//! to the node; that its clients have their keys it finds out itself.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use hsm_api::Base64;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::client::{Identity, Pki};
use crate::http1::{Message, Wire, client_config};

/// A certificate as `Client-Cert` has it.
#[must_use]
pub fn client_cert(der: &[u8]) -> String {
    format!("Client-Cert: :{}:", Base64::from(der))
}

/// A running proxy. Stops when dropped.
pub struct Proxy {
    port: u16,
    opened: Arc<AtomicUsize>,
    listener: JoinHandle<()>,
}

impl Proxy {
    /// In front of the node at this port, which knows it as `who`.
    pub async fn start(pki: &Pki, who: &Identity, node_port: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let acceptor = TlsAcceptor::from(Arc::new(server_config(pki)?));
        let opened = Arc::new(AtomicUsize::new(0));
        let node = Arc::new(Backend {
            connector: TlsConnector::from(Arc::new(client_config(pki, who)?)),
            port: node_port,
            opened: Arc::clone(&opened),
            pooled: Mutex::new(None),
        });
        let listener = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, node) = (acceptor.clone(), Arc::clone(&node));
                tokio::spawn(async move {
                    // The client sees its connection end; why is the test's business.
                    let _ = serve(&acceptor, &node, stream).await;
                });
            }
        });
        Ok(Self {
            port,
            opened,
            listener,
        })
    }

    /// Where its clients connect.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many connections it has opened to its node so far.
    #[must_use]
    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// The way to the node: one connection, on which requests of all clients take turns.
struct Backend {
    connector: TlsConnector,
    port: u16,
    opened: Arc<AtomicUsize>,
    pooled: Mutex<Option<Wire<TlsStream<TcpStream>>>>,
}

impl Backend {
    async fn forward(&self, request: &Message) -> Result<Message> {
        let mut pooled = self.pooled.lock().await;
        let mut wire = match pooled.take() {
            Some(wire) => wire,
            None => self.connect().await?,
        };
        wire.send(request).await?;
        let answer = wire
            .receive()
            .await?
            .context("the node has closed the connection")?;
        if answer.header("connection") != Some("close") {
            *pooled = Some(wire);
        }
        Ok(answer)
    }

    async fn connect(&self) -> Result<Wire<TlsStream<TcpStream>>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("localhost")?;
        Ok(Wire::new(self.connector.connect(name, stream).await?))
    }
}

async fn serve(acceptor: &TlsAcceptor, node: &Backend, stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let shown = client_cert(chain.first().context("no certificate")?);
    let mut client = Wire::new(stream);
    while let Some(mut request) = client.receive().await? {
        // Only what it has seen itself.
        request.remove("client-cert");
        request.remove("client-cert-chain");
        request.lines.push(shown.clone());
        let answer = node.forward(&request).await?;
        client.send(&answer).await?;
    }
    Ok(())
}

/// With a node's certificate: its clients are the tests, which ask for `localhost`.
fn server_config(pki: &Pki) -> Result<ServerConfig> {
    let folder = pki.dir().join("nodes/hsm-node-1");
    let chain = CertificateDer::pem_file_iter(folder.join("server.crt"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyClient(provider)))
        .with_single_cert(chain, key)?)
}

/// Whoever has the key of the certificate that he shows.
struct AnyClient(Arc<CryptoProvider>);

impl fmt::Debug for AnyClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyClient")
    }
}

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
