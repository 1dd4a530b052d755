//! Names beside a file or folder under which its successor grows: one writer each, taken over from those that were killed.
//!
//! A writer holds an empty file beside, `<unfinished name>.lock`, and never locks what it writes: on Windows a locked file cannot be read by
//! anybody, and one that is held open cannot be relied on to give up its name.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{During, Result};

/// Ends the names of what is not whole yet.
const UNFINISHED: &str = ".tmp";
/// Ends the name of the lock beside it.
const LOCK: &str = ".lock";
/// Ends the name of a folder that waits while its successor gets its name.
const ASIDE: &str = ".old";

/// An unfinished name that this process alone may use, as long as the slot lives.
#[derive(Debug)]
pub(crate) struct Slot {
    /// What may be written.
    pub path: PathBuf,
    lock: Option<File>,
}

impl Slot {
    /// Takes the first of `names(1)`, `names(2)` ... that no other writer holds. Where the file system knows no locks, that is the first.
    pub fn take(names: impl Fn(u32) -> PathBuf) -> Result<Slot> {
        let mut number = 1;
        loop {
            let path = names(number);
            match Slot::try_take(&path).during("write", &path)? {
                Some(slot) => return Ok(slot),
                None => number += 1,
            }
        }
    }

    /// `None` where another writer holds the name.
    fn try_take(path: &Path) -> io::Result<Option<Slot>> {
        let lock = lock(&lock_of(path))?;
        Ok(lock.map(|lock| Slot {
            path: path.to_owned(),
            lock: Some(lock),
        }))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Windows removes no file that is held. Elsewhere the name goes first, so that whoever opened it meanwhile sees that it is gone.
        if cfg!(windows) {
            drop(self.lock.take());
        }
        // A failure leaves an empty file, which the next of this name takes.
        let _ = fs::remove_file(lock_of(&self.path));
    }
}

/// Makes or opens a lock's file and holds it; `None` where somebody else does.
#[cfg(unix)]
fn lock(path: &Path) -> io::Result<Option<File>> {
    use std::fs::TryLockError;
    loop {
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(None),
            // The second: a file system without locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // Its holder may have removed it before the lock was ours.
        if is_still(path, &file)? {
            return Ok(Some(file));
        }
    }
}

/// Whether `path` still names the file that was opened.
#[cfg(unix)]
fn is_still(path: &Path, file: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes or opens a lock's file and holds it; `None` where somebody else does. Opened to be shared with nobody, it is the lock by itself:
/// until it is closed, which the end of the process does too, it can be neither opened again nor removed.
/// Source: CreateFile, `dwShareMode` of 0; a second opening fails with ERROR_SHARING_VIOLATION.
#[cfg(windows)]
fn lock(path: &Path) -> io::Result<Option<File>> {
    use std::os::windows::fs::OpenOptionsExt;
    const SHARED_WITH_NOBODY: u32 = 0;
    const ERROR_SHARING_VIOLATION: i32 = 32;
    let mut options = File::options();
    options.write(true).create(true).truncate(false);
    match options.share_mode(SHARED_WITH_NOBODY).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(ERROR_SHARING_VIOLATION) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `name.tmp`, for the second writer at the same time `name.2.tmp`.
pub(crate) fn unfinished_file(path: &Path, number: u32) -> PathBuf {
    path.with_file_name(unfinished(&file_name(path), number))
}

/// `.name.tmp`: what lists a folder's visible content does not see a half folder.
pub(crate) fn unfinished_folder(path: &Path, number: u32) -> PathBuf {
    let mut hidden = OsString::from(".");
    hidden.push(file_name(path));
    path.with_file_name(unfinished(&hidden, number))
}

/// `.name.old`: where a folder waits while its successor gets its name.
pub(crate) fn aside(path: &Path) -> PathBuf {
    let mut hidden = OsString::from(".");
    hidden.push(file_name(path));
    hidden.push(ASIDE);
    path.with_file_name(hidden)
}

/// The lock of an unfinished file or folder, beside it.
fn lock_of(path: &Path) -> PathBuf {
    let mut name = file_name(path);
    name.push(LOCK);
    path.with_file_name(name)
}

fn unfinished(name: &std::ffi::OsStr, number: u32) -> OsString {
    let mut name = name.to_owned();
    if number > 1 {
        name.push(format!(".{number}"));
    }
    name.push(UNFINISHED);
    name
}

fn file_name(path: &Path) -> OsString {
    path.file_name().unwrap_or_default().to_owned()
}

/// Removes from `folder` what killed processes left there of the files and folders whose final name `is_ours` accepts. What a living
/// process is writing stays, and so does an old folder whose name nothing has: it is the only one of its kind.
///
/// # Errors
/// The folder cannot be read, a leftover not removed.
pub fn clear_leftovers(folder: &Path, is_ours: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(folder).during("list", folder)? {
        let name = entry.during("list", folder)?.file_name();
        let name = name.to_string_lossy();
        if let Some(last) = name
            .strip_suffix(ASIDE)
            .and_then(|old| old.strip_prefix('.'))
        {
            let target = folder.join(last);
            if is_ours(last) && target.exists() {
                clear(&unfinished_folder(&target, 1), &folder.join(&*name))?;
            }
            continue;
        }
        // A lock stands for what it guards, which may be gone.
        let name = name.strip_suffix(LOCK).unwrap_or(&name);
        let path = folder.join(name);
        let is_leftover = final_name(name).is_some_and(|last| {
            let is_file = !path.is_dir() && is_ours(last);
            is_file || !path.is_file() && last.strip_prefix('.').is_some_and(&is_ours)
        });
        if is_leftover {
            clear(&path, &path)?;
        }
    }
    Ok(())
}

/// What `name`, of something unfinished, is to become, of a folder with the point in front; `None` for the name of anything else.
fn final_name(name: &str) -> Option<&str> {
    let name = name.strip_suffix(UNFINISHED)?;
    Some(match name.rsplit_once('.') {
        Some((name, number)) if number.parse::<u32>().is_ok_and(|n| n > 1) => name,
        _ => name,
    })
}

/// Removes `leftover`, a file or folder, unless a living process holds the unfinished name that guards it.
fn clear(guard: &Path, leftover: &Path) -> Result<()> {
    let Some(slot) = Slot::try_take(guard).during("remove", leftover)? else {
        return Ok(());
    };
    let removed = match leftover.is_dir() {
        true => fs::remove_dir_all(leftover),
        false => fs::remove_file(leftover),
    };
    drop(slot);
    match removed {
        // Only its lock was left.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.during("remove", leftover),
    }
}
