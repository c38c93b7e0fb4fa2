//! TLS of the API listener: client certificates required, no resumption of any kind.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::crl::{self, Crl, CrlError};
use super::files::{CaFile, certificates, first_end, private_key, refuse_dev};
use super::{TlsError, provider};
use crate::config::ApiTlsFiles;
use crate::identity::{self, Authority, IdentityError, Principal};

const CA: &str = "server.tls.ca_path";
const ADMIN_CA: &str = "server.tls.admin_client_ca_path";
const CERT: &str = "server.tls.cert_path";
const KEY: &str = "server.tls.key_path";
/// The cluster's CA, only compared with.
pub(super) const CLUSTER_CA: &str = "cluster.tls.ca_path";
/// A CA that ends earlier is warned of at the start.
const SOON: i64 = 30 * 24 * 60 * 60;

/// What the API listener needs for a handshake, as one immutable snapshot.
#[derive(Debug)]
pub struct ApiTls {
    /// For the acceptor.
    pub server: Arc<ServerConfig>,
    /// Whose certificates are accepted.
    pub issuers: ClientIssuers,
    /// When the first certificate of the listener's own chain ends, in seconds since the Unix epoch.
    pub ends: Option<i64>,
    /// The certificates of the issuers.
    cas: Vec<CertificateDer<'static>>,
    /// What handshakes go by.
    verifier: Arc<dyn ClientCertVerifier>,
    /// A configured CA's name and a verifier that knows the CAs of its file only.
    by_name: Vec<(String, Arc<dyn ClientCertVerifier>)>,
    anchors: Vec<Anchor>,
}

/// A configured CA. Clients need not send its certificate, and it can be revoked like any other.
#[derive(Debug)]
struct Anchor {
    name: String,
    authority: Authority,
    /// Knows no other CA.
    verifier: Arc<dyn ClientCertVerifier>,
    /// Another one bears its name.
    ambiguous: bool,
    /// In seconds since the Unix epoch. TLS does not ask when an anchor ends; version 1 did.
    ends: i64,
}

impl Anchor {
    fn all(sources: &[(&CaFile, &Path)]) -> Result<Vec<Self>, TlsError> {
        let mut anchors = Vec::new();
        for (file, path) in sources {
            for (ca, der) in file.cas.iter().zip(&file.ders) {
                let authority = Authority::from_der(der).map_err(|reason| TlsError::Identity {
                    key: file.key,
                    path: (*path).to_owned(),
                    reason,
                })?;
                let mut root = rustls::RootCertStore::empty();
                root.add(der.clone()).map_err(|reason| TlsError::Rejected {
                    key: file.key,
                    path: (*path).to_owned(),
                    reason,
                })?;
                let ends = ends(der);
                warn_of_end((file.key, *path), &ca.subject_dn, ends);
                anchors.push(Self {
                    name: ca.subject_dn.clone(),
                    authority,
                    ends,
                    verifier: verifier(root)?,
                    ambiguous: false,
                });
            }
        }
        let names: Vec<String> = anchors.iter().map(|anchor| anchor.name.clone()).collect();
        for anchor in &mut anchors {
            anchor.ambiguous = names.iter().filter(|name| **name == anchor.name).count() > 1;
        }
        Ok(anchors)
    }
}

/// Of one that cannot be read it is not known when it ends.
fn ends(der: &CertificateDer<'_>) -> i64 {
    identity::not_after(der).unwrap_or(i64::MIN)
}

