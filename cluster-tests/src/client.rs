//! Who speaks to the nodes: the playground's certificates, further ones from its CAs for what the playground
//! has nobody for, and clients that never repeat a request unless they are told to.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hsm_api::Client;
use hsm_api::client::Retry;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub cert: String,
    /// Its key.
    pub key: String,
}

impl Identity {
    /// The certificate as DER.
    pub fn der(&self) -> Result<Vec<u8>> {
        Ok(CertificateDer::from_pem_slice(self.cert.as_bytes())?.to_vec())
    }

    /// Its SubjectPublicKeyInfo as DER.
    pub fn spki(&self) -> Result<Vec<u8>> {
        let der = self.der()?;
        match X509Certificate::from_der(&der) {
            Ok((_, certificate)) => Ok(certificate.public_key().raw.to_vec()),
            Err(error) => bail!("an identity's certificate: {error}"),
        }
    }

    /// Its serial number.
    pub fn serial(&self) -> Result<Vec<u8>> {
        let der = self.der()?;
        match X509Certificate::from_der(&der) {
            Ok((_, certificate)) => Ok(certificate.raw_serial().to_vec()),
            Err(error) => bail!("an identity's certificate: {error}"),
        }
    }
}

/// A playground's `pki` folder.
#[derive(Clone)]
pub struct Pki {
    dir: PathBuf,
}

/// The client CA's name.
const CLIENT_CA: &str = "DEV hsm-service client CA";
/// The cluster CA's name.
const CLUSTER_CA: &str = "DEV hsm-service cluster CA";
/// One attempt of a request; a test that waits longer is a test of something else.
const ATTEMPT: Duration = Duration::from_secs(5);

fn name(common: &str, unit: Option<&str>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "DEV");
    if let Some(unit) = unit {
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, unit);
    }
    params.distinguished_name.push(DnType::CommonName, common);
    Ok(params)
}

