//! Gives the rows of built data sets back, each with its language, its scene and the side of the split it is on.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use files::outside::{self, MOST_DATA_BYTES};
use serde::Deserialize;
use text::{Message, Role};

use crate::error::{Error, Result, without_position};
use crate::language::Language;
use crate::manifest::{self, DataFile, Dataset, Manifest, RowScenes};
use crate::split::{Side, Split};
use crate::task::Task;

/// A row of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct BuiltRow {
    /// The scene it comes from; the first one if the row holds lines of several on the same side.
    pub scene: String,
    /// Side of the split that the scene is on in this language.
    pub side: Side,
    /// Language of the row; `None` for a vendor set.
    pub language: Option<Language>,
    /// What is said, in order.
    pub messages: Vec<Message>,
}

/// A message as a build spells it.
#[derive(Deserialize)]
struct Built {
    role: BuiltRole,
    content: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum BuiltRole {
    System,
    User,
    Assistant,
}

impl From<Built> for Message {
    fn from(built: Built) -> Message {
        let role = match built.role {
            BuiltRole::System => Role::System,
            BuiltRole::User => Role::User,
            BuiltRole::Assistant => Role::Assistant,
        };
        Message::new(role, built.content)
    }
}

impl BuiltRow {
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
pub fn load(path: &Path, split: Option<&Split>) -> Result<Vec<BuiltRow>> {
    let found = find(path, split)?;
    let mut rows = Vec::new();
    for file in &found.files {
        rows.extend(load_file(&found, file, split)?);
    }
    Ok(rows)
}

/// The data sets that a path means: those of an output folder, in the order of its manifest, or the path itself.
///
/// # Errors
/// There is a manifest that cannot be read.
pub fn datasets(path: &Path) -> Result<Vec<PathBuf>> {
    let manifest = if path.is_dir() {
        Manifest::load(path)?
    } else {
        None
    };
    Ok(match manifest {
        Some(manifest) => manifest
            .datasets
            .keys()
            .map(|task| path.join(task))
            .collect(),
        None => vec![path.to_owned()],
    })
}

/// A data set, or one file of it, as the manifest above it lists it.
pub(crate) struct Found {
    pub out: PathBuf,
    /// Name of the data set: `pt/everything`.
    pub task: String,
    pub dataset: Dataset,
    pub files: Vec<DataFile>,
}

impl Found {
    /// The tokens of every row by the files' keys.
    pub fn token_counts(&self) -> Result<BTreeMap<String, Vec<u64>>> {
        let path = self.out.join(&self.dataset.tokens_file);
        let bytes = outside::read(&path, MOST_DATA_BYTES).map_err(|source| Error::Read {
            path: path.clone(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| Error::Manifest {
            path,
            problem: format!("is no file of token counts ({error})"),
        })
    }
}

/// The output folder that a data set's folder, or a file in it, lies in by its name (`OUT/pt/everything/en.jsonl`), if that holds a
/// manifest. A `manifest.json` anywhere else is nobody's business.
///
/// # Errors
/// The working folder is gone.
pub fn output_folder(path: &Path) -> Result<Option<PathBuf>> {
    let absolute = absolute(path)?;
    let out = absolute.ancestors().take(2).find_map(|folder| {
        let out = folder.parent()?.parent()?;
        let is_dataset = |task: &Task| out.join(task.name()) == folder;
        Task::ALL.iter().any(is_dataset).then_some(out)
    });
    Ok(out
        .filter(|out| out.join(manifest::FILE_NAME).exists())
        .map(Path::to_owned))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

/// Finds the data set and the files that `path` names: the folder of a data set, or a file in it. With a split, one of the same story.
pub(crate) fn find(path: &Path, split: Option<&Split>) -> Result<Found> {
    let absolute = absolute(path)?;
    if let Some(out) = output_folder(path)?
        && let Some(manifest) = Manifest::load(&out)?
    {
        let relative = absolute.strip_prefix(&out).unwrap_or(&absolute);
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
                if let Some(split) = split {
                    split.check_files(path, &dataset.source_files)?;
                }
                return Ok(Found {
                    out,
                    task,
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

/// Rows of a file by the sides of their scenes.
fn load_file(found: &Found, file: &DataFile, split: Option<&Split>) -> Result<Vec<BuiltRow>> {
    let mut rows = Vec::new();
    found.each_record(
        file,
        |_| true,
        |record| {
            rows.extend(found.by_side(file, split, record)?);
            Ok(())
        },
    )?;
    Ok(rows)
}

/// A line of a data set's file.
pub(crate) struct Record<'a> {
    /// From 0.
    pub idx: usize,
    pub messages: Vec<Message>,
    pub origin: &'a RowScenes,
}

/// What of a row comes from one scene.
pub(crate) struct ScenePart<'a> {
    pub scene: &'a str,
    /// `None` for the whole row.
    pub lines_and_tokens: Option<(u32, u32)>,
}

impl Found {
    /// The tokens of a file's rows.
    pub fn tokens_of<'a>(
        &self,
        file: &DataFile,
        counts: &'a BTreeMap<String, Vec<u64>>,
    ) -> Result<&'a [u64]> {
        let tokens = counts.get(&file.key).map_or(&[][..], |c| &c[..]);
        if tokens.len() == file.rows.len() {
            return Ok(tokens);
        }
        let problem = format!(
            "has {} rows, but {} holds {} token counts for it",
            file.rows.len(),
            self.dataset.tokens_file,
            tokens.len()
        );
        Err(self.changed(file, problem))
    }

    /// Reads the lines of a file for which `wanted` (their places from 0) holds, and checks that there are as many lines
    /// as the manifest says.
    pub fn each_record<'a>(
        &self,
        file: &'a DataFile,
        wanted: impl Fn(usize) -> bool,
        mut f: impl FnMut(Record<'a>) -> Result<()>,
    ) -> Result<()> {
        #[derive(Deserialize)]
        struct Line {
            messages: Vec<Built>,
        }
        let path = self.out.join(&file.path);
        let read_error = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let mut input = BufReader::new(outside::open(&path).map_err(read_error)?);
        let mut line = Vec::new();
        let mut n_rows = 0;
        loop {
            line.clear();
            let n = outside::read_line(&mut input, &mut line)
                .map_err(|source| Error::reading(&path, n_rows + 1, source))?;
            if n == 0 {
                break;
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            let idx = n_rows;
            n_rows += 1;
            if !wanted(idx) {
                continue;
            }
            let json: Line = serde_json::from_slice(&line).map_err(|error| Error::Json {
                path: path.clone(),
                line: n_rows,
                column: error.column().max(1),
                problem: without_position(&error.to_string()),
            })?;
            let origin = file.rows.get(idx).ok_or_else(|| {
                self.changed(file, "has more rows than its manifest says".to_owned())
            })?;
            f(Record {
                idx,
                messages: json.messages.into_iter().map(Message::from).collect(),
                origin,
            })?;
        }
        if n_rows != file.rows.len() {
            let problem = format!(
                "has {n_rows} rows, but its manifest says {}",
                file.rows.len()
            );
            return Err(self.changed(file, problem));
        }
        Ok(())
    }

    /// The scenes of a row, in the order of its content.
    pub fn scenes_of<'a>(
        &'a self,
        file: &DataFile,
        origin: &RowScenes,
    ) -> Result<Vec<ScenePart<'a>>> {
        match origin {
            RowScenes::One(scene) => Ok(vec![ScenePart {
                scene: self.scene(file, *scene)?,
                lines_and_tokens: None,
            }]),
            RowScenes::Several(parts) => parts
                .iter()
                .map(|(scene, n_lines, tokens)| {
                    Ok(ScenePart {
                        scene: self.scene(file, *scene)?,
                        lines_and_tokens: Some((*n_lines, *tokens)),
                    })
                })
                .collect(),
        }
    }

    /// The side of a scene of a file's row.
    pub fn side(&self, file: &DataFile, split: Option<&Split>, scene: &str) -> Result<Side> {
        match split {
            None => Ok(Side::Train),
            Some(split) => split
                .side(scene, file.language)
                .ok_or_else(|| Error::UnknownScene {
                    path: self.out.join(&file.path),
                    scene: scene.to_owned(),
                    remedy: match file.language {
                        Some(_) => "split the story that it was built from",
                        // Only pages of the vendor folder have no language.
                        None => "split the story again with --vendor FOLDER",
                    },
                }),
        }
    }

    /// The side of a whole row; `None` if its lines are on several.
    pub fn row_side(
        &self,
        file: &DataFile,
        split: Option<&Split>,
        origin: &RowScenes,
    ) -> Result<Option<Side>> {
        let mut side = None;
        for part in self.scenes_of(file, origin)? {
            let other = self.side(file, split, part.scene)?;
            if *side.get_or_insert(other) != other {
                return Ok(None);
            }
        }
        // A row without a text comes from no scene; it has nothing to hold out.
        Ok(Some(side.unwrap_or(Side::Train)))
    }

    /// A record as one row, or as one for each side that its scenes are on.
    pub fn by_side(
        &self,
        file: &DataFile,
        split: Option<&Split>,
        record: Record<'_>,
    ) -> Result<Vec<BuiltRow>> {
        if let RowScenes::One(scene) = record.origin {
            let scene = self.scene(file, *scene)?;
            return Ok(vec![BuiltRow {
                scene: scene.to_owned(),
                side: self.side(file, split, scene)?,
                language: file.language,
                messages: record.messages,
            }]);
        }
        let content = record.messages.first().map_or("", |m| m.content.as_str());
        let mut sides: Vec<(Side, &str, Vec<&str>)> = Vec::new();
        let mut lines = content.split('\n');
        for part in self.scenes_of(file, record.origin)? {
            let side = self.side(file, split, part.scene)?;
            let n_lines = part.lines_and_tokens.map_or(0, |(n_lines, _)| n_lines);
            let taken = lines.by_ref().take(n_lines as usize);
            match sides.iter_mut().find(|(s, ..)| *s == side) {
                Some((_, _, known)) => known.extend(taken),
                None => sides.push((side, part.scene, taken.collect())),
            }
        }
        let rows = sides.into_iter().map(|(side, scene, lines)| BuiltRow {
            scene: scene.to_owned(),
            side,
            language: file.language,
            messages: vec![Message::assistant(lines.join("\n"))],
        });
        Ok(rows.collect())
    }

    pub fn scene(&self, file: &DataFile, idx: u32) -> Result<&str> {
        let scene = self.dataset.scenes.get(idx as usize);
        scene.map(String::as_str).ok_or_else(|| {
            self.changed(
                file,
                format!("points to a scene {idx} that the manifest lacks"),
            )
        })
    }

    fn changed(&self, file: &DataFile, problem: String) -> Error {
        Error::Manifest {
            path: self.out.join(&file.path),
            problem,
        }
    }
}
