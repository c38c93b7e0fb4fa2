mod ending;
mod recovery;

use std::path::{Path, PathBuf};

use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::config::{ApiTlsFiles, PeerTlsFiles};
use crate::identity::test_certs::{TestCa, TestCert};
use crate::identity::{Authority, Principal, peer_identity};

struct Folder {
    dir: tempfile::TempDir,
    ca: TestCa,
}

impl Folder {
    fn new(ca: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new(ca);
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        ca.server("server", None).write(dir.path(), "server");
        Self { dir, ca }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn api(&self) -> ApiTlsFiles {
        ApiTlsFiles {
            ca_path: self.path("ca.crt"),
            cert_path: self.path("server.crt"),
            key_path: self.path("server.key"),
            admin_client_ca_path: None,
        }
    }

    fn peer(&self, name: &str, uri: &str) -> PeerTlsFiles {
        self.ca.server(name, Some(uri)).write(self.dir.path(), name);
        PeerTlsFiles {
            ca_path: self.path("ca.crt"),
            cert_path: self.path(&format!("{name}.crt")),
            key_path: self.path(&format!("{name}.key")),
        }
    }
}

fn refusal(files: &ApiTlsFiles, cluster_ca: Option<&Path>) -> String {
    load_api(files, cluster_ca, false).unwrap_err().to_string()
}

fn client(ca: &TestCa, chain: &[&[u8]], key_pem: Option<&str>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca.der.clone())).unwrap();
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match key_pem {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let chain = chain
                .iter()
                .map(|der| CertificateDer::from(der.to_vec()))
                .collect();
            let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    })
}

fn with(ca: &TestCa, cert: &TestCert) -> Arc<ClientConfig> {
    client(ca, &[&cert.der], Some(&cert.key_pem))
}

/// The certificates each side saw of the other, or the server's refusal; and whether the client
/// got a ticket.
async fn shake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>, u32), std::io::Error> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from("localhost").unwrap();
    let serving = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"x").await?;
        stream.flush().await?;
        let chain = stream
            .get_ref()
            .1
            .peer_certificates()
            .unwrap_or_default()
            .to_vec();
        Ok::<_, std::io::Error>((stream, chain))
    };
    let asking = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        // The server's refusal of a certificate arrives with the first read.
        let mut byte = [0_u8; 1];
        stream.read_exact(&mut byte).await?;
        let (_, session) = stream.get_ref();
        let chain = session.peer_certificates().unwrap_or_default().to_vec();
        Ok::<_, std::io::Error>((chain, session.tls13_tickets_received()))
    };
    let (served, asked) = tokio::join!(serving, asking);
    let (_stream, seen_by_server) = served?;
    let (seen_by_client, tickets) = asked?;
    Ok((seen_by_server, seen_by_client, tickets))
}

#[tokio::test]
async fn a_client_of_the_ca_is_let_in_and_gets_no_ticket() {
    let folder = Folder::new("Clients");
    let tls = load_api(&folder.api(), None, false).unwrap();
    assert_eq!(tls.issuers.of_roles, ["CN=Clients"]);
    let cert = folder.ca.client("trading-1", "Trading");
    let (chain, _, tickets) = shake(Arc::clone(&tls.server), with(&folder.ca, &cert))
        .await
        .unwrap();
    let principal = tls.principal(&chain).unwrap();
    assert_eq!(
        (principal.cn.as_str(), principal.ou.as_deref()),
        ("trading-1", Some("Trading"))
    );
    assert_eq!(tickets, 0);
}

#[tokio::test]
async fn no_certificate_or_a_foreign_one_is_refused() {
    let folder = Folder::new("Clients");
    let tls = load_api(&folder.api(), None, false).unwrap();
    let foreign = TestCa::new("Clients").client("trading-1", "Trading");
    assert!(
        shake(Arc::clone(&tls.server), client(&folder.ca, &[], None))
            .await
            .is_err()
    );
    assert!(
        shake(Arc::clone(&tls.server), with(&folder.ca, &foreign))
            .await
            .is_err()
    );
    let expired = folder.ca.issue("trading-1", Some("Trading"), &[], 1990);
    assert!(
        shake(Arc::clone(&tls.server), with(&folder.ca, &expired))
            .await
            .is_err()
    );
}

