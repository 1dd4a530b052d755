//! One folder: built beside its name, brought to the disk, swapped for the old one.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{During, Result};
use crate::file;
use crate::slot::{Slot, aside, unfinished_folder};
use crate::sync::{parent, sync_folder, sync_tree};

/// A folder on its way: `.<name>.tmp` beside its final name; removed if it never arrives, and by the next one of its name if this
/// process is killed.
#[derive(Debug)]
pub struct NewFolder {
    target: PathBuf,
    /// The name that it is built under.
    slot: Slot,
}

impl NewFolder {
    /// Begins a folder that will be `target`, which need not exist; a link stays a link, and what it leads to is replaced.
    ///
    /// # Errors
    /// `target` is something other than a folder, or the folder beside it cannot be made.
    pub fn create(target: &Path) -> Result<NewFolder> {
        let target = place(target)?;
        let around = parent(&target);
        fs::create_dir_all(around).during("make", around)?;
        let slot = Slot::take(|number| unfinished_folder(&target, number))?;
        let new = NewFolder { slot, target };
        if !new.target.exists() {
            new.bring_back_the_old()?;
        }
        let path = new.path();
        if path.exists() {
            fs::remove_dir_all(path).during("remove", path)?;
        }
        fs::create_dir(path).during("make", path)?;
        Ok(new)
    }

    /// Where its files are to be written.
    pub fn path(&self) -> &Path {
        &self.slot.path
    }

    /// Brings everything to the disk and swaps the folder for the one that has its name, which is then removed with all that is in it.
    ///
    /// # Errors
    /// The disk is full or refuses; the old folder is still whole.
    pub fn replace(self) -> Result<()> {
        self.replace_keeping(|_| false)
    }

    /// As [`NewFolder::replace`], but what the old folder has, the new one lacks and `keep` accepts by its name comes along.
    ///
    /// # Errors
    /// As [`NewFolder::replace`].
    pub fn replace_keeping(self, keep: impl Fn(&str) -> bool) -> Result<()> {
        let is_new = !self.target.exists();
        if !is_new {
            let mine = names(self.path())?;
            for name in names(&self.target)?.difference(&mine) {
                if keep(&name.to_string_lossy()) {
                    link(&self.target.join(name), &self.path().join(name))?;
                }
            }
        }
        sync_tree(self.path())?;
        match is_new {
            true => fs::rename(self.path(), &self.target).during("make", &self.target)?,
            false => self.swap()?,
        }
        // The new one stands. What is left has the name of the unfinished and goes with it.
        sync_folder(parent(&self.target))
    }

    /// Exchanges the two names, at one instant where the system can.
    fn swap(&self) -> Result<()> {
        match exchange(self.path(), &self.target) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.swap_by_renames(),
            exchanged => exchanged.during("replace", &self.target),
        }
    }

    /// For an instant nobody has the name; a process killed in it leaves the old folder to [`NewFolder::bring_back_the_old`].
    fn swap_by_renames(&self) -> Result<()> {
        let aside = aside(&self.target);
        // Whoever left it was killed when the folder that now has the name stood already.
        if aside.exists() {
            fs::remove_dir_all(&aside).during("remove", &aside)?;
        }
        // 1. the old folder goes aside  2. the new one gets the name
        fs::rename(&self.target, &aside).during("replace", &self.target)?;
        if let Err(error) = fs::rename(self.path(), &self.target) {
            fs::rename(&aside, &self.target).during("bring back", &self.target)?;
            return Err(error).during("replace", &self.target);
        }
        // 3. the old one becomes what is left; where that fails it goes with the next swap or with `clear_leftovers`
        let _ = fs::rename(&aside, self.path());
        Ok(())
    }

    fn bring_back_the_old(&self) -> Result<()> {
        let aside = aside(&self.target);
        match aside.exists() {
            true => fs::rename(&aside, &self.target).during("bring back", &self.target),
            false => Ok(()),
        }
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // A failure costs room on the disk until the next folder of this name.
        let _ = fs::remove_dir_all(self.path());
    }
}

/// Gives a folder that is whole another name on the same file system, for good: its files are brought to the disk first.
///
/// # Errors
/// `to` exists, or the disk refuses.
pub fn move_folder(from: &Path, to: &Path) -> Result<()> {
    sync_tree(from)?;
    fs::rename(from, to).during("make", to)?;
    sync_folder(parent(to))
}

