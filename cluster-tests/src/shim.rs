//! A PKCS#11 module between a node and SoftHSM that can be told to misbehave: `shim/pkcs11_shim.c`, which says what
//! rules there are.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

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

    /// How often a process has made the calls that rules `log`, by their first argument: of most, that is the handle
    /// of a session.
    pub fn logged(&self, process: i32) -> Result<BTreeMap<u64, usize>> {
        let path = self.library.with_extension("so.calls");
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.with_context(|| path.display().to_string())?,
        };
        let mut calls: BTreeMap<u64, usize> = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [by, _, first] = words[..] else {
                bail!("{}: {line:?}", path.display());
            };
            if by.parse::<i32>()? == process {
                *calls.entry(first.parse::<u64>()?).or_default() += 1;
            }
        }
        Ok(calls)
    }
}
