//! A proxy that ends TLS, as far as it is certificates: the one that nodes know it by, the one that it shows its clients,
//! and the CAs that it goes by.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::client::{Identity, Pki};

/// Where a playground's configuration has room for what a test says of its server.
const BEFORE: &str = "  drain: {";

/// See the module.
pub struct Edge {
    identity: Identity,
    pin: String,
}

impl Edge {
    /// With an OU that may encrypt, which is of no use to a proxy.
    pub fn issue(pki: &Pki) -> Result<Self> {
        let identity = pki.issue("edge-1", Some("Trading"))?;
        let pin = hex::encode(Sha256::digest(identity.spki()?));
        Ok(Self { identity, pin })
    }

    /// A node's configuration in which it is trusted, and these lines stand under `server`.
    pub fn trusted(&self, config: &str, lines: &str) -> Result<String> {
        let pin = &self.pin;
        let keys = format!("  trusted_proxies: [{{name: edge, spki_sha256: \"{pin}\"}}]\n{lines}{BEFORE}");
        ensure!(
            config.contains(BEFORE),
            "the playground's configuration has changed:\n{config}"
        );
        Ok(config.replacen(BEFORE, &keys, 1))
    }

    /// Writes what the examples for HAProxy and nginx have under these names in folders of their own.
    pub fn write_files(&self, pki: &Pki, folder: &Path) -> Result<()> {
        // Tests ask for `localhost`, as which every node's certificate will do.
        let server = pki.dir().join("nodes/hsm-node-1");
        let read = |name: &str| {
            let path = server.join(name);
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let (cert, key) = (read("server.crt")?, read("server.key")?);
        let ca = pki.dir().join("ca.crt");
        let ca = std::fs::read_to_string(&ca).with_context(|| ca.display().to_string())?;
        let own = &self.identity;
        std::fs::create_dir_all(folder)?;
        for (name, text) in [
            ("edge-server.pem", format!("{cert}{key}")),
            ("edge-server.crt", cert),
            ("edge-server.key", key),
            ("edge-client.pem", format!("{}{}", own.cert, own.key)),
            ("edge-client.crt", own.cert.clone()),
            ("edge-client.key", own.key.clone()),
            ("client-ca.crt", ca.clone()),
            ("server-ca.crt", ca),
        ] {
            std::fs::write(folder.join(name), text)?;
        }
        Ok(())
    }
}
