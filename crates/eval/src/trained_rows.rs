//! Which rows a model was trained on, kept beside its weights, so that evaluation can draw from them what it compares held-out rows with.

use std::collections::BTreeSet;
use std::path::Path;

use files::outside;
use serde::{Deserialize, Serialize};
use text::labels::LossScale;

use crate::{Error, Result};

/// Name of the file in a model's or adapter's folder.
const FILE: &str = "trained_rows.json";
const VERSION: u32 = 1;

/// Rows by the hash of their token ids, over all stages of training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedRows {
    version: u32,
    /// Tokens of a packed row of the last training, which evaluation cuts by too; None in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_tokens: Option<usize>,
    /// Which parts of answers the last fine-tuning learned, which evaluation measures too; records of earlier versions mean the default.
    #[serde(default)]
    pub loss_scale: LossScale,
    /// The first 16 hexadecimal digits of the SHA-256 of the ids, each in four bytes, lowest first.
    rows: BTreeSet<String>,
}

impl Default for TrainedRows {
    fn default() -> Self {
        TrainedRows {
            version: VERSION,
            row_tokens: None,
            loss_scale: LossScale::default(),
            rows: BTreeSet::new(),
        }
    }
}

impl TrainedRows {
    /// What `folder` says; None if it says nothing: nobody knows what its model was trained on.
    ///
    /// # Errors
    /// A file that cannot be read, or is of another version.
    pub fn read(folder: &Path) -> Result<Option<TrainedRows>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = outside::read(&path, outside::MOST_DATA_BYTES);
        let rows = bytes.and_then(|bytes| Ok(serde_json::from_slice::<TrainedRows>(&bytes)?));
        let rows = rows.map_err(|source| Error::TrainedRows {
            path: path.clone(),
            source,
        })?;
        if rows.version != VERSION {
            return Err(Error::TrainedRowsVersion {
                path,
                version: rows.version,
                known: VERSION,
            });
        }
        Ok(Some(rows))
    }

    /// Writes them into `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::write(&folder.join(FILE), &serde_json::to_vec(self)?)?;
        Ok(())
    }

    /// Adds a row by its ids.
    pub fn insert(&mut self, input_ids: &[u32]) {
        self.rows.insert(key(input_ids));
    }

    /// Whether a row of these ids is among them.
    pub fn contains(&self, input_ids: &[u32]) -> bool {
        self.rows.contains(&key(input_ids))
    }
}

fn key(input_ids: &[u32]) -> String {
    let bytes: Vec<u8> = input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    files::sha256(&bytes)[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_known_again_by_their_ids() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(TrainedRows::read(dir.path()).unwrap(), None);
        let mut rows = TrainedRows::default();
        rows.insert(&[1, 2, 3]);
        rows.loss_scale = LossScale::LastRound;
        rows.write(dir.path()).unwrap();
        let read = TrainedRows::read(dir.path()).unwrap().unwrap();
        assert_eq!(read, rows);
        assert!(read.contains(&[1, 2, 3]));
        assert!(!read.contains(&[1, 2]) && !read.contains(&[513, 3]));
        std::fs::write(dir.path().join(FILE), "{\"version\":2,\"rows\":[]}").unwrap();
        let error = TrainedRows::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    #[test]
    fn record_of_an_earlier_version_means_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{\"version\":1,\"rows\":[]}").unwrap();
        let read = TrainedRows::read(dir.path()).unwrap();
        assert_eq!(read, Some(TrainedRows::default()));
    }
}
