//! `server`: where the node listens, with which certificates, within which limits.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::env::{Env, or_file};
use super::error::ConfigError;
use super::file::{Http2Section, ServerSection, TlsSection};
use super::proxies::Proxies;

/// The API listener and the health listener.
#[derive(Debug, Clone)]
pub struct Server {
    /// Address of the API.
    pub listen: SocketAddr,
    /// The key that set it, for messages: `server.listen` or `server.port`.
    pub listen_key: &'static str,
    /// Certificates of the API.
    pub tls: ApiTlsFiles,
    /// Address of probes and metrics, plain HTTP.
    pub health_listen: SocketAddr,
    /// HTTP/2 and keep-alive.
    pub http2: Http2,
    /// What SIGTERM does.
    pub drain: Drain,
    /// How long a starting member's API waits for the node to be ready before it lets anybody in.
    pub wait_ready: Duration,
    /// Bounds.
    pub limits: Limits,
    /// Proxies and balancers in front of the API.
    pub proxies: Proxies,
}

/// Files of the API listener.
#[derive(Debug, Clone)]
pub struct ApiTlsFiles {
    /// CAs whose client certificates are accepted.
    pub ca_path: PathBuf,
    /// The server's chain, leaf first.
    pub cert_path: PathBuf,
    /// Its private key.
    pub key_path: PathBuf,
    /// A CA of their own for holders of roles.
    pub admin_client_ca_path: Option<PathBuf>,
}

/// What v1's `http2` section still decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2 {
    /// Streams a client may have open on one connection.
    pub max_concurrent_streams: u32,
    /// How long a connection may be without a request.
    pub idle_timeout: Duration,
}

/// The steps of a shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Not ready, still accepting.
    pub notice: Duration,
    /// Then connections are kept at most this long, those at rest too.
    pub timeout: Duration,
    /// Then requests in hand get at most this long.
    pub finish: Duration,
}

/// Bounds of the API listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections.
    pub max_connections: usize,
    /// Nobody has written that number: fewer will do where fewer fit.
    pub connections_by_default: bool,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// How long a request waits for the state that it asks for (`X-HSM-Min-Index`).
    pub min_index_wait: Duration,
}

const DEFAULT_PORT: u16 = 8443;
/// Clients keep connections without a request for up to 30 s, and each is closed by an answer to its next request: if a
/// node closed one first, that request could cross the news of it.
const TIMEOUT_MS: u64 = 35_000;
/// As long as the largest batch may take, which is 66 s, and a little longer.
const FINISH_MS: u64 = 70_000;
const STREAMS: &str = "server.http2.max_concurrent_streams";
const DEFAULT_STREAMS: u32 = 250;
const MAX_STREAMS: u32 = 2000;
/// A plaintext of 64 KiB in base64 with its JSON around it must fit.
const MIN_BODY: usize = 128 * 1024;
/// Bodies are held in memory.
const MAX_BODY: usize = 64 * 1024 * 1024;

impl ServerSection {
    pub(crate) fn resolve(self, env: Env<'_>) -> Result<Server, ConfigError> {
        let (listen, listen_key) = self.address(env)?;
        let health = self.health_listen.as_deref().unwrap_or("127.0.0.1:8444");
        let health_listen = socket_address("server.health_listen", health)?;
        if health_listen == listen && listen.port() != 0 {
            return Err(ConfigError::invalid(
                "server.health_listen",
                health_listen,
                "is the API's address too",
                format!("give it a port of its own, or change {listen_key}"),
            ));
        }
        Ok(Server {
            listen,
            listen_key,
            health_listen,
            tls: self.tls.resolve(env)?,
            http2: self.http2.resolve()?,
            drain: Drain {
                notice: millis("server.drain.notice_ms", self.drain.notice_ms, 1000, 0..=600_000)?,
                timeout: millis(
                    "server.drain.timeout_ms",
                    self.drain.timeout_ms,
                    TIMEOUT_MS,
                    0..=600_000,
                )?,
                finish: millis(
                    "server.drain.finish_ms",
                    self.drain.finish_ms,
                    FINISH_MS,
                    0..=600_000,
                )?,
            },
            wait_ready: millis("server.wait_ready_ms", self.wait_ready_ms, 0, 0..=600_000)?,
            limits: Limits {
                connections_by_default: self.limits.max_connections.is_none(),
                max_connections: number(
                    "server.limits.max_connections",
                    self.limits.max_connections,
                    10_000,
                    1..=1_000_000,
                )?,
                max_body_bytes: number(
                    "server.limits.max_body_bytes",
                    self.limits.max_body_bytes,
                    1024 * 1024,
                    MIN_BODY..=MAX_BODY,
                )?,
                min_index_wait: millis(
                    "server.limits.min_index_wait_ms",
                    self.limits.min_index_wait_ms,
                    1000,
                    0..=10_000,
                )?,
            },
            proxies: Proxies::resolve(self.trusted_proxies, self.proxy_protocol_from)?,
        })
    }

