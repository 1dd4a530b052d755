//! A repository's files at one commit, and the record of it in a finished folder.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hash::{Commit, Hash};
use crate::name::{FileName, HubId, Revision};

/// In a finished folder, what it holds and where it is from.
pub const RECORD: &str = "fetch.json";
/// Ends the names of files that are not whole.
pub(crate) const INCOMPLETE: &str = ".incomplete";

/// Files that a repository may have.
pub const MAX_FILES: usize = 4096;
/// Bytes that the wanted files may have together: 4 TiB.
pub const MAX_BYTES: u64 = 1 << 42;
/// Of [`RECORD`]; [`MAX_FILES`] with their names and hashes take less.
const MAX_RECORD_BYTES: u64 = 4 << 20;

/// One file of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its name, without a folder.
    pub name: FileName,
    /// Its size.
    pub bytes: u64,
    /// What it is held against.
    pub hash: Hash,
}

/// The wanted files of a repository at a commit: no name twice, not even with other capitals, and no more than [`MAX_FILES`] and
/// [`MAX_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Snapshot {
    hub_id: HubId,
    commit: Commit,
    files: Vec<File>,
}

/// A snapshot as a record says it.
#[derive(Deserialize)]
struct Unchecked {
    hub_id: HubId,
    commit: Commit,
    files: Vec<File>,
}

impl TryFrom<Unchecked> for Snapshot {
    type Error = Error;

    fn try_from(unchecked: Unchecked) -> Result<Snapshot> {
        Snapshot::new(unchecked.hub_id, unchecked.commit, unchecked.files)
    }
}

impl Snapshot {
    /// Checks the files against each other.
    ///
    /// # Errors
    /// Too many, too large, two of one name, or a name that a fetched folder needs for itself.
    pub fn new(hub_id: HubId, commit: Commit, files: Vec<File>) -> Result<Snapshot> {
        if files.len() > MAX_FILES {
            return Err(Error::TooManyFiles);
        }
        let mut folded = HashSet::new();
        let mut bytes: u64 = 0;
        for file in &files {
            let name = file.name.folded();
            if name == RECORD || name.ends_with(INCOMPLETE) {
                let name = file.name.clone();
                return Err(Error::Reserved { name });
            }
            if !folded.insert(name) {
                let name = file.name.clone();
                return Err(Error::Duplicate { name });
            }
            let sum = bytes.checked_add(file.bytes);
            bytes = sum
                .filter(|sum| *sum <= MAX_BYTES)
                .ok_or(Error::TooManyBytes)?;
        }
        Ok(Snapshot {
            hub_id,
            commit,
            files,
        })
    }

    /// What an earlier fetch left in `folder`, if all its files are still there with their sizes.
    pub fn read(folder: &Path) -> Option<Snapshot> {
        let record = folder.join(RECORD);
        let meta = std::fs::metadata(&record).ok()?;
        if !meta.is_file() || meta.len() > MAX_RECORD_BYTES {
            return None;
        }
        let snapshot: Snapshot = serde_json::from_slice(&std::fs::read(record).ok()?).ok()?;
        let is_there = |file: &File| {
            std::fs::metadata(folder.join(file.name.as_str()))
                .is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes)
        };
        snapshot.files.iter().all(is_there).then_some(snapshot)
    }

    /// Whether this is what `revision` of `hub_id` means. A branch may have moved on; `main` counts as what it was.
    pub fn is_of(&self, hub_id: &HubId, revision: &Revision) -> bool {
        let revision = revision.as_str();
        self.hub_id == *hub_id && (revision == "main" || revision == self.commit.as_str())
    }

    /// `owner/name`.
    pub fn hub_id(&self) -> &HubId {
        &self.hub_id
    }

    /// The commit that the revision meant.
    pub fn commit(&self) -> &Commit {
        &self.commit
    }

    /// The wanted files.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Bytes of all files together, [`MAX_BYTES`] at most.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::GitBlobId;

    const ZEROS: &str = "0000000000000000000000000000000000000000";

    fn tiny() -> Snapshot {
        let file = File {
            name: FileName::parse("config.json").unwrap(),
            bytes: 2,
            hash: Hash::GitBlob(GitBlobId::parse(ZEROS).unwrap()),
        };
        let id = HubId::parse("someone/Tiny").unwrap();
        Snapshot::new(id, Commit::parse(ZEROS).unwrap(), vec![file]).unwrap()
    }

    #[test]
    fn record_is_believed_while_its_files_have_their_sizes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Snapshot::read(dir.path()), None);
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let record = serde_json::to_string(&tiny()).unwrap();
        std::fs::write(dir.path().join(RECORD), &record).unwrap();
        assert_eq!(Snapshot::read(dir.path()), Some(tiny()));

        let elsewhere = record.replace("config.json", "../config.json");
        std::fs::write(dir.path().join(RECORD), elsewhere).unwrap();
        assert_eq!(Snapshot::read(dir.path()), None);

        std::fs::write(dir.path().join(RECORD), &record).unwrap();
        std::fs::write(dir.path().join("config.json"), "{ }").unwrap();
        assert_eq!(Snapshot::read(dir.path()), None);
    }

    #[test]
    fn snapshot_is_of_its_commit_and_of_main() {
        let id = HubId::parse("someone/Tiny").unwrap();
        for (revision, is_of) in [("main", true), (ZEROS, true), ("v2", false)] {
            let revision = Revision::parse(revision).unwrap();
            assert_eq!(tiny().is_of(&id, &revision), is_of);
        }
        let other = HubId::parse("someone/Other").unwrap();
        assert!(!tiny().is_of(&other, &Revision::parse("main").unwrap()));
    }
}
