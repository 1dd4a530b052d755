//! Stages keyed by content: a stage whose inputs did not change is not run again.
//!
//! A stage's key is the SHA-256 of the program's version, the stage's name and everything that its result depends on, as one JSON value.
//! The key is written as `stage.json` into the stage's folder after its outputs, so a stage that was cut short has none.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// The file that a finished stage's folder has.
pub const STAGE_MARK: &str = "stage.json";

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

    /// Marks the stage as done.
    ///
    /// # Errors
    /// The mark cannot be written.
    pub fn finish(&self) -> Result<()> {
        files::write(
            &self.dir.join(STAGE_MARK),
            &serde_json::to_vec_pretty(&self.record())?,
        )?;
        Ok(())
    }

    fn record(&self) -> Value {
        serde_json::json!({ "stage": self.name, "key": self.key, "version": env!("CARGO_PKG_VERSION"), "inputs": self.inputs })
    }

    fn recorded_key(&self) -> Option<String> {
        read_key(&self.dir.join(STAGE_MARK))
    }
}

fn read_key(path: &Path) -> Option<String> {
    let value: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    value.get("key")?.as_str().map(str::to_owned)
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
