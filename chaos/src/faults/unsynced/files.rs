//! The file system itself: everything is passed on to a folder, what would undo it is noted first. Nothing is cached by the
//! kernel for longer than a call, so that it never knows better than what is there after a loss.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::{Shared, lock};

/// The kernel asks again every time.
const NOT_KEPT: Duration = Duration::ZERO;
const GENERATION: Generation = Generation(0);

/// See the module.
pub(super) struct Files {
    shared: Arc<Shared>,
    open: Mutex<HashMap<u64, Arc<File>>>,
    last_handle: AtomicU64,
}

/// What a synchronisation is of.
enum Covers {
    File,
    Folder,
}

impl Files {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            open: Mutex::default(),
            last_handle: AtomicU64::new(0),
        }
    }

    fn path(&self, inode: INodeNo) -> io::Result<PathBuf> {
        let state = lock(&self.shared.state);
        let path = state.names.path(inode.0).map(Path::to_owned);
        path.ok_or_else(|| io::Error::from_raw_os_error(Errno::ENOENT.code()))
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    /// What lies there, under its number.
    fn entry(&self, path: &Path) -> io::Result<FileAttr> {
        let metadata = fs::symlink_metadata(path)?;
        let number = lock(&self.shared.state).names.number(path);
        attributes(&metadata, number)
    }

    fn handle(&self, file: File) -> FileHandle {
        let number = self.last_handle.fetch_add(1, Ordering::Relaxed) + 1;
        lock(&self.open).insert(number, Arc::new(file));
        FileHandle(number)
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        let file = lock(&self.open).get(&handle.0).cloned();
        file.ok_or_else(|| io::Error::from_raw_os_error(Errno::EBADF.code()))
    }

    fn make_file(&self, parent: INodeNo, name: &OsStr, mode: u32) -> io::Result<(FileAttr, FileHandle)> {
        let path = self.child(parent, name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)?;
        // The kernel has applied the caller's mask; this program's has nothing to do with it.
        file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        lock(&self.shared.state).journal.made(path.clone());
        Ok((self.entry(&path)?, self.handle(file)))
    }

    fn make_folder(&self, parent: INodeNo, name: &OsStr, mode: u32) -> io::Result<FileAttr> {
        let path = self.child(parent, name)?;
        fs::create_dir(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))?;
        lock(&self.shared.state).journal.made(path.clone());
        self.entry(&path)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, folder: bool) -> io::Result<()> {
        let path = self.child(parent, name)?;
        let mut state = lock(&self.shared.state);
        if folder {
            state.journal.remove_folder(&path)?;
        } else {
            state.journal.remove_file(&path)?;
        }
        state.names.remove(&path);
        Ok(())
    }

    fn give_name(&self, from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && fs::symlink_metadata(to).is_ok() {
            return Err(io::Error::from_raw_os_error(Errno::EEXIST.code()));
        }
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return Err(io::Error::from_raw_os_error(Errno::EINVAL.code()));
        }
        let mut state = lock(&self.shared.state);
        state.journal.rename(from, to)?;
        state.names.rename(from, to);
        Ok(())
    }

    fn write_at(&self, inode: INodeNo, handle: FileHandle, at: u64, data: &[u8]) -> io::Result<()> {
        let file = self.file(handle)?;
        let mut state = lock(&self.shared.state);
        state
            .journal
            .before_write(inode.0, &file, at, data.len() as u64)?;
        file.write_all_at(data, at)
    }

    fn set_length(&self, inode: INodeNo, handle: Option<FileHandle>, length: u64) -> io::Result<()> {
        let file = match handle {
            Some(handle) => self.file(handle)?,
            None => Arc::new(read_write(&self.path(inode)?)?),
        };
        let mut state = lock(&self.shared.state);
        state.journal.before_length(inode.0, &file, length)?;
        file.set_len(length)
    }

    fn attributes_of(&self, inode: INodeNo, handle: Option<FileHandle>) -> io::Result<FileAttr> {
        let metadata = match self.path(inode) {
            Ok(path) => fs::symlink_metadata(path)?,
            // It was removed, and is still open.
            Err(error) => match handle {
                Some(handle) => self.file(handle)?.metadata()?,
                None => return Err(error),
            },
        };
        attributes(&metadata, inode.0)
    }

    fn list(&self, inode: INodeNo) -> io::Result<Vec<(u64, FileType, std::ffi::OsString)>> {
        let folder = self.path(inode)?;
        let mut all = vec![
            (inode.0, FileType::Directory, ".".into()),
            (inode.0, FileType::Directory, "..".into()),
        ];
        let mut entries = fs::read_dir(&folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        let mut state = lock(&self.shared.state);
        for entry in entries {
            let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
            all.push((state.names.number(&entry.path()), kind, entry.file_name()));
        }
        Ok(all)
    }

    /// Answers once it is done, which may be later: others go on meanwhile.
    fn synchronise(&self, inode: INodeNo, covers: Covers, reply: ReplyEmpty) {
        let shared = Arc::clone(&self.shared);
        let mark = lock(&shared.state).journal.mark();
        let orders = *lock(&shared.orders);
        if orders.longer().is_zero() {
            finish(&shared, inode, &covers, mark, orders.fail, reply);
            return;
        }
        shared.delayed.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            std::thread::sleep(orders.longer());
            finish(&shared, inode, &covers, mark, orders.fail, reply);
        });
    }
}

