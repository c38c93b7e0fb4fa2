//! SoftHSM's files, where it leaves them in danger: it never syncs, `C_Login` itself truncates
//! `token.object`, and a kill inside a write leaves torn objects. Only files that SoftHSM cannot
//! read are ever replaced or removed here, and only under the token's lock.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::HsmError;
use crate::object_file::{self, ObjectFile, TOKEN_FLAGS};
use crate::token_lock::TokenLock;

pub(crate) use aside::set_absurd_aside;

mod aside;
mod copy;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod damage_tests;

const TOKEN_OBJECT: &str = "token.object";
/// Of an object file that SoftHSM must not see.
const SET_ASIDE: &str = "object-damaged";

/// So many bytes may be damage: flags that SoftHSM has written since, 8 bytes, and as many besides. A PIN's blob has 72, drawn
/// anew each time.
const DAMAGED_BYTES: usize = 16;

/// The files of one token.
///
/// ```text
/// <token root>/<uuid>/token.object          label, serial, flags, PIN blobs
/// <token root>/<uuid>/<uuid>.object         one per token object
/// <token root>/<uuid>/generation            counter of changes
/// <token root>/<uuid>.token-object          our copy of token.object
/// <token root>/<uuid>.token-object-aside    the same, while the token is being erased
/// <token root>/<serial>.hsm-owner           the lock
/// ```
///
/// The copy lies beside the token, not in a node's state: it has to be found before the module
/// is initialised, belongs to the token wherever that is moved, and must not come back from
/// another time than the token's.
#[derive(Debug, Clone)]
pub(crate) struct TokenFiles {
    dir: PathBuf,
}

impl TokenFiles {
    /// The directory of the token with this serial number.
    pub(crate) fn locate(token_root: &Path, serial: &str) -> Result<Option<Self>, HsmError> {
        for dir in token_dirs(token_root)? {
            let found = match durable::read(&dir.join(TOKEN_OBJECT))? {
                Some(contents) => object_file::parse(&contents).serial(),
                None => None,
            };
            if found.as_deref() == Some(serial) {
                return Ok(Some(Self { dir }));
            }
        }
        Ok(None)
    }

    /// True while the token's directory and main file are there.
    pub(crate) fn are_there(&self) -> bool {
        self.dir.join(TOKEN_OBJECT).is_file()
    }

