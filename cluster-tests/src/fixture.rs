//! What earlier releases have written (`cluster-tests/fixtures`, made by `scripts/fixture.sh`): a stopped node with its
//! data, tokens and PINs, and what it said of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use hsm_api::Base64;
use hsm_api::admin::{AclDocument, ClusterStatus, ListKeksResponse, RevocationInfo};
use hsm_api::data::EncryptResponse;
use serde_json::Value;

use crate::playground::Playground;
use crate::ports;

/// Of `expected.json`.
const FORMAT: u64 = 1;
/// Files in which the folder is named that it was made in.
const NAMING: [&str; 3] = ["env", "node1/config.yaml", "node1/softhsm2.conf"];

/// See the module.
pub struct Fixture {
    /// Its folder's name.
    pub name: String,
    dir: PathBuf,
    root: String,
    base_port: u16,
    /// What was encrypted.
    pub sealed: Vec<Sealed>,
    /// `hsmctl cluster status`.
    pub status: ClusterStatus,
    /// `hsmctl list-kek`.
    pub keks: ListKeksResponse,
    /// `hsmctl acl get`.
    pub acl: AclDocument,
    /// `hsmctl revocations`.
    pub revocations: Vec<RevocationInfo>,
}

/// A ciphertext of that release.
pub struct Sealed {
    /// Who has made it.
    pub profile: String,
    /// The context that was asked for.
    pub context: String,
    /// What it was made of.
    pub plaintext: String,
    /// Associated data, if there was any.
    pub aad: Option<Base64>,
    /// The answer.
    pub answer: EncryptResponse,
}

/// All that there are, by their names.
pub fn all() -> Result<Vec<Fixture>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut fixtures = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let dir = entry?.path();
        if dir.is_dir() {
            fixtures.push(Fixture::read(&dir).with_context(|| dir.display().to_string())?);
        }
    }
    ensure!(!fixtures.is_empty(), "{}: no fixture", folder.display());
    fixtures.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(fixtures)
}

impl Fixture {
    fn read(dir: &Path) -> Result<Self> {
        let text = std::fs::read(dir.join("expected.json"))?;
        let mut said: Value = serde_json::from_slice(&text)?;
        ensure!(said["format"] == FORMAT, "format {}", said["format"]);
        let name = dir.file_name().context("a folder without a name")?;
        let sealed = said["sealed"].as_array().context("sealed")?;
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            dir: dir.to_owned(),
            root: text_of(&said, "root")?,
            base_port: serde_json::from_value(said["base_port"].clone())?,
            sealed: sealed.iter().map(Sealed::read).collect::<Result<_>>()?,
            status: serde_json::from_value(said["status"].take())?,
            keks: serde_json::from_value(said["keks"].take())?,
            acl: serde_json::from_value(said["acl"].take())?,
            revocations: serde_json::from_value(said["revocations"]["revocations"].take())?,
        })
    }

    /// A copy of it, which does not run yet. Waits until no other test has its ports, which stand in its state.
    pub async fn unpack(&self) -> Result<Playground> {
        ports::wait_for(self.base_port).await?;
        let folder = tempfile::Builder::new().prefix("hsm-fixture-").tempdir()?;
        let packed = self.dir.join("playground.tar.gz");
        let unpacked = Command::new("tar")
            .arg("-xzf")
            .arg(&packed)
            .arg("-C")
            .arg(folder.path())
            .status()
            .context("tar")?;
        ensure!(unpacked.success(), "tar -xzf {}: {unpacked}", packed.display());
        let dir = folder.path().join("playground");
        let own = dir.to_str().context("folder is not UTF-8")?;
        for file in NAMING {
            let path = dir.join(file);
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            if !text.contains(&self.root) {
                bail!("{}: does not name {}", path.display(), self.root);
            }
            std::fs::write(&path, text.replace(&self.root, own))?;
        }
        Playground::at(folder, self.base_port, 1)
    }
}

impl Sealed {
    fn read(said: &Value) -> Result<Self> {
        let aad = text_of(said, "aad")?;
        Ok(Self {
            profile: text_of(said, "profile")?,
            context: text_of(said, "context")?,
            plaintext: text_of(said, "plaintext")?,
            aad: (!aad.is_empty()).then(|| Base64::from(aad.as_bytes())),
            answer: serde_json::from_value(said["sealed"].clone())?,
        })
    }
}

fn text_of(said: &Value, name: &str) -> Result<String> {
    let text = said[name].as_str();
    Ok(text.with_context(|| format!("no {name}"))?.to_owned())
}
