//! Relays between the nodes' cluster listeners, one link for each pair of nodes, so that a test can cut any of
//! them. A cut link is silent: nothing arrives, and nobody is told.
//!
//! All nodes reach one node at one address, so a relay has to find out who is calling. It ends the TLS of both
//! sides with the nodes' own certificates, which the playground holds: to each node the other end is who it
//! says it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::{Acceptor, NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::subnet::Subnet;
use crate::weather::{Pump, Reset, Touched, Weather};

/// Both handshakes of a connection.
const HANDSHAKES: Duration = Duration::from_secs(5);

/// From one node to another.
pub(crate) type Way = (u32, u32);

/// What is wrong with the ways between the nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ways {
    pub(crate) cuts: BTreeSet<Way>,
    pub(crate) weather: BTreeMap<Way, Weather>,
}

impl Ways {
    fn between(&self, a: u32, b: u32) -> bool {
        !self.cuts.contains(&(a, b)) && !self.cuts.contains(&(b, a))
    }
}

/// One node's place behind its relay.
pub(crate) struct Place {
    pub(crate) number: u32,
    pub(crate) host: Ipv4Addr,
    /// Where the relay listens: what peers are told.
    pub(crate) relay_port: u16,
    /// The node's own listener.
    pub(crate) cluster_port: u16,
}

/// All relays of a playground. They stop when dropped.
pub struct Relays {
    nodes: Vec<u32>,
    ways: watch::Sender<Ways>,
    touched: Arc<Touched>,
    listeners: Vec<JoinHandle<()>>,
}

