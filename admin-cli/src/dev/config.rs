//! A node's `config.yaml` and `softhsm2.conf`. Written once: what a person changes in them stays.

use std::path::Path;

use anyhow::{Context, Result};

use super::layout::{CLUSTER, Layout, Node, REPLICATION_ENV, SLOTS};
use crate::files;

/// Writes both files where they are missing.
pub(crate) fn ensure(layout: &Layout, node: &Node, module: &Path) -> Result<()> {
    if !node.config().exists() {
        files::write(&node.config(), render(layout, node, module)?.as_bytes())?;
    }
    if !node.softhsm_conf().exists() {
        files::write(&node.softhsm_conf(), softhsm(node).as_bytes())?;
    }
    Ok(())
}

/// A JSON string is a YAML string.
fn quoted(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{}: not UTF-8", path.display()))?;
    serde_json::to_string(text).context("quote a path")
}

fn render(layout: &Layout, node: &Node, module: &Path) -> Result<String> {
    let pki = layout.pki();
    let own = layout.node_pki(node.number);
    let mut slots = String::new();
    let mut keys = String::new();
    for slot in &SLOTS {
        let contexts: Vec<&str> = slot.contexts.iter().map(|(context, _)| *context).collect();
        slots.push_str(&format!(
            "    \"{}\": {{label: {}, pin_env: {}, contexts: [{}]}}\n",
            slot.name,
            slot.label,
            slot.pin_env,
            contexts.join(", ")
        ));
        for (context, mode) in slot.contexts {
            keys.push_str(&format!("    \"{context}\": {{type: aes, mode: {mode}}}\n"));
        }
    }
    Ok(format!(
        "\
# A DEV node, made by `hsmctl dev up`, which leaves later changes alone.
server:
  listen: {host}:{api}
  health_listen: {host}:{health}
  tls:
    ca_path: {ca}
    cert_path: {server_cert}
    key_path: {server_key}
  drain: {{notice_ms: 500, timeout_ms: 3000}}
data_dir: {data}
dev: true
hsm:
  pkcs11_lib: {module}
  slots:
{slots}  keys:
{keys}acl:
  mappings:
    Trading: [exchange-key, order-key]
    \"2FA\": [2fa]
roles:
  admin: [{{ou: Admin}}]
  auditor: [{{ou: Auditor}}]
cluster:
  enabled: true
  mode: active-active
  node_id: {id}
  name: {CLUSTER}
  listen: {host}:{cluster}
  advertise: {advertised}
  api_advertise: {host}:{api}
  tls:
    ca_path: {cluster_ca}
    cert_path: {cluster_cert}
    key_path: {cluster_key}
  coordination: {{type: raft}}
  token_replication: {{enabled: true, interval_seconds: 60, encryption_key_env: {REPLICATION_ENV}}}
logging: {{level: info, format: json}}
",
        host = node.host,
        api = node.api_port,
        health = node.health_port,
        cluster = node.cluster_port,
        advertised = node.advertised(),
        id = node.id(),
        ca = quoted(&pki.join("ca.crt"))?,
        server_cert = quoted(&own.join("server.crt"))?,
        server_key = quoted(&own.join("server.key"))?,
        cluster_ca = quoted(&pki.join("cluster-ca.crt"))?,
        cluster_cert = quoted(&own.join("cluster.crt"))?,
        cluster_key = quoted(&own.join("cluster.key"))?,
        data = quoted(&node.data())?,
        module = quoted(module)?,
    ))
}

fn softhsm(node: &Node) -> String {
    format!(
        "\
directories.tokendir = {}
objectstore.backend = file
objectstore.umask = 0077
log.level = ERROR
slots.removable = false
",
        node.tokens().display()
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::layout::Facts;
    use super::*;

    fn rendered(dir: &Path, relay_offset: u16) -> Value {
        let layout = Layout::create(dir).unwrap();
        let node = layout
            .node(Facts::new(3, 8443, relay_offset).unwrap(), 2)
            .unwrap();
        let text = render(&layout, &node, Path::new("/usr/lib/softhsm/libsofthsm2.so")).unwrap();
        serde_saphyr::from_str(&text).unwrap()
    }

    #[test]
    fn it_is_yaml_with_every_part_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let config = rendered(dir.path(), 0);
        assert_eq!(config["server"]["listen"], "127.0.0.1:8453");
        assert_eq!(config["server"]["health_listen"], "127.0.0.1:8454");
        assert_eq!(config["cluster"]["listen"], "127.0.0.1:8455");
        assert_eq!(config["cluster"]["advertise"], "127.0.0.1:8455");
        assert_eq!(config["cluster"]["node_id"], "hsm-node-2");
        assert_eq!(config["cluster"]["name"], "playground");
        assert_eq!(config["dev"], true);
        assert_eq!(config["data_dir"], root.join("node2/data").to_str().unwrap());
        assert_eq!(
            config["hsm"]["slots"]["exchange"]["contexts"],
            json!(["exchange-key", "order-key"])
        );
        assert_eq!(config["hsm"]["slots"]["2fa"]["pin_env"], "HSM_PIN_2FA");
        assert_eq!(config["hsm"]["keys"]["2fa"]["mode"], "private");
        assert_eq!(config["acl"]["mappings"]["2FA"], json!(["2fa"]));
        assert_eq!(config["roles"]["auditor"][0]["ou"], "Auditor");
        assert_ne!(
            config["server"]["tls"]["ca_path"],
            config["cluster"]["tls"]["ca_path"]
        );
    }

    #[test]
    fn a_relay_is_what_peers_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let config = rendered(dir.path(), 5);
        assert_eq!(config["cluster"]["listen"], "127.0.0.1:8455");
        assert_eq!(config["cluster"]["advertise"], "127.0.0.1:8460");
    }

    #[test]
    fn a_folder_with_a_strange_name_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let strange = dir.path().join("it's \"here\": #1");
        let config = rendered(&strange, 0);
        let expected = strange.canonicalize().unwrap().join("node2/data");
        assert_eq!(config["data_dir"], expected.to_str().unwrap());
    }

    #[test]
    fn no_secret_is_in_it_and_changes_stay() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let node = layout.node(Facts::new(1, 8443, 0).unwrap(), 1).unwrap();
        files::private_dir(&node.dir).unwrap();
        ensure(&layout, &node, Path::new("/m.so")).unwrap();
        files::write(&node.config(), b"changed").unwrap();
        ensure(&layout, &node, Path::new("/m.so")).unwrap();
        assert_eq!(std::fs::read(node.config()).unwrap(), b"changed");
        let conf = std::fs::read_to_string(node.softhsm_conf()).unwrap();
        assert!(conf.contains("objectstore.umask = 0077"), "{conf}");
    }
}
