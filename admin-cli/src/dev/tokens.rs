//! The tokens of a node: one per slot, initialised by `hsmctl slot init` in a process of its own, because
//! a process may load the module once only, with one set of tokens. Tokens that may hold keys are never
//! touched.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::layout::{Layout, Node, SLOTS};
use crate::files;

/// Initialises the node's tokens, unless that is done. The PINs are made by the first node's.
pub(crate) fn ensure(layout: &Layout, node: &Node, module: &Path) -> Result<()> {
    let done = node.dir.join("tokens.done");
    if done.exists() {
        return Ok(());
    }
    if node.data().exists() {
        bail!(
            "{} is missing although node {} has run: its tokens may hold keys and are left alone; put the file \
             back, or make another playground",
            done.display(),
            node.number
        );
    }
    let tokens = node.tokens();
    if tokens.exists() {
        // Begun and cut short; the node has never run, so no key is in them.
        std::fs::remove_dir_all(&tokens).with_context(|| format!("{}: remove", tokens.display()))?;
    }
    files::private_dir(&tokens)?;
    for slot in &SLOTS {
        init(layout, node, module, slot.name, slot.label)?;
    }
    files::write(&done, b"initialised by hsmctl dev up\n")
}

fn init(layout: &Layout, node: &Node, module: &Path, slot: &str, label: &str) -> Result<()> {
    let output = Command::new(std::env::current_exe().context("find this program")?)
        .args(["slot", "init", "--output", "json", "--label", label, "--module"])
        .arg(module)
        .arg("--pin-file")
        .arg(layout.pin_file(slot))
        .arg("--so-pin-file")
        .arg(layout.so_pin_file(slot))
        .env("SOFTHSM2_CONF", node.softhsm_conf())
        .stdin(Stdio::null())
        .output()
        .context("run hsmctl slot init")?;
    if !output.status.success() {
        bail!(
            "token {label} of node {}: hsmctl slot init: {}\n{}",
            node.number,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::layout::Facts;
    use super::*;

    fn prepared() -> (tempfile::TempDir, Layout, Node) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let node = layout.node(Facts::new(1, 8443, 0).unwrap(), 1).unwrap();
        std::fs::create_dir_all(node.tokens()).unwrap();
        std::fs::write(node.tokens().join("key"), "k").unwrap();
        (dir, layout, node)
    }

    #[test]
    fn tokens_that_are_done_stay() {
        let (_dir, layout, node) = prepared();
        std::fs::write(node.dir.join("tokens.done"), "").unwrap();
        ensure(&layout, &node, Path::new("/nonexistent.so")).unwrap();
        assert!(node.tokens().join("key").exists());
    }

    #[test]
    fn tokens_of_a_node_that_has_run_are_never_made_anew() {
        let (_dir, layout, node) = prepared();
        std::fs::create_dir(node.data()).unwrap();
        let error = ensure(&layout, &node, Path::new("/nonexistent.so"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("left alone"), "{error}");
        assert!(node.tokens().join("key").exists());
    }
}
