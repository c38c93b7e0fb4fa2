use super::test_certs::TestCa;
use super::*;

/// Made with openssl: subject C=DE, O="Example, Inc", OU=Trading, OU=2FA, CN=first, CN=last in
/// this order, serial 0xAB12.
const TWO_OUS_TWO_CNS: &str = "\
-----BEGIN CERTIFICATE-----
MIICDTCCAbOgAwIBAgIDAKsSMAoGCCqGSM49BAMCMGMxCzAJBgNVBAYTAkRFMRUw
EwYDVQQKDAxFeGFtcGxlLCBJbmMxEDAOBgNVBAsMB1RyYWRpbmcxDDAKBgNVBAsM
AzJGQTEOMAwGA1UEAwwFZmlyc3QxDTALBgNVBAMMBGxhc3QwIBcNMjYxMTIzMjEz
MDQ2WhgPMjEyNjEwMzAyMTMwNDZaMGMxCzAJBgNVBAYTAkRFMRUwEwYDVQQKDAxF
eGFtcGxlLCBJbmMxEDAOBgNVBAsMB1RyYWRpbmcxDDAKBgNVBAsMAzJGQTEOMAwG
A1UEAwwFZmlyc3QxDTALBgNVBAMMBGxhc3QwWTATBgcqhkjOPQIBBggqhkjOPQMB
BwNCAARTNdiFZ4hSXhiIiMbsWmE59PfJvQ61bKYYXE/FIMDrdwuPzbwX7ZmZtFVN
oPhBO+XQn4e9Bm2XIoXGzbNsEqXoo1QwUjAxBgNVHREEKjAogglhLmV4YW1wbGWG
FWhzbTovL3Byb2QvaHNtLW5vZGUtMYcEfwAAATAdBgNVHQ4EFgQUZJe1Afc8LVQz
F69SlxT6+EDqbc4wCgYIKoZIzj0EAwIDSAAwRQIhALeqFStzP7w2pxCEkZASIeWv
VyPHfk7wfLnfaCY8UmsrAiByAvCz7EgSeZ73wctAPuVfRq+JsGyzZW8efDGbyS2s
XQ==
-----END CERTIFICATE-----
";

fn der(pem: &str) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject;
    rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes())
        .unwrap()
        .to_vec()
}

#[test]
fn the_first_ou_and_the_last_cn_count_as_in_go() {
    let principal = Principal::from_der(&der(TWO_OUS_TWO_CNS)).unwrap();
    assert_eq!(principal.ou.as_deref(), Some("Trading"));
    assert_eq!(principal.cn, "last");
}

/// Compared with what openssl prints of the same certificate.
#[test]
fn every_part_of_an_identity_is_what_openssl_says() {
    let principal = Principal::from_der(&der(TWO_OUS_TWO_CNS)).unwrap();
    assert_eq!(
        principal.issuer_dn,
        r"CN=last,CN=first,OU=2FA,OU=Trading,O=Example\, Inc,C=DE"
    );
    assert_eq!(principal.serial, "ab12");
    assert_eq!(
        principal.sans,
        ["DNS:a.example", "URI:hsm://prod/hsm-node-1", "IP:127.0.0.1"]
    );
    assert_eq!(
        principal.fingerprint_hex(),
        "99a3ce6652643e5711f4da179192e215b3e54bb781627b8bda74a3a1c97ad11d"
    );
    assert_eq!(
        hex::encode(principal.spki_sha256),
        "060ac607d72025bf2b39e5c527a1da64f6d4ad8183a4b368efaf5d9341b2cc13"
    );
    assert_eq!(principal.not_after, 4_949_069_446);
    assert_eq!(dn::normalise(&principal.issuer_dn), principal.issuer_dn);
}

#[test]
fn a_node_is_what_its_uri_says() {
    let node = peer_identity(&der(TWO_OUS_TWO_CNS)).unwrap();
    assert_eq!(
        (node.cluster.as_str(), node.name.as_str()),
        ("prod", "hsm-node-1")
    );
}

