//! What stands between clients and the API: proxies that end TLS for their clients, and balancers that say in a PROXY
//! header whose connection it is. Both lists are short: they are looked through for every connection.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use raft_store::names::{InvalidName, NodeName};

use super::access::fingerprint;
use super::error::ConfigError;
use super::file::ProxyEntry;

/// A fleet of proxies has a few certificates; one for each is no list any more that somebody looks at.
const MAX_PROXIES: usize = 64;
const MAX_NETWORKS: usize = 256;
const TRUSTED: &str = "server.trusted_proxies";
const PROXY_PROTOCOL: &str = "server.proxy_protocol_from";

/// Proxies and balancers in front of the API listener.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// Whoever has such a key says for each request whose it is (`Client-Cert`, RFC 9440), and is nobody himself.
    pub trusted: Vec<TrustedProxy>,
    /// Connections from there begin with a PROXY header, version 2.
    pub proxy_protocol_from: Vec<Network>,
}

/// A proxy that ends TLS for its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedProxy {
    /// For logs.
    pub name: Arc<str>,
    /// SHA-256 of the SPKI of its client certificate.
    pub spki_sha256: [u8; 32],
}

/// An address, or all that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The lowest address.
    first: IpAddr,
    /// How many bits all have in common.
    bits: u32,
}

impl Proxies {
    /// Whether a connection from this address has to begin with a PROXY header.
    #[must_use]
    pub fn speaks_proxy_protocol(&self, address: IpAddr) -> bool {
        self.proxy_protocol_from
            .iter()
            .any(|network| network.contains(address))
    }

    pub(crate) fn resolve(
        trusted: Option<Vec<ProxyEntry>>,
        proxy_protocol_from: Option<Vec<String>>,
    ) -> Result<Self, ConfigError> {
        let (entries, networks) = (
            trusted.unwrap_or_default(),
            proxy_protocol_from.unwrap_or_default(),
        );
        at_most(TRUSTED, entries.len(), MAX_PROXIES)?;
        at_most(PROXY_PROTOCOL, networks.len(), MAX_NETWORKS)?;
        let mut trusted: Vec<TrustedProxy> = Vec::with_capacity(entries.len());
        for (index, entry) in entries.into_iter().enumerate() {
            let key = format!("{TRUSTED}[{index}]");
            let proxy = entry.resolve(&key)?;
            differs(&trusted, &proxy, &key)?;
            trusted.push(proxy);
        }
        let network = |(index, text): (usize, String)| {
            Network::parse(&text).map_err(|(problem, remedy)| {
                ConfigError::invalid(format!("{PROXY_PROTOCOL}[{index}]"), &text, problem, remedy)
            })
        };
        let proxy_protocol_from = networks.into_iter().enumerate().map(network);
        Ok(Self {
            trusted,
            proxy_protocol_from: proxy_protocol_from.collect::<Result<_, _>>()?,
        })
    }
}

fn at_most(key: &str, length: usize, most: usize) -> Result<(), ConfigError> {
    if length <= most {
        return Ok(());
    }
    Err(ConfigError::invalid(
        key,
        format!("{length} entries"),
        format!("are more than {most}"),
        "let proxies share a certificate, and write networks in place of addresses",
    ))
}

/// Two entries for one key would give it two names, and two of one name could not be told apart in a log.
fn differs(known: &[TrustedProxy], proxy: &TrustedProxy, key: &str) -> Result<(), ConfigError> {
    if known.iter().any(|other| other.name == proxy.name) {
        return Err(ConfigError::invalid(
            format!("{key}.name"),
            &proxy.name,
            "is another proxy's name too",
            "give each its own",
        ));
    }
    match known.iter().find(|other| other.spki_sha256 == proxy.spki_sha256) {
        None => Ok(()),
        Some(other) => Err(ConfigError::invalid(
            format!("{key}.spki_sha256"),
            hex::encode(proxy.spki_sha256),
            format!("is the key of {} too", other.name),
            "remove one of the two",
        )),
    }
}

