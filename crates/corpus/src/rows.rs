//! Gives the rows of built data sets back, each with its language, its scene and the side of the split it is on.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result, without_position};
use crate::language::Language;
use crate::manifest::{self, DataFile, Dataset, Manifest, RowScenes};
use crate::output::Role;
use crate::split::{Side, Split};

/// A row of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The scene it comes from; the first one if the row holds lines of several on the same side.
    pub scene: String,
    pub side: Side,
    pub language: Option<Language>,
    pub messages: Vec<RowMessage>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RowMessage {
    pub role: Role,
    pub content: String,
}

impl Row {
    /// The text of a pre-training row: its only message.
    pub fn text(&self) -> Option<&str> {
        match &self.messages[..] {
            [only] => Some(&only.content),
            _ => None,
        }
    }
}

/// Reads a data set: `path` is its folder (all languages) or one file in it, as built.
/// Without a split all rows are on the training side. A row with lines of scenes on different sides becomes one row
/// for each side.
///
/// # Errors
/// The manifest is missing or does not fit the files, or the split does not know a scene.
pub fn load(path: &Path, split: Option<&Split>) -> Result<Vec<Row>> {
    let found = find(path)?;
    let mut rows = Vec::new();
    for file in &found.files {
        load_file(&found.out, &found.dataset, file, split, &mut rows)?;
    }
    Ok(rows)
}

/// A data set, or one file of it, as the manifest above it lists it.
pub(crate) struct Found {
    pub out: PathBuf,
    pub dataset: Dataset,
    pub files: Vec<DataFile>,
}

impl Found {
    /// The tokens of every row by the files' keys.
    pub fn token_counts(&self) -> Result<BTreeMap<String, Vec<u64>>> {
        let path = self.out.join(&self.dataset.tokens_file);
        let bytes = std::fs::read(&path).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| Error::Manifest {
            path,
            problem: format!("is no file of token counts ({error})"),
        })
    }
}

/// Finds the data set and the files that `path` names: the folder of a data set, or a file in it.
pub(crate) fn find(path: &Path) -> Result<Found> {
    let absolute = std::path::absolute(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    for out in absolute.ancestors().skip(1) {
        let Some(manifest) = Manifest::load(out)? else {
            continue;
        };
        let relative = absolute.strip_prefix(out).unwrap_or(&absolute);
        let relative: Vec<_> = relative
            .components()
            .map(|c| c.as_os_str().to_string_lossy())
            .collect();
        let relative = relative.join("/");
        for (task, dataset) in manifest.datasets {
            let files: Vec<DataFile> = dataset
                .files
                .iter()
                .filter(|f| task == relative || f.path == relative)
                .cloned()
                .collect();
            if !files.is_empty() {
                return Ok(Found {
                    out: out.to_owned(),
                    dataset,
                    files,
                });
            }
        }
    }
    Err(Error::Manifest {
        path: path.to_owned(),
        problem: format!(
            "is no folder or file of a data set that was built here (no {} above it lists it)",
            manifest::FILE_NAME
        ),
    })
}

fn load_file(
    out: &Path,
    dataset: &Dataset,
    file: &DataFile,
    split: Option<&Split>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    #[derive(Deserialize)]
    struct Record {
        messages: Vec<RowMessage>,
    }
    let path = out.join(&file.path);
    let read_error = |source| Error::Read {
        path: path.clone(),
        source,
    };
    let changed = |problem: String| Error::Manifest {
        path: path.clone(),
        problem,
    };
    let input = BufReader::new(std::fs::File::open(&path).map_err(read_error)?);
    let mut n_rows = 0;
    for line in input.split(b'\n') {
        let line = line.map_err(read_error)?;
        let record: Record = serde_json::from_slice(&line).map_err(|error| Error::Json {
            path: path.clone(),
            line: n_rows + 1,
            column: error.column().max(1),
            problem: without_position(&error.to_string()),
        })?;
        let origin = file
            .rows
            .get(n_rows)
            .ok_or_else(|| changed("has more rows than its manifest says".to_owned()))?;
        n_rows += 1;
        let side = |scene: u32| -> Result<(&str, Side)> {
            let id = dataset.scenes.get(scene as usize).ok_or_else(|| {
                changed(format!("points to a scene {scene} that the manifest lacks"))
            })?;
            let side = match split {
                None => Side::Train,
                // Vendor sets have no language and no scenes; they are for training only.
                Some(_) if file.language.is_none() => Side::Train,
                Some(split) => split.side(id).ok_or_else(|| {
                    changed(format!("holds scene `{id}`, which the split does not know"))
                })?,
            };
            Ok((id, side))
        };
        match origin {
            RowScenes::One(scene) => {
                let (id, side) = side(*scene)?;
                rows.push(Row {
                    scene: id.to_owned(),
                    side,
                    language: file.language,
                    messages: record.messages,
                });
            }
            RowScenes::Several(parts) => {
                let content = record.messages.first().map_or("", |m| m.content.as_str());
                let mut sides: Vec<(Side, &str, Vec<&str>)> = Vec::new();
                let mut lines = content.split('\n');
                for (scene, n_lines) in parts {
                    let (id, side) = side(*scene)?;
                    let taken = lines.by_ref().take(*n_lines as usize);
                    match sides.iter_mut().find(|(s, ..)| *s == side) {
                        Some((_, _, known)) => known.extend(taken),
                        None => sides.push((side, id, taken.collect())),
                    }
                }
                rows.extend(sides.into_iter().map(|(side, id, lines)| Row {
                    scene: id.to_owned(),
                    side,
                    language: file.language,
                    messages: vec![RowMessage {
                        role: Role::Assistant,
                        content: lines.join("\n"),
                    }],
                }));
            }
        }
    }
    if n_rows != file.rows.len() {
        return Err(changed(format!(
            "has {n_rows} rows, but its manifest says {}",
            file.rows.len()
        )));
    }
    Ok(())
}