    /// Names of the object files, to tell afterwards which ones a call made.
    pub(crate) fn objects(&self) -> Result<BTreeSet<OsString>, HsmError> {
        let fail = |error: std::io::Error| HsmError::file(&self.dir, "list", &error);
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            if name != TOKEN_OBJECT && Path::new(&name).extension().is_some_and(|ext| ext == "object") {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Puts every object file made since `before` on disk, and the directory that names them.
    pub(crate) fn sync_since(&self, before: &BTreeSet<OsString>) -> Result<(), HsmError> {
        for name in self.objects()?.difference(before) {
            durable::sync(&self.dir.join(name))?;
        }
        self.sync_dir()
    }

    /// Puts everything on disk. After this at the opening of a slot, an object that is found is
    /// one that survives a power cut, also if the process that made it was killed before its own
    /// sync.
    pub(crate) fn sync_all(&self) -> Result<(), HsmError> {
        self.sync_since(&BTreeSet::new())?;
        durable::sync(&self.dir.join(TOKEN_OBJECT))
    }

    /// Puts removals on disk.
    pub(crate) fn sync_dir(&self) -> Result<(), HsmError> {
        let generation = self.dir.join("generation");
        if generation.is_file() {
            durable::sync(&generation)?;
        }
        durable::sync(&self.dir)
    }

    /// Keeps a synced copy of `token.object`, to be made before every `C_Login`.
    pub(crate) fn back_up(&self) -> Result<(), HsmError> {
        let path = self.dir.join(TOKEN_OBJECT);
        let Some(contents) = durable::read(&path)? else {
            return Ok(());
        };
        let copy = copy_of(&self.dir);
        let stored = durable::read(&copy)?;
        let known = stored.as_deref().and_then(copy::unpack);
        let parsed = object_file::parse(&contents);
        let whole = matches!(parsed, ObjectFile::Whole(_))
            && !known
                .as_deref()
                .is_some_and(|known| is_torn(&parsed, &object_file::parse(known)));
        if !whole {
            return Ok(());
        }
        let packed = copy::pack(&contents);
        if stored.as_deref() != Some(packed.as_slice()) {
            durable::write(&copy, &packed)?;
        }
        durable::remove(&aside_of(&self.dir))
    }

    /// Puts the copy aside: the token is about to be erased, and its old PINs must not come back over new ones.
    /// SoftHSM keeps the SO PIN's blob when it erases a token, so that an erased one looks like the beginning
    /// of its own copy; see [`backup_of`]. If nothing was erased, [`TokenFiles::back_up`] makes a copy again.
    pub(crate) fn set_backup_aside(&self) -> Result<(), HsmError> {
        let copy = copy_of(&self.dir);
        if let Some(contents) = durable::read(&copy)? {
            durable::write(&aside_of(&self.dir), &contents)?;
        }
        durable::remove(&copy)
    }

    /// Forgets the copy for good: the token is erased.
    pub(crate) fn forget_backup(&self) -> Result<(), HsmError> {
        durable::remove(&copy_of(&self.dir))?;
        durable::remove(&aside_of(&self.dir))
    }

    /// Removes object files that end in the middle of something. SoftHSM ignores them for ever;
    /// their keys are imported again. A private key is not: its file is set aside, because a damaged length reads like a cut and
    /// leaves every other byte. Returns their names.
    pub(crate) fn remove_unreadable(&self) -> Result<Vec<String>, HsmError> {
        let mut removed = Vec::new();
        for name in self.objects()? {
            let path = self.dir.join(&name);
            let Some(contents) = durable::read(&path)? else {
                continue;
            };
            let parsed = object_file::parse(&contents);
            if !matches!(parsed, ObjectFile::Torn(_)) {
                continue;
            }
            let (name, bytes) = (name.to_string_lossy(), contents.len());
            if parsed.is_private_key() {
                let aside = path.with_extension(SET_ASIDE);
                std::fs::rename(&path, &aside).map_err(|error| HsmError::file(&path, "rename", &error))?;
                durable::sync(&self.dir)?;
                removed.push(format!(
                    "object file {name} ({bytes} bytes, a private key, cut off or damaged), kept as {}",
                    aside.display()
                ));
            } else {
                durable::remove(&path)?;
                removed.push(format!("object file {name} ({bytes} bytes, cut off)"));
            }
            durable::remove(&path.with_extension("lock"))?;
        }
        Ok(removed)
    }

    /// A token that this program has logged in to has a copy of its main file, see [`TokenFiles::back_up`]. Others are not ours
    /// to touch.
    fn is_ours(&self) -> bool {
        copy_of(&self.dir).is_file() || aside_of(&self.dir).is_file()
    }
}

/// Restores every `token.object` that a kill inside `C_Login` left empty or cut off, or over which SoftHSM would end the
/// process, from the copy beside it. One of the latter kind is kept as `token.object-damaged`.
///
/// To be called when no process of ours has the token open; a token that is
/// owned is left alone. Returns the serial numbers.
pub(crate) fn restore_torn_tokens(token_root: &Path) -> Result<Vec<String>, HsmError> {
    let mut restored = Vec::new();
    for dir in token_dirs(token_root)? {
        let Some(copy) = backup_of(&dir)? else {
            continue;
        };
        let parsed_copy = object_file::parse(&copy);
        let Some(serial) = parsed_copy.serial() else {
            continue;
        };
        let path = dir.join(TOKEN_OBJECT);
        let now = durable::read(&path)?.unwrap_or_default();
        if !is_to_be_restored(&now, &copy, &parsed_copy) {
            continue;
        }
        let Ok(_lock) = TokenLock::beside(token_root, &serial) else {
            continue;
        };
        // Between the first look and the lock the owner may have finished its write.
        let now = durable::read(&path)?.unwrap_or_default();
        if is_to_be_restored(&now, &copy, &parsed_copy) {
            if !is_torn(&object_file::parse(&now), &parsed_copy) {
                durable::write(&path.with_extension(SET_ASIDE), &now)?;
            }
            durable::write(&path, &copy)?;
            restored.push(serial);
        }
    }
    Ok(restored)
}

/// Whether the copy stands for what is there now. For a file over which SoftHSM would end the process it does only if little
/// in it is otherwise: another PIN is none of what was damaged, and must not be undone.
fn is_to_be_restored(now: &[u8], copy: &[u8], parsed_copy: &ObjectFile) -> bool {
    let nearly = || {
        let differing = now.iter().zip(copy).filter(|(now, copied)| now != copied);
        now.len() == copy.len() && differing.count() <= DAMAGED_BYTES
    };
    is_torn(&object_file::parse(now), parsed_copy) || (object_file::overlong_name(now).is_some() && nearly())
}

/// Refuses two token folders of one serial number, a copy left beside its original for example:
/// SoftHSM 2.6.1 takes its slot numbers from serial numbers and aborts the whole process in
/// `C_Initialize` over two that are alike, at every start and without a word.
///
/// A folder that cannot be read is left to the module.
pub(crate) fn refuse_same_serial(token_root: &Path) -> Result<(), HsmError> {
    let Ok(dirs) = token_dirs(token_root) else {
        return Ok(());
    };
    let mut seen: BTreeMap<String, PathBuf> = BTreeMap::new();
    for dir in dirs {
        let Ok(Some(contents)) = durable::read(&dir.join(TOKEN_OBJECT)) else {
            continue;
        };
        let Some(serial) = object_file::parse(&contents).serial() else {
            continue;
        };
        if let Some(other) = seen.insert(serial.clone(), dir.clone()) {
            return Err(HsmError::File {
                path: token_root.display().to_string(),
                action: "look for tokens",
                reason: format!(
                    "{} and {} are one token (serial {serial}), and SoftHSM aborts over that; move one of them away",
                    other.display(),
                    dir.display()
                ),
            });
        }
    }
    Ok(())
}

/// True if `now` can be a beginning of what `copy` is a copy of: nothing in it contradicts the
/// copy, and something is missing. A token that was made anew has another SO PIN blob and so
/// contradicts it; flags differ after every wrong PIN and say nothing.
pub(crate) fn is_torn(now: &ObjectFile, copy: &ObjectFile) -> bool {
    let (ObjectFile::Whole(attributes) | ObjectFile::Torn(attributes)) = now else {
        return false;
    };
    let ObjectFile::Whole(expected) = copy else {
        return false;
    };
    // Flags that the copy lacks contradict it too: it is a copy of something else, or damaged.
    let contradicted = attributes.iter().any(|(kind, value)| {
        copy.attribute(*kind)
            .is_none_or(|copied| *kind != TOKEN_FLAGS && copied != value.as_slice())
    });
    // SO PIN blobs are salted: equal ones mean the same initialisation.
    let missing = expected.iter().any(|(kind, _)| now.attribute(*kind).is_none());
    !contradicted && missing
}

/// The copy to restore from. One that was put aside counts only while the token has objects: erasing it begins
/// with them, and before that `C_InitToken` writes nothing of `token.object` but its flags.
fn backup_of(dir: &Path) -> Result<Option<Vec<u8>>, HsmError> {
    if let Some(copy) = copy::read(&copy_of(dir))? {
        return Ok(Some(copy));
    }
    let Some(aside) = copy::read(&aside_of(dir))? else {
        return Ok(None);
    };
    let files = TokenFiles { dir: dir.to_owned() };
    Ok((!files.objects()?.is_empty()).then_some(aside))
}

/// Our copy of a token directory's `token.object`. SoftHSM takes only directories for tokens, so
/// a file beside them is invisible to it.
fn copy_of(dir: &Path) -> PathBuf {
    beside(dir, ".token-object")
}

/// Where the copy is while the token is being erased.
fn aside_of(dir: &Path) -> PathBuf {
    beside(dir, ".token-object-aside")
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}

fn token_dirs(token_root: &Path) -> Result<Vec<PathBuf>, HsmError> {
    let fail = |error: std::io::Error| HsmError::file(token_root, "list tokens", &error);
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(token_root).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_type().map_err(fail)?.is_dir() {
            dirs.push(entry.path());
        }
    }
    dirs.sort();
    Ok(dirs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::object_file::{SO_PIN, TOKEN_SERIAL};

    fn counted(kind: u64, value: &[u8]) -> Vec<u8> {
        [
            kind.to_be_bytes().as_slice(),
            &3_u64.to_be_bytes(),
            &(value.len() as u64).to_be_bytes(),
            value,
        ]
        .concat()
    }

    pub(super) fn token_object(so_pin: &[u8], user_pin: Option<&[u8]>) -> Vec<u8> {
        let mut contents = [
            vec![0; 8],
            counted(TOKEN_SERIAL, b"abcd"),
            counted(SO_PIN, so_pin),
        ]
        .concat();
        if let Some(pin) = user_pin {
            contents.extend(counted(SO_PIN + 1, pin));
        }
        contents
    }

    pub(super) fn token(root: &Path, now: &[u8], copy: &[u8]) -> PathBuf {
        let dir = root.join("1f2e-uuid");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(TOKEN_OBJECT), now).unwrap();
        std::fs::write(copy_of(&dir), copy).unwrap();
        dir
    }

    #[test]
    fn an_empty_or_cut_token_object_is_restored() {
        let whole = token_object(b"so", Some(b"user"));
        let without_user = token_object(b"so", None).len();
        for length in [0, 7, 8, 20, without_user, whole.len() - 1] {
            let root = tempfile::tempdir().unwrap();
            let dir = token(root.path(), &whole[..length], &whole);
            assert_eq!(restore_torn_tokens(root.path()).unwrap(), ["abcd"], "{length}");
            assert_eq!(std::fs::read(dir.join(TOKEN_OBJECT)).unwrap(), whole);
        }
    }

    #[test]
    fn a_token_initialised_anew_keeps_its_new_pins() {
        let root = tempfile::tempdir().unwrap();
        let now = token_object(b"new", None);
        token(root.path(), &now, &token_object(b"so", Some(b"user")));
        assert!(restore_torn_tokens(root.path()).unwrap().is_empty());
    }

    /// Killed while it was being erased: in the write of its flags, or after its user PIN was removed. In both
    /// it is the beginning of its own copy.
    #[test]
    fn a_copy_put_aside_comes_back_only_while_nothing_is_erased() {
        let whole = token_object(b"so", Some(b"user"));
        let erased = token_object(b"so", None);
        for (object_left, expected) in [(true, whole.clone()), (false, erased.clone())] {
            let root = tempfile::tempdir().unwrap();
            let dir = token(root.path(), &whole, &whole);
            if object_left {
                std::fs::write(dir.join("a.object"), &whole).unwrap();
            }
            let files = TokenFiles::locate(root.path(), "abcd").unwrap().unwrap();
            files.set_backup_aside().unwrap();
            assert!(!copy_of(&dir).exists());
            std::fs::write(dir.join(TOKEN_OBJECT), &erased).unwrap();
            let restored = restore_torn_tokens(root.path()).unwrap();
            assert_eq!(restored.len(), usize::from(object_left));
            assert_eq!(std::fs::read(dir.join(TOKEN_OBJECT)).unwrap(), expected);
        }
    }

    #[test]
    fn a_token_that_was_not_erased_has_its_copy_again() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let dir = token(root.path(), &whole, &whole);
        let files = TokenFiles::locate(root.path(), "abcd").unwrap().unwrap();
        files.set_backup_aside().unwrap();
        files.back_up().unwrap();
        assert_eq!(copy::read(&copy_of(&dir)).unwrap().unwrap(), whole);
        assert!(!aside_of(&dir).exists());
        files.set_backup_aside().unwrap();
        files.forget_backup().unwrap();
        assert!(!copy_of(&dir).exists() && !aside_of(&dir).exists());
    }

