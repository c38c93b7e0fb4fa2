//! Relays between the nodes' cluster listeners, one link for each pair of nodes, so that a test can cut any of
//! them. A cut link is silent: nothing arrives, and nobody is told.
//!
//! All nodes reach one node at one address, so a relay has to find out who is calling. It ends the TLS of both
//! sides with the nodes' own certificates, which the playground holds: to each node the other end is who it
//! says it is.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::{Acceptor, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Both handshakes of a connection.
const HANDSHAKES: Duration = Duration::from_secs(5);

/// Two nodes, the lower number first.
type Link = (u32, u32);
type Cuts = BTreeSet<Link>;

fn link(a: u32, b: u32) -> Link {
    (a.min(b), a.max(b))
}

/// One node's place behind its relay.
pub(crate) struct Place {
    pub(crate) number: u32,
    /// Where the relay listens: what peers are told.
    pub(crate) relay_port: u16,
    /// The node's own listener.
    pub(crate) cluster_port: u16,
}

/// All relays of a playground. They stop when dropped.
pub struct Relays {
    nodes: Vec<u32>,
    cuts: watch::Sender<Cuts>,
    listeners: Vec<JoinHandle<()>>,
}

impl Relays {
    /// Listens for every node. The certificates are read when somebody connects: they need not be there yet.
    pub(crate) async fn start(pki: &Path, places: Vec<Place>) -> Result<Self> {
        let (cuts, _) = watch::channel(Cuts::new());
        let mut listeners = Vec::with_capacity(places.len());
        let nodes = places.iter().map(|place| place.number).collect();
        for place in places {
            let listener = TcpListener::bind(("127.0.0.1", place.relay_port))
                .await
                .with_context(|| format!("relay port {}", place.relay_port))?;
            let wire = Arc::new(Wire {
                pki: pki.to_owned(),
                to: place.number,
                cluster_port: place.cluster_port,
            });
            let cuts = cuts.clone();
            listeners.push(tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (wire, cuts) = (Arc::clone(&wire), cuts.subscribe());
                    tokio::spawn(async move {
                        // Nodes connect again; what a connection died of is in their logs.
                        let _ = wire.carry(stream, cuts).await;
                    });
                }
            }));
        }
        Ok(Self {
            nodes,
            cuts,
            listeners,
        })
    }

    /// Silences the link between two nodes, in both directions.
    pub fn cut(&self, a: u32, b: u32) {
        self.cuts.send_modify(|cuts| {
            cuts.insert(link(a, b));
        });
    }

    /// Cuts every link of one node.
    pub fn isolate(&self, node: u32) {
        self.separate(&[node]);
    }

    /// Cuts every link between these nodes and all others.
    pub fn separate(&self, group: &[u32]) {
        self.cuts.send_modify(|cuts| {
            for &inside in group {
                let outside = self.nodes.iter().filter(|node| !group.contains(node));
                cuts.extend(outside.map(|&outside| link(inside, outside)));
            }
        });
    }

    /// Mends every link.
    pub fn heal(&self) {
        self.cuts.send_modify(Cuts::clear);
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// The way to one node.
struct Wire {
    pki: PathBuf,
    to: u32,
    cluster_port: u16,
}

impl Wire {
    async fn carry(&self, stream: TcpStream, mut cuts: watch::Receiver<Cuts>) -> Result<()> {
        stream.set_nodelay(true)?;
        let accepted = async {
            let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
            let alpn: Vec<Vec<u8>> = match start.client_hello().alpn() {
                Some(names) => names.map(<[u8]>::to_vec).collect(),
                None => Vec::new(),
            };
            let inbound = start.into_stream(Arc::new(self.server_config(alpn)?)).await?;
            anyhow::Ok(inbound)
        };
        let mut inbound = timeout(HANDSHAKES, accepted)
            .await
            .context("handshake with the caller")??;
        let session = inbound.get_ref().1;
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let from = node_of(certificate.context("no certificate")?)?;
        let alpn = session
            .alpn_protocol()
            .map(|name| vec![name.to_vec()])
            .unwrap_or_default();
        let link = link(from, self.to);
        // While the link is cut the caller hears nothing, as from a machine that is gone.
        changed(&mut cuts, link, false).await;
        let connected = async {
            let tcp = TcpStream::connect(("127.0.0.1", self.cluster_port)).await?;
            tcp.set_nodelay(true)?;
            let connector = TlsConnector::from(Arc::new(self.client_config(from, alpn)?));
            anyhow::Ok(
                connector
                    .connect(ServerName::try_from("hsm-node.invalid")?, tcp)
                    .await?,
            )
        };
        let mut outbound = timeout(HANDSHAKES, connected)
            .await
            .context("handshake with the node")??;
        tokio::select! {
            ended = tokio::io::copy_bidirectional(&mut inbound, &mut outbound) => {
                ended?;
            }
            () = changed(&mut cuts, link, true) => {
                // Kept open and silent; both ends find out by their own time-outs.
                changed(&mut cuts, link, false).await;
            }
        }
        Ok(())
    }

    fn identity(&self, node: u32) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let folder = self.pki.join(format!("nodes/hsm-node-{node}"));
        let chain = CertificateDer::pem_file_iter(folder.join("cluster.crt"))?.collect::<Result<_, _>>()?;
        Ok((chain, PrivateKeyDer::from_pem_file(folder.join("cluster.key"))?))
    }

    fn server_config(&self, alpn: Vec<Vec<u8>>) -> Result<ServerConfig> {
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_file_iter(self.pki.join("cluster-ca.crt"))? {
            roots.add(ca?)?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build()?;
        let (chain, key) = self.identity(self.to)?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn;
        Ok(config)
    }

    fn client_config(&self, from: u32, alpn: Vec<Vec<u8>>) -> Result<ClientConfig> {
        let (chain, key) = self.identity(from)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyNode(provider())))
            .with_client_auth_cert(chain, key)?;
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.alpn_protocols = alpn;
        Ok(config)
    }
}

