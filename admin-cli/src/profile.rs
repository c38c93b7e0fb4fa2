//! Who speaks to which nodes: endpoints, CA, and a client certificate, chosen by name or by file. Reads the
//! private key, and hands it to nobody but the client.

mod choose;
mod file;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use hsm_api::client::{BuildError, Client, Retry};
use zeroize::Zeroizing;

use crate::cli::Global;
use crate::exit::usage;

pub(crate) use choose::{apply, file_of};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use file::parse as parse_file;

/// Whose certificate of the folder is used unless something else is said.
const DEFAULT_PROFILE: &str = "admin";

/// Everything a client needs, as paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) endpoints: Vec<String>,
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Profile {
    /// Explicit files go before a profile's, arguments before the environment.
    pub(crate) fn resolve(global: &Global) -> Result<Self> {
        let endpoints: Vec<String> = global
            .endpoints
            .iter()
            .map(|endpoint| endpoint.trim().to_owned())
            .filter(|endpoint| !endpoint.is_empty())
            .collect();
        if endpoints.is_empty() {
            return Err(usage(
                "no node is named; give --endpoint https://host:8443 or a --profile that has endpoints, or set \
                 HSMCTL_ENDPOINTS (in a playground: . DIR/env)",
            ));
        }
        let ca = match (given(&global.ca), given(&global.pki)) {
            (Some(ca), _) => ca.to_owned(),
            (None, Some(pki)) => pki.join("ca.crt"),
            (None, None) => {
                return Err(usage(
                    "no CA is named for the nodes' certificates; give --ca FILE or a --profile that has one, or set \
                     HSMCTL_CA",
                ));
            }
        };
        let (cert, key) = identity(global)?;
        Ok(Self {
            endpoints,
            ca,
            cert,
            key,
        })
    }

    /// The files, for messages.
    pub(crate) fn files(&self) -> String {
        format!(
            "CA {}, client certificate {}, client key {}",
            self.ca.display(),
            self.cert.display(),
            self.key.display()
        )
    }

    /// A client that gives up after `budget`.
    pub(crate) fn client(&self, budget: Duration) -> Result<Client> {
        let read = |path: &Path, what: &str| {
            std::fs::read(path)
                .map_err(|error| usage(format!("{what} {}: cannot be read: {error}", path.display())))
        };
        let ca = read(&self.ca, "CA")?;
        let cert = read(&self.cert, "client certificate")?;
        let key = Zeroizing::new(read(&self.key, "client key")?);
        let client = Client::builder()
            .endpoints(self.endpoints.iter().cloned())
            .ca_pem(ca)
            .identity_pem(cert, key.as_slice())
            .retry(Retry::Until(budget))
            .build();
        client.map_err(|error| match error {
            BuildError::Pem { .. } | BuildError::Tls(_) => usage(format!("{error} ({})", self.files())),
            BuildError::NoEndpoint | BuildError::Endpoint { .. } => usage(error.to_string()),
        })
    }
}

/// An empty variable is no value.
fn given(path: &Option<PathBuf>) -> Option<&Path> {
    path.as_deref().filter(|path| !path.as_os_str().is_empty())
}

