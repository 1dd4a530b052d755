//! `metrics.jsonl`: one JSON object a line, the record that every other view of a run is drawn from.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{IoContext, Result};

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainLine {
    /// Counts from 1.
    pub step: u64,
    /// Passes over the data so far, as a fraction of rows.
    pub epoch: f64,
    /// Nats a trained token: sum over all micro-batches / trained tokens of the step.
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Tokens of this step's rows, trained or not.
    pub tokens: u64,
    /// Tokens of this step that carry loss.
    pub trained_tokens: u64,
    /// Tokens of the step over its seconds.
    pub tokens_per_s: f64,
}

/// Held-out loss of one language, or of `all`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationLine {
    /// Steps that were trained.
    pub step: u64,
    /// Name of the held-out set.
    pub split: String,
    /// Language code, or `all`.
    pub language: String,
    /// Nats a held-out target token.
    pub loss: f64,
    /// Bits per UTF-8 byte of the text behind the targets; null where the bytes are unknown.
    pub bits_per_byte: Option<f64>,
    /// Loss on training documents matched in language and length; null where training has none of this language.
    pub train_probe_loss: Option<f64>,
    /// loss / train_probe_loss − 1.
    pub gap: Option<f64>,
}

/// Something a person should look at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlertLine {
    /// Steps that were trained.
    pub step: u64,
    /// What kind it is.
    pub alert: String,
    /// How bad it is.
    pub level: String,
    /// What it says to people.
    pub text: String,
}

/// The file, open for appending.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl MetricsFile {
    /// Opens or makes `path` and keeps its first `keep_bytes`: lines after the checkpoint that a run goes on from will be written again.
    ///
    /// # Errors
    /// The file cannot be opened or cut.
    pub fn open(path: &Path, keep_bytes: u64) -> Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(path)
            .during("opening", path)?;
        let length = file.metadata().during("reading", path)?.len();
        let bytes = length.min(keep_bytes);
        file.set_len(bytes).during("cutting", path)?;
        file.seek(SeekFrom::End(0)).during("seeking in", path)?;
        Ok(MetricsFile {
            file,
            path: path.to_path_buf(),
            bytes,
        })
    }

    /// Appends one line, in one write.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn line(&mut self, line: &impl Serialize) -> Result<()> {
        let mut json = serde_json::to_string(line)
            .map_err(std::io::Error::from)
            .during("writing", &self.path)?;
        json.push('\n');
        self.file
            .write_all(json.as_bytes())
            .during("writing", &self.path)?;
        self.bytes += json.len() as u64;
        Ok(())
    }

    /// Length so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Waits until everything written so far is on the disk.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().during("syncing", &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alert(step: u64) -> AlertLine {
        AlertLine {
            step,
            alert: "gap".into(),
            level: "warn".into(),
            text: "x".into(),
        }
    }

    #[test]
    fn lines_have_the_documented_keys_in_order() {
        let train = TrainLine {
            step: 1,
            epoch: 0.002,
            loss: 2.5,
            lr: 0.0,
            grad_norm: 1.5,
            tokens: 10,
            trained_tokens: 9,
            tokens_per_s: 3.0,
        };
        assert_eq!(
            serde_json::to_string(&train).unwrap(),
            r#"{"step":1,"epoch":0.002,"loss":2.5,"lr":0.0,"grad_norm":1.5,"tokens":10,"trained_tokens":9,"tokens_per_s":3.0}"#
        );
        let validation = ValidationLine {
            step: 50,
            split: "val".into(),
            language: "all".into(),
            loss: 2.0,
            bits_per_byte: Some(0.5),
            train_probe_loss: Some(1.0),
            gap: Some(1.0),
        };
        assert_eq!(
            serde_json::to_string(&validation).unwrap(),
            r#"{"step":50,"split":"val","language":"all","loss":2.0,"bits_per_byte":0.5,"train_probe_loss":1.0,"gap":1.0}"#
        );
        assert_eq!(
            serde_json::to_string(&alert(3)).unwrap(),
            r#"{"step":3,"alert":"gap","level":"warn","text":"x"}"#
        );
    }

    #[test]
    fn reopening_keeps_only_the_bytes_of_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        file.line(&alert(1)).unwrap();
        let keep = file.bytes();
        file.line(&alert(2)).unwrap();
        drop(file);
        let mut file = MetricsFile::open(&path, keep).unwrap();
        file.line(&alert(3)).unwrap();
        let steps: Vec<u64> = std::fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<AlertLine>(line).unwrap().step)
            .collect();
        assert_eq!(steps, [1, 3]);
    }
}
