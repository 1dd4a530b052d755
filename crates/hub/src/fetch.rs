//! A whole repository into a folder. Files gather in `<out>.part`; the folder gets its name only when all of them are there and right.

use std::fs::{self, TryLockError};
use std::path::{Path, PathBuf};

use crate::answer;
use crate::client::Client;
use crate::download::{begun, download, failed, is_whole};
use crate::endpoint::Endpoint;
use crate::error::{Error, Result};
use crate::hash::Commit;
use crate::name::{FileName, HubId, Revision, percent_encoded};
use crate::snapshot::{File, INCOMPLETE, RECORD, Snapshot};

/// Of the answer that lists a repository's files.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Held in `<out>.part` by the process that writes there.
const LOCK: &str = ".lock";

/// The Hub, or a mirror of it.
#[derive(Debug)]
pub struct Hub {
    client: Client,
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file that is coming.
    pub name: &'a FileName,
    /// Bytes that are there, of all files.
    pub done: u64,
    /// Bytes of all files.
    pub total: u64,
}

impl Hub {
    /// The Hub at `endpoint`. The token, for gated and private models, goes to that host alone.
    ///
    /// # Errors
    /// A token that cannot be one.
    pub fn new(endpoint: &Endpoint, token: Option<&str>) -> Result<Hub> {
        let client = Client::new(endpoint, token)?;
        Ok(Hub { client })
    }

    /// What a revision means, and what is in it.
    ///
    /// # Errors
    /// No way to the server, no such repository or revision, an answer that cannot be.
    pub fn snapshot(&self, hub_id: &HubId, revision: &Revision) -> Result<Snapshot> {
        let revision = revision.as_str();
        let encoded = percent_encoded(revision);
        let path = format!("/api/models/{hub_id}/revision/{encoded}?blobs=true");
        let json = self.client.get_all(&path, MAX_ANSWER_BYTES)?;
        let snapshot = answer::read(hub_id, &json)?;
        // Who asks for a commit gets that one.
        match Commit::parse(revision) {
            Ok(asked) if asked != *snapshot.commit() => Err(Error::OtherCommit {
                asked,
                got: snapshot.commit().clone(),
            }),
            _ => Ok(snapshot),
        }
    }

    /// Gets a snapshot's files into `out`, going on from what an earlier start left in `<out>.part`.
    ///
    /// # Errors
    /// `out` exists, the disk has no room, a server that cannot be reached or trusted, a file whose hash differs (it is removed).
    pub fn fetch(
        &self,
        snapshot: &Snapshot,
        out: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<()> {
        // 1. the folder beside, for this process alone
        if fs::symlink_metadata(out).is_ok() {
            let out = out.to_owned();
            return Err(Error::Exists { out });
        }
        let part = open_part(out)?;
        let lock = take_lock(&part)?;

        // 2. what is there already, and room for what is not
        clear_stale(&part, snapshot)?;
        let total = snapshot.bytes();
        let mut done = 0;
        let mut missing = Vec::new();
        for file in snapshot.files() {
            match is_whole(&part, file)? {
                true => done += file.bytes,
                false => missing.push(file),
            }
        }
        ask_for_room(&part, &missing)?;

        // 3. each file: get, check, name
        for file in missing {
            let name = &file.name;
            let mut heard = |bytes| {
                let done = done + bytes;
                progress(Progress { name, done, total });
            };
            self.get(snapshot, file, &part, &mut heard)?;
            done += file.bytes;
        }

        // 4. the folder gets its name
        let record = serde_json::to_vec_pretty(snapshot);
        let record = record.map_err(|error| failed("write", &part.join(RECORD), error.into()))?;
        files::write(&part.join(RECORD), &record)?;
        drop(lock);
        let lock = part.join(LOCK);
        fs::remove_file(&lock).map_err(|source| failed("remove", &lock, source))?;
        Ok(files::move_folder(&part, out)?)
    }

    fn get(
        &self,
        snapshot: &Snapshot,
        file: &File,
        part: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let path = format!(
            "/{}/resolve/{}/{}",
            snapshot.hub_id(),
            snapshot.commit(),
            percent_encoded(file.name.as_str())
        );
        download(&self.client, &path, file, part, progress).map_err(|error| match error {
            error @ Error::Damaged { .. } => error,
            error => Error::Getting {
                name: file.name.clone(),
                part: part.to_owned(),
                source: Box::new(error),
            },
        })
    }
}

/// Makes `<out>.part`, or finds it; a link with that name is not followed.
fn open_part(out: &Path) -> Result<PathBuf> {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = out.with_file_name(name);
    fs::create_dir_all(&part).map_err(|source| failed("make", &part, source))?;
    match fs::symlink_metadata(&part).is_ok_and(|meta| meta.is_dir()) {
        true => Ok(part),
        false => Err(Error::Part { part }),
    }
}

/// Dies with this process. A file system that knows no locks has two writers at once on their own account.
fn take_lock(part: &Path) -> Result<fs::File> {
    let lock = files::open_plain(&part.join(LOCK))?;
    match lock.try_lock() {
        Ok(()) | Err(TryLockError::Error(_)) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            let part = part.to_owned();
            Err(Error::Busy { part })
        }
    }
}

/// Removes what an earlier start left of a commit that had other files.
fn clear_stale(part: &Path, snapshot: &Snapshot) -> Result<()> {
    let entries = fs::read_dir(part).map_err(|source| failed("list", part, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| failed("list", part, source))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let stem = name.strip_suffix(INCOMPLETE).unwrap_or(&name);
        let mut files = snapshot.files().iter();
        if answer::is_wanted(stem) && !files.any(|file| file.name.as_str() == stem) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|source| failed("remove", &path, source))?;
        }
    }
    Ok(())
}

fn ask_for_room(part: &Path, missing: &[&File]) -> Result<()> {
    let left = missing.iter().map(|file| file.bytes - begun(part, file));
    let needed: u64 = left.sum();
    match files::disk_free(part) {
        Some(free) if free < needed => Err(Error::Room {
            needed,
            free,
            part: part.to_owned(),
        }),
        _ => Ok(()),
    }
}