fn identity(global: &Global) -> Result<(PathBuf, PathBuf)> {
    match (given(&global.cert), given(&global.key)) {
        (Some(cert), Some(key)) => return Ok((cert.to_owned(), key.to_owned())),
        (Some(_), None) => return Err(usage("--cert (HSMCTL_CERT) needs --key (HSMCTL_KEY) with it")),
        (None, Some(_)) => return Err(usage("--key (HSMCTL_KEY) needs --cert (HSMCTL_CERT) with it")),
        (None, None) => {}
    }
    let name = global
        .profile
        .as_deref()
        .filter(|name| !name.is_empty())
        .unwrap_or(DEFAULT_PROFILE);
    // It becomes part of a path.
    if !file::is_name(name) {
        return Err(usage(format!(
            "profile {name:?}: not a name; use letters, digits and . - _, and do not begin with a dot"
        )));
    }
    let Some(pki) = given(&global.pki) else {
        return Err(usage(format!(
            "no certificate for profile {name}: give it cert and key in the profiles' file, set HSMCTL_PKI to the \
             folder that has clients/{name}.crt, or give --cert and --key"
        )));
    };
    let clients = pki.join("clients");
    Ok((
        clients.join(format!("{name}.crt")),
        clients.join(format!("{name}.key")),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn playground() -> Global {
        Global {
            endpoints: vec!["https://127.0.0.1:8443".to_owned()],
            pki: Some("/play/pki".into()),
            ca: Some("/play/pki/ca.crt".into()),
            ..Global::default()
        }
    }

    fn refusal(global: &Global) -> String {
        Profile::resolve(global).unwrap_err().to_string()
    }

    #[test]
    fn without_a_profile_it_is_the_administrator() {
        let profile = Profile::resolve(&playground()).unwrap();
        assert_eq!(profile.cert, PathBuf::from("/play/pki/clients/admin.crt"));
        assert_eq!(profile.key, PathBuf::from("/play/pki/clients/admin.key"));
    }

    #[test]
    fn a_profile_names_certificate_and_key() {
        let profile = Profile::resolve(&Global {
            profile: Some("trading-1".into()),
            ..playground()
        })
        .unwrap();
        assert_eq!(profile.cert, PathBuf::from("/play/pki/clients/trading-1.crt"));
        assert_eq!(profile.key, PathBuf::from("/play/pki/clients/trading-1.key"));
    }

    #[test]
    fn explicit_files_go_before_a_profile() {
        let global = Global {
            profile: Some("trading-1".into()),
            cert: Some("a.crt".into()),
            key: Some("a.key".into()),
            ..playground()
        };
        let profile = Profile::resolve(&global).unwrap();
        assert_eq!((profile.cert, profile.key), ("a.crt".into(), "a.key".into()));
        assert!(
            refusal(&Global {
                key: None,
                ..global.clone()
            })
            .contains("--key")
        );
        assert!(refusal(&Global { cert: None, ..global }).contains("--cert"));
    }

    #[test]
    fn the_ca_is_the_pkis_unless_it_is_named() {
        let profile = Profile::resolve(&Global {
            ca: None,
            ..playground()
        })
        .unwrap();
        assert_eq!(profile.ca, PathBuf::from("/play/pki/ca.crt"));
        let profile = Profile::resolve(&Global {
            ca: Some("other".into()),
            ..playground()
        })
        .unwrap();
        assert_eq!(profile.ca, PathBuf::from("other"));
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        assert!(
            refusal(&Global {
                endpoints: vec![" ".to_owned()],
                ..playground()
            })
            .contains("HSMCTL_ENDPOINTS")
        );
        assert!(
            refusal(&Global {
                pki: Some(PathBuf::new()),
                ..playground()
            })
            .contains("HSMCTL_PKI")
        );
        assert!(
            refusal(&Global {
                ca: None,
                pki: None,
                ..playground()
            })
            .contains("--ca")
        );
    }

    #[test]
    fn a_profile_cannot_leave_its_folder() {
        for name in ["../../etc/x", "a/b", ".hidden", "a b", ".."] {
            assert!(
                refusal(&Global {
                    profile: Some(name.into()),
                    ..playground()
                })
                .contains("not a name"),
                "{name}"
            );
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Profile::resolve(&playground())
            .unwrap()
            .client(Duration::ZERO)
            .unwrap_err();
        assert!(format!("{error:#}").contains("/play/pki/ca.crt"), "{error:#}");
        assert_eq!(Exit::of(&error), Exit::Usage);
    }

    #[test]
    fn files_that_do_not_go_together_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let issued = || rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let (one, other) = (issued(), issued());
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let profile = Profile {
            endpoints: vec!["https://a:1".to_owned()],
            ca: file("ca.crt", &one.cert.pem()),
            cert: file("client.crt", &one.cert.pem()),
            key: file("client.key", &other.signing_key.serialize_pem()),
        };
        let text = profile.client(Duration::ZERO).unwrap_err().to_string();
        assert!(
            text.contains("client.key") && text.contains("give the key that"),
            "{text}"
        );
        let mixed_up = Profile {
            cert: file("no.crt", "nothing"),
            ..profile
        };
        let text = mixed_up.client(Duration::ZERO).unwrap_err().to_string();
        assert!(
            text.contains("client certificate: ") && text.contains("no.crt"),
            "{text}"
        );
    }
}
