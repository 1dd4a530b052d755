//! Stages keyed by content: a stage whose inputs did not change is not run again.
//!
//! A stage's key is the SHA-256 of the program's version, the stage's name and everything that its result depends on, as one JSON value.
//! The key is written as `stage.json` into the stage's folder after its outputs, so a stage that was cut short has none.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// One stage of a run.
pub struct Stage {
    pub name: &'static str,
    pub dir: PathBuf,
    pub key: String,
    inputs: Value,
}

impl Stage {
    /// `run_dir/<name>`, keyed by `inputs`.
    pub fn new(run_dir: &Path, name: &'static str, inputs: Value) -> Self {
        let text = serde_json::json!([env!("CARGO_PKG_VERSION"), name, inputs]).to_string();
        Stage {
            name,
            dir: run_dir.join(name),
            key: hex(&Sha256::digest(text.as_bytes())),
            inputs,
        }
    }

    /// Whether the folder holds the finished result of these very inputs.
    pub fn is_cached(&self) -> bool {
        self.recorded_key().is_some_and(|key| key == self.key)
    }

    /// Readies the folder: what other inputs left there is removed, what an interrupted run with the same inputs left is kept, so that it resumes.
    ///
    /// # Errors
    /// The folder cannot be made or emptied.
    pub fn begin(&self) -> Result<()> {
        let marker = self.dir.join("inputs.json");
        let same = read_key(&marker).is_some_and(|key| key == self.key);
        if self.dir.exists() && !same {
            std::fs::remove_dir_all(&self.dir)
                .with_context(|| format!("emptying {}", self.dir.display()))?;
        }
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("making {}", self.dir.display()))?;
        write_whole(&marker, &serde_json::to_vec_pretty(&self.record())?)
    }

    /// Marks the stage as done.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn finish(&self) -> Result<()> {
        write_whole(
            &self.dir.join("stage.json"),
            &serde_json::to_vec_pretty(&self.record())?,
        )
    }

    fn record(&self) -> Value {
        serde_json::json!({ "stage": self.name, "key": self.key, "version": env!("CARGO_PKG_VERSION"), "inputs": self.inputs })
    }

    fn recorded_key(&self) -> Option<String> {
        read_key(&self.dir.join("stage.json"))
    }
}

fn read_key(path: &Path) -> Option<String> {
    let value: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    value.get("key")?.as_str().map(str::to_owned)
}

/// Writes beside, syncs, renames: `path` is old or new, never half.
///
/// # Errors
/// Names the file and says what the system said (a full disk, above all).
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let run = || -> std::io::Result<()> {
        use std::io::Write;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".tmp");
        let beside = path.with_file_name(name);
        let mut file = std::fs::File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    run().with_context(|| format!("writing {}", path.display()))
}

/// SHA-256 of a file's bytes, or of a folder's files by name and bytes, in name order.
///
/// # Errors
/// Names the path that cannot be read.
pub fn hash_path(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    hash_into(&mut hasher, path)?;
    Ok(hex(&hasher.finalize()))
}

fn hash_into(hasher: &mut Sha256, path: &Path) -> Result<()> {
    if path.is_dir() {
        let read = || {
            std::fs::read_dir(path)?
                .map(|entry| Ok(entry?.path()))
                .collect::<std::io::Result<Vec<_>>>()
        };
        let mut entries = read().with_context(|| format!("reading {}", path.display()))?;
        entries.sort();
        for entry in entries {
            hasher.update(entry.file_name().unwrap_or_default().as_encoded_bytes());
            hash_into(hasher, &entry)?;
        }
        return Ok(());
    }
    let mut file =
        std::fs::File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer)
            .with_context(|| format!("reading {}", path.display()))?;
        if n == 0 {
            return Ok(());
        }
        hasher.update(&buffer[..n]);
    }
}

/// SHA-256 of bytes, in hex.
pub fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn stage_is_cached_only_when_finished_with_the_same_inputs() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path(), "corpus", json!({ "story": "abc" }));
        stage.begin().unwrap();
        assert!(!stage.is_cached());
        std::fs::write(stage.dir.join("partial"), "kept for resume").unwrap();
        stage.begin().unwrap();
        assert!(stage.dir.join("partial").exists());
        stage.finish().unwrap();
        assert!(Stage::new(dir.path(), "corpus", json!({ "story": "abc" })).is_cached());
        let other = Stage::new(dir.path(), "corpus", json!({ "story": "abd" }));
        assert!(!other.is_cached());
        other.begin().unwrap();
        assert!(!other.dir.join("partial").exists() && !other.is_cached());
    }

    #[test]
    fn hash_of_a_folder_sees_names_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "1").unwrap();
        let first = hash_path(dir.path()).unwrap();
        std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_ne!(first, hash_path(dir.path()).unwrap());
    }
}