impl Relays {
    /// Listens for every node. The certificates are read when somebody connects: they need not be there yet.
    pub(crate) async fn start(pki: &Path, places: Vec<Place>, subnet: Option<&Subnet>) -> Result<Self> {
        let (ways, _) = watch::channel(Ways::default());
        let touched = Arc::new(Touched::default());
        let connections = Arc::new(AtomicU64::new(0));
        let mut listeners = Vec::with_capacity(places.len());
        let nodes = places.iter().map(|place| place.number).collect();
        for place in places {
            let listener = match subnet {
                Some(subnet) => TcpListener::from_std(subnet.listen(place.number, place.relay_port)?),
                None => TcpListener::bind((place.host, place.relay_port)).await,
            };
            let listener = listener.with_context(|| format!("relay port {}", place.relay_port))?;
            let wire = Arc::new(Wire {
                pki: pki.to_owned(),
                to: place.number,
                host: place.host,
                cluster_port: place.cluster_port,
                subnet: subnet.cloned(),
                touched: Arc::clone(&touched),
                connections: Arc::clone(&connections),
            });
            let ways = ways.clone();
            listeners.push(tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (wire, ways) = (Arc::clone(&wire), ways.subscribe());
                    tokio::spawn(async move {
                        // Nodes connect again; what a connection died of is in their logs.
                        let _ = wire.carry(stream, ways).await;
                    });
                }
            }));
        }
        Ok(Self {
            nodes,
            ways,
            touched,
            listeners,
        })
    }

    /// Silences the link between two nodes, in both directions.
    pub fn cut(&self, a: u32, b: u32) {
        self.ways.send_modify(|ways| {
            ways.cuts.extend([(a, b), (b, a)]);
        });
    }

    /// Silences one direction: nothing of `from` reaches `to` any more. What `to` sends on connections that are there still
    /// arrives; new connections need both directions.
    pub fn cut_one_way(&self, from: u32, to: u32) {
        self.ways.send_modify(|ways| {
            ways.cuts.insert((from, to));
        });
    }

    /// Cuts every link of one node.
    pub fn isolate(&self, node: u32) {
        self.separate(&[node]);
    }

    /// Cuts every link between these nodes and all others.
    pub fn separate(&self, group: &[u32]) {
        self.ways.send_modify(|ways| {
            for &inside in group {
                let outside = self.nodes.iter().filter(|node| !group.contains(node));
                ways.cuts
                    .extend(outside.flat_map(|&outside| [(inside, outside), (outside, inside)]));
            }
        });
    }

    /// Mends every link; the weather stays.
    pub fn heal(&self) {
        self.ways.send_modify(|ways| ways.cuts.clear());
    }

    /// What one direction does to what passes through it.
    pub fn set_weather(&self, from: u32, to: u32, weather: Weather) {
        self.ways.send_modify(|ways| {
            ways.weather.insert((from, to), weather);
        });
    }

    /// The same in every direction of every link.
    pub fn set_weather_everywhere(&self, weather: &Weather) {
        self.ways.send_modify(|ways| {
            for &from in &self.nodes {
                let others = self.nodes.iter().filter(|to| **to != from);
                let all = others.map(|&to| ((from, to), weather.clone()));
                ways.weather.extend(all);
            }
        });
    }

    /// No more delay, loss or limit anywhere; cuts stay.
    pub fn calm(&self) {
        self.ways.send_modify(|ways| ways.weather.clear());
    }

    /// What the weather has done so far.
    #[must_use]
    pub fn touched(&self) -> &Touched {
        &self.touched
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

/// One end of a connection.
trait End: AsyncRead + AsyncWrite + Unpin {
    /// It ends with RST, whatever is still to be sent.
    fn reset_when_dropped(&self) -> std::io::Result<()>;
}

impl End for TcpStream {
    fn reset_when_dropped(&self) -> std::io::Result<()> {
        self.set_zero_linger()
    }
}

impl End for tokio_rustls::server::TlsStream<TcpStream> {
    fn reset_when_dropped(&self) -> std::io::Result<()> {
        self.get_ref().0.set_zero_linger()
    }
}

impl End for tokio_rustls::client::TlsStream<TcpStream> {
    fn reset_when_dropped(&self) -> std::io::Result<()> {
        self.get_ref().0.set_zero_linger()
    }
}

/// The way to one node.
struct Wire {
    pki: PathBuf,
    to: u32,
    host: Ipv4Addr,
    cluster_port: u16,
    subnet: Option<Subnet>,
    touched: Arc<Touched>,
    /// Each has dice of its own.
    connections: Arc<AtomicU64>,
}

impl Wire {
    async fn carry(&self, stream: TcpStream, ways: watch::Receiver<Ways>) -> Result<()> {
        stream.set_nodelay(true)?;
        match &self.subnet {
            // Whoever calls has an address of its own: nothing has to be opened.
            Some(subnet) => {
                let from = subnet.node_at(stream.peer_addr()?.ip())?;
                self.open(from, &ways).await;
                let there = timeout(HANDSHAKES, TcpStream::connect((self.host, self.cluster_port)))
                    .await
                    .context("connect to the node")??;
                there.set_nodelay(true)?;
                self.pass_on(from, stream, there, ways).await
            }
            None => self.carry_opened(stream, ways).await,
        }
    }

    /// Until a new connection could be made.
    async fn open(&self, from: u32, ways: &watch::Receiver<Ways>) {
        // The sender only goes when the test ends.
        let mut ways = ways.clone();
        let _ = ways.wait_for(|ways| ways.between(from, self.to)).await;
    }

    async fn carry_opened(&self, stream: TcpStream, ways: watch::Receiver<Ways>) -> Result<()> {
        let accepted = async {
            let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
            let alpn: Vec<Vec<u8>> = match start.client_hello().alpn() {
                Some(names) => names.map(<[u8]>::to_vec).collect(),
                None => Vec::new(),
            };
            let inbound = start.into_stream(Arc::new(self.server_config(alpn)?)).await?;
            anyhow::Ok(inbound)
        };
        let inbound = timeout(HANDSHAKES, accepted)
            .await
            .context("handshake with the caller")??;
        let session = inbound.get_ref().1;
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let from = node_of(certificate.context("no certificate")?)?;
        let alpn = session
            .alpn_protocol()
            .map(|name| vec![name.to_vec()])
            .unwrap_or_default();
        // While the link is cut the caller hears nothing, as from a machine that is gone.
        self.open(from, &ways).await;
        let connected = async {
            let tcp = TcpStream::connect((self.host, self.cluster_port)).await?;
            tcp.set_nodelay(true)?;
            let connector = TlsConnector::from(Arc::new(self.client_config(from, alpn)?));
            anyhow::Ok(
                connector
                    .connect(ServerName::try_from("hsm-node.invalid")?, tcp)
                    .await?,
            )
        };
        let outbound = timeout(HANDSHAKES, connected)
            .await
            .context("handshake with the node")??;
        self.pass_on(from, inbound, outbound, ways).await
    }

    /// Both directions, until both have ended or one was cut and is mended: kept open and silent meanwhile, so that both
    /// ends find out by their own time-outs.
    async fn pass_on(
        &self,
        from: u32,
        inbound: impl End,
        outbound: impl End,
        ways: watch::Receiver<Ways>,
    ) -> Result<()> {
        let seed = 2 * self.connections.fetch_add(1, Ordering::Relaxed);
        let (mut in_read, mut in_write) = tokio::io::split(inbound);
        let (mut out_read, mut out_write) = tokio::io::split(outbound);
        let there = Pump::new((from, self.to), ways.clone(), &self.touched, seed);
        let back = Pump::new((self.to, from), ways, &self.touched, seed + 1);
        let ended = tokio::try_join!(
            there.run(&mut in_read, &mut out_write),
            back.run(&mut out_read, &mut in_write)
        );
        if let Err(error) = &ended
            && error.is::<Reset>()
        {
            in_read.unsplit(in_write).reset_when_dropped()?;
            out_read.unsplit(out_write).reset_when_dropped()?;
        }
        ended.map(drop)
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn three() -> Relays {
        let (ways, _) = watch::channel(Ways::default());
        Relays {
            nodes: vec![1, 2, 3],
            ways,
            touched: Arc::default(),
            listeners: Vec::new(),
        }
    }

    fn cuts(relays: &Relays) -> Vec<Way> {
        relays.ways.borrow().cuts.iter().copied().collect()
    }

    async fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    #[tokio::test]
    async fn both_ends_see_a_reset_as_one() {
        let relays = three();
        let weather = Weather {
            reset_permille: 1000,
            ..Weather::default()
        };
        relays.set_weather(1, 2, weather);
        let wire = Wire {
            pki: PathBuf::new(),
            to: 2,
            host: Ipv4Addr::LOCALHOST,
            cluster_port: 0,
            subnet: None,
            touched: Arc::default(),
            connections: Arc::default(),
        };
        let (mut caller, inbound) = connected().await;
        let (outbound, mut node) = connected().await;
        caller.write_all(b"hello").await.unwrap();
        let ended = wire.pass_on(1, inbound, outbound, relays.ways.subscribe()).await;
        assert!(ended.unwrap_err().is::<Reset>());
        for end in [&mut caller, &mut node] {
            let error = end.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
    }

    #[test]
    fn a_cut_has_both_directions_unless_it_is_said() {
        let relays = three();
        relays.cut(3, 1);
        assert_eq!(cuts(&relays), [(1, 3), (3, 1)]);
        relays.heal();
        assert!(cuts(&relays).is_empty());
        relays.cut_one_way(3, 1);
        assert_eq!(cuts(&relays), [(3, 1)]);
        assert!(!relays.ways.borrow().between(1, 3));
        assert!(relays.ways.borrow().between(1, 2));
    }

    #[test]
    fn a_group_keeps_its_own_links() {
        let relays = three();
        relays.separate(&[1, 2]);
        assert_eq!(cuts(&relays), [(1, 3), (2, 3), (3, 1), (3, 2)]);
        relays.heal();
        relays.isolate(2);
        assert_eq!(cuts(&relays), [(1, 2), (2, 1), (2, 3), (3, 2)]);
    }

    #[test]
    fn cuts_and_weather_end_apart() {
        let relays = three();
        let slow = Weather {
            delay: Duration::from_millis(5),
            ..Weather::default()
        };
        relays.set_weather_everywhere(&slow);
        relays.cut(1, 2);
        relays.heal();
        assert_eq!(relays.ways.borrow().weather.len(), 6);
        relays.cut(1, 2);
        relays.calm();
        assert!(relays.ways.borrow().weather.is_empty());
        assert_eq!(cuts(&relays), [(1, 2), (2, 1)]);
    }
}
