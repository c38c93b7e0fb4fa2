//! A PKCS#11 module between a node and SoftHSM that can be told to misbehave: `shim/pkcs11_shim.c`, which says what
//! rules there are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The module that Debian's package installs.
pub const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// A shim, compiled for one test. Nodes that load it share its rules.
pub struct Shim {
    library: PathBuf,
    module: PathBuf,
}

impl Shim {
    /// Compiles it into `folder`, in front of `module`. Without rules it passes everything on.
    pub fn build(folder: &Path, name: &str, module: &Path) -> Result<Self> {
        let shim = Self {
            library: folder.join(format!("{name}.so")),
            module: module.to_owned(),
        };
        shim.obey(&[])?;
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/shim/pkcs11_shim.c");
        let output = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o"])
            .arg(&shim.library)
            .args([source, "-ldl"])
            .output()
            .context("start cc")?;
        ensure!(
            output.status.success(),
            "cc {source}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(shim)
    }

    /// What goes into `pkcs11_lib`.
    #[must_use]
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// These rules from now on, and no others; in force for every call that begins after this.
    pub fn obey(&self, rules: &[&str]) -> Result<()> {
        let mut text = format!("module {}\n", self.module.display());
        for rule in rules {
            text.push_str(rule);
            text.push('\n');
        }
        let path = self.library.with_extension("so.rules");
        let new = path.with_extension("new");
        std::fs::write(&new, text).with_context(|| new.display().to_string())?;
        std::fs::rename(&new, &path).with_context(|| path.display().to_string())
    }
}
