//! Names beside a file or folder under which its successor grows: one writer each, taken over from those that were killed.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{During, Result};

/// Ends the names of what is not whole yet.
const UNFINISHED: &str = ".tmp";
/// Ends the name of the lock beside an unfinished folder, which itself cannot be locked everywhere.
const LOCK: &str = ".lock";

/// A file that this process alone may write, as long as the slot lives.
#[derive(Debug)]
pub(crate) struct Slot {
    pub path: PathBuf,
    pub file: Arc<File>,
}

impl Slot {
    /// Takes the first of `names(1)`, `names(2)` ... that no other writer holds. Where the file system knows no locks, that is the first.
    pub fn take(names: impl Fn(u32) -> PathBuf) -> Result<Slot> {
        let mut number = 1;
        loop {
            let path = names(number);
            match lock(&path, true).during("write", &path)? {
                Lock::Held => number += 1,
                Lock::Moved => {}
                Lock::Taken(file) => {
                    let file = Arc::new(file);
                    return Ok(Slot { path, file });
                }
            }
        }
    }
}

enum Lock {
    Taken(File),
    /// Another writer lives.
    Held,
    /// The file got its final name, or was removed, before the lock was ours.
    Moved,
}

fn lock(path: &Path, create: bool) -> io::Result<Lock> {
    let mut options = File::options();
    // What is in it is another's until the lock says otherwise.
    options.write(true).create(create).truncate(false);
    let file = options.open(path)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(Lock::Held),
        // The second: a file system without locks.
        Ok(()) | Err(TryLockError::Error(_)) => match is_still(path, &file)? {
            true => Ok(Lock::Taken(file)),
            false => Ok(Lock::Moved),
        },
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

/// Whether `path` still names the file that was opened, as far as that can be told: that it names one.
#[cfg(not(unix))]
fn is_still(path: &Path, _: &File) -> io::Result<bool> {
    Ok(path.exists())
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

/// The lock of an unfinished folder, beside it.
pub(crate) fn lock_of(folder: &Path) -> PathBuf {
    let mut name = file_name(folder);
    name.push(LOCK);
    folder.with_file_name(name)
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
/// process is writing stays.
///
/// # Errors
/// The folder cannot be read, a leftover not removed.
pub fn clear_leftovers(folder: &Path, is_ours: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(folder).during("list", folder)? {
        let entry = entry.during("list", folder)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // A lock stands for its folder, which may be gone.
        let (name, is_lock) = match name.strip_suffix(LOCK) {
            Some(name) => (name, true),
            None => (&*name, false),
        };
        let is_folder = is_lock || entry.file_type().during("read", &entry.path())?.is_dir();
        if final_name(name, is_folder).is_some_and(&is_ours) {
            clear(&folder.join(name), is_folder)?;
        }
    }
    Ok(())
}

/// What `name`, of something unfinished, is to become; `None` for the name of anything else.
fn final_name(name: &str, is_folder: bool) -> Option<&str> {
    let name = name.strip_suffix(UNFINISHED)?;
    let name = match name.rsplit_once('.') {
        Some((name, number)) if number.parse::<u32>().is_ok_and(|n| n > 1) => name,
        _ => name,
    };
    match is_folder {
        true => name.strip_prefix('.'),
        false => Some(name),
    }
}

fn clear(path: &Path, is_folder: bool) -> Result<()> {
    let lock_path = match is_folder {
        true => lock_of(path),
        false => path.to_owned(),
    };
    let held = match lock(&lock_path, is_folder) {
        Ok(Lock::Taken(file)) => file,
        // Alive, or gone meanwhile.
        Ok(Lock::Held | Lock::Moved) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).during("remove", path),
    };
    if is_folder && path.exists() {
        fs::remove_dir_all(path).during("remove", path)?;
    }
    fs::remove_file(&lock_path).during("remove", &lock_path)?;
    drop(held);
    Ok(())
}
