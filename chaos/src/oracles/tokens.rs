//! What a node's tokens hold, past the node: `pkcs11-tool` reads the same folder as whoever has it and the PIN can. It only
//! reads; the node's own process goes on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::Node;
use tokio::process::Command;

use super::observed::TokenView;

/// SoftHSM itself, not what may stand before it.
const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// Every node of a playground has these.
pub(super) const SLOTS: [&str; 2] = ["exchange", "2fa"];
const LIMIT: Duration = Duration::from_secs(60);

/// The keys in a token of a node, whose PIN lies in the playground's folder.
pub(super) async fn look(playground: &Path, node: &Node, slot: &str) -> Result<TokenView> {
    let pin = playground.join(format!("secrets/{slot}.pin"));
    let pin = std::fs::read_to_string(&pin).with_context(|| pin.display().to_string())?;
    let asked = Command::new("pkcs11-tool")
        .args(["--module", MODULE, "--token-label", &format!("slot-{slot}")])
        .args([
            "--login",
            "--pin",
            "env:CHAOS_PIN",
            "--list-objects",
            "--type",
            "secrkey",
        ])
        .env("SOFTHSM2_CONF", node.dir.join("softhsm2.conf"))
        .env("CHAOS_PIN", pin.trim())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(LIMIT, asked)
        .await
        .with_context(|| format!("{}: pkcs11-tool: no answer within {LIMIT:?}", node.id()))?
        .context("pkcs11-tool: install opensc")?;
    ensure!(
        output.status.success(),
        "{}: slot {slot}: pkcs11-tool: {}",
        node.id(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(TokenView {
        slot: slot.to_owned(),
        ids: ids(&String::from_utf8_lossy(&output.stdout)),
    })
}

/// `CKA_ID` of every object in a listing.
fn ids(listing: &str) -> Vec<String> {
    let fields = listing.lines().filter_map(|line| line.trim().split_once(':'));
    fields
        .filter(|(name, _)| name.trim() == "ID")
        .map(|(_, id)| id.trim().to_ascii_lowercase())
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_has_the_id_of_every_key() {
        let listing = "\
Using slot 0 with a present token (0x1)
Secret Key Object; AES length 32
  label:      kek-exchange-key-v1
  ID:         5F00aa
  Usage:      encrypt, decrypt
  Access:     never extractable
Secret Key Object; AES length 32
  label:      kek-exchange-key-v2
  ID:         5f00ab
";
        assert_eq!(ids(listing), ["5f00aa", "5f00ab"]);
        assert!(ids("").is_empty());
    }
}
