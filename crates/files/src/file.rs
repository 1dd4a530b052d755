//! One file: written beside its name, brought to the disk, renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::error::{During, Result};
use crate::outside;
use crate::slot::{Slot, unfinished_file};
use crate::sync::{parent, sync_folder};

/// Puts a whole file in place of the old one, if any; folders that are missing are made.
///
/// # Errors
/// Names the file that cannot be written; the old one is still there.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(path)?;
    file.write(bytes)?;
    file.commit()
}

/// As [`write()`], with the bytes of another file; its permissions stay behind.
///
/// # Errors
/// Names the file that cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = outside::open(from).during("read", from)?;
    let mut target = NewFile::create(to)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read(&mut buffer).during("read", from)? {
            0 => return target.commit(),
            n => target.write(&buffer[..n])?,
        }
    }
}

/// A file on its way: `<name>.tmp` beside its final name; removed if it never arrives.
#[derive(Debug)]
pub struct NewFile {
    target: PathBuf,
    /// The name that is written under.
    slot: Slot,
    writer: Option<BufWriter<File>>,
    /// Brings a closed file to the disk while the next ones are made.
    syncing: Option<JoinHandle<io::Result<()>>>,
    /// Whether it has its final name.
    is_published: bool,
}

impl NewFile {
    /// Begins a file that will be `target`; folders that are missing are made.
    ///
    /// # Errors
    /// The file beside it cannot be made.
    pub fn create(target: &Path) -> Result<NewFile> {
        let folder = parent(target);
        fs::create_dir_all(folder).during("make", folder)?;
        let slot = Slot::take(|number| unfinished_file(target, number))?;
        let file = File::create(&slot.path).during("write", &slot.path)?;
        Ok(NewFile {
            target: target.to_owned(),
            writer: Some(BufWriter::with_capacity(1 << 18, file)),
            slot,
            syncing: None,
            is_published: false,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// The disk is full or refuses. Panics after [`NewFile::close`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.writer {
            Some(writer) => writer.write_all(bytes),
            None => panic!("bytes for a file that is closed"),
        };
        written.during("write", self.path())
    }

    /// Ends the file, which keeps its temporary name, and begins to bring it to the disk.
    ///
    /// # Errors
    /// The disk is full or refuses.
    pub fn close(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let file = writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)
            .during("write", self.path())?;
        let syncing = std::thread::Builder::new().spawn(move || file.sync_all());
        self.syncing = Some(syncing.during("write", self.path())?);
        Ok(())
    }

    /// Ends the file if nobody did, and waits until it is on the disk.
    ///
    /// # Errors
    /// The disk is full or refuses.
    pub fn settle(&mut self) -> Result<()> {
        self.close()?;
        let Some(syncing) = self.syncing.take() else {
            return Ok(());
        };
        let gone = |_| Err(io::Error::other("the thread that wrote it failed"));
        syncing
            .join()
            .unwrap_or_else(gone)
            .during("write", self.path())
    }

    /// Gives a file that is on the disk its final name, which is sure to last once [`sync_folder`] was called for its folder.
    ///
    /// # Errors
    /// The disk is full or refuses; what had the name before still has it.
    pub fn publish(mut self) -> Result<()> {
        self.settle()?;
        fs::rename(self.path(), &self.target).during("write", &self.target)?;
        self.is_published = true;
        Ok(())
    }

    /// [`NewFile::publish`], and the name lasts.
    ///
    /// # Errors
    /// As [`NewFile::publish`].
    pub fn commit(self) -> Result<()> {
        let target = self.target.clone();
        self.publish()?;
        sync_folder(parent(&target))
    }

    /// Where the bytes are now.
    pub fn path(&self) -> &Path {
        &self.slot.path
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Some systems keep a file that is open. Nothing more can be done about a failure here.
        let _ = self.syncing.take().map(JoinHandle::join);
        if let Some(writer) = self.writer.take() {
            // What is still in memory is of no use.
            drop(writer.into_parts());
        }
        if !self.is_published {
            let _ = fs::remove_file(&self.slot.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn write_replaces_the_old_file_and_makes_folders() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c.json");
        write(&path, b"a longer old text").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(path.parent().unwrap()), ["c.json"]);
    }

    #[test]
    fn copy_of_what_cannot_be_read_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        write(&to, b"old").unwrap();
        assert!(copy(&from, &to).unwrap_err().to_string().contains("read"));
        assert_eq!(fs::read(&to).unwrap(), b"old");
        write(&from, &[7; 3 << 20]).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), [7; 3 << 20]);
    }

    #[test]
    fn a_file_that_never_arrives_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, b"old").unwrap();
        let mut file = NewFile::create(&path).unwrap();
        file.write(b"half").unwrap();
        file.settle().unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn what_a_killed_writer_left_is_overwritten_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::write(
            dir.path().join("a.json.tmp"),
            "a long text of one that died",
        )
        .unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn a_file_that_is_being_written_can_be_read_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = NewFile::create(&dir.path().join("a.json")).unwrap();
        file.write(b"half").unwrap();
        file.settle().unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"half");
        file.publish().unwrap();
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn two_writers_at_once_each_give_a_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut first = NewFile::create(&path).unwrap();
        let mut second = NewFile::create(&path).unwrap();
        first.write(b"first").unwrap();
        second.write(b"the second").unwrap();
        first.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        second.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"the second");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn many_threads_that_write_one_file_never_show_a_half_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::thread::scope(|scope| {
            for n in 0..8_u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write(path, &vec![n; 1000 + usize::from(n)]).unwrap();
                        let seen = fs::read(path).unwrap();
                        assert_eq!(seen.len(), 1000 + usize::from(seen[0]));
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn a_name_that_is_a_folder_is_an_error_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        fs::create_dir(&path).unwrap();
        let error = write(&path, b"x").unwrap_err().to_string();
        assert!(error.contains("a.json"), "{error}");
        assert_eq!(names(dir.path()), ["a.json"]);
    }
}