#[test]
fn files_that_cannot_be_used_are_named_with_their_key() {
    let folder = Folder::new("Clients");
    let mut files = folder.api();
    files.key_path = folder.path("none.key");
    let error = refusal(&files, None);
    assert!(
        error.starts_with("server.tls.key_path: ") && error.contains("none.key"),
        "{error}"
    );
    files = folder.api();
    files.cert_path = folder.path("server.key");
    assert!(refusal(&files, None).contains("holds no certificate"));
    files = folder.api();
    files.ca_path = folder.dir.path().to_owned();
    assert!(refusal(&files, None).starts_with("server.tls.ca_path: "));
    files = folder.api();
    files.key_path = folder.path("ca.crt");
    assert!(refusal(&files, None).contains("holds no unencrypted private key"));
    // Another certificate's key.
    folder.ca.client("other", "x").write(folder.dir.path(), "other");
    files.key_path = folder.path("other.key");
    assert!(refusal(&files, None).starts_with("server.tls.key_path: "));
}

#[test]
fn the_clients_ca_must_not_be_the_clusters() {
    let folder = Folder::new("One CA");
    let error = refusal(&folder.api(), Some(&folder.path("ca.crt")));
    assert!(
        error.contains("server.tls.ca_path and cluster.tls.ca_path"),
        "{error}"
    );
    let other = Folder::new("Cluster CA");
    assert!(load_api(&folder.api(), Some(&other.path("ca.crt")), false).is_ok());
}

#[test]
fn dev_certificates_need_dev_true() {
    let folder = Folder::new("hsm-service DEV client CA");
    let error = refusal(&folder.api(), None);
    assert!(
        error.contains("server.tls.ca_path") && error.contains("dev: true"),
        "{error}"
    );
    assert!(load_api(&folder.api(), None, true).is_ok());
    let production = Folder::new("Production");
    let mut files = folder.api();
    files.ca_path = production.path("ca.crt");
    assert!(refusal(&files, None).starts_with("server.tls.cert_path: "));
}

#[test]
fn two_cas_of_one_name_are_refused() {
    let (clients, admins) = (Folder::new("Same"), Folder::new("Same"));
    let mut files = clients.api();
    files.admin_client_ca_path = Some(admins.path("ca.crt"));
    assert!(refusal(&files, None).contains("roles are bound to the issuer's name"));
    // The same name for people, and other bytes.
    let printable = rcgen::DnValue::PrintableString("Same".try_into().unwrap());
    std::fs::write(admins.path("ca.crt"), TestCa::new(printable).pem).unwrap();
    assert!(refusal(&files, None).contains("roles are bound to the issuer's name"));
}

#[test]
fn every_ca_of_both_files_is_known_by_the_name_its_certificates_bear() {
    let (clients, admins) = (Folder::new("Clients, old"), Folder::new("Admins"));
    let second = TestCa::new("Clients #2 ");
    let bundle = [&clients.ca.pem, &second.pem, &clients.ca.pem].map(String::as_str);
    std::fs::write(clients.path("ca.crt"), bundle.join("\n")).unwrap();
    let mut files = clients.api();
    files.admin_client_ca_path = Some(admins.path("ca.crt"));
    let known = load_api(&files, None, false).unwrap().issuers;
    assert_eq!(known.of_roles, ["CN=Admins"]);
    let known = known.all;
    assert_eq!(known.len(), 3, "{known:?}");
    for ca in [&clients.ca, &second, &admins.ca] {
        let caller = Principal::from_der(&ca.client("a", "A").der).unwrap();
        assert!(
            known.contains(&caller.issuer_dn),
            "{} not in {known:?}",
            caller.issuer_dn
        );
    }
}

