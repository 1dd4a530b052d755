//! Waiting until what was written is on the disk.

use std::fs::{self, File};
use std::path::Path;

use crate::error::{During, Result};

/// Waits until a folder's list of names is on the disk. Windows syncs no folders and needs none synced.
///
/// # Errors
/// The folder cannot be opened, the disk refuses.
#[cfg(unix)]
pub fn sync_folder(folder: &Path) -> Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Network file systems that cannot: what they promise is all that can be had.
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
        synced => synced.during("flush", folder),
    }
}

/// Waits until a folder's list of names is on the disk. Windows syncs no folders and needs none synced.
///
/// # Errors
/// None here.
#[cfg(not(unix))]
pub fn sync_folder(_: &Path) -> Result<()> {
    Ok(())
}

/// Waits until everything below `folder`, and its list of names, is on the disk.
///
/// # Errors
/// Something cannot be opened, the disk refuses.
pub fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).during("list", folder)? {
        let entry = entry.during("list", folder)?;
        let path = entry.path();
        let kind = entry.file_type().during("read", &path)?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync_file(&path)?;
        }
    }
    sync_folder(folder)
}

fn sync_file(path: &Path) -> Result<()> {
    // Windows flushes only what is open for writing, and on Unix a file may be read-only.
    let file = match cfg!(unix) {
        true => File::open(path),
        false => File::options().write(true).open(path),
    };
    file.and_then(|file| file.sync_all()).during("flush", path)
}

/// The folder that holds `path`, as something that can be opened.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
