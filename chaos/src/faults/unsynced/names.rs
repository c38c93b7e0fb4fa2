//! Inode numbers and the paths behind them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The number of the root, as FUSE has it.
pub(super) const ROOT: u64 = 1;

/// Paths lie below the folder that is passed on to.
pub(super) struct Names {
    root: PathBuf,
    paths: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    /// No number is given twice.
    last: u64,
}

impl Names {
    pub(super) fn new(root: PathBuf) -> Self {
        let mut names = Self {
            root,
            paths: HashMap::new(),
            numbers: HashMap::new(),
            last: ROOT,
        };
        names.forget();
        names
    }

    /// Every number but the root's.
    pub(super) fn forget(&mut self) {
        self.paths.clear();
        self.numbers.clear();
        self.paths.insert(ROOT, self.root.clone());
        self.numbers.insert(self.root.clone(), ROOT);
    }

    pub(super) fn path(&self, number: u64) -> Option<&Path> {
        self.paths.get(&number).map(PathBuf::as_path)
    }

    /// The number of what lies there.
    pub(super) fn number(&mut self, path: &Path) -> u64 {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        self.last += 1;
        self.paths.insert(self.last, path.to_owned());
        self.numbers.insert(path.to_owned(), self.last);
        self.last
    }

    /// What lies there is gone.
    pub(super) fn remove(&mut self, path: &Path) {
        if let Some(number) = self.numbers.remove(path) {
            self.paths.remove(&number);
        }
    }

    /// It and everything below it has another name; what had that name is gone.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) {
        self.remove(to);
        let moved: Vec<PathBuf> = self
            .numbers
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for old in moved {
            let (Some(number), Ok(rest)) = (self.numbers.remove(&old), old.strip_prefix(from)) else {
                continue;
            };
            let new = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            self.paths.insert(number, new.clone());
            self.numbers.insert(new, number);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_their_files() {
        let mut names = Names::new("/r".into());
        let (folder, file) = (names.number(Path::new("/r/a")), names.number(Path::new("/r/a/f")));
        let gone = names.number(Path::new("/r/b"));
        names.rename(Path::new("/r/a"), Path::new("/r/b"));
        assert_eq!(names.path(folder), Some(Path::new("/r/b")));
        assert_eq!(names.path(file), Some(Path::new("/r/b/f")));
        assert_eq!(names.path(gone), None);
        assert_eq!(names.number(Path::new("/r/b/f")), file);
        names.remove(Path::new("/r/b/f"));
        assert_ne!(names.number(Path::new("/r/b/f")), file);
        names.forget();
        assert_eq!(names.path(folder), None);
        assert_eq!(names.path(ROOT), Some(Path::new("/r")));
    }
}