/// Removes a folder that is whole or not there at every instant.
///
/// # Errors
/// Something in it cannot be removed; it has lost its name then, and [`crate::clear_leftovers`] removes the rest.
pub fn remove_folder(folder: &Path) -> Result<()> {
    let doomed = NewFolder {
        slot: Slot::take(|number| unfinished_folder(folder, number))?,
        target: folder.to_owned(),
    };
    let path = doomed.path();
    if path.exists() {
        fs::remove_dir_all(path).during("remove", path)?;
    }
    fs::rename(folder, path).during("remove", folder)?;
    fs::remove_dir_all(path).during("remove", path)?;
    sync_folder(parent(folder))
}

/// Gives the files of `from`, without its folders, a second name in `to`; what has its name there already stays. A file that is a link to
/// one, as in a cache of the Hub, counts as the file.
///
/// # Errors
/// A folder that cannot be read or made, a file that can be neither linked nor copied.
pub fn link_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).during("make", to)?;
    for name in names(from)? {
        let (file, place) = (from.join(&name), to.join(&name));
        let is_file = fs::metadata(&file).is_ok_and(|meta| meta.is_file());
        if is_file && !place.exists() {
            link(&fs::canonicalize(&file).during("find", &file)?, &place)?;
        }
    }
    Ok(())
}

/// Bytes of a folder's files, without those of its folders.
///
/// # Errors
/// The folder cannot be read.
pub fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for name in names(folder)? {
        let path = folder.join(name);
        let meta = fs::symlink_metadata(&path).during("read", &path)?;
        if meta.is_file() {
            bytes += meta.len();
        }
    }
    Ok(bytes)
}

/// Bytes of all regular files below a folder, as far as it can be read; 0 where there is none.
pub fn tree_bytes(folder: &Path) -> u64 {
    let mut bytes = 0;
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                Ok(meta) if meta.is_file() => bytes += meta.len(),
                _ => {}
            }
        }
    }
    bytes
}

/// The folder that is meant: links followed, `.` by its name.
fn place(target: &Path) -> Result<PathBuf> {
    let is_link = fs::symlink_metadata(target).is_ok_and(|meta| meta.is_symlink());
    let place = match is_link || target.file_name().is_none() {
        true => fs::canonicalize(target).during("find", target)?,
        false => target.to_owned(),
    };
    if place.file_name().is_none() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).during("replace", target);
    }
    if place.exists() && !place.is_dir() {
        return Err(io::Error::from(io::ErrorKind::NotADirectory)).during("replace", target);
    }
    Ok(place)
}

fn names(folder: &Path) -> Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(folder).during("list", folder)?;
    let names: io::Result<_> = entries.map(|entry| Ok(entry?.file_name())).collect();
    names.during("list", folder)
}