fn client_params(common: &str, unit: Option<&str>) -> Result<CertificateParams> {
    let mut params = name(common, unit)?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn cluster_params(node_id: &str) -> Result<CertificateParams> {
    let mut params = name(node_id, None)?;
    let uri = format!("hsm://playground/{node_id}");
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    Ok(params)
}

fn sign(params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<Identity> {
    sign_for(params, &KeyPair::generate()?, issuer)
}

fn sign_for(params: &CertificateParams, key: &KeyPair, issuer: &Issuer<'_, KeyPair>) -> Result<Identity> {
    let cert = params.signed_by(key, issuer)?;
    Ok(Identity {
        cert: cert.pem(),
        key: key.serialize_pem(),
    })
}

/// A CA beside the playground's own, such as one for administrators alone.
pub struct Ca {
    common: String,
    key: String,
    /// Its certificate, PEM.
    pub cert: String,
}

fn ca_params(common: &str) -> Result<CertificateParams> {
    let mut params = name(common, None)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(params)
}

impl Ca {
    /// Makes one.
    pub fn new(common: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        Ok(Self {
            common: common.to_owned(),
            cert: ca_params(common)?.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// A CA below it.
    pub fn intermediate(&self, common: &str) -> Result<Self> {
        let issuer = Issuer::new(name(&self.common, None)?, KeyPair::from_pem(&self.key)?);
        let Identity { cert, key } = sign(&ca_params(common)?, &issuer)?;
        Ok(Self {
            common: common.to_owned(),
            key,
            cert,
        })
    }

    /// Its certificate as DER.
    pub fn der(&self) -> Result<Vec<u8>> {
        Ok(CertificateDer::from_pem_slice(self.cert.as_bytes())?.to_vec())
    }

    /// Its name as nodes and openssl write it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("CN={},O=DEV", self.common)
    }

    /// A client of it.
    pub fn issue(&self, common: &str, unit: Option<&str>) -> Result<Identity> {
        self.sign(common, unit, &KeyPair::generate()?)
    }

    /// A further certificate for somebody's key.
    pub fn issue_for(&self, holder: &Identity, common: &str, unit: Option<&str>) -> Result<Identity> {
        self.sign(common, unit, &KeyPair::from_pem(&holder.key)?)
    }

    fn sign(&self, common: &str, unit: Option<&str>, key: &KeyPair) -> Result<Identity> {
        let issuer = Issuer::new(name(&self.common, None)?, KeyPair::from_pem(&self.key)?);
        sign_for(&client_params(common, unit)?, key, &issuer)
    }
}

impl Pki {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// One of the playground's own: `admin`, `trading-1`, ….
    pub fn identity(&self, profile: &str) -> Result<Identity> {
        Ok(Identity {
            cert: self.read(&format!("clients/{profile}.crt"))?,
            key: self.read(&format!("clients/{profile}.key"))?,
        })
    }

    /// A further client of the playground's CA.
    pub fn issue(&self, common: &str, unit: Option<&str>) -> Result<Identity> {
        self.sign(&client_params(common, unit)?)
    }

    /// A further certificate of the playground's CA, for somebody's key.
    pub fn issue_for(&self, holder: &Identity, common: &str, unit: Option<&str>) -> Result<Identity> {
        self.sign_for(&client_params(common, unit)?, &KeyPair::from_pem(&holder.key)?)
    }

    /// A client with an RSA key and many names: its certificate has more than 1.5 KB, as some CAs issue them.
    pub fn issue_large(&self, common: &str, unit: Option<&str>) -> Result<Identity> {
        let mut params = client_params(common, unit)?;
        for number in 0..20 {
            let name = format!("{number}.{}.example", "x".repeat(40));
            params
                .subject_alt_names
                .push(SanType::DnsName(name.as_str().try_into()?));
        }
        let key = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256)?;
        self.sign_for(&params, &key)
    }

    /// A client whose certificate has ended.
    pub fn issue_expired(&self, common: &str, unit: Option<&str>) -> Result<Identity> {
        let mut params = client_params(common, unit)?;
        params.not_after = rcgen::date_time_ymd(1990, 1, 1);
        self.sign(&params)
    }

    /// A certificate of the playground's CA that is not for clients.
    pub fn issue_for_servers(&self, common: &str, unit: Option<&str>) -> Result<Identity> {
        let mut params = client_params(common, unit)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> Result<Identity> {
        self.sign_for(params, &KeyPair::generate()?)
    }

    fn sign_for(&self, params: &CertificateParams, key: &KeyPair) -> Result<Identity> {
        let ca = KeyPair::from_pem(&self.read("ca.key")?)?;
        sign_for(params, key, &Issuer::new(name(CLIENT_CA, None)?, ca))
    }

    /// The client CA's name as nodes and openssl write it.
    #[must_use]
    pub fn client_ca_name(&self) -> String {
        format!("CN={CLIENT_CA},O=DEV")
    }

    /// A list of certificates that the playground's CA has revoked, PEM.
    pub fn crl(&self, revoked: &[&Identity]) -> Result<String> {
        crl(KeyPair::from_pem(&self.read("ca.key")?)?, revoked)
    }

    /// The same, signed by somebody else under the CA's name.
    pub fn foreign_crl(revoked: &[&Identity]) -> Result<String> {
        crl(KeyPair::generate()?, revoked)
    }

    /// A client of a CA that no node knows, under the playground's CA's name.
    pub fn foreign(common: &str, unit: Option<&str>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = name(CLIENT_CA, None)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        sign(&client_params(common, unit)?, &Issuer::new(params, key))
    }

    /// A new cluster certificate, with a new key, for the node of this name.
    pub fn issue_cluster(&self, node_id: &str) -> Result<Identity> {
        let key = KeyPair::from_pem(&self.read("cluster-ca.key")?)?;
        sign(
            &cluster_params(node_id)?,
            &Issuer::new(name(CLUSTER_CA, None)?, key),
        )
    }

    /// A cluster CA that no member knows, under the playground's CA's name, and a certificate of it for this node.
    pub fn foreign_cluster(node_id: &str) -> Result<(Identity, Identity)> {
        let key = KeyPair::generate()?;
        let mut params = name(CLUSTER_CA, None)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca = Identity {
            cert: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
        };
        let own = sign(&cluster_params(node_id)?, &Issuer::new(params, key))?;
        Ok((ca, own))
    }

    /// Where a node's cluster certificate lies.
    #[must_use]
    pub fn cluster_files(&self, node_id: &str) -> (PathBuf, PathBuf) {
        let folder = self.dir.join("nodes").join(node_id);
        (folder.join("cluster.crt"), folder.join("cluster.key"))
    }

    /// A client that sends each request once; `None` has no certificate.
    pub fn client(&self, identity: Option<&Identity>, endpoints: &[String]) -> Result<Client> {
        self.client_that(true, identity, endpoints)
    }

    /// As [`Pki::client`], with a connection of its own for each request unless `keeps` is true.
    pub fn client_that(
        &self,
        keeps: bool,
        identity: Option<&Identity>,
        endpoints: &[String],
    ) -> Result<Client> {
        self.client_waiting(ATTEMPT, keeps, identity, endpoints)
    }

    /// As [`Pki::client_that`], with another time for one answer.
    pub fn client_waiting(
        &self,
        limit: Duration,
        keeps: bool,
        identity: Option<&Identity>,
        endpoints: &[String],
    ) -> Result<Client> {
        let mut builder = Client::builder()
            .endpoints(endpoints.iter().cloned())
            .ca_pem(self.read("ca.crt")?)
            .retry(Retry::None)
            .keep_alive(keeps)
            .request_timeout(limit);
        if let Some(identity) = identity {
            builder = builder.identity_pem(&identity.cert, &identity.key);
        }
        Ok(builder.build()?)
    }
}

fn crl(key: KeyPair, revoked: &[&Identity]) -> Result<String> {
    let entry = |identity: &&Identity| -> Result<RevokedCertParams> {
        Ok(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&identity.serial()?),
            revocation_time: rcgen::date_time_ymd(2025, 1, 1),
            reason_code: None,
            invalidity_date: None,
        })
    };
    let list = CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2025, 1, 1),
        next_update: rcgen::date_time_ymd(2045, 1, 1),
        crl_number: SerialNumber::from_slice(&[1]),
        issuing_distribution_point: None,
        revoked_certs: revoked.iter().map(entry).collect::<Result<_>>()?,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(list.signed_by(&Issuer::new(name(CLIENT_CA, None)?, key))?.pem()?)
}

/// Shakes hands with a node that has to refuse this certificate, `None`: that there is none; gives the alert that
/// comes back. A client of the API may find the connection broken before it has read why.
pub async fn alert_for(pki: &Pki, identity: Option<&Identity>, port: u16) -> Result<AlertDescription> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pki.read("ca.crt")?.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder.with_client_auth_cert(
            vec![CertificateDer::from(identity.der()?)],
            PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?,
        )?,
    };
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let connecting = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost")?, stream);
    let answered = tokio::time::timeout(ATTEMPT, async {
        // In TLS 1.3 a client is done before the node has looked at its certificate.
        connecting.await?.read_u8().await
    });
    let error = match answered.await.context("no answer to a handshake")? {
        Ok(byte) => bail!("it was let in, and heard {byte}"),
        Err(error) => error,
    };
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::AlertReceived(alert)) => Ok(*alert),
        _ => bail!("no alert: {error}"),
    }
}

