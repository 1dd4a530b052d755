//! A run's folder belongs to one process at a time: a lock of the system, which goes with the process however it ends, and beside it who has it.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kernel::host;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};

/// The lock on a run's folder, until it is dropped.
#[derive(Debug)]
pub struct RunLock {
    file: File,
    holder: PathBuf,
}

/// Who has a folder, as `run.lock.json`: on Windows nobody else can read the locked file itself.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    process: u32,
    host: String,
    /// Seconds since 1970.
    since: u64,
}

impl RunLock {
    /// Takes the folder, which is there.
    ///
    /// # Errors
    /// [`Error::InUse`] if another process has it, with its id, its machine and since when; a folder that cannot be written.
    pub fn take(folder: &Path) -> Result<RunLock> {
        let path = folder.join("run.lock");
        let holder = folder.join("run.lock.json");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .during("opening", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::InUse {
                    folder: folder.to_owned(),
                    holder: describe(&holder),
                });
            }
            // Some network file systems have no locks, and are no reason not to train.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).during("locking", &path);
            }
        }
        let record = Holder {
            process: std::process::id(),
            host: host::name(),
            since: now().as_secs(),
        };
        let json = serde_json::to_vec(&record).map_err(std::io::Error::from);
        files::write(&holder, &json.during("writing", &holder)?)?;
        Ok(RunLock { file, holder })
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The lock goes with the file; a record that stays says nothing without it.
        drop(std::fs::remove_file(&self.holder));
        drop(self.file.unlock());
    }
}

fn describe(holder: &Path) -> String {
    let record = std::fs::read(holder).ok();
    let record = record.and_then(|bytes| serde_json::from_slice::<Holder>(&bytes).ok());
    match record {
        Some(record) => {
            let since = now().saturating_sub(Duration::from_secs(record.since));
            format!(
                "process {} on {}, which started {} ago",
                record.process,
                record.host,
                spoken(since.as_secs())
            )
        }
        None => "another process".to_owned(),
    }
}

/// `75 s`, `12 min`, `30 h`.
fn spoken(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_holder_is_told_who_has_the_folder_and_a_freed_one_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let lock = RunLock::take(folder.path()).unwrap();
        let error = RunLock::take(folder.path()).err().unwrap().to_string();
        let process = format!("process {} on ", std::process::id());
        assert!(error.contains(&process) && error.contains("ago"), "{error}");
        drop(lock);
        drop(RunLock::take(folder.path()).unwrap());
    }

    /// A process that was killed leaves its record and no lock.
    #[test]
    fn record_without_a_lock_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let record = r#"{"process": 1, "host": "elsewhere", "since": 0}"#;
        std::fs::write(folder.path().join("run.lock.json"), record).unwrap();
        std::fs::write(folder.path().join("run.lock"), "").unwrap();
        drop(RunLock::take(folder.path()).unwrap());
    }
}