/// The same file under a second name, or a copy where the file system has none; folders with all that is in them.
fn link(from: &Path, to: &Path) -> Result<()> {
    let kind = fs::symlink_metadata(from).during("read", from)?;
    if kind.is_dir() {
        fs::create_dir(to).during("make", to)?;
        for name in names(from)? {
            link(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(_) => file::copy(from, to),
    }
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(|error| match error {
        Errno::INVAL | Errno::NOSYS | Errno::NOTSUP => io::ErrorKind::Unsupported.into(),
        other => other.into(),
    })
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::{clear_leftovers, write};

    /// A folder with `files`, each with its own name as content.
    fn old(dir: &Path, files: &[&str]) -> PathBuf {
        let folder = dir.join("model");
        for name in files {
            write(&folder.join(name), b"old").unwrap();
        }
        folder
    }

    fn listed(folder: &Path) -> Vec<String> {
        let names = names(folder).unwrap().into_iter();
        names.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn replace_leaves_nothing_of_the_old_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a", "b/c"]);
        let new = NewFolder::create(&folder).unwrap();
        fs::write(new.path().join("a"), "new").unwrap();
        assert_eq!(listed(&folder), ["a", "b"]);
        new.replace().unwrap();
        assert_eq!(listed(&folder), ["a"]);
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"new");
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    fn replace_keeping_brings_along_what_is_wanted_and_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a", "keep", "drop", "sub/x"]);
        let new = NewFolder::create(&folder).unwrap();
        fs::write(new.path().join("a"), "new").unwrap();
        new.replace_keeping(|name| name != "drop").unwrap();
        assert_eq!(listed(&folder), ["a", "keep", "sub"]);
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"new");
        assert_eq!(fs::read(folder.join("sub/x")).unwrap(), b"old");
    }

    #[test]
    fn a_folder_that_never_arrives_leaves_the_old_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a"]);
        let new = NewFolder::create(&folder).unwrap();
        fs::write(new.path().join("a"), "half").unwrap();
        drop(new);
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"old");
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    fn what_a_killed_process_left_goes_with_the_next_folder_of_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        write(&dir.path().join(".model.tmp/half"), b"half").unwrap();
        fs::write(dir.path().join(".model.tmp.lock"), "").unwrap();
        let new = NewFolder::create(&folder).unwrap();
        fs::write(new.path().join("a"), "new").unwrap();
        new.replace().unwrap();
        assert_eq!(listed(&folder), ["a"]);
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    fn an_old_folder_that_lost_its_name_gets_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        write(&dir.path().join(".model.old/a"), b"old").unwrap();
        drop(NewFolder::create(&folder).unwrap());
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"old");
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    fn two_builders_at_once_each_give_a_whole_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        let first = NewFolder::create(&folder).unwrap();
        let second = NewFolder::create(&folder).unwrap();
        fs::write(first.path().join("first"), "").unwrap();
        fs::write(second.path().join("second"), "").unwrap();
        first.replace().unwrap();
        assert_eq!(listed(&folder), ["first"]);
        second.replace().unwrap();
        assert_eq!(listed(&folder), ["second"]);
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    fn a_reader_finds_a_whole_folder_at_every_instant() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a"]);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(folder.join("a").is_file());
                }
            });
            for _ in 0..100 {
                let new = NewFolder::create(&folder).unwrap();
                fs::write(new.path().join("a"), "new").unwrap();
                new.replace().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    /// What a process leaves that was killed before the first of the three renames, and behind each of them.
    #[test]
    fn swap_by_renames_goes_on_from_wherever_another_was_killed() {
        let kills: [&[&str]; 4] = [
            &["model/a", ".model.tmp/b"],
            &[".model.old/a", ".model.tmp/b"],
            &["model/b", ".model.old/a"],
            &["model/b", ".model.tmp/a"],
        ];
        for left in kills {
            let dir = tempfile::tempdir().unwrap();
            for name in left {
                write(&dir.path().join(name), b"whole").unwrap();
            }
            fs::write(dir.path().join(".model.tmp.lock"), "").unwrap();
            let folder = dir.path().join("model");
            for name in ["c", "d"] {
                let new = NewFolder::create(&folder).unwrap();
                assert_eq!(listed(&folder).len(), 1, "{left:?}");
                fs::write(new.path().join(name), "new").unwrap();
                new.swap_by_renames().unwrap();
                drop(new);
                assert_eq!(listed(&folder), [name], "{left:?}");
                assert_eq!(listed(dir.path()), ["model"], "{left:?}");
            }
        }
    }

    #[test]
    fn new_folder_that_cannot_get_the_name_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a"]);
        let new = NewFolder::create(&folder).unwrap();
        fs::remove_dir(new.path()).unwrap();
        new.swap_by_renames().unwrap_err();
        drop(new);
        assert_eq!(listed(&folder), ["a"]);
        assert_eq!(listed(dir.path()), ["model"]);
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a"]);
        let link = dir.path().join("link");
        #[cfg(unix)]
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        #[cfg(windows)]
        std::os::windows::fs::symlink_dir(&folder, &link).unwrap();
        let new = NewFolder::create(&link).unwrap();
        fs::write(new.path().join("b"), "new").unwrap();
        new.replace().unwrap();
        assert!(link.is_symlink());
        assert_eq!(listed(&folder), ["b"]);
    }

    #[test]
    fn a_file_of_the_name_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        fs::write(&path, "a file").unwrap();
        let error = NewFolder::create(&path).unwrap_err().to_string();
        assert!(error.contains("choose another place"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn leftovers_of_the_dead_are_cleared_and_those_of_the_living_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let living = NewFolder::create(&path("step-2")).unwrap();
        write(&path(".step-1.tmp/half"), b"half").unwrap();
        fs::write(path(".step-3.2.tmp.lock"), "").unwrap();
        fs::write(path("last.tmp"), "half").unwrap();
        fs::write(path("last.2.tmp.lock"), "").unwrap();
        fs::write(path("mine.tmp"), "not of this program").unwrap();
        // The first has a successor, the second is the only one of its name.
        write(&path(".step-4.old/a"), b"old").unwrap();
        write(&path("step-4/a"), b"new").unwrap();
        write(&path(".step-5.old/a"), b"old").unwrap();
        clear_leftovers(dir.path(), |name| {
            name.starts_with("step-") || name == "last"
        })
        .unwrap();
        assert!(living.path().is_dir());
        drop(living);
        assert_eq!(listed(dir.path()), [".step-5.old", "mine.tmp", "step-4"]);
    }

    #[test]
    fn a_removed_folder_is_gone_with_all_that_was_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = old(dir.path(), &["a", "b/c"]);
        remove_folder(&folder).unwrap();
        assert_eq!(listed(dir.path()), Vec::<String>::new());
    }
}