impl ProxyEntry {
    fn resolve(self, key: &str) -> Result<TrustedProxy, ConfigError> {
        let name = self.name.filter(|name| !name.is_empty()).ok_or_else(|| {
            ConfigError::missing(
                format!("{key}.name"),
                "write what logs shall call the proxy, such as edge-1",
            )
        })?;
        // The rule of all names.
        NodeName::new(&name).map_err(|invalid| {
            let invalid = InvalidName {
                kind: "proxy",
                ..invalid
            };
            ConfigError::name(format!("{key}.name"))(invalid)
        })?;
        let pin = self.spki_sha256.filter(|pin| !pin.is_empty()).ok_or_else(|| {
            ConfigError::missing(
                format!("{key}.spki_sha256"),
                "write the SHA-256 of the public key in the proxy's certificate: openssl x509 -in proxy.crt -pubkey -noout | \
                 openssl pkey -pubin -outform DER | sha256sum",
            )
        })?;
        Ok(TrustedProxy {
            name: name.into(),
            spki_sha256: fingerprint(key, &pin)?,
        })
    }
}

impl Network {
    /// Reads an address, or an address and the number of bits.
    fn parse(text: &str) -> Result<Self, (String, String)> {
        let example = || "write one such as 10.0.0.5, 10.0.1.0/24 or 2001:db8::/64".to_owned();
        let (address, bits) = match text.trim().split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text.trim(), None),
        };
        let address: IpAddr = address
            .parse()
            .map_err(|_| ("is no address or network".to_owned(), example()))?;
        let address = address.to_canonical();
        let most = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        let bits = match bits {
            None => most,
            Some(digits) => digits
                .parse::<u32>()
                .ok()
                .filter(|bits| *bits <= most && digits.bytes().all(|byte| byte.is_ascii_digit()))
                .ok_or_else(|| {
                    let problem = format!("has no number from 0 to {most} after the slash");
                    (problem, example())
                })?,
        };
        let network = Self {
            first: masked(address, bits),
            bits,
        };
        // Somebody who writes 10.0.0.5/24 means either one address or the network.
        if network.first != address {
            let problem = format!("is inside the network {network}, and not its first address");
            return Err((problem, format!("write {network} or {address}")));
        }
        Ok(network)
    }

    /// Whether an address is in it. An IPv4 address that comes through an IPv6 socket is an IPv4 address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.first.is_ipv4() && masked(address, self.bits) == self.first
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