    fn address(&self, env: Env<'_>) -> Result<(SocketAddr, &'static str), ConfigError> {
        let everywhere = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
        let from_env = or_file::<String>(env, "HSM_SERVER_PORT", None);
        match (&self.listen, from_env.as_ref().or(self.port.as_ref())) {
            (Some(listen), None) => Ok((socket_address("server.listen", listen)?, "server.listen")),
            (None, Some(text)) => Ok((everywhere(port("server.port", text)?), "server.port")),
            (None, None) => Ok((everywhere(DEFAULT_PORT), "server.listen")),
            (Some(listen), Some(text)) if from_env.is_some() => {
                let mut address = socket_address("server.listen", listen)?;
                address.set_port(port("HSM_SERVER_PORT", text)?);
                Ok((address, "server.listen"))
            }
            (Some(listen), Some(text)) => Err(ConfigError::invalid(
                "server.port",
                text,
                format!("set together with server.listen ({listen})"),
                "keep server.listen and remove server.port",
            )),
        }
    }
}

impl TlsSection {
    fn resolve(self, env: Env<'_>) -> Result<ApiTlsFiles, ConfigError> {
        let path = |key: &str, variable: &str, value: Option<PathBuf>, what: &str| {
            or_file(env, variable, value)
                .filter(|path| !path.as_os_str().is_empty())
                .ok_or_else(|| ConfigError::missing(key, format!("write the path of {what}")))
        };
        Ok(ApiTlsFiles {
            ca_path: path(
                "server.tls.ca_path",
                "HSM_SERVER_CA",
                self.ca_path,
                "the CA whose client certificates are accepted (PEM)",
            )?,
            cert_path: path(
                "server.tls.cert_path",
                "HSM_SERVER_CERT",
                self.cert_path,
                "the server's certificate chain (PEM, leaf first)",
            )?,
            key_path: path(
                "server.tls.key_path",
                "HSM_SERVER_KEY",
                self.key_path,
                "the server's private key (PEM)",
            )?,
            admin_client_ca_path: self.admin_client_ca_path,
        })
    }
}

impl Http2Section {
    /// The streams that are asked for.
    fn streams(&self) -> Result<u32, ConfigError> {
        let Some(text) = self.max_concurrent_streams.as_deref() else {
            return Ok(DEFAULT_STREAMS);
        };
        let number = text.trim().parse::<u32>().ok().filter(|number| *number > 0);
        number.ok_or_else(|| {
            ConfigError::invalid(STREAMS, text, "is not a number above 0", "write 250, for example")
        })
    }

    /// That fewer streams are allowed than are asked for; a line for the log.
    pub(super) fn cut(&self) -> Option<String> {
        let asked = self.streams().ok().filter(|asked| *asked > MAX_STREAMS)?;
        Some(format!(
            "{STREAMS}: {asked} is more than a client may have; {MAX_STREAMS} count, so that memory stays bounded"
        ))
    }

    fn resolve(self) -> Result<Http2, ConfigError> {
        let streams = self.streams()?;
        let idle = number(
            "server.http2.idle_timeout_seconds",
            self.idle_timeout_seconds,
            120,
            1..=86_400,
        )?;
        Ok(Http2 {
            max_concurrent_streams: streams.min(MAX_STREAMS),
            idle_timeout: Duration::from_secs(idle),
        })
    }
}

fn port(key: &str, text: &str) -> Result<u16, ConfigError> {
    text.trim().trim_start_matches(':').parse().map_err(|_| {
        ConfigError::invalid(
            key,
            text,
            "is not a port",
            "write a number from 0 to 65535, such as 8443",
        )
    })
}

/// `host:port` with a literal address: names would be resolved at an unknown moment.
pub(crate) fn socket_address(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.trim().parse().map_err(|_| {
        ConfigError::invalid(
            key,
            text,
            "is not an address and port",
            "write one such as 127.0.0.1:8443 or [::]:8443",
        )
    })
}

/// `host:port` that others connect to: a name or an address, but not "all addresses".
pub(crate) fn advertised(key: &str, text: &str) -> Result<String, ConfigError> {
    let text = text.trim();
    if let Ok(address) = text.parse::<SocketAddr>() {
        return if address.ip().is_unspecified() {
            Err(ConfigError::invalid(
                key,
                text,
                "means all addresses, to which nobody can connect",
                "write the address or name under which others reach the node",
            ))
        } else {
            Ok(text.to_owned())
        };
    }
    let host_ok = |host: &str| {
        !host.is_empty()
            && host.len() <= 253
            && host
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    match text.rsplit_once(':') {
        Some((host, port)) if host_ok(host) && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err(ConfigError::invalid(
            key,
            text,
            "is not host:port",
            "write one such as hsm-1.internal:8445",
        )),
    }
}

/// A number within its range, or its default.
pub(crate) fn number<N>(
    key: &str,
    value: Option<N>,
    default: N,
    range: std::ops::RangeInclusive<N>,
) -> Result<N, ConfigError>
where
    N: PartialOrd + Copy + std::fmt::Display,
{
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::invalid(
        key,
        value,
        format!("is outside {} to {}", range.start(), range.end()),
        format!("the default is {default}"),
    ))
}