#[test]
fn a_certificate_that_names_no_node_or_two_is_no_node() {
    let ca = TestCa::new("cluster");
    for uri in [
        None,
        Some("https://prod/x"),
        Some("hsm://prod"),
        Some("hsm://prod/a/b"),
        Some("hsm:///a"),
    ] {
        let error = peer_identity(&ca.server("n", uri).der).unwrap_err();
        assert!(
            error.to_string().contains("URI:hsm://<cluster>/<node_id>"),
            "{error}"
        );
    }
    let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
    let two = ca.issue("n", None, &[uri("hsm://prod/a"), uri("hsm://prod/b")], 4096);
    assert!(peer_identity(&two.der).is_err());
}

#[test]
fn a_certificate_without_ou_is_an_identity_all_the_same() {
    let principal = Principal::from_der(&TestCa::new("CA").server("srv", None).der).unwrap();
    assert_eq!((principal.ou.as_deref(), principal.cn.as_str()), (None, "srv"));
    assert_eq!(principal.issuer_dn, "CN=CA");
}

/// Go refuses such certificates. Passed over, the first OU would give its place to the second.
#[test]
fn an_ou_or_cn_that_cannot_be_read_is_refused_and_not_passed_over() {
    use rcgen::{DistinguishedName, DnType, DnValue};
    let ca = TestCa::new("CA");
    let unreadable = |text: &str| DnValue::UniversalString(text.try_into().unwrap());
    // rcgen knows a second OU only under its number.
    let second_ou = || DnType::CustomDnType(vec![2, 5, 4, 11]);
    let identity = |parts: Vec<(DnType, DnValue)>| {
        let mut subject = DistinguishedName::new();
        for (kind, value) in parts {
            subject.push(kind, value);
        }
        Principal::from_der(&ca.named(subject).der).map(|who| (who.ou.clone(), who.cn.clone()))
    };
    let (ou, cn) = (|| DnType::OrganizationalUnitName, || DnType::CommonName);
    let readable = vec![
        (ou(), "Trading".into()),
        (second_ou(), "2FA".into()),
        (cn(), "c".into()),
    ];
    assert_eq!(
        identity(readable),
        Ok((Some("Trading".to_owned()), "c".to_owned()))
    );
    for (what, parts) in [
        (
            "OU",
            vec![(ou(), unreadable("2FA")), (second_ou(), "Trading".into())],
        ),
        (
            "OU",
            vec![(ou(), "Trading".into()), (second_ou(), unreadable("2FA"))],
        ),
        ("CN", vec![(ou(), "Trading".into()), (cn(), unreadable("c"))]),
    ] {
        assert_eq!(identity(parts), Err(IdentityError::NoText { what }));
    }
    // Bytes that are none of their type.
    let mut der = ca.client("c", "Trading").der;
    let at = der.windows(7).position(|bytes| bytes == b"Trading").unwrap();
    der[at] = 0xff;
    assert_eq!(
        Principal::from_der(&der),
        Err(IdentityError::NoText { what: "OU" })
    );
}

#[test]
fn a_ca_that_says_dev_is_recognised() {
    assert!(
        CaCertificate::from_der(&TestCa::new("hsm-service DEV CA").der)
            .unwrap()
            .dev
    );
    let ca = CaCertificate::from_der(&TestCa::new("Production CA").der).unwrap();
    assert!(!ca.dev);
    assert_eq!(ca.subject_dn, "CN=Production CA");
    // What a DEV CA has signed is marked by its issuer.
    assert!(
        CaCertificate::from_der(&TestCa::new("DEV").intermediate("Sub").der)
            .unwrap()
            .dev
    );
}

#[test]
fn an_identity_survives_its_journey_to_the_leader() {
    let principal = Principal::from_der(&TestCa::new("CA").client("c", "Trading").der).unwrap();
    let json = serde_json::to_string(&*principal).unwrap();
    assert_eq!(Principal::new(serde_json::from_str(&json).unwrap()), principal);
}

#[test]
fn what_is_no_certificate_is_an_error() {
    for bytes in [&b""[..], b"x", &[0x30, 0x82, 0xff, 0xff]] {
        assert!(Principal::from_der(bytes).is_err());
    }
    let mut trailing = TestCa::new("CA").der;
    trailing.push(0);
    assert!(Principal::from_der(&trailing).is_err());
}
