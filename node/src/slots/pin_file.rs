//! The file of a closed slot's PIN: whoever puts it right does not wait for the next attempt to open the slot. One that is
//! still being written is not tried at all: half a PIN is a wrong one, and tokens count those.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::config::PinSource;

/// How long one look waits for the file system.
const PATIENCE: Duration = Duration::from_millis(250);

/// Which file it is: another inode, size or change is another PIN, or one that can be read now.
#[derive(PartialEq, Eq, Clone, Copy, Debug)]
struct Seen {
    inode: u64,
    size: u64,
    /// Of contents, owner or mode, in seconds and nanoseconds.
    changed: (i64, i64),
}

impl Seen {
    /// `None`: there is no such file. Blocks for as long as the file system takes.
    fn at(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            inode: found.ino(),
            size: found.size(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// What a look has shown.
#[derive(PartialEq, Eq, Clone, Copy, Debug)]
pub(super) enum Look {
    /// It is the one that was tried, or there is none; also where the file system does not answer, and where the PIN has
    /// another source.
    Same,
    /// It is another one than at the last look: somebody may be writing it.
    Changing,
    /// It is another one than was tried, and has looked the same twice. From now on it counts as tried.
    Changed,
}

/// Nothing is known of the file at the moment.
struct Unknown;

/// What is known of the file.
pub(super) struct PinFile {
    /// `None`: the PIN has another source.
    path: Option<PathBuf>,
    /// One at a time, however long it takes: a file system that hangs costs one thread.
    looking: Option<JoinHandle<Option<Seen>>>,
    last: Option<Seen>,
    tried: Option<Seen>,
}

impl PinFile {
    /// The file as it is now counts as tried.
    pub(super) async fn of(source: &PinSource) -> Self {
        let path = match source {
            PinSource::File { path, .. } => Some(path.clone()),
            _ => None,
        };
        let mut file = Self {
            path,
            looking: None,
            last: None,
            tried: None,
        };
        if let Ok(now) = file.seen().await {
            (file.last, file.tried) = (now, now);
        }
        file
    }

    /// Looks again. To be called at intervals in which nobody stops in the middle of a PIN.
    pub(super) async fn look(&mut self) -> Look {
        match self.seen().await {
            Ok(now) => self.judge(now),
            Err(Unknown) => Look::Same,
        }
    }

    async fn seen(&mut self) -> Result<Option<Seen>, Unknown> {
        let path = self.path.as_ref().ok_or(Unknown)?;
        let looking = self.looking.get_or_insert_with(|| {
            let path = path.clone();
            tokio::task::spawn_blocking(move || Seen::at(&path))
        });
        let seen = tokio::time::timeout(PATIENCE, looking)
            .await
            .map_err(|_| Unknown)?;
        self.looking = None;
        seen.map_err(|_| Unknown)
    }

    fn judge(&mut self, now: Option<Seen>) -> Look {
        let is_settled = now == self.last;
        self.last = now;
        match now {
            None => Look::Same,
            Some(_) if !is_settled => Look::Changing,
            Some(_) if now == self.tried => Look::Same,
            Some(_) => {
                self.tried = now;
                Look::Changed
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    fn source(path: &Path) -> PinSource {
        PinSource::File {
            key: "hsm.slots.a.pin_file".to_owned(),
            path: path.to_owned(),
        }
    }

    /// Looks until the file system has answered.
    async fn look(file: &mut PinFile) -> Look {
        loop {
            let look = file.look().await;
            if file.looking.is_none() {
                return look;
            }
        }
    }

    #[test]
    fn a_file_is_tried_once_when_it_has_looked_the_same_twice() {
        let seen = |size| {
            Some(Seen {
                inode: 1,
                size,
                changed: (1, 0),
            })
        };
        let mut file = PinFile {
            path: None,
            looking: None,
            last: seen(4),
            tried: seen(4),
        };
        for (size, expected) in [
            (4, Look::Same),
            // It is written in pieces.
            (0, Look::Changing),
            (2, Look::Changing),
            (6, Look::Changing),
            (6, Look::Changed),
            (6, Look::Same),
        ] {
            assert_eq!(file.judge(seen(size)), expected, "{size}");
        }
        // Taken away, and put back as it was.
        assert_eq!(file.judge(None), Look::Same);
        assert_eq!(file.judge(None), Look::Same);
        assert_eq!(file.judge(seen(6)), Look::Changing);
        assert_eq!(file.judge(seen(6)), Look::Same);
    }

    #[tokio::test]
    async fn a_file_that_comes_is_replaced_or_may_be_read_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let mut file = PinFile::of(&source(&path)).await;
        let mut looks = async || {
            [
                look(&mut file).await,
                look(&mut file).await,
                look(&mut file).await,
            ]
        };
        let another = [Look::Changing, Look::Changed, Look::Same];
        assert_eq!(looks().await, [Look::Same; 3]);
        std::fs::write(&path, "1234").unwrap();
        assert_eq!(looks().await, another);
        // As editors do.
        let other = dir.path().join("other");
        std::fs::write(&other, "4321").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(looks().await, another);
        // Of which neither time nor size of the contents tells.
        let (before, began) = (Seen::at(&path), Instant::now());
        while Seen::at(&path) == before {
            // The kernel's clock goes in steps of milliseconds.
            assert!(began.elapsed() < Duration::from_secs(20));
            std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        }
        assert_eq!(looks().await, another);
    }

    #[tokio::test]
    async fn a_file_system_that_does_not_answer_costs_one_thread_and_no_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        std::fs::write(&path, "1234").unwrap();
        let now = Seen::at(&path);
        let (answer, hangs) = std::sync::mpsc::channel::<()>();
        let looking = tokio::task::spawn_blocking(move || {
            let _ = hangs.recv();
            None
        });
        let mut file = PinFile {
            path: Some(path),
            looking: Some(looking),
            last: now,
            tried: now,
        };
        for _ in 0..2 {
            assert_eq!(file.look().await, Look::Same);
            assert!(file.looking.is_some());
        }
        drop(answer);
        // Its answer is still the first one's, as if there were no such file; then it is looked at as ever.
        assert_eq!(look(&mut file).await, Look::Same);
        assert_eq!(look(&mut file).await, Look::Changing);
        assert_eq!(look(&mut file).await, Look::Same);
    }

    #[tokio::test]
    async fn a_pin_from_elsewhere_is_looked_at_nowhere() {
        let source = PinSource::Env {
            key: "hsm.slots.a.pin_env".to_owned(),
            variable: "HSM_PIN_A".to_owned(),
        };
        assert_eq!(PinFile::of(&source).await.look().await, Look::Same);
    }
}
