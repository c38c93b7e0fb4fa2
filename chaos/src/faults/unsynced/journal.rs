//! What would undo each change that was not synchronised yet, in the order in which the changes were made.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What undoes one change.
enum Undo {
    /// These bytes stood there.
    Bytes { file: Arc<File>, at: u64, old: Vec<u8> },
    /// The file was so long.
    Length { file: Arc<File>, old: u64 },
    /// There was nothing of this name.
    Made(PathBuf),
    /// What had this name was put aside, or an empty folder.
    Removed { path: PathBuf, aside: Option<PathBuf> },
    /// It had the other name, and what had this one was put aside.
    Renamed {
        from: PathBuf,
        to: PathBuf,
        over: Option<PathBuf>,
    },
}

struct Change {
    number: u64,
    /// Number of the file whose content it is.
    inode: Option<u64>,
    undo: Undo,
}

/// The last write of all, as long as it was not synchronised.
struct LastWrite {
    number: u64,
    inode: u64,
    file: Arc<File>,
    at: u64,
    length: u64,
    /// Of the file, before it.
    was: u64,
}

/// See the module.
pub(super) struct Journal {
    /// Where what is removed waits.
    aside: PathBuf,
    changes: Vec<Change>,
    last: u64,
    /// Changes up to this one may be synchronised already when a synchronisation that is under way ends.
    marked: u64,
    last_write: Option<LastWrite>,
    put_aside: u64,
}

impl Journal {
    pub(super) fn new(aside: PathBuf) -> Self {
        Self {
            aside,
            changes: Vec::new(),
            last: 0,
            marked: 0,
            last_write: None,
            put_aside: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }

    fn note(&mut self, inode: Option<u64>, undo: Undo) {
        self.last += 1;
        self.changes.push(Change {
            number: self.last,
            inode,
            undo,
        });
    }

    /// Before so many bytes are written there.
    pub(super) fn before_write(
        &mut self,
        inode: u64,
        file: &Arc<File>,
        at: u64,
        length: u64,
    ) -> io::Result<()> {
        let was = file.metadata()?.len();
        if at + length > was {
            self.note(
                Some(inode),
                Undo::Length {
                    file: Arc::clone(file),
                    old: was,
                },
            );
        }
        let kept = was.saturating_sub(at).min(length);
        if kept > 0 && !self.has(inode, at, kept) {
            let old = read(file, at, kept)?;
            self.note(
                Some(inode),
                Undo::Bytes {
                    file: Arc::clone(file),
                    at,
                    old,
                },
            );
        }
        self.last_write = Some(LastWrite {
            number: self.last,
            inode,
            file: Arc::clone(file),
            at,
            length,
            was,
        });
        Ok(())
    }

    /// Whether what stood there when the file was last synchronised is kept already.
    fn has(&self, inode: u64, at: u64, length: u64) -> bool {
        self.changes
            .iter()
            .rev()
            .take_while(|change| change.number > self.marked)
            .any(|change| {
                change.inode == Some(inode)
                    && matches!(&change.undo, Undo::Bytes { at: begins, old, .. }
                    if *begins <= at && at + length <= begins + old.len() as u64)
            })
    }

    /// Before a file gets another length.
    pub(super) fn before_length(&mut self, inode: u64, file: &Arc<File>, length: u64) -> io::Result<()> {
        let was = file.metadata()?.len();
        if length < was {
            let old = read(file, length, was - length)?;
            self.note(
                Some(inode),
                Undo::Bytes {
                    file: Arc::clone(file),
                    at: length,
                    old,
                },
            );
        }
        if length != was {
            self.note(
                Some(inode),
                Undo::Length {
                    file: Arc::clone(file),
                    old: was,
                },
            );
        }
        Ok(())
    }

    /// A file or folder was made.
    pub(super) fn made(&mut self, path: PathBuf) {
        self.note(None, Undo::Made(path));
    }

    /// Removes a file, for good only once its folder is synchronised.
    pub(super) fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        let aside = self.put_aside(path)?;
        self.note(
            None,
            Undo::Removed {
                path: path.to_owned(),
                aside: Some(aside),
            },
        );
        Ok(())
    }