#[tokio::test]
async fn an_intermediate_with_the_admin_cas_name_makes_no_admin() {
    let (clients, admins) = (Folder::new("Clients"), Folder::new("Admins"));
    let mut files = clients.api();
    files.admin_client_ca_path = Some(admins.path("ca.crt"));
    let tls = load_api(&files, None, false).unwrap();
    assert_eq!(tls.issuers.of_roles, ["CN=Admins"]);

    let team = clients.ca.intermediate("Team A");
    let printable = rcgen::DnValue::PrintableString("Admins".try_into().unwrap());
    for (forged_ca, above) in [
        (clients.ca.intermediate("Admins"), None),
        // The same name for people, and other bytes.
        (clients.ca.intermediate(printable), None),
        (team.intermediate("Admins"), Some(&team.der)),
        // The genuine CA's certificate proves nothing about who has signed.
        (clients.ca.intermediate("Admins"), Some(&admins.ca.der)),
    ] {
        let forged = forged_ca.client("root", "Admin");
        let mut sent = vec![forged.der.as_slice(), forged_ca.der.as_slice()];
        sent.extend(above.map(Vec::as_slice));
        let config = client(&clients.ca, &sent, Some(&forged.key_pem));
        let (chain, _, _) = shake(Arc::clone(&tls.server), config).await.unwrap();
        assert!(tls.principal(&chain).is_err(), "a forged admin was let in");
    }

    let honest_ca = clients.ca.intermediate("Team A");
    let honest = honest_ca.client("a", "Trading");
    let config = client(&clients.ca, &[&honest.der, &honest_ca.der], Some(&honest.key_pem));
    let (chain, _, _) = shake(Arc::clone(&tls.server), config).await.unwrap();
    assert_eq!(tls.principal(&chain).unwrap().issuer_dn, "CN=Team A");

    let real = admins.ca.client("root", "Admin");
    let (chain, _, _) = shake(Arc::clone(&tls.server), with(&clients.ca, &real))
        .await
        .unwrap();
    assert_eq!(tls.principal(&chain).unwrap().issuer_dn, "CN=Admins");
}

/// What a proxy shows is judged by the verifier of handshakes, and by the rules about names.
#[test]
fn a_certificate_that_a_proxy_shows_is_judged_as_in_a_handshake() {
    use rustls::CertificateError;
    use rustls_pki_types::UnixTime;

    let (clients, admins) = (Folder::new("Clients"), Folder::new("Admins"));
    let mut files = clients.api();
    files.admin_client_ca_path = Some(admins.path("ca.crt"));
    let tls = load_api(&files, None, false).unwrap();
    let shown = |ders: &[&[u8]]| {
        let chain: Vec<_> = ders
            .iter()
            .map(|der| CertificateDer::from(der.to_vec()))
            .collect();
        tls.vouched(&chain, UnixTime::now())
    };
    let refused = |cert: &TestCert| match shown(&[&cert.der]).unwrap_err() {
        VouchedError::Refused(rustls::Error::InvalidCertificate(reason)) => reason,
        other => panic!("{other}"),
    };

    let good = shown(&[&clients.ca.client("trading-1", "Trading").der]).unwrap();
    assert_eq!(
        (good.cn.as_str(), good.ou.as_deref()),
        ("trading-1", Some("Trading"))
    );
    let expired = refused(&clients.ca.issue("trading-1", Some("Trading"), &[], 1990));
    assert!(
        matches!(expired, CertificateError::ExpiredContext { .. }),
        "{expired:?}"
    );
    let foreign = refused(&TestCa::new("Clients").client("trading-1", "Trading"));
    assert!(
        !matches!(foreign, CertificateError::ExpiredContext { .. }),
        "{foreign:?}"
    );
    let purpose = refused(&clients.ca.not_for_clients("trading-1", "Trading"));
    assert!(
        matches!(
            purpose,
            CertificateError::InvalidPurposeContext { .. } | CertificateError::InvalidPurpose
        ),
        "{purpose:?}"
    );

    let team = clients.ca.intermediate("Team A");
    let member = team.client("a", "Trading");
    assert!(shown(&[&member.der]).is_err(), "its chain is missing");
    assert_eq!(shown(&[&member.der, &team.der]).unwrap().issuer_dn, "CN=Team A");
    let forger = clients.ca.intermediate("Admins");
    let forged = shown(&[&forger.client("root", "Admin").der, &forger.der]);
    assert!(matches!(forged, Err(VouchedError::Identity(_))), "{forged:?}");
    assert!(shown(&[]).is_err() && shown(&[b"x"]).is_err());
}

fn node(folder: &Folder, name: &str) -> ClusterTls {
    let files = folder.peer(name, &format!("hsm://prod/{name}"));
    load_cluster(&files, "prod", name, &[b"h2"], false).unwrap()
}

#[test]
fn a_chain_ends_with_the_first_of_its_certificates_that_does() {
    let folder = Folder::new("Clients");
    let ends = || load_api(&folder.api(), None, false).unwrap().ends;
    let year = |year| Some(rcgen::date_time_ymd(year, 1, 1).unix_timestamp());
    assert_eq!(ends(), year(4096));
    let intermediate = folder.ca.intermediate_until("Sub", 2090);
    let leaf = std::fs::read_to_string(folder.path("server.crt")).unwrap();
    std::fs::write(folder.path("server.crt"), leaf + &intermediate.pem).unwrap();
    assert_eq!(ends(), year(2090));
    assert_eq!(node(&folder, "n1").ends, year(4096));
}

