//! Wall clocks of single nodes, by libfaketime: each node's goes by a file in its own folder, its monotonic clock is the
//! machine's.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::node::Node;

/// In a node's folder: what its wall clock shows besides the time.
const WALL: &str = "wall";
/// An offset that is none.
const RIGHT: &str = "+0d";

/// libfaketime, of whatever architecture this is. The variant for programs with threads: the other one reads its file
/// in several at once.
fn libfaketime() -> Result<PathBuf> {
    for folder in std::fs::read_dir("/usr/lib").context("/usr/lib")? {
        let library = folder?.path().join("faketime/libfaketimeMT.so.1");
        if library.is_file() {
            return Ok(library);
        }
    }
    bail!("libfaketime is not installed; install it with: scripts/setup.sh packages")
}

/// For [`crate::Program::write`]: a node with a wall clock that goes by its file, read whenever the time is asked for.
pub fn before_node() -> Result<String> {
    Ok(format!(
        "env LD_PRELOAD='{}' FAKETIME_TIMESTAMP_FILE=\"${{2%/*}}/{WALL}\" FAKETIME_NO_CACHE=1 \
         FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1 ",
        libfaketime()?.display()
    ))
}

/// Moves a node's wall clock by an offset such as `+400d`; `+0d` is right.
pub fn set(node: &Node, offset: &str) -> Result<()> {
    let new = node.dir.join(format!("{WALL}.new"));
    std::fs::write(&new, offset)?;
    Ok(std::fs::rename(&new, node.dir.join(WALL))?)
}

/// Whether nobody has moved a node's wall clock, or it was moved back.
#[must_use]
pub fn is_right(node: &Node) -> bool {
    let offset = std::fs::read_to_string(node.dir.join(WALL));
    offset.ok().is_none_or(|offset| offset == RIGHT)
}

/// libfaketime leaves a few bytes of shared memory behind when its process is killed; dropped, this removes them.
pub struct SharedMemory;

impl Drop for SharedMemory {
    fn drop(&mut self) {
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = ["faketime_shm_", "sem.faketime_sem_"]
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix));
            // One that has ended and that nobody has asked about yet is there, without a program.
            let ended = |pid: &str| {
                let program = std::fs::read_link(Path::new("/proc").join(pid).join("exe"));
                program.is_err_and(|error| error.kind() == ErrorKind::NotFound)
            };
            if pid.is_some_and(ended) {
                // Somebody else's, if it cannot be removed.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