    /// Removes a folder, which is empty.
    pub(super) fn remove_folder(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)?;
        self.note(
            None,
            Undo::Removed {
                path: path.to_owned(),
                aside: None,
            },
        );
        Ok(())
    }

    /// Gives something another name.
    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let over = match fs::symlink_metadata(to) {
            Ok(_) if fs::symlink_metadata(from).is_ok() => Some(self.put_aside(to)?),
            _ => None,
        };
        fs::rename(from, to)?;
        self.note(
            None,
            Undo::Renamed {
                from: from.to_owned(),
                to: to.to_owned(),
                over,
            },
        );
        Ok(())
    }

    fn put_aside(&mut self, path: &Path) -> io::Result<PathBuf> {
        self.put_aside += 1;
        let aside = self.aside.join(self.put_aside.to_string());
        fs::rename(path, &aside)?;
        Ok(aside)
    }

    /// A synchronisation begins; it covers what is here now.
    pub(super) fn mark(&mut self) -> u64 {
        self.marked = self.last;
        self.last
    }

    /// The content of a file was synchronised, as it was at the mark, and that it is there.
    pub(super) fn file_synced(&mut self, inode: u64, path: Option<&Path>, mark: u64) {
        self.changes.retain(|change| {
            let content = change.inode == Some(inode);
            let there = matches!(&change.undo, Undo::Made(made) if Some(made.as_path()) == path);
            change.number > mark || !(content || there)
        });
        if self
            .last_write
            .as_ref()
            .is_some_and(|last| last.inode == inode && last.number <= mark)
        {
            self.last_write = None;
        }
    }

    /// The names in a folder were synchronised, as they were at the mark.
    pub(super) fn folder_synced(&mut self, folder: &Path, mark: u64) -> io::Result<()> {
        let in_it = |path: &Path| path.parent() == Some(folder);
        let mut gone = Vec::new();
        self.changes.retain(|change| {
            let synced = change.number <= mark
                && match &change.undo {
                    Undo::Made(path) | Undo::Removed { path, .. } => in_it(path),
                    Undo::Renamed { to, .. } => in_it(to),
                    Undo::Bytes { .. } | Undo::Length { .. } => false,
                };
            if synced
                && let Undo::Removed {
                    aside: Some(aside), ..
                }
                | Undo::Renamed {
                    over: Some(aside), ..
                } = &change.undo
            {
                gone.push(aside.clone());
            }
            !synced
        });
        gone.iter().try_for_each(|aside| remove(aside))
    }

    /// Undoes everything; how many changes that were.
    pub(super) fn undo(&mut self) -> io::Result<usize> {
        let changes = std::mem::take(&mut self.changes);
        self.last_write = None;
        let lost = changes.len();
        for change in changes.into_iter().rev() {
            match change.undo {
                Undo::Bytes { file, at, old } => file.write_all_at(&old, at)?,
                Undo::Length { file, old } => file.set_len(old)?,
                Undo::Made(path) => remove(&path)?,
                Undo::Removed {
                    path,
                    aside: Some(aside),
                } => fs::rename(aside, path)?,
                Undo::Removed { path, aside: None } => fs::create_dir(path)?,
                Undo::Renamed { from, to, over } => {
                    fs::rename(&to, from)?;
                    if let Some(over) = over {
                        fs::rename(over, to)?;
                    }
                }
            }
        }
        Ok(lost)
    }

    /// Of the last write, only so much of a thousand is there; everything before it is synchronised. How many writes that
    /// were, one or none.
    pub(super) fn tear(&mut self, permille: u32) -> io::Result<usize> {
        let changes = std::mem::take(&mut self.changes);
        let torn = self.last_write.take();
        for change in &changes {
            if let Undo::Removed {
                aside: Some(aside), ..
            }
            | Undo::Renamed {
                over: Some(aside), ..
            } = &change.undo
            {
                remove(aside)?;
            }
        }
        let Some(torn) = torn else { return Ok(0) };
        let there = torn.at + torn.length * u64::from(permille.min(1000)) / 1000;
        let end = torn.at + torn.length;
        // The oldest is what was there when the file was last synchronised, so it comes last.
        for change in changes
            .iter()
            .rev()
            .filter(|change| change.inode == Some(torn.inode))
        {
            let Undo::Bytes { at, old, .. } = &change.undo else {
                continue;
            };
            let (from, to) = ((*at).max(there), (at + old.len() as u64).min(end));
            if from < to {
                let (first, last) = ((from - at) as usize, (to - at) as usize);
                torn.file.write_all_at(&old[first..last], from)?;
            }
        }
        if torn.was < end && torn.file.metadata()?.len() == end {
            torn.file.set_len(there.max(torn.was))?;
        }
        Ok(1)
    }
}

fn read(file: &File, at: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// A file, or a folder with what is in it: that was not synchronised either.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        // It has another name by now, which was synchronised.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