    #[test]
    fn an_owned_token_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = token(root.path(), b"", &token_object(b"so", None));
        let _lock = TokenLock::beside(root.path(), "abcd").unwrap();
        assert!(restore_torn_tokens(root.path()).unwrap().is_empty());
        assert_eq!(std::fs::read(dir.join(TOKEN_OBJECT)).unwrap(), b"");
    }

    #[test]
    fn two_folders_of_one_token_are_refused_by_name() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        token(root.path(), &whole, &whole);
        refuse_same_serial(root.path()).unwrap();
        refuse_same_serial(&root.path().join("absent")).unwrap();
        let copy = root.path().join("copy-of-it");
        std::fs::create_dir(&copy).unwrap();
        std::fs::write(copy.join(TOKEN_OBJECT), &whole).unwrap();
        let error = refuse_same_serial(root.path()).unwrap_err().to_string();
        for part in ["1f2e-uuid", "copy-of-it", "serial abcd", "move one of them away"] {
            assert!(error.contains(part), "{error}");
        }
    }

    /// As SoftHSM begins a file: the class. Then something that is longer than the file, by its own word.
    pub(super) fn overlong(class: u64, announced: u64) -> Vec<u8> {
        [
            vec![0; 8],
            [[0; 8], 2_u64.to_be_bytes(), class.to_be_bytes()].concat(),
            [3_u64.to_be_bytes(), 3_u64.to_be_bytes(), announced.to_be_bytes()].concat(),
        ]
        .concat()
    }

    #[test]
    fn only_cut_object_files_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let dir = token(root.path(), &whole, &whole);
        std::fs::write(dir.join("a.object"), b"").unwrap();
        std::fs::write(dir.join("a.lock"), b"").unwrap();
        std::fs::write(dir.join("b.object"), &whole[..30]).unwrap();
        std::fs::write(dir.join("c.object"), &whole).unwrap();
        std::fs::write(dir.join("d.object"), [vec![0; 8], vec![9; 16]].concat()).unwrap();
        // One bit of a length, and no more.
        std::fs::write(dir.join("e.object"), overlong(3, 1 << 20)).unwrap();
        let files = TokenFiles::locate(root.path(), "abcd").unwrap().unwrap();
        let removed = files.remove_unreadable().unwrap();
        assert_eq!(removed.len(), 3);
        assert!(
            removed[2].contains("a private key") && removed[2].contains("e.object-damaged"),
            "{removed:?}"
        );
        assert_eq!(
            std::fs::read(dir.join("e.object-damaged")).unwrap(),
            overlong(3, 1 << 20)
        );
        let left: Vec<_> = files.objects().unwrap().into_iter().collect();
        assert_eq!(left, ["c.object", "d.object"]);
        assert!(!dir.join("a.lock").exists());
    }

    #[test]
    fn the_copy_follows_the_token_object() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let dir = token(root.path(), &whole, b"");
        let files = TokenFiles::locate(root.path(), "abcd").unwrap().unwrap();
        files.back_up().unwrap();
        assert_eq!(copy::read(&copy_of(&dir)).unwrap().unwrap(), whole);
        for torn in [Vec::new(), token_object(b"so", None)] {
            std::fs::write(dir.join(TOKEN_OBJECT), torn).unwrap();
            files.back_up().unwrap();
            assert_eq!(
                copy::read(&copy_of(&dir)).unwrap().unwrap(),
                whole,
                "a torn file must not become the copy"
            );
        }
        std::fs::write(dir.join(TOKEN_OBJECT), b"").unwrap();
        files.forget_backup().unwrap();
        assert!(restore_torn_tokens(root.path()).unwrap().is_empty());
    }
}