/// Offers TLS 1.2 as the newest version, and gives level and description of the alert that comes back.
pub async fn alert_for_tls12(port: u16) -> Result<(u8, u8)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(&client_hello_of_tls12()).await?;
    let mut answer = [0_u8; 7];
    let read = tokio::time::timeout(ATTEMPT, stream.read_exact(&mut answer)).await;
    read.context("no answer to a TLS 1.2 hello")??;
    match answer {
        [21, _, _, 0, 2, level, description] => Ok((level, description)),
        [kind, ..] => bail!("record of type {kind} instead of an alert"),
    }
}

/// RFC 5246 section 7.4.1.2, with the extensions every client of its time sent.
fn client_hello_of_tls12() -> Vec<u8> {
    let extensions: [&[u8]; 3] = [
        // supported_groups: secp256r1
        &[0, 10, 0, 4, 0, 2, 0, 23],
        // ec_point_formats: uncompressed
        &[0, 11, 0, 2, 1, 0],
        // signature_algorithms: ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256, rsa_pkcs1_sha256
        &[0, 13, 0, 8, 0, 6, 4, 3, 8, 4, 4, 1],
    ];
    let extensions = extensions.concat();
    let mut body = vec![3, 3];
    body.extend_from_slice(&[7; 32]);
    body.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    body.extend_from_slice(&[0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
    body.extend_from_slice(&[1, 0]);
    body.extend_from_slice(&length(&extensions));
    body.extend_from_slice(&extensions);
    let mut handshake = vec![1, 0];
    handshake.extend_from_slice(&length(&body));
    handshake.extend_from_slice(&body);
    let mut record = vec![22, 3, 1];
    record.extend_from_slice(&length(&handshake));
    record.extend_from_slice(&handshake);
    record
}

fn length(bytes: &[u8]) -> [u8; 2] {
    u16::try_from(bytes.len()).unwrap_or_default().to_be_bytes()
}
