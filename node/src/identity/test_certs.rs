//! Certificates for tests, made on the spot. A certificate of another tool stands in `tests`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::field_reassign_with_default)]

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};

pub(crate) struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
    pub(crate) der: Vec<u8>,
}

pub(crate) struct TestCert {
    pub(crate) pem: String,
    pub(crate) der: Vec<u8>,
    pub(crate) key_pem: String,
}

fn ca_params(cn: impl Into<DnValue>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, cn);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl TestCa {
    pub(crate) fn new(cn: impl Into<DnValue>) -> Self {
        Self::of(ca_params(cn), KeyPair::generate().unwrap())
    }

    /// One that ends at the beginning of a year, and one of the same name and key that does not.
    pub(crate) fn ending_and_renewed(cn: &str, year: i32) -> [Self; 2] {
        let key = KeyPair::generate().unwrap();
        let renewed_key = KeyPair::from_pem(&key.serialize_pem()).unwrap();
        let mut params = ca_params(cn);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        [Self::of(params, key), Self::of(ca_params(cn), renewed_key)]
    }

    fn of(params: CertificateParams, key: KeyPair) -> Self {
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Its certificate says what its key is for, and not that it is for revocation lists; it signs some all the same.
    pub(crate) fn without_crl_sign(cn: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = ca_params(cn);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            issuer: Issuer::new(ca_params(cn), key),
        }
    }

    /// A list of certificates that it has revoked, by serial numbers in hex: DER and PEM.
    pub(crate) fn crl(&self, serials: &[&str]) -> (Vec<u8>, String) {
        let revoked = |serial: &&str| {
            let digits = format!("{}{serial}", if serial.len() % 2 == 1 { "0" } else { "" });
            RevokedCertParams {
                serial_number: SerialNumber::from_slice(&hex::decode(digits).unwrap()),
                revocation_time: rcgen::date_time_ymd(2024, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }
        };
        let list = CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2024, 1, 1),
            next_update: rcgen::date_time_ymd(2025, 1, 1),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        (list.der().to_vec(), list.pem().unwrap())
    }

    /// A CA below this one, with any name.
    pub(crate) fn intermediate(&self, cn: impl Into<DnValue>) -> Self {
        self.intermediate_until(cn, 4096)
    }

    /// The same, that ends at the beginning of a year.
    pub(crate) fn intermediate_until(&self, cn: impl Into<DnValue>, year: i32) -> Self {
        self.below(cn, |params| params.not_after = rcgen::date_time_ymd(year, 1, 1))
    }

    /// The same, that ends at a moment, given as time since the Unix epoch.
    pub(crate) fn intermediate_ending(&self, cn: &str, at: std::time::Duration) -> Self {
        self.below(cn, |params| {
            params.not_after = rcgen::date_time_ymd(1970, 1, 1) + at
        })
    }

    fn below(&self, cn: impl Into<DnValue>, end: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = ca_params(cn);
        end(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn client(&self, cn: &str, ou: &str) -> TestCert {
        self.issue(cn, Some(ou), &[], 4096)
    }

    /// A server or cluster certificate, for localhost and with the given URI.
    pub(crate) fn server(&self, cn: &str, uri: Option<&str>) -> TestCert {
        let mut sans = vec![
            SanType::DnsName("localhost".try_into().unwrap()),
            SanType::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()),
        ];
        sans.extend(uri.map(|uri| SanType::URI(uri.try_into().unwrap())));
        self.issue(cn, None, &sans, 4096)
    }

    /// A client certificate that ends at a moment, given as time since the Unix epoch.
    pub(crate) fn ending(&self, cn: &str, ou: &str, at: std::time::Duration) -> TestCert {
        self.issue_until(cn, Some(ou), &[], |params| {
            params.not_after = rcgen::date_time_ymd(1970, 1, 1) + at;
        })
    }

    /// A certificate that is for servers, and not for clients.
    pub(crate) fn not_for_clients(&self, cn: &str, ou: &str) -> TestCert {
        self.issue_until(cn, Some(ou), &[], |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        })
    }

    pub(crate) fn issue(&self, cn: &str, ou: Option<&str>, sans: &[SanType], year: i32) -> TestCert {
        self.issue_until(cn, ou, sans, |params| {
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
        })
    }

    /// A client certificate with any subject.
    pub(crate) fn named(&self, subject: DistinguishedName) -> TestCert {
        self.issue_until("", None, &[], |params| params.distinguished_name = subject)
    }

    fn issue_until(
        &self,
        cn: &str,
        ou: Option<&str>,
        sans: &[SanType],
        end: impl FnOnce(&mut CertificateParams),
    ) -> TestCert {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(ou) = ou {
            params.distinguished_name.push(DnType::OrganizationalUnitName, ou);
        }
        params.distinguished_name.push(DnType::CommonName, cn);
        params.subject_alt_names = sans.to_vec();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        end(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        TestCert {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            key_pem: key.serialize_pem(),
        }
    }
}

impl TestCert {
    /// Writes `<name>.crt` and `<name>.key`.
    pub(crate) fn write(&self, folder: &Path, name: &str) {
        std::fs::write(folder.join(format!("{name}.crt")), &self.pem).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), &self.key_pem).unwrap();
    }
}
