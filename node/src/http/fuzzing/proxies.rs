//! What proxies and balancers say of their clients.

use std::net::{IpAddr, Ipv6Addr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::http::client_cert::{MAX_CHAIN, MAX_VALUE, certificate, chain};
use crate::http::proxy_protocol::{HEAD, HeaderError, MAX_REST, SIGNATURE, Source, begins, parse};

/// A PROXY header: exactly as long as it says, and an address that it is read from again.
pub fn proxy_header(data: &[u8]) -> bool {
    let source = match parse(data) {
        Ok(source) => source,
        Err(error) => {
            assert!(error != HeaderError::Missing || !data.starts_with(&SIGNATURE));
            return false;
        }
    };
    assert!(data.starts_with(&SIGNATURE) && begins(data));
    assert!((1..data.len()).all(|length| begins(&data[..length])));
    let rest = usize::from(u16::from_be_bytes([data[14], data[15]]));
    assert!(rest <= MAX_REST && data.len() == HEAD + rest);
    assert!(parse(&data[..data.len() - 1]).is_err());
    assert!(parse(&[data, &[0]].concat()).is_err());
    if let Source::Client(address) = source {
        let (family, ip, none) = match address.ip() {
            IpAddr::V4(ip) => (0x11, ip.octets().to_vec(), vec![0; 4]),
            IpAddr::V6(ip) => {
                assert_eq!(
                    ip.to_canonical(),
                    IpAddr::V6(ip),
                    "an IPv4 client has an IPv4 address"
                );
                (
                    0x21,
                    ip.octets().to_vec(),
                    Ipv6Addr::UNSPECIFIED.octets().to_vec(),
                )
            }
        };
        let mut plain = [&SIGNATURE[..], &[0x21, family, 0, 0]].concat();
        plain.extend([ip, none, address.port().to_be_bytes().to_vec(), vec![0; 2]].concat());
        plain[15] = (plain.len() - HEAD) as u8;
        assert_eq!(parse(&plain), Ok(source));
    }
    true
}

/// `Client-Cert` or `Client-Cert-Chain`: what is accepted is read from its plain form again, and stays within bounds.
pub fn client_cert(data: &[u8]) -> bool {
    let Ok(ders) = chain([data].into_iter()) else {
        assert!(certificate(data).is_err(), "a chain of one is refused");
        return false;
    };
    assert!((1..=MAX_CHAIN).contains(&ders.len()) && data.len() <= MAX_VALUE);
    let plain: Vec<String> = ders
        .iter()
        .map(|der| format!(":{}:", STANDARD.encode(der)))
        .collect();
    let plain = plain.join(",");
    // Padding that was left out may not fit.
    if plain.len() <= MAX_VALUE {
        assert_eq!(chain([plain.as_bytes()].into_iter()), Ok(ders.clone()));
    }
    match certificate(data) {
        Ok(der) => assert_eq!(vec![der], ders),
        Err(_) => assert!(ders.len() > 1),
    }
    for der in &ders {
        assert!(!der.is_empty() && der.len() < data.len());
        let _ = crate::fuzzing::certificate(der);
    }
    true
}
