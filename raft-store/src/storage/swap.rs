//! Puts a sled that was written anew in the place of the one before. Two renames, in an order that any start can finish:
//! while there is no `sled`, the one beside it is whole.
//!
//! ```text
//! sled, sled.new           being written, or not yet put in place: the new one goes
//! sled.old, sled.new       killed between the renames: the new one was whole and durable before the first of them
//! sled, sled.old           in place: the old one goes
//! ```

use std::path::{Path, PathBuf};

use super::control::sync_parent;
use super::error::StoreFailure;

/// Where the new one is written.
pub(super) fn beside(dir: &Path) -> PathBuf {
    dir.join("sled.new")
}

fn in_force(dir: &Path) -> PathBuf {
    dir.join("sled")
}

fn before(dir: &Path) -> PathBuf {
    dir.join("sled.old")
}

/// Puts `sled.new`, which has to be whole and durable, in the place of `sled`.
pub(super) fn swap(dir: &Path) -> Result<(), StoreFailure> {
    fail::fail_point!("compact::before_swap");
    rename(&in_force(dir), &before(dir))?;
    fail::fail_point!("compact::between_renames");
    rename(&beside(dir), &in_force(dir))?;
    fail::fail_point!("compact::before_removal");
    remove(&before(dir))?;
    fail::fail_point!("compact::after_removal");
    Ok(())
}

/// Finishes, or takes back, what a process that was killed had begun. Under the directory's lock.
///
/// # Errors
/// The new one is there alone: nobody leaves that behind, so somebody has removed the others, and it may be the only copy.
pub(super) fn finish(dir: &Path) -> Result<(), StoreFailure> {
    if !exists(&in_force(dir))? {
        if !exists(&before(dir))? {
            if exists(&beside(dir))? {
                let what = "`sled` and `sled.old` are missing, and `sled.new` is there".to_owned();
                return Err(StoreFailure::Damaged(what));
            }
            return Ok(());
        }
        let whole = if exists(&beside(dir))? {
            beside(dir)
        } else {
            before(dir)
        };
        rename(&whole, &in_force(dir))?;
    }
    remove(&beside(dir))?;
    remove(&before(dir))
}

fn exists(path: &Path) -> Result<bool, StoreFailure> {
    path.try_exists()
        .map_err(StoreFailure::io(format!("look for {}", path.display())))
}

/// Durable when this returns: the second of two renames must never be on the disk without the first.
fn rename(from: &Path, to: &Path) -> Result<(), StoreFailure> {
    std::fs::rename(from, to).map_err(StoreFailure::io(format!("rename {}", from.display())))?;
    sync_parent(to)
}

/// Removes a folder, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), StoreFailure> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreFailure::io(format!("remove {}", path.display()))(error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Which of the folders there are, and whose contents `sled` has.
    fn finished(there: &[&str]) -> (Vec<String>, String) {
        let top = tempfile::tempdir().unwrap();
        for name in there {
            std::fs::create_dir(top.path().join(name)).unwrap();
            std::fs::write(top.path().join(name).join("db"), name).unwrap();
        }
        finish(top.path()).unwrap();
        let left = std::fs::read_dir(top.path()).unwrap();
        let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let contents = std::fs::read_to_string(top.path().join("sled/db")).unwrap_or_default();
        (left.collect(), contents)
    }

    #[test]
    fn whatever_a_kill_leaves_one_whole_sled_remains() {
        let left: [(&[&str], &str); 6] = [
            (&["sled"], "sled"),
            (&["sled", "sled.new"], "sled"),
            (&["sled.old", "sled.new"], "sled.new"),
            (&["sled", "sled.old"], "sled"),
            (&["sled", "sled.new", "sled.old"], "sled"),
            // Nobody leaves that behind; what there is is whole all the same.
            (&["sled.old"], "sled.old"),
        ];
        for (there, contents) in left {
            assert_eq!(
                finished(there),
                (vec!["sled".to_owned()], contents.to_owned()),
                "{there:?}"
            );
        }
        // A new directory, or a lost one: the store says which.
        assert_eq!(finished(&[]).0, Vec::<String>::new());
    }

    #[test]
    fn the_only_copy_there_is_is_not_removed() {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("sled.new")).unwrap();
        let refused = finish(top.path()).unwrap_err();
        assert!(
            matches!(&refused, StoreFailure::Damaged(what) if what.contains("`sled.new` is there")),
            "{refused}"
        );
        assert!(top.path().join("sled.new").is_dir());
    }
}
