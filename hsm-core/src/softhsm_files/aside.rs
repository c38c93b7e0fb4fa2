//! Object files over which SoftHSM would end the process, set aside before it looks.

use std::path::Path;

use super::{SET_ASIDE, TOKEN_OBJECT, TokenFiles, token_dirs};
use crate::durable;
use crate::error::HsmError;
use crate::object_file;
use crate::token_lock::TokenLock;

/// No file of a token is nearly as long; SoftHSM asks for as much memory as a file announces.
const ABSURD: u64 = 16 << 20;

/// Sets object files aside that announce more than any file has, before the module looks for its tokens: SoftHSM 2.6.1 asks for the
/// memory that a file announces, and where there cannot be as much it ends the whole process in `C_Initialize` (exit status 5), at every
/// start and without a word. No file that is only cut off or just being written announces so much.
///
/// They are kept, whatever they were: of a key that nobody can import again every byte but one may be there. Only tokens are touched that
/// this program has used before, and nobody owns now. What cannot be read is passed over, as the module does.
///
/// Says what lies aside, since earlier too: whoever runs this has to know, because a key in it outlasts its destruction.
///
/// # Errors
/// Such a file that cannot be set aside, so that the module must not be loaded: `token.object` itself, also if a name in it is too long
/// (it was restored before if there is a copy, [`super::restore_torn_tokens`]), or one of a token that is not ours.
pub(crate) fn set_absurd_aside(token_root: &Path) -> Result<Vec<String>, HsmError> {
    let mut set_aside = Vec::new();
    for dir in token_dirs(token_root).unwrap_or_default() {
        let main = dir.join(TOKEN_OBJECT);
        let Ok(token) = durable::read(&main) else { continue };
        let token = token.unwrap_or_default();
        if let Some(announced) = absurd(&token) {
            return Err(harmful(&main, &format!("it announces {announced} bytes")));
        }
        if let Some((name, length)) = object_file::overlong_name(&token) {
            return Err(harmful(&main, &format!("its {name} has {length} bytes")));
        }
        let files = TokenFiles { dir };
        for name in files.objects().unwrap_or_default() {
            let path = files.dir.join(&name);
            let Ok(Some(contents)) = durable::read(&path) else {
                continue;
            };
            let Some(announced) = absurd(&contents) else {
                continue;
            };
            let serial = object_file::parse(&token).serial().filter(|_| files.is_ours());
            let lock = serial.and_then(|serial| TokenLock::beside(token_root, &serial).ok());
            let aside = path.with_extension(SET_ASIDE);
            let moved = lock.is_some_and(|_lock| std::fs::rename(&path, &aside).is_ok());
            if !moved {
                return Err(harmful(&path, &format!("it announces {announced} bytes")));
            }
            durable::sync(&files.dir)?;
        }
        let lies_there = std::fs::read_dir(&files.dir).into_iter().flatten().flatten();
        let aside = lies_there
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == SET_ASIDE));
        set_aside.extend(aside.map(|path| path.display().to_string()));
    }
    set_aside.sort();
    Ok(set_aside)
}

fn absurd(contents: &[u8]) -> Option<u64> {
    object_file::announced_beyond_the_end(contents).filter(|announced| *announced > ABSURD)
}

fn harmful(path: &Path, why: &str) -> HsmError {
    HsmError::File {
        path: path.display().to_string(),
        action: "read",
        reason: format!(
            "it is damaged: {why}, and SoftHSM ends the process over that; put the token's folder back from a copy"
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::tests::{overlong, token, token_object};
    use super::super::{copy_of, restore_torn_tokens};
    use super::*;

    #[test]
    fn what_announces_more_than_any_file_has_is_set_aside_before_the_module_looks() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let dir = token(root.path(), &whole, &whole);
        std::fs::write(dir.join("absurd.object"), overlong(4, u64::MAX)).unwrap();
        std::fs::write(dir.join("fine.object"), &whole).unwrap();
        // Somebody may be writing it; and cut off, it is passed over by SoftHSM.
        std::fs::write(dir.join("written.object"), overlong(4, 2000)).unwrap();
        let held = TokenLock::beside(root.path(), "abcd").unwrap();
        let refused = set_absurd_aside(root.path()).unwrap_err().to_string();
        assert!(refused.contains("from a copy"), "{refused}");
        drop(held);
        let aside = dir.join("absurd.object-damaged");
        for when in ["now", "since earlier"] {
            let said = set_absurd_aside(root.path()).unwrap();
            assert_eq!(said, [aside.display().to_string()], "{when}");
        }
        let files = TokenFiles::locate(root.path(), "abcd").unwrap().unwrap();
        let left: Vec<_> = files.objects().unwrap().into_iter().collect();
        assert_eq!(left, ["fine.object", "written.object"]);
        assert_eq!(std::fs::read(&aside).unwrap(), overlong(4, u64::MAX));
    }

    #[test]
    fn nothing_is_set_aside_in_a_token_that_is_not_ours() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let dir = token(root.path(), &whole, &whole);
        std::fs::remove_file(copy_of(&dir)).unwrap();
        std::fs::write(dir.join("absurd.object"), overlong(4, u64::MAX)).unwrap();
        let refused = set_absurd_aside(root.path()).unwrap_err().to_string();
        assert!(refused.contains("absurd.object"), "{refused}");
        assert!(dir.join("absurd.object").is_file());
    }

    #[test]
    fn a_token_object_with_a_name_that_is_too_long_is_restored_unless_a_pin_in_it_is_another_one() {
        let copied = token_object(b"so", Some(&[7; 72]));
        for (pin, restores) in [([7; 72], true), ([8; 72], false)] {
            let root = tempfile::tempdir().unwrap();
            let mut damaged = token_object(b"so", Some(&pin));
            // One bit, and what was the user PIN's blob is a label.
            let kind = damaged.len() - 72 - 17;
            damaged[kind] ^= 4;
            let dir = token(root.path(), &damaged, &copied);
            let restored = restore_torn_tokens(root.path()).unwrap();
            assert_eq!(restored.len(), usize::from(restores), "{restored:?}");
            let kept = dir.join("token.object-damaged");
            assert_eq!(std::fs::read(kept).ok(), restores.then_some(damaged));
            match set_absurd_aside(root.path()) {
                Ok(aside) => assert!(restores && aside.len() == 1, "{aside:?}"),
                Err(error) => {
                    let refused = error.to_string();
                    assert!(
                        !restores && refused.contains("its label has 72 bytes"),
                        "{refused}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_token_object_that_announces_more_than_any_file_has_is_restored_or_refused() {
        let root = tempfile::tempdir().unwrap();
        let whole = token_object(b"so", Some(b"user"));
        let mut damaged = whole.clone();
        let user_length = whole.len() - b"user".len() - 8;
        damaged[user_length] = 0x40;
        let dir = token(root.path(), &damaged, &whole);
        let refused = set_absurd_aside(root.path()).unwrap_err().to_string();
        assert!(refused.contains("token.object"), "{refused}");
        assert_eq!(restore_torn_tokens(root.path()).unwrap(), ["abcd"]);
        assert!(set_absurd_aside(root.path()).unwrap().is_empty());
        assert_eq!(std::fs::read(dir.join(TOKEN_OBJECT)).unwrap(), whole);
        assert!(set_absurd_aside(&root.path().join("absent")).unwrap().is_empty());
    }
}