/// The address with everything behind its first `bits` set to zero.
fn masked(address: IpAddr, bits: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(bits)).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(bits)).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(name: &str, pin: &str) -> ProxyEntry {
        ProxyEntry {
            name: Some(name.to_owned()),
            spki_sha256: Some(pin.to_owned()),
        }
    }

    fn trusted(entries: Vec<ProxyEntry>) -> Result<Vec<TrustedProxy>, String> {
        Proxies::resolve(Some(entries), None)
            .map(|proxies| proxies.trusted)
            .map_err(|error| error.to_string())
    }

    fn from(networks: &[&str]) -> Result<Proxies, String> {
        let networks = networks.iter().map(|text| (*text).to_owned()).collect();
        Proxies::resolve(None, Some(networks)).map_err(|error| error.to_string())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn nobody_is_trusted_unless_it_is_said() {
        let none = Proxies::resolve(None, None).unwrap();
        assert_eq!(none, Proxies::default());
        assert!(!none.speaks_proxy_protocol(ip("127.0.0.1")));
    }

    #[test]
    fn a_proxy_is_a_name_and_a_pin_in_either_way_of_writing() {
        let colons = ["ab"; 32].join(":");
        for pin in [&"ab".repeat(32), &"AB".repeat(32), &colons] {
            let list = trusted(vec![entry("edge-1", pin)]).unwrap();
            assert_eq!(
                (&*list[0].name, list[0].spki_sha256),
                ("edge-1", [0xab; 32]),
                "{pin}"
            );
        }
    }

    #[test]
    fn what_is_wrong_with_a_proxy_is_named_with_its_key() {
        let pin = || "ab".repeat(32);
        let without_name = ProxyEntry {
            spki_sha256: Some(pin()),
            ..ProxyEntry::default()
        };
        let without_pin = ProxyEntry {
            name: Some("edge".to_owned()),
            ..ProxyEntry::default()
        };
        for (entries, start, rest) in [
            (
                vec![without_name],
                "config: server.trusted_proxies[0].name: is not set; ",
                "edge-1",
            ),
            (
                vec![without_pin],
                "config: server.trusted_proxies[0].spki_sha256: is not set; ",
                "openssl x509",
            ),
            (
                vec![entry("edge 1", &pin())],
                "config: server.trusted_proxies[0].name: proxy \"edge 1\" is not valid",
                "A-Z",
            ),
            (
                vec![entry("edge", "abcd")],
                "config: server.trusted_proxies[0].spki_sha256: abcd: is not a SHA-256",
                "64 hex digits",
            ),
            (
                vec![entry("edge", &pin()), entry("edge", &"cd".repeat(32))],
                "config: server.trusted_proxies[1].name: edge: is another proxy's",
                "each its own",
            ),
            (
                vec![entry("a", &pin()), entry("b", &pin())],
                "config: server.trusted_proxies[1].spki_sha256: abab",
                "is the key of a too; remove one",
            ),
        ] {
            let error = trusted(entries).unwrap_err();
            assert!(error.starts_with(start) && error.contains(rest), "{error}");
        }
    }

    #[test]
    fn both_lists_are_bounded() {
        let proxies = |count: usize| {
            let one = |n: usize| entry(&format!("edge-{n}"), &format!("{n:064x}"));
            trusted((0..count).map(one).collect())
        };
        assert_eq!(proxies(MAX_PROXIES).unwrap().len(), MAX_PROXIES);
        let error = proxies(MAX_PROXIES + 1).unwrap_err();
        assert!(
            error.starts_with("config: server.trusted_proxies: 65 entries: are more than 64; "),
            "{error}"
        );
        assert!(from(&vec!["10.0.0.1"; MAX_NETWORKS]).is_ok());
        let error = from(&vec!["10.0.0.1"; MAX_NETWORKS + 1]).unwrap_err();
        assert!(
            error.starts_with("config: server.proxy_protocol_from: 257 entries: are more than 256; "),
            "{error}"
        );
    }

    #[test]
    fn a_network_has_its_addresses_and_no_others() {
        let proxies = from(&["10.0.0.5", "10.1.2.0/23", "2001:db8::/64", "::ffff:10.9.0.1"]).unwrap();
        for (address, listed) in [
            ("10.0.0.5", true),
            ("::ffff:10.0.0.5", true),
            ("10.0.0.6", false),
            ("10.1.3.255", true),
            ("10.1.4.0", false),
            ("10.9.0.1", true),
            ("2001:db8::1", true),
            ("2001:db8:0:1::1", false),
            ("::1", false),
        ] {
            assert_eq!(proxies.speaks_proxy_protocol(ip(address)), listed, "{address}");
        }
        let everywhere = from(&["0.0.0.0/0"]).unwrap();
        assert!(everywhere.speaks_proxy_protocol(ip("192.0.2.1")));
        assert!(!everywhere.speaks_proxy_protocol(ip("2001:db8::1")));
        assert!(from(&["::/0"]).unwrap().speaks_proxy_protocol(ip("2001:db8::1")));
    }

    #[test]
    fn what_is_no_network_is_refused_with_what_may_have_been_meant() {
        for (text, problem) in [
            ("edge-1", "is no address or network"),
            ("", "is no address or network"),
            ("10.0.0.5:443", "is no address or network"),
            ("10.0.0.0/33", "no number from 0 to 32"),
            ("10.0.0.0/", "no number from 0 to 32"),
            ("10.0.0.0/+8", "no number from 0 to 32"),
            ("::/129", "no number from 0 to 128"),
            ("10.0.0.5/24", "write 10.0.0.0/24 or 10.0.0.5"),
            ("2001:db8::1/64", "write 2001:db8::/64 or 2001:db8::1"),
        ] {
            let error = from(&["10.0.0.1", text]).unwrap_err();
            assert!(
                error.starts_with(&format!("config: server.proxy_protocol_from[1]: {text}: "))
                    && error.contains(problem),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_network_contains_whatever_shares_its_first_bits(address: u32, other: u32, bits in 0_u32..=32) {
            let v4 = |bits: u32| IpAddr::V4(bits.into());
            let network = Network { first: masked(v4(address), bits), bits };
            let same = bits == 0 || (address ^ other) >> (32 - bits) == 0;
            prop_assert_eq!(network.contains(v4(other)), same);
            prop_assert_eq!(Network::parse(&network.to_string()), Ok(network));
        }

        #[test]
        fn no_text_makes_it_fail_otherwise(text in ".{0,60}") {
            let _ = Network::parse(&text);
        }
    }
}