#[tokio::test]
async fn two_nodes_of_a_cluster_know_each_other() {
    let folder = Folder::new("Cluster");
    let (one, two) = (node(&folder, "n1"), node(&folder, "n2"));
    assert_eq!(one.ca_sha256, two.ca_sha256);
    let (by_server, by_client, tickets) = shake(Arc::clone(&one.server), Arc::clone(&two.client))
        .await
        .unwrap();
    assert_eq!(peer_identity(&by_server[0]).unwrap().name, "n2");
    assert_eq!(peer_identity(&by_client[0]).unwrap().name, "n1");
    assert_eq!(tickets, 0);
}

#[tokio::test]
async fn a_node_of_another_ca_or_cluster_is_refused() {
    let (folder, other) = (Folder::new("Cluster"), Folder::new("Cluster"));
    let (one, stranger) = (node(&folder, "n1"), node(&other, "n2"));
    assert!(
        shake(Arc::clone(&one.server), Arc::clone(&stranger.client))
            .await
            .is_err()
    );
    assert!(
        shake(Arc::clone(&stranger.server), Arc::clone(&one.client))
            .await
            .is_err()
    );
    let files = folder.peer("n3", "hsm://staging/n3");
    let staging = load_cluster(&files, "staging", "n3", &[b"h2"], false).unwrap();
    assert!(
        shake(Arc::clone(&staging.server), Arc::clone(&one.client))
            .await
            .is_err()
    );
}

#[test]
fn another_nodes_certificate_is_refused_at_start() {
    let folder = Folder::new("Cluster");
    let files = folder.peer("n2", "hsm://prod/n2");
    let error = load_cluster(&files, "prod", "n1", &[], false)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("hsm://prod/n2") && error.contains("hsm://prod/n1"),
        "{error}"
    );
    let mut foreign = folder.peer("n1", "hsm://prod/n1");
    foreign.ca_path = Folder::new("Elsewhere").dir.keep().join("ca.crt");
    let error = load_cluster(&foreign, "prod", "n1", &[], false)
        .err()
        .unwrap()
        .to_string();
    assert!(error.starts_with("cluster.tls.cert_path: "), "{error}");
}

/// Whoever looks at revocations has to see every CA that a certificate hangs on, also those whose certificates the
/// client need not send, and no other one.
#[tokio::test]
async fn a_caller_is_known_with_every_ca_above_it() {
    let mut folder = Folder::new("Clients");
    let between = folder.ca.intermediate("Between");
    let cert = between.client("trading-1", "Trading");
    let chain = [&cert.der, &between.der].map(|der| CertificateDer::from(der.clone()));
    let read = |der: &[u8]| Authority::from_der(der).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    assert_eq!(
        tls.principal(&chain).unwrap().authorities(),
        [read(&between.der), read(&folder.ca.der)]
    );
    // The node knows the one between, too: the client leaves it out. It still hangs on its own CA, and not on another of
    // the same name.
    let renewed = TestCa::new("Clients");
    let known = [&folder.ca.pem, &between.pem, &renewed.pem].map(String::as_str);
    std::fs::write(folder.path("ca.crt"), known.concat()).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    assert_eq!(
        tls.principal(&chain[..1]).unwrap().authorities(),
        [read(&between.der), read(&folder.ca.der)]
    );
    // Over two of them.
    let lowest = between.intermediate("Lowest");
    let known = [&lowest.pem, &renewed.pem, &folder.ca.pem, &between.pem].map(String::as_str);
    std::fs::write(folder.path("ca.crt"), known.concat()).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    let below = [CertificateDer::from(lowest.client("trading-4", "Trading").der)];
    assert_eq!(
        tls.principal(&below).unwrap().authorities(),
        [read(&lowest.der), read(&between.der), read(&folder.ca.der)]
    );
    // Of two CAs of one name it is the one that has signed.
    let direct = folder.ca.client("trading-2", "Trading");
    let direct = [CertificateDer::from(direct.der)];
    assert_eq!(
        tls.principal(&direct).unwrap().authorities(),
        [read(&folder.ca.der)]
    );
    folder.ca = renewed;
    let direct = [CertificateDer::from(folder.ca.client("trading-3", "Trading").der)];
    assert_eq!(
        tls.principal(&direct).unwrap().authorities(),
        [read(&folder.ca.der)]
    );
}