fn seconds(now: UnixTime) -> i64 {
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

fn warn_of_end((key, path): (&'static str, &Path), ca: &str, ends: i64) {
    let left = ends.saturating_sub(seconds(UnixTime::now()));
    let path = path.display();
    if left <= 0 {
        tracing::warn!(key, %path, ca, "this CA's certificate has ended: certificates that hang on it are refused");
    } else if left < SOON {
        let days = left / (24 * 60 * 60);
        tracing::warn!(key, %path, ca, days, "this CA's certificate ends soon, and with it those that hang on it");
    }
}

/// What a certificate hangs on.
struct Above {
    authorities: Vec<Authority>,
    /// When the first of it ends.
    ends: i64,
}

/// The CAs that clients' certificates are accepted from, by the names that [`Principal`] has as issuers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientIssuers {
    /// The CAs of both files, each once.
    pub all: Vec<String>,
    /// The CAs of the file that roles go by: without an issuer of its own a role is bound to the first.
    pub of_roles: Vec<String>,
}

/// Why a certificate that a proxy has seen is not taken.
#[derive(Debug, thiserror::Error)]
pub enum VouchedError {
    /// Its chain, its dates, or what it is for.
    #[error(transparent)]
    Refused(#[from] rustls::Error),
    /// What it says.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Loads the API's certificates. `cluster_ca` is the cluster's CA file, if there is one.
///
/// # Errors
/// What is unreadable, unusable or dangerous, with its configuration key.
pub fn load_api(files: &ApiTlsFiles, cluster_ca: Option<&Path>, dev: bool) -> Result<ApiTls, TlsError> {
    let clients = CaFile::load(CA, &files.ca_path, dev)?;
    let mut roots = clients.roots(&files.ca_path)?;
    let mut sources = vec![(&clients, files.ca_path.as_path())];
    let admins = files
        .admin_client_ca_path
        .as_deref()
        .map(|path| CaFile::load(ADMIN_CA, path, dev).map(|ca| (ca, path)))
        .transpose()?;
    if let Some((ca, path)) = &admins {
        clients.names_must_differ(ca)?;
        ca.add_to(&mut roots, path)?;
        sources.push((ca, *path));
    }
    if let Some(path) = cluster_ca {
        let cluster = CaFile::load(CLUSTER_CA, path, true)?;
        for (ca, _) in &sources {
            ca.must_differ(&cluster)?;
        }
    }
    let mut by_name = Vec::new();
    for (file, path) in &sources {
        for ca in &file.cas {
            by_name.push((ca.subject_dn.clone(), verifier(file.roots(path)?)?));
        }
    }
    let anchors = Anchor::all(&sources)?;
    let mut all: Vec<String> = sources.iter().flat_map(|(file, _)| file.names()).collect();
    all.sort();
    all.dedup();
    let cas = sources.iter().flat_map(|(file, _)| file.ders.iter().cloned());
    let cas = cas.collect();
    let of_roles = admins.as_ref().map_or(&clients, |(ca, _)| ca).names();
    let verifier = verifier(roots)?;
    let (server, ends) = server(files, Arc::clone(&verifier), dev)?;
    Ok(ApiTls {
        server,
        issuers: ClientIssuers { all, of_roles },
        ends,
        cas,
        verifier,
        by_name,
        anchors,
    })
}

fn verifier(roots: rustls::RootCertStore) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| TlsError::Setup(error.to_string()))
}

/// With when its chain ends.
fn server(
    files: &ApiTlsFiles,
    verifier: Arc<dyn ClientCertVerifier>,
    dev: bool,
) -> Result<(Arc<ServerConfig>, Option<i64>), TlsError> {
    let chain = certificates(CERT, &files.cert_path)?;
    let ends = first_end(&chain);
    if let Some(leaf) = chain.first() {
        refuse_dev(CERT, &files.cert_path, leaf, dev)?;
    }
    let key = private_key(KEY, &files.key_path)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Setup(error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|reason| TlsError::of_pair((CERT, &files.cert_path), (KEY, &files.key_path), reason))?;
    forget_sessions(&mut config);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((Arc::new(config), ends))
}

/// No tickets, no storage, no early data: each handshake checks the certificate anew.
pub(super) fn forget_sessions(config: &mut ServerConfig) {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
}

impl ApiTls {
    /// Reads a file of revocation lists of the CAs whose certificates are accepted.
    ///
    /// # Errors
    /// The first list that is none, or whose signature does not hold; then nothing of the file is taken.
    pub fn read_crls(&self, file: &[u8]) -> Result<Vec<Crl>, CrlError> {
        crl::read(file, &self.cas)
    }

    /// The holder of a certificate (leaf first) that a proxy has seen in a handshake of its own. Judged by what our
    /// own handshakes go by; that the holder has the key, the proxy alone knows.
    ///
    /// # Errors
    /// What the certificate would have been refused for in a handshake.
    pub fn vouched(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<Principal, VouchedError> {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or_else(|| IdentityError::Unreadable("there is none".to_owned()))?;
        self.verifier.verify_client_cert(leaf, intermediates, now)?;
        Ok(self.principal_at(chain, now)?)
    }

    /// The caller behind a finished handshake's certificates.
    ///
    /// Roles are bound to the issuer's *name*, and whoever may make intermediate CAs may choose
    /// their names. So a certificate whose issuer bears the name of a configured CA must have
    /// been signed by that CA itself; and roles of other issuers do not count
    /// ([`rules`](crate::admin::authorise::rules)).
    ///
    /// # Errors
    /// No certificate, an unreadable one, one below a configured CA that has ended, or one whose issuer pretends to be a
    /// configured CA.
    pub fn principal(&self, chain: &[CertificateDer<'_>]) -> Result<Principal, IdentityError> {
        self.principal_at(chain, UnixTime::now())
    }

    fn principal_at(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<Principal, IdentityError> {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or_else(|| IdentityError::Unreadable("there is none".to_owned()))?;
        let principal = Principal::from_der(leaf)?;
        let Above { authorities, ends } = self.above(&principal, leaf, intermediates, now)?;
        if ends <= seconds(now) && principal.not_after > seconds(now) {
            return Err(IdentityError::CaEnded);
        }
        let principal = Principal::until((*principal).clone(), authorities, ends);
        if intermediates.is_empty() {
            // Verified by TLS without help: a configured CA has signed it.
            return Ok(principal);
        }
        let mut named = self
            .by_name
            .iter()
            .filter(|(name, _)| *name == principal.issuer_dn)
            .peekable();
        let genuine =
            named.peek().is_none() || named.any(|(_, ca)| ca.verify_client_cert(leaf, &[], now).is_ok());
        if genuine {
            Ok(principal)
        } else {
            Err(IdentityError::Unreadable(format!(
                "its issuer bears the name of a configured CA ({}) and is another",
                principal.issuer_dn
            )))
        }
    }

    /// The CAs that a certificate hangs on: all that came with it, and the configured ones up to the topmost. Of several
    /// configured ones of one name it is those under which it can be verified.
    fn above(
        &self,
        principal: &Principal,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Above, IdentityError> {
        let sent = intermediates.iter().map(|der| Authority::from_der(der));
        let mut authorities = sent.collect::<Result<Vec<Authority>, _>>()?;
        let mut names: Vec<String> = authorities.iter().map(|ca| ca.issuer_dn.clone()).collect();
        names.push(principal.issuer_dn.clone());

        // Trusted for its own sake is only what stands directly above what was sent, and a name alone proves nothing: a
        // client chooses what it sends along, and with that which CAs are named.
        let verifies = |anchor: &&Anchor| {
            anchor
                .verifier
                .verify_client_cert(leaf, intermediates, now)
                .is_ok()
        };
        let trusted = self
            .anchors
            .iter()
            .filter(|anchor| names.contains(&anchor.name))
            .filter(verifies)
            .map(|anchor| anchor.ends);
        let anchors_end = trusted.max().unwrap_or(i64::MAX);
        // What came along and has ended was not needed: TLS has found another way.
        let sent_end = intermediates
            .iter()
            .map(ends)
            .filter(|end| *end > seconds(now))
            .min();
        let ends = principal
            .not_after
            .min(anchors_end)
            .min(sent_end.unwrap_or(i64::MAX));

        // A configured CA may hang on another one, whose loss is its own.
        let known: Vec<CertificateDer<'_>> = intermediates.iter().chain(&self.cas).cloned().collect();
        loop {
            let found = self
                .signers(&names, leaf, &known, now)
                .find(|anchor| !authorities.contains(&anchor.authority));
            let Some(anchor) = found else { break };
            names.push(anchor.authority.issuer_dn.clone());
            authorities.push(anchor.authority.clone());
        }
        Ok(Above { authorities, ends })
    }

    /// The configured CAs that bear one of these names.
    fn signers<'s, 'q>(
        &'s self,
        names: &'q [String],
        leaf: &'q CertificateDer<'_>,
        intermediates: &'q [CertificateDer<'_>],
        now: UnixTime,
    ) -> impl Iterator<Item = &'s Anchor> {
        let named = move |anchor: &&Anchor| names.contains(&anchor.name);
        let signs = move |anchor: &&Anchor| {
            let verified = || anchor.verifier.verify_client_cert(leaf, intermediates, now);
            !anchor.ambiguous || verified().is_ok()
        };
        self.anchors.iter().filter(named).filter(signs)
    }
}
