//! Tokens that were initialised once and are copied into every playground. A token's RSA key pair takes a second to
//! make, and two of them a node took longer than everything else that a test's cluster needs; which key pair it is
//! does not matter to any test. No token of the pool was ever opened by a node, so no other key is in it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

/// As many nodes as most tests have at the end; more make their tokens themselves.
const NODES: &str = "5";
const PREFIX: &str = "token-pool-";

/// The folder of the pool, which the first who asks makes. Another build of hsmctl has another pool.
pub(crate) async fn ready(hsmctl: &Path) -> Result<PathBuf> {
    let folder = hsmctl.parent().context("hsmctl is in no folder")?;
    let built = std::fs::metadata(hsmctl).with_context(|| hsmctl.display().to_string())?;
    let pool = folder.join(format!("{PREFIX}{}-{}", built.mtime(), built.mtime_nsec()));
    if pool.is_dir() {
        return Ok(pool);
    }
    let path = folder.join("token-pool.lock");
    let _lock = tokio::task::spawn_blocking(move || lock(&path))
        .await
        .context("wait for the token pool")??;
    if !pool.is_dir() {
        remove_old(folder)?;
        make(hsmctl, &pool).await?;
    }
    Ok(pool)
}

/// The kernel lets go of it when the process ends, however that is.
fn lock(path: &Path) -> Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    file.lock().with_context(|| path.display().to_string())?;
    Ok(file)
}

/// Pools of earlier builds, and what was cut short.
fn remove_old(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let is_pool = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if is_pool && entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

async fn make(hsmctl: &Path, pool: &Path) -> Result<()> {
    let partial = pool.with_extension("partial");
    let output = Command::new(hsmctl)
        .args(["dev", "up", "--prepare-only", "--nodes", NODES, "--dir"])
        .arg(&partial)
        .env_remove("HSM_PKCS11_LIB")
        .stdin(Stdio::null())
        .output()
        .await
        .context("run hsmctl dev up --prepare-only")?;
    ensure!(
        output.status.success(),
        "hsmctl dev up --prepare-only: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&partial, pool).with_context(|| pool.display().to_string())
}
