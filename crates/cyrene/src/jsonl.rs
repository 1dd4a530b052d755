//! Files of JSON lines that a user names, with errors that give the line.

use std::io::BufRead;
use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::misuse;

/// Reads every non-empty line of `path` as a `T`.
///
/// # Errors
/// [`crate::ui::Misuse`]: the file cannot be read, or a line is not what was expected; names file, line and column.
pub fn read<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<T>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) => misuse!("cannot read {}: {error}", path.display()),
    };
    let mut rows = Vec::new();
    for (at, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = match line {
            Ok(line) => line,
            Err(error) => misuse!(
                "{}:{}: {error}; expected UTF-8 JSON lines",
                path.display(),
                at + 1
            ),
        };
        if line.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(&line) {
            Ok(row) => rows.push(row),
            Err(error) => misuse!(
                "{}:{}:{}: {error}; expected {expected}",
                path.display(),
                at + 1,
                error.column()
            ),
        }
    }
    Ok(rows)
}