/// Milliseconds within their range, or their default.
pub(crate) fn millis(
    key: &str,
    value: Option<u64>,
    default: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Duration, ConfigError> {
    number(key, value, default, range).map(Duration::from_millis)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    fn section(listen: Option<&str>, port: Option<&str>) -> ServerSection {
        ServerSection {
            listen: listen.map(str::to_owned),
            port: port.map(str::to_owned),
            tls: TlsSection {
                ca_path: Some("ca".into()),
                cert_path: Some("crt".into()),
                key_path: Some("key".into()),
                admin_client_ca_path: None,
            },
            ..ServerSection::default()
        }
    }

    #[test]
    fn v1s_port_means_all_addresses() {
        let server = section(None, Some("8443")).resolve(&none).unwrap();
        assert_eq!(server.listen, "0.0.0.0:8443".parse().unwrap());
        assert_eq!(server.listen_key, "server.port");
    }

    #[test]
    fn port_and_listen_together_are_refused() {
        let error = section(Some("127.0.0.1:1"), Some("2"))
            .resolve(&none)
            .unwrap_err();
        assert!(error.to_string().contains("remove server.port"), "{error}");
    }

    #[test]
    fn the_environment_changes_port_and_files_as_in_v1() {
        let env = |name: &str| match name {
            "HSM_SERVER_PORT" => Some("9443".to_owned()),
            "HSM_SERVER_CERT" => Some("/other.crt".to_owned()),
            _ => None,
        };
        let server = section(Some("127.0.0.1:1"), None).resolve(&env).unwrap();
        assert_eq!(server.listen, "127.0.0.1:9443".parse().unwrap());
        assert_eq!(server.tls.cert_path, PathBuf::from("/other.crt"));
        assert_eq!(server.tls.key_path, PathBuf::from("key"));
    }

    #[test]
    fn a_missing_certificate_names_its_key() {
        let mut section = section(None, None);
        section.tls.key_path = None;
        let error = section.resolve(&none).unwrap_err().to_string();
        assert!(
            error.starts_with("config: server.tls.key_path: is not set;"),
            "{error}"
        );
    }

    #[test]
    fn health_on_the_apis_address_is_refused() {
        let error = section(Some("127.0.0.1:8444"), None).resolve(&none).unwrap_err();
        assert!(
            error.to_string().starts_with("config: server.health_listen"),
            "{error}"
        );
    }

    #[test]
    fn v1s_streams_are_a_text_and_capped_not_in_silence() {
        let section = |text: &str| Http2Section {
            max_concurrent_streams: Some(text.to_owned()),
            ..Http2Section::default()
        };
        let streams = |text: &str| section(text).resolve().map(|http2| http2.max_concurrent_streams);
        for (text, allowed, cut) in [
            ("1", 1, None),
            ("2000", 2000, None),
            (
                "2001",
                2000,
                Some("server.http2.max_concurrent_streams: 2001 is more than"),
            ),
            (" 100000 ", 2000, Some("; 2000 count")),
        ] {
            assert_eq!(streams(text).unwrap(), allowed, "{text}");
            let said = section(text).cut();
            let as_expected = match (cut, &said) {
                (None, None) => true,
                (Some(part), Some(line)) => line.contains(part),
                _ => false,
            };
            assert!(as_expected, "{text}: {said:?}");
        }
        for text in ["0", "-1", "many", ""] {
            assert!(streams(text).is_err() && section(text).cut().is_none(), "{text}");
        }
        assert_eq!(Http2Section::default().cut(), None);
    }

    #[test]
    fn a_number_of_connections_is_known_to_be_the_operators_or_the_default() {
        let limits = |max_connections| {
            let mut section = section(None, None);
            section.limits.max_connections = max_connections;
            section.resolve(&none).unwrap().limits
        };
        let (default, written) = (limits(None), limits(Some(10_000)));
        assert_eq!(
            (default.max_connections, written.max_connections),
            (10_000, 10_000)
        );
        assert!(default.connections_by_default && !written.connections_by_default);
    }

    #[test]
    fn an_advertised_address_can_be_reached() {
        for good in ["hsm-1.internal:8445", "10.0.0.1:8445", "[::1]:8445"] {
            assert_eq!(advertised("k", good).unwrap(), good);
        }
        for bad in [
            "0.0.0.0:8445",
            "[::]:8445",
            "hsm-1",
            "hsm 1:8445",
            ":8445",
            "a:b:c",
        ] {
            assert!(advertised("k", bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_number_out_of_range_says_the_range() {
        let error = number("a.b", Some(0_usize), 5, 1..=9).unwrap_err().to_string();
        assert_eq!(error, "config: a.b: 0: is outside 1 to 9; the default is 5");
    }
}
