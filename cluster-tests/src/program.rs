//! What nodes are started as: hsm-node, or something that becomes hsm-node under the same pid.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::TempDir;

/// A script that `HSM_NODE_BIN` can name. What it says holds for every start after it was written.
pub struct Program {
    folder: TempDir,
    node: PathBuf,
}

impl Program {
    /// Starts hsm-node itself.
    pub fn new() -> Result<Self> {
        let program = Self {
            folder: tempfile::Builder::new().prefix("hsm-program-").tempdir()?,
            node: crate::binary("hsm-node")?,
        };
        program.plain()?;
        Ok(program)
    }

    /// The script.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("node")
    }

    /// What it ends up as.
    #[must_use]
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Nothing before the node.
    pub fn plain(&self) -> Result<()> {
        self.write("")
    }

    /// Words of a shell before the node's own; a node's folder is `${2%/*}`.
    pub fn write(&self, before: &str) -> Result<()> {
        let text = format!("#!/bin/sh\nexec {before}'{}' \"$@\"\n", self.node.display());
        // A node that starts at this moment reads the old script or the new one.
        let new = self.path().with_extension("new");
        fs::write(&new, text)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o700))?;
        Ok(fs::rename(&new, self.path())?)
    }
}
