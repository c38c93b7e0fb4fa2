//! The binary header of the PROXY protocol, version 2 (HAProxy's `proxy-protocol.txt`, section 2.2): whose connection
//! it is that a balancer passes on. Reads bytes only; from whom a header is taken is decided elsewhere. What it says is
//! an address for logs, never an identity.
//!
//! ```text
//!  0  signature               12 bytes
//! 12  version 2, command      LOCAL (0) or PROXY (1)
//! 13  family, transport       0x11 TCP over IPv4, 0x21 TCP over IPv6, 0x00 unspecified
//! 14  length of what follows  16 bits, big endian
//! 16  source, destination, source port, destination port
//!     extensions              type (8 bits), length (16 bits), value
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What every header begins with, and no TLS connection does.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// What version 1, which is text, begins with.
const TEXT: &[u8] = b"PROXY ";
/// Everything up to the length.
pub const HEAD: usize = 16;
/// Most bytes after the head: addresses, and what balancers add. A host name has up to 255 bytes, a unique id 128, a
/// certificate's CN and a cloud's own fields some hundred: 536, what fits into any segment, is too few for all of them.
/// A whole certificate is not expected: HAProxy's own buffer of 16 KiB would be too much before anybody is known.
pub const MAX_REST: usize = 2048;

const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const UNSPECIFIED: u8 = 0x00;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// Whose connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The balancer's own, a health check for one: the address it comes from counts.
    Own,
    /// A client's, from this address.
    Client(SocketAddr),
}

/// Why bytes are no header that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else altogether.
    #[error("does not begin with a PROXY header")]
    Missing,
    /// The older form.
    #[error("begins with a PROXY header of version 1 (text); send version 2 (send-proxy-v2)")]
    Version1,
    /// Another version than 2, or an unknown command.
    #[error("has a PROXY header of version and command {0:#04x}, where 0x20 and 0x21 are known")]
    Command(u8),
    /// Not TCP over IP.
    #[error(
        "has a PROXY header of family and transport {0:#04x}, where TCP over IPv4 (0x11) and IPv6 (0x21) are taken"
    )]
    Family(u8),
    /// Longer than is read.
    #[error("has a PROXY header with {0} bytes after its head, where {MAX_REST} are taken")]
    TooLong(usize),
    /// The bytes end too early, or go on.
    #[error("has a PROXY header whose length does not fit")]
    Length,
    /// An extension goes beyond the end.
    #[error("has a PROXY header with an extension that goes beyond its end")]
    Extension,
}

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    is_local: bool,
    family: u8,
    rest: usize,
}

/// Whether these first bytes of a connection begin a header of either version. One byte is enough: no TLS record
/// begins like one.
#[must_use]
pub fn begins(bytes: &[u8]) -> bool {
    let begins = |what: &[u8]| match bytes.get(..what.len()) {
        Some(bytes) => bytes == what,
        None => !bytes.is_empty() && what.starts_with(bytes),
    };
    begins(&SIGNATURE) || begins(TEXT)
}

impl Head {
    /// Reads the head.
    ///
    /// # Errors
    /// All but [`HeaderError::Length`] and [`HeaderError::Extension`].
    pub fn parse(bytes: &[u8; HEAD]) -> Result<Self, HeaderError> {
        if bytes.starts_with(TEXT) {
            return Err(HeaderError::Version1);
        }
        let (signature, [command, family, high, low]) =
            bytes.split_last_chunk::<4>().ok_or(HeaderError::Missing)?;
        if signature != SIGNATURE {
            return Err(HeaderError::Missing);
        }
        let is_local = match *command {
            LOCAL => true,
            PROXY => false,
            other => return Err(HeaderError::Command(other)),
        };
        // Of the balancer's own connection the family is ignored, whatever it is.
        if !is_local && !matches!(*family, UNSPECIFIED | TCP4 | TCP6) {
            return Err(HeaderError::Family(*family));
        }
        let rest = usize::from(u16::from_be_bytes([*high, *low]));
        if rest > MAX_REST {
            return Err(HeaderError::TooLong(rest));
        }
        Ok(Self {
            is_local,
            family: *family,
            rest,
        })
    }

    /// How many bytes follow.
    #[must_use]
    pub fn rest(&self) -> usize {
        self.rest
    }

    /// Whose connection it is, by the bytes that follow.
    ///
    /// # Errors
    /// [`HeaderError::Length`] or [`HeaderError::Extension`].
    pub fn source(&self, rest: &[u8]) -> Result<Source, HeaderError> {
        if rest.len() != self.rest {
            return Err(HeaderError::Length);
        }
        let (source, extensions) = match self.family {
            // What follows is to be ignored.
            _ if self.is_local => return Ok(Source::Own),
            TCP4 => v4(rest)?,
            TCP6 => v6(rest)?,
            _ => return Ok(Source::Own),
        };
        check_extensions(extensions)?;
        Ok(Source::Client(source))
    }
}

