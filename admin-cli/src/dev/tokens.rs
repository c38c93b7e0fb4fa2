//! The tokens of the nodes: one per slot, initialised by `hsmctl slot init` in a process of its own, because
//! a process may load the module once only, with one set of tokens. Tokens that may hold keys are never
//! touched.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use super::layout::{Facts, Layout, Node, SLOTS};
use crate::files;
use crate::progress::Progress;

/// Says that a node's tokens are initialised.
const DONE: &str = "tokens.done";

/// Another playground that has never run, whose tokens are copied instead of making new ones.
pub(crate) type Pool = (Layout, Facts);

/// Initialises the nodes' tokens, unless that is done; several nodes at a time, because a token's key pair takes a
/// second to make.
pub(crate) fn ensure(layout: &Layout, nodes: &[Node], module: &Path, pool: Option<&Pool>) -> Result<()> {
    pins(layout, pool)?;
    let progress = Progress::of_steps("tokens of the nodes", nodes.len());
    thread::scope(|scope| {
        let making: Vec<_> = nodes
            .iter()
            .map(|node| {
                let made = scope.spawn(move || ensure_one(layout, node, module, pool));
                (node.number, made)
            })
            .collect();
        making.into_iter().try_for_each(|(number, made)| {
            let made = made.join().map_err(|_| anyhow!("making its tokens panicked"));
            progress.step();
            made.and_then(|made| made)
                .with_context(|| format!("node {number}"))
        })
    })
}

/// Every slot's PINs, which all nodes share. On disk before any token has them.
fn pins(layout: &Layout, pool: Option<&Pool>) -> Result<()> {
    for slot in &SLOTS {
        for file in [Layout::pin_file, Layout::so_pin_file] {
            let path = file(layout, slot.name);
            if path.exists() {
                continue;
            }
            match pool {
                Some((pool, _)) => {
                    let pin = files::read_secret(&file(pool, slot.name))?;
                    files::write(&path, pin.as_bytes())?;
                }
                None => files::write(&path, hsm_core::generate_pin()?.expose().as_bytes())?,
            }
        }
    }
    Ok(())
}

fn ensure_one(layout: &Layout, node: &Node, module: &Path, pool: Option<&Pool>) -> Result<()> {
    let done = node.dir.join(DONE);
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
    match pool.filter(|(_, pooled)| node.number <= pooled.nodes) {
        Some((pool, pooled)) => copy_folder(&pool.node(*pooled, node.number)?.tokens(), &tokens)?,
        None => {
            for slot in &SLOTS {
                init(layout, node, module, slot.name, slot.label)?;
            }
        }
    }
    files::write(&done, b"initialised by hsmctl dev up\n")
}

/// A token's files are the same wherever they lie.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let about = || format!("{}: copy to {}", from.display(), to.display());
    for entry in std::fs::read_dir(from).with_context(about)? {
        let entry = entry.with_context(about)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().with_context(about)?.is_dir() {
            files::private_dir(&target)?;
            copy_folder(&source, &target)?;
        } else {
            std::fs::copy(&source, &target).with_context(about)?;
        }
    }
    Ok(())
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
    use super::*;

    fn prepared() -> (tempfile::TempDir, Layout, Node) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        files::private_dir(&layout.secrets()).unwrap();
        let node = layout.node(Facts::new(1, 8443, 0).unwrap(), 1).unwrap();
        std::fs::create_dir_all(node.tokens()).unwrap();
        std::fs::write(node.tokens().join("key"), "k").unwrap();
        (dir, layout, node)
    }

    #[test]
    fn tokens_that_are_done_stay() {
        let (_dir, layout, node) = prepared();
        std::fs::write(node.dir.join(DONE), "").unwrap();
        ensure(
            &layout,
            std::slice::from_ref(&node),
            Path::new("/nonexistent.so"),
            None,
        )
        .unwrap();
        assert!(node.tokens().join("key").exists());
    }

    #[test]
    fn tokens_and_pins_of_a_pool_are_copied() {
        let (_pool_dir, pool, pooled) = prepared();
        std::fs::create_dir(pooled.tokens().join("token")).unwrap();
        std::fs::write(pooled.tokens().join("token/object"), "o").unwrap();
        for slot in &SLOTS {
            files::write(&pool.pin_file(slot.name), b"pin").unwrap();
            files::write(&pool.so_pin_file(slot.name), b"so pin").unwrap();
        }
        let (_dir, layout, node) = prepared();
        let pool = (pool, Facts::new(1, 8443, 0).unwrap());
        let nodes = [node.clone()];
        ensure(&layout, &nodes, Path::new("/nonexistent.so"), Some(&pool)).unwrap();
        assert_eq!(std::fs::read(node.tokens().join("token/object")).unwrap(), b"o");
        for slot in &SLOTS {
            assert_eq!(std::fs::read(layout.pin_file(slot.name)).unwrap(), b"pin");
        }
    }

    #[test]
    fn tokens_of_a_node_that_has_run_are_never_made_anew() {
        let (_dir, layout, node) = prepared();
        std::fs::create_dir(node.data()).unwrap();
        let error = ensure(
            &layout,
            std::slice::from_ref(&node),
            Path::new("/nonexistent.so"),
            None,
        )
        .unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("left alone"), "{error}");
        assert!(node.tokens().join("key").exists());
    }
}