fn finish(shared: &Shared, inode: INodeNo, covers: &Covers, mark: u64, fail: bool, reply: ReplyEmpty) {
    if fail {
        shared.failed.fetch_add(1, Ordering::SeqCst);
        reply.error(Errno::EIO);
        return;
    }
    let done = {
        let mut state = lock(&shared.state);
        let path = state.names.path(inode.0).map(Path::to_owned);
        match (covers, path) {
            (Covers::File, path) => {
                state.journal.file_synced(inode.0, path.as_deref(), mark);
                Ok(())
            }
            (Covers::Folder, Some(path)) => state.journal.folder_synced(&path, mark),
            (Covers::Folder, None) => Ok(()),
        }
    };
    shared.synced.fetch_add(1, Ordering::SeqCst);
    answer(done, reply);
}

fn answer(done: io::Result<()>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

/// Whatever the caller wants: what undoes a write has to read first.
fn read_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn attributes(metadata: &Metadata, number: u64) -> io::Result<FileAttr> {
    let narrow = |value: u64| u32::try_from(value).map_err(io::Error::other);
    let kind = FileType::from_std(metadata.file_type())
        .ok_or_else(|| io::Error::other("an unknown type of file"))?;
    let changed = Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or_default())
        + Duration::from_nanos(u64::try_from(metadata.ctime_nsec()).unwrap_or_default());
    Ok(FileAttr {
        ino: INodeNo(number),
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: metadata.accessed()?,
        mtime: metadata.modified()?,
        ctime: SystemTime::UNIX_EPOCH + changed,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm: u16::try_from(metadata.mode() & 0o7777).unwrap_or_default(),
        nlink: narrow(metadata.nlink())?,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: narrow(metadata.rdev())?,
        blksize: 4096,
        flags: 0,
    })
}

impl Filesystem for Files {
    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.child(parent, name).and_then(|path| self.entry(&path)) {
            Ok(found) => reply.entry(&NOT_KEPT, &found, GENERATION),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes_of(inode, handle) {
            Ok(found) => reply.attr(&NOT_KEPT, &found),
            Err(error) => reply.error(error.into()),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            if let Some(mode) = mode {
                fs::set_permissions(self.path(inode)?, fs::Permissions::from_mode(mode & 0o7777))?;
            }
            if uid.is_some() || gid.is_some() {
                std::os::unix::fs::chown(self.path(inode)?, uid, gid)?;
            }
            if let Some(size) = size {
                self.set_length(inode, handle, size)?;
            }
            self.attributes_of(inode, handle)
        };
        match set() {
            Ok(found) => reply.attr(&NOT_KEPT, &found),
            Err(error) => reply.error(error.into()),
        }
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        match self.make_folder(parent, name, mode) {
            Ok(made) => reply.entry(&NOT_KEPT, &made, GENERATION),
            Err(error) => reply.error(error.into()),
        }
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.remove(parent, name, false), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.remove(parent, name, true), reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self.child(parent, name).and_then(|from| {
            let to = self.child(new_parent, new_name)?;
            self.give_name(&from, &to, flags)
        });
        answer(renamed, reply);
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.path(inode).and_then(|path| read_write(&path)) {
            Ok(file) => reply.opened(self.handle(file), FopenFlags::empty()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.make_file(parent, name, mode) {
            Ok((made, handle)) => reply.created(&NOT_KEPT, &made, GENERATION, handle, FopenFlags::empty()),
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = || {
            let file = self.file(handle)?;
            let mut buffer = vec![0; size as usize];
            let mut filled = 0;
            while filled < buffer.len() {
                match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
                    0 => break,
                    count => filled += count,
                }
            }
            buffer.truncate(filled);
            io::Result::Ok(buffer)
        };
        match read() {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_at(inode, handle, offset, data) {
            // One request is far shorter than that.
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Of `close`, which synchronises nothing.
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        lock(&self.open).remove(&handle.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.synchronise(inode, Covers::File, reply);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.synchronise(inode, Covers::Folder, reply);
    }

    fn readdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.list(inode) {
            Ok(all) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                for (index, (number, kind, name)) in all.into_iter().enumerate().skip(from) {
                    if reply.add(INodeNo(number), index as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let found = self
            .path(INodeNo::ROOT)
            .and_then(|root| nix::sys::statvfs::statvfs(&root).map_err(io::Error::from));
        match found {
            Ok(found) => {
                let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
                reply.statfs(
                    found.blocks(),
                    found.blocks_free(),
                    found.blocks_available(),
                    found.files(),
                    found.files_free(),
                    narrow(found.block_size()),
                    narrow(found.name_max()),
                    narrow(found.fragment_size()),
                );
            }
            Err(error) => reply.error(error.into()),
        }
    }
}