fn v4(rest: &[u8]) -> Result<(SocketAddr, &[u8]), HeaderError> {
    let ([a, b, c, d, _, _, _, _, high, low, _, _], extensions) =
        rest.split_first_chunk::<12>().ok_or(HeaderError::Length)?;
    let address = IpAddr::V4(Ipv4Addr::new(*a, *b, *c, *d));
    let port = u16::from_be_bytes([*high, *low]);
    Ok((SocketAddr::new(address, port), extensions))
}

fn v6(rest: &[u8]) -> Result<(SocketAddr, &[u8]), HeaderError> {
    let (source, rest) = rest.split_first_chunk::<16>().ok_or(HeaderError::Length)?;
    let (_destination, rest) = rest.split_first_chunk::<16>().ok_or(HeaderError::Length)?;
    let ([high, low, _, _], extensions) = rest.split_first_chunk::<4>().ok_or(HeaderError::Length)?;
    // An IPv4 client of a balancer that listens on both.
    let address = IpAddr::V6(Ipv6Addr::from(*source)).to_canonical();
    let port = u16::from_be_bytes([*high, *low]);
    Ok((SocketAddr::new(address, port), extensions))
}

/// Nothing of them is used; a header that does not add up was not made by a balancer.
fn check_extensions(mut rest: &[u8]) -> Result<(), HeaderError> {
    while !rest.is_empty() {
        let ([_type, high, low], after) = rest.split_first_chunk::<3>().ok_or(HeaderError::Extension)?;
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        rest = after.get(length..).ok_or(HeaderError::Extension)?;
    }
    Ok(())
}

