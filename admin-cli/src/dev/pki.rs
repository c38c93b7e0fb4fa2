//! The playground's certificates: one CA for clients and servers, another one for the cluster, both marked
//! DEV. Made once; a later node gets its certificates from the same CAs.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use zeroize::Zeroizing;

use super::layout::{CLUSTER, Facts, Layout, node_id};
use crate::files;

const CLIENT_CA: &str = "DEV hsm-service client CA";
const CLUSTER_CA: &str = "DEV hsm-service cluster CA";
const ORGANIZATION: &str = "DEV";
const YEARS: i32 = 10;

/// Everyone who has a certificate, with their organizational unit.
pub(crate) const CLIENTS: [(&str, &str); 9] = [
    ("trading-1", "Trading"),
    ("trading-2", "Trading"),
    ("2fa-1", "2FA"),
    ("admin", "Admin"),
    ("auditor", "Auditor"),
    ("officer-1", "Officer"),
    ("officer-2", "Officer"),
    ("officer-3", "Officer"),
    ("nobody", "Nobody"),
];

/// A CA that can sign.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// Makes whatever is missing.
pub(crate) fn ensure(layout: &Layout, facts: Facts) -> Result<()> {
    let pki = layout.pki();
    let clients = pki.join("clients");
    files::private_dir(&clients)?;
    let authority = Authority::ensure(&pki, "ca", CLIENT_CA)?;
    for (name, unit) in CLIENTS {
        let mut params = leaf(name, Some(unit))?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        authority.ensure_leaf(&clients, name, &params)?;
    }
    let cluster = Authority::ensure(&pki, "cluster-ca", CLUSTER_CA)?;
    for number in 1..=facts.nodes {
        let own = layout.node_pki(number);
        files::private_dir(&own)?;
        let mut server = leaf(&node_id(number), None)?;
        server.subject_alt_names = names(facts.host(number))?;
        // Not a client's: a node must not be able to pass as an application.
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        authority.ensure_leaf(&own, "server", &server)?;
        let mut peer = leaf(&node_id(number), None)?;
        let identity = format!("hsm://{CLUSTER}/{}", node_id(number));
        peer.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        peer.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        cluster.ensure_leaf(&own, "cluster", &peer)?;
    }
    Ok(())
}

fn names(host: Ipv4Addr) -> Result<Vec<SanType>> {
    let mut names = vec![
        SanType::IpAddress(Ipv4Addr::LOCALHOST.into()),
        SanType::DnsName("localhost".try_into()?),
    ];
    if !host.is_loopback() {
        names.push(SanType::IpAddress(host.into()));
    }
    Ok(names)
}

fn named(unit: Option<&str>, name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, ORGANIZATION);
    if let Some(unit) = unit {
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, unit);
    }
    params.distinguished_name.push(DnType::CommonName, name);
    let year = i32::from(jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).year());
    // A node whose clock is more than a year behind still takes them: what it does then is tested.
    params.not_before = rcgen::date_time_ymd(year - 2, 1, 1);
    params.not_after = rcgen::date_time_ymd(year + YEARS, 1, 1);
    Ok(params)
}

fn leaf(name: &str, unit: Option<&str>) -> Result<CertificateParams> {
    let mut params = named(unit, name)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn authority_params(name: &str) -> Result<CertificateParams> {
    let mut params = named(None, name)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

impl Authority {
    /// The CA in `<folder>/<file>.crt` and `.key`; made if there is none. The certificate is written last,
    /// so that one that is there has its key.
    fn ensure(folder: &Path, file: &str, name: &str) -> Result<Self> {
        let (cert_path, key_path) = (
            folder.join(format!("{file}.crt")),
            folder.join(format!("{file}.key")),
        );
        let params = authority_params(name)?;
        if cert_path.exists() {
            let pem = files::read_secret_text(&key_path)?;
            let key = KeyPair::from_pem(&pem).with_context(|| format!("{}", key_path.display()))?;
            // Only the name and the key of an issuer end up in what it signs.
            return Ok(Self {
                issuer: Issuer::new(params, key),
            });
        }
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        files::write(&key_path, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        files::write(&cert_path, certificate.pem().as_bytes())?;
        Ok(Self {
            issuer: Issuer::new(params, key),
        })
    }

    fn ensure_leaf(&self, folder: &Path, file: &str, params: &CertificateParams) -> Result<()> {
        let cert_path = folder.join(format!("{file}.crt"));
        if cert_path.exists() {
            return Ok(());
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        files::write(
            &folder.join(format!("{file}.key")),
            Zeroizing::new(key.serialize_pem()).as_bytes(),
        )?;
        files::write(&cert_path, certificate.pem().as_bytes())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::Client;

    use super::*;

    #[test]
    fn everyone_gets_a_certificate_that_a_client_takes() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        ensure(&layout, Facts::new(2, 8443, 0).unwrap()).unwrap();
        let read = |path: &Path| std::fs::read(path).unwrap();
        for (name, _) in CLIENTS {
            Client::builder()
                .endpoint("https://127.0.0.1:8443")
                .ca_pem(read(&layout.pki().join("ca.crt")))
                .identity_pem(
                    read(&layout.pki().join(format!("clients/{name}.crt"))),
                    read(&layout.pki().join(format!("clients/{name}.key"))),
                )
                .build()
                .unwrap();
        }
        for number in 1..=2 {
            for file in ["server.crt", "server.key", "cluster.crt", "cluster.key"] {
                assert!(layout.node_pki(number).join(file).is_file(), "{number} {file}");
            }
        }
    }

    #[test]
    fn what_is_there_stays_and_a_later_node_is_added() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        ensure(&layout, Facts::new(1, 8443, 0).unwrap()).unwrap();
        let files = [
            layout.pki().join("ca.crt"),
            layout.pki().join("cluster-ca.crt"),
            layout.pki().join("clients/admin.crt"),
            layout.node_pki(1).join("cluster.crt"),
        ];
        let before: Vec<_> = files.iter().map(|path| std::fs::read(path).unwrap()).collect();
        ensure(&layout, Facts::new(3, 8443, 0).unwrap()).unwrap();
        let after: Vec<_> = files.iter().map(|path| std::fs::read(path).unwrap()).collect();
        assert_eq!(before, after);
        assert!(layout.node_pki(3).join("cluster.crt").is_file());
    }
}
