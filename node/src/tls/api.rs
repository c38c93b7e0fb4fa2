//! TLS of the API listener: client certificates required, no resumption of any kind.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::crl::{self, Crl, CrlError};
use super::files::{CaFile, certificates, private_key, refuse_dev};
use super::{TlsError, provider};
use crate::config::ApiTlsFiles;
use crate::identity::{Authority, IdentityError, Principal};

const CA: &str = "server.tls.ca_path";
const ADMIN_CA: &str = "server.tls.admin_client_ca_path";
const CERT: &str = "server.tls.cert_path";
const KEY: &str = "server.tls.key_path";
/// The cluster's CA, only compared with.
pub(super) const CLUSTER_CA: &str = "cluster.tls.ca_path";

/// What the API listener needs for a handshake, as one immutable snapshot.
#[derive(Debug)]
pub struct ApiTls {
    /// For the acceptor.
    pub server: Arc<ServerConfig>,
    /// Whose certificates are accepted.
    pub issuers: ClientIssuers,
    /// Their certificates.
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
                anchors.push(Self {
                    name: ca.subject_dn.clone(),
                    authority,
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
    Ok(ApiTls {
        server: server(files, Arc::clone(&verifier), dev)?,
        issuers: ClientIssuers { all, of_roles },
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

fn server(
    files: &ApiTlsFiles,
    verifier: Arc<dyn ClientCertVerifier>,
    dev: bool,
) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(CERT, &files.cert_path)?;
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
    Ok(Arc::new(config))
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
        Ok(self.principal(chain)?)
    }

    /// The caller behind a finished handshake's certificates.
    ///
    /// Roles are bound to the issuer's *name*, and whoever may make intermediate CAs may choose
    /// their names. So a certificate whose issuer bears the name of a configured CA must have
    /// been signed by that CA itself; and roles of other issuers do not count
    /// ([`rules`](crate::admin::authorise::rules)).
    ///
    /// # Errors
    /// No certificate, an unreadable one, or one whose issuer pretends to be a configured CA.
    pub fn principal(&self, chain: &[CertificateDer<'_>]) -> Result<Principal, IdentityError> {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or_else(|| IdentityError::Unreadable("there is none".to_owned()))?;
        let principal = Principal::from_der(leaf)?;
        let authorities = self.authorities(&principal, leaf, intermediates)?;
        let principal = Principal::below((*principal).clone(), authorities);
        if intermediates.is_empty() {
            // Verified by TLS without help: a configured CA has signed it.
            return Ok(principal);
        }
        let mut named = self
            .by_name
            .iter()
            .filter(|(name, _)| *name == principal.issuer_dn)
            .peekable();
        let genuine = named.peek().is_none()
            || named.any(|(_, ca)| ca.verify_client_cert(leaf, &[], UnixTime::now()).is_ok());
        if genuine {
            Ok(principal)
        } else {
            Err(IdentityError::Unreadable(format!(
                "its issuer bears the name of a configured CA ({}) and is another",
                principal.issuer_dn
            )))
        }
    }

    /// The CAs that a certificate hangs on: all that came with it, and the configured ones. Of several configured ones
    /// of one name it is those under which it can be verified.
    fn authorities(
        &self,
        principal: &Principal,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<Vec<Authority>, IdentityError> {
        let sent = intermediates.iter().map(|der| Authority::from_der(der));
        let mut all = sent.collect::<Result<Vec<Authority>, _>>()?;
        let mut issuers: Vec<String> = all.iter().map(|ca| ca.issuer_dn.clone()).collect();
        issuers.push(principal.issuer_dn.clone());
        for anchor in &self.anchors {
            let signs = issuers.contains(&anchor.name)
                && (!anchor.ambiguous
                    || anchor
                        .verifier
                        .verify_client_cert(leaf, intermediates, UnixTime::now())
                        .is_ok());
            if signs && !all.contains(&anchor.authority) {
                all.push(anchor.authority.clone());
            }
        }
        Ok(all)
    }
}
