//! Files that are what they seem: opened without following a link that somebody laid under their name.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::Path;

use crate::error::{During, Result};
use crate::sync::{parent, sync_folder};

/// Opens a regular file for reading and writing, made if it is missing; its bytes stay.
///
/// # Errors
/// The name is that of a link, a pipe, a device, a folder, or of a file that has a second name elsewhere; the system refuses.
pub fn open_plain(path: &Path) -> Result<File> {
    // Asked first for the sake of the message; the open file is what counts.
    let named = match fs::symlink_metadata(path) {
        Ok(meta) => is_plain(&meta),
        Err(_) => Ok(()),
    };
    named.during("write", path)?;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    never_follow(&mut options);
    let file = options.open(path).during("write", path)?;
    let opened = file.metadata().and_then(|meta| is_plain(&meta));
    opened.during("write", path)?;
    Ok(file)
}

/// Brings a file that is whole to the disk and gives it another name on the same file system, for good; what had the name is replaced.
///
/// # Errors
/// The disk is full or refuses; what had the name before still has it.
pub fn move_file(file: File, from: &Path, to: &Path) -> Result<()> {
    file.sync_all().during("write", from)?;
    // Some systems keep the name of a file that is open.
    drop(file);
    fs::rename(from, to).during("write", to)?;
    sync_folder(parent(to))
}

fn is_plain(meta: &Metadata) -> io::Result<()> {
    match meta.is_file() && !has_second_name(meta) {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "something other than a file of its own has this name",
        )),
    }
}

#[cfg(unix)]
fn has_second_name(meta: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    meta.nlink() > 1
}

/// Nothing that the standard library says.
#[cfg(not(unix))]
fn has_second_name(_: &Metadata) -> bool {
    false
}

#[cfg(unix)]
fn never_follow(options: &mut fs::OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    options.custom_flags(flags.bits().cast_signed());
}

/// The link itself is opened then, which is no file.
#[cfg(windows)]
fn never_follow(options: &mut fs::OpenOptions) {
    use std::os::windows::fs::OpenOptionsExt;
    const FILE_FLAG_OPEN_REPARSE_POINT: u32 = 0x0020_0000;
    options.custom_flags(FILE_FLAG_OPEN_REPARSE_POINT);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn plain_file_keeps_its_bytes_and_gets_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a.incomplete"), dir.path().join("a"));
        open_plain(&from).unwrap().write_all(b"half").unwrap();
        fs::write(&to, "old").unwrap();
        let mut file = open_plain(&from).unwrap();
        let mut bytes = String::new();
        file.read_to_string(&mut bytes).unwrap();
        assert_eq!(bytes, "half");
        move_file(file, &from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"half");
        assert!(!from.exists());
    }

    #[test]
    fn folder_is_no_plain_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = open_plain(dir.path()).unwrap_err().to_string();
        assert!(error.contains("choose another place"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn what_leads_to_another_file_is_refused_and_the_other_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, missing) = (dir.path().join("victim"), dir.path().join("missing"));
        fs::write(&victim, "mine").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink(&victim, path("link")).unwrap();
        std::os::unix::fs::symlink(&missing, path("dangling")).unwrap();
        fs::hard_link(&victim, path("hard")).unwrap();
        for name in ["link", "dangling", "hard"] {
            let error = open_plain(&path(name)).unwrap_err().to_string();
            assert!(error.contains("something other than a file"), "{error}");
        }
        assert_eq!(fs::read(&victim).unwrap(), b"mine");
        assert!(!missing.exists());
    }
}