/// Until the link is cut, or mended.
async fn changed(cuts: &mut watch::Receiver<Cuts>, link: Link, cut: bool) {
    // The sender only goes when the test ends.
    let _ = cuts.wait_for(|cuts| cuts.contains(&link) == cut).await;
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The number in `URI:hsm://playground/hsm-node-I`.
fn node_of(certificate: &CertificateDer<'_>) -> Result<u32> {
    let (_, certificate) =
        X509Certificate::from_der(certificate).map_err(|error| anyhow::anyhow!("certificate: {error}"))?;
    let names = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .context("no SAN")?;
    for name in &names.value.general_names {
        if let GeneralName::URI(uri) = name
            && let Some(number) = uri.strip_prefix("hsm://playground/hsm-node-")
        {
            return number.parse().with_context(|| (*uri).to_owned());
        }
    }
    bail!("a certificate of no node of the playground")
}

/// The relay has started both nodes' playground; it knows whom it connects to.
struct AnyNode(Arc<CryptoProvider>);

impl fmt::Debug for AnyNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyNode")
    }
}

impl ServerCertVerifier for AnyNode {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn three() -> Relays {
        let (cuts, _) = watch::channel(Cuts::new());
        Relays {
            nodes: vec![1, 2, 3],
            cuts,
            listeners: Vec::new(),
        }
    }

    #[test]
    fn a_cut_has_no_direction() {
        let relays = three();
        relays.cut(3, 1);
        assert_eq!(*relays.cuts.borrow(), Cuts::from([(1, 3)]));
        relays.heal();
        assert!(relays.cuts.borrow().is_empty());
    }

    #[test]
    fn a_group_keeps_its_own_links() {
        let relays = three();
        relays.separate(&[1, 2]);
        assert_eq!(*relays.cuts.borrow(), Cuts::from([(1, 3), (2, 3)]));
        relays.heal();
        relays.isolate(2);
        assert_eq!(*relays.cuts.borrow(), Cuts::from([(1, 2), (2, 3)]));
    }
}
