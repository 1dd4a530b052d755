//! Stages keyed by content: a stage whose inputs did not change is not run again.
//!
//! A stage's key is the SHA-256 of the program's version, the stage's name and everything that its result depends on, as one JSON value.
//! The key is written as `stage.json` into the stage's folder after its outputs, so a stage that was cut short has none; with it the files
//! that the stage made, so that one that has lost some of them is made again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use files::outside;
use serde_json::Value;

/// The file that a finished stage's folder has.
pub const STAGE_MARK: &str = "stage.json";
/// The file that says what a stage is made from, from its beginning on.
const INPUTS: &str = "inputs.json";
/// What a stage's folder holds that is no result: what its work resumes from, and its lock.
const NO_RESULT: [&str; 5] = [
    STAGE_MARK,
    INPUTS,
    "checkpoints",
    "run.lock",
    "run.lock.json",
];

/// One stage of a run.
pub struct Stage {
    /// Of the stage and its folder.
    pub name: &'static str,
    /// Where its result lies.
    pub dir: PathBuf,
    /// SHA-256 of all that its result depends on.
    pub key: String,
    inputs: Value,
    /// Whether what other inputs left stays until the work replaces it.
    is_replacing: bool,
}

impl Stage {
    /// `run_dir/<name>`, keyed by `inputs`.
    pub fn new(run_dir: &Path, name: &'static str, inputs: Value) -> Self {
        let text = serde_json::json!([env!("CARGO_PKG_VERSION"), name, inputs]).to_string();
        Stage {
            name,
            dir: run_dir.join(name),
            key: files::sha256(text.as_bytes()),
            inputs,
            is_replacing: false,
        }
    }

    /// The same, for work that replaces the old result whole: [`Stage::begin`] leaves it until then.
    pub fn replacing(self) -> Self {
        Stage {
            is_replacing: true,
            ..self
        }
    }

    /// Whether the folder holds the finished result of these very inputs, with every file that was made.
    pub fn is_cached(&self) -> bool {
        let record = read_record(&self.dir.join(STAGE_MARK));
        record.is_some_and(|record| {
            record.get("key").and_then(Value::as_str) == Some(&self.key) && self.has_files(&record)
        })
    }

    /// Whether the files that a record lists are there with their sizes.
    fn has_files(&self, record: &Value) -> bool {
        let Some(files) = record.get("files").and_then(Value::as_object) else {
            return false;
        };
        files.iter().all(|(name, n_bytes)| {
            let there = std::fs::metadata(self.dir.join(name));
            there.is_ok_and(|meta| meta.is_file() && Some(meta.len()) == n_bytes.as_u64())
        })
    }

    /// Readies the folder: what other inputs left there is removed, what an interrupted run with the same inputs left is kept, so that it resumes.
    ///
    /// # Errors
    /// The folder cannot be made or emptied.
    pub fn begin(&self) -> Result<()> {
        let marker = self.dir.join(INPUTS);
        let same = read_record(&marker)
            .is_some_and(|record| record.get("key").and_then(Value::as_str) == Some(&self.key));
        if self.dir.exists() && !same {
            self.make_room()?;
        }
        files::write(&marker, &serde_json::to_vec_pretty(&self.record())?)?;
        Ok(())
    }

    fn make_room(&self) -> Result<()> {
        let mark = self.dir.join(STAGE_MARK);
        if !self.is_replacing {
            files::remove_folder(&self.dir)?;
        } else if mark.exists() {
            // What comes is not what this says.
            std::fs::remove_file(&mark).with_context(|| format!("removing {}", mark.display()))?;
        }
        Ok(())
    }

    /// Marks the stage as done, with the files that it made.
    ///
    /// # Errors
    /// The folder cannot be listed, the mark not be written.
    pub fn finish(&self) -> Result<()> {
        let mut files = BTreeMap::new();
        list(&self.dir, "", &mut files)
            .with_context(|| format!("listing {}", self.dir.display()))?;
        let mut record = self.record();
        record["files"] = serde_json::to_value(files)?;
        files::write(
            &self.dir.join(STAGE_MARK),
            &serde_json::to_vec_pretty(&record)?,
        )?;
        Ok(())
    }

    fn record(&self) -> Value {
        serde_json::json!({ "stage": self.name, "key": self.key, "version": env!("CARGO_PKG_VERSION"), "inputs": self.inputs })
    }
}

fn read_record(path: &Path) -> Option<Value> {
    let bytes = outside::read(path, outside::MOST_SETTINGS_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The files of a result below `folder` and their bytes, by names with `/` behind `prefix`; hidden ones are no part of it.
fn list(folder: &Path, prefix: &str, files: &mut BTreeMap<String, u64>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_result = !prefix.is_empty() || !NO_RESULT.contains(&name.as_str());
        if name.starts_with('.') || !is_result {
            continue;
        }
        let meta = std::fs::metadata(entry.path())?;
        let name = format!("{prefix}{name}");
        if meta.is_dir() {
            list(&entry.path(), &format!("{name}/"), files)?;
        } else if meta.is_file() {
            files.insert(name, meta.len());
        }
    }
    Ok(())
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
    fn stage_that_lost_a_file_that_it_made_is_not_cached() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path(), "export", json!({ "n": 1 }));
        stage.begin().unwrap();
        let write = |name: &str, bytes: &str| {
            files::write(&stage.dir.join(name), bytes.as_bytes()).unwrap();
        };
        write("fp8-block/model.safetensors", "weights");
        write("checkpoints/step-1/state.json", "{}");
        stage.finish().unwrap();
        assert!(stage.is_cached());
        // What is made beside it later changes nothing, nor does what it could resume from.
        write("notes.txt", "mine");
        std::fs::remove_dir_all(stage.dir.join("checkpoints")).unwrap();
        assert!(stage.is_cached());
        write("fp8-block/model.safetensors", "half");
        assert!(!stage.is_cached());
        write("fp8-block/model.safetensors", "weights");
        assert!(stage.is_cached());
        std::fs::remove_file(stage.dir.join("fp8-block/model.safetensors")).unwrap();
        assert!(!stage.is_cached());
        // It is made anew beside what is there.
        stage.begin().unwrap();
        assert!(stage.dir.join("notes.txt").exists());
    }

    #[test]
    fn stage_that_replaces_keeps_the_old_result_but_not_its_mark() {
        let dir = tempfile::tempdir().unwrap();
        let stage = |n: u32| Stage::new(dir.path(), "export", json!({ "n": n })).replacing();
        stage(1).begin().unwrap();
        std::fs::write(stage(1).dir.join("weights"), "old").unwrap();
        stage(1).finish().unwrap();
        stage(2).begin().unwrap();
        assert!(stage(2).dir.join("weights").exists());
        assert!(!stage(1).is_cached() && !stage(2).is_cached());
    }
}