/// Reads a whole header, with nothing behind it.
///
/// # Errors
/// [`HeaderError`].
pub fn parse(bytes: &[u8]) -> Result<Source, HeaderError> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else {
        return Err(if begins(bytes) {
            HeaderError::Length
        } else {
            HeaderError::Missing
        });
    };
    Head::parse(head)?.source(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut header = SIGNATURE.to_vec();
        header.extend([command, family]);
        header.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
        header.extend(rest);
        header
    }

    /// As a balancer writes it.
    pub(in crate::http) fn encode(source: SocketAddr, extensions: &[u8]) -> Vec<u8> {
        let mut rest = Vec::new();
        let family = match source.ip() {
            IpAddr::V4(address) => {
                rest.extend(address.octets());
                rest.extend([192, 0, 2, 1]);
                TCP4
            }
            IpAddr::V6(address) => {
                rest.extend(address.octets());
                rest.extend([0xfd; 16]);
                TCP6
            }
        };
        rest.extend(source.port().to_be_bytes());
        rest.extend(8443_u16.to_be_bytes());
        rest.extend(extensions);
        header(PROXY, family, &rest)
    }

    fn extension(kind: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        bytes.extend(value);
        bytes
    }

    /// Taken from the wire: HAProxy 2.6.12 (`send-proxy-v2`), for a connection from 127.0.0.1:40001 to 127.0.0.1:18443.
    #[test]
    fn a_balancers_own_bytes_are_read() {
        let bytes = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\
                      \x7f\x00\x00\x01\x7f\x00\x00\x01\x9c\x41\x48\x0b";
        let source = "127.0.0.1:40001".parse().unwrap();
        assert_eq!(parse(bytes), Ok(Source::Client(source)));
    }

    #[test]
    fn an_ipv4_client_of_an_ipv6_balancer_is_an_ipv4_client() {
        let mapped: SocketAddr = "[::ffff:192.0.2.7]:5".parse().unwrap();
        let plain = "192.0.2.7:5".parse().unwrap();
        assert_eq!(parse(&encode(mapped, &[])), Ok(Source::Client(plain)));
    }

    #[test]
    fn a_balancers_own_connection_is_taken_whatever_its_family_says() {
        for family in [0x00, 0x11, 0x21, 0x31, 0xff] {
            for rest in [&[][..], &[1, 2, 3], &[0; MAX_REST]] {
                assert_eq!(parse(&header(LOCAL, family, rest)), Ok(Source::Own));
            }
        }
        // The receiver may accept these, and has to ignore the addresses.
        assert_eq!(parse(&header(PROXY, UNSPECIFIED, &[9; 40])), Ok(Source::Own));
    }

    #[test]
    fn what_is_no_tcp_over_ip_is_refused() {
        // UDP, UNIX sockets, and what is unspecified.
        for family in [0x12, 0x22, 0x31, 0x32, 0x01, 0x10, 0x13, 0x41, 0xff] {
            assert_eq!(
                parse(&header(PROXY, family, &[0; 216])),
                Err(HeaderError::Family(family))
            );
        }
    }

    #[test]
    fn other_versions_and_commands_are_refused() {
        for command in [0x00, 0x01, 0x10, 0x11, 0x22, 0x2f, 0x31, 0xff] {
            assert_eq!(
                parse(&header(command, TCP4, &[0; 12])),
                Err(HeaderError::Command(command))
            );
        }
        let text = b"PROXY TCP4 192.0.2.7 192.0.2.1 5 8443\r\n";
        let head = text.first_chunk::<HEAD>().unwrap();
        assert_eq!(Head::parse(head), Err(HeaderError::Version1));
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 0, 0, 0, 0, 0];
        assert_eq!(Head::parse(&hello), Err(HeaderError::Missing));
    }

    #[test]
    fn a_balancer_may_add_more_than_one_segment_holds() {
        let source = "192.0.2.7:5".parse().unwrap();
        // A host name, a unique id, and fields of a cloud's own.
        let extensions: Vec<u8> = [(2, 255), (5, 128), (0xea, 300)]
            .iter()
            .flat_map(|(kind, length)| extension(*kind, &vec![b'x'; *length]))
            .collect();
        assert!(extensions.len() > 536);
        assert_eq!(parse(&encode(source, &extensions)), Ok(Source::Client(source)));
    }

    #[test]
    fn a_header_that_does_not_add_up_is_refused() {
        assert_eq!(
            parse(&header(PROXY, TCP4, &[0; MAX_REST + 1])),
            Err(HeaderError::TooLong(MAX_REST + 1))
        );
        assert_eq!(parse(&header(PROXY, TCP4, &[0; 11])), Err(HeaderError::Length));
        assert_eq!(parse(&header(PROXY, TCP6, &[0; 35])), Err(HeaderError::Length));
        let source = "192.0.2.7:5".parse().unwrap();
        for extensions in [&[1][..], &[1, 0], &[1, 0, 2, 9], &[1, 0xff, 0xff]] {
            assert_eq!(parse(&encode(source, extensions)), Err(HeaderError::Extension));
        }
        let mut longer = encode(source, &[]);
        longer.push(0);
        assert_eq!(parse(&longer), Err(HeaderError::Length));
    }

    #[test]
    fn the_first_byte_tells_a_header_from_tls() {
        assert!(begins(b"\r") && begins(b"P") && begins(&SIGNATURE) && begins(b"PROXY TCP4 1"));
        assert!(!begins(b"") && !begins(&[22, 3, 1]) && !begins(b"POST /encr") && !begins(b"\r\n\r\nGET"));
    }

    fn source() -> impl Strategy<Value = SocketAddr> {
        (any::<IpAddr>(), any::<u16>())
            .prop_map(|(address, port)| SocketAddr::new(address.to_canonical(), port))
    }

    fn extensions() -> impl Strategy<Value = Vec<u8>> {
        let one = (any::<u8>(), vec(any::<u8>(), 0..80));
        vec(one, 0..5).prop_map(|list| {
            list.iter()
                .flat_map(|(kind, value)| extension(*kind, value))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_a_balancer_writes_is_what_is_read(source in source(), extensions in extensions()) {
            prop_assert_eq!(parse(&encode(source, &extensions)), Ok(Source::Client(source)));
        }

        #[test]
        fn no_part_of_a_header_is_a_header(source in source(), extensions in extensions()) {
            let whole = encode(source, &extensions);
            for length in 0..whole.len() {
                prop_assert!(parse(&whole[..length]).is_err(), "{} of {} bytes", length, whole.len());
                prop_assert_eq!(begins(&whole[..length]), length > 0);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..MAX_REST + 200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_bytes_behind_the_signature_are_read_or_refused(bytes in vec(any::<u8>(), 0..MAX_REST + 200)) {
            let _ = parse(&[&SIGNATURE[..], &bytes].concat());
        }

        #[test]
        fn a_header_of_any_kind_is_taken_only_within_its_bound(
            command in prop_oneof![Just(LOCAL), Just(PROXY), any::<u8>()],
            family in prop_oneof![Just(TCP4), Just(TCP6), Just(UNSPECIFIED), any::<u8>()],
            rest in vec(any::<u8>(), 0..MAX_REST + 200),
        ) {
            if parse(&header(command, family, &rest)).is_ok() {
                prop_assert!(rest.len() <= MAX_REST && matches!(command, LOCAL | PROXY));
            }
        }
    }
}
