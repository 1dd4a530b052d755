//! `manifest.json`: what was built from what, and from which scene every row comes.

use std::collections::BTreeMap;
use std::path::Path;

use files::outside;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, shorten};
use crate::language::Language;

/// Name of the file in the output folder.
pub const FILE_NAME: &str = "manifest.json";
const VERSION: u32 = 3;

/// What a data set or a split was made from: SHA-256 by the file's name in the source. Of a plain story that is `story`, of a game
/// `ExcelOutput/<Table>`, `TextMap/<LANG>` (all parts) and `vendor/<set>`.
pub type SourceFiles = BTreeMap<String, String>;

/// All data sets of an output folder, by task name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Data sets by their tasks: `pt/everything`, ...
    pub datasets: BTreeMap<String, Dataset>,
}

/// One data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dataset {
    /// `story` or `turn-based-game`.
    pub source: String,
    /// SHA-256 over the names and contents of the source's files that were read.
    pub source_sha256: String,
    /// SHA-256 of each of these files by its name, for a split to be held against.
    pub source_files: SourceFiles,
    /// Name of the character file without `.toml`, and its SHA-256.
    pub character: String,
    /// SHA-256 of the character file.
    pub character_sha256: String,
    /// The file of token counts, relative to the output folder.
    pub tokens_file: String,
    /// SHA-256 of the file of token counts.
    pub tokens_sha256: String,
    /// Scenes that rows come from, in the order of first use; `rows` points into this list.
    pub scenes: Vec<String>,
    /// Its files, in the order of languages or sets.
    pub files: Vec<DataFile>,
    /// What the source holds that looks wrong, with how often.
    pub warnings: Vec<Warning>,
}

/// One file of rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataFile {
    /// Relative to the output folder, with `/`.
    pub path: String,
    /// The key in the file of token counts: the language code, or the name of a vendor set.
    pub key: String,
    /// Language of all rows; `None` for a vendor set.
    pub language: Option<Language>,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
    /// Rows in it.
    pub n_rows: u64,
    /// Tokens of all rows, of their contents alone, as the rules count them.
    pub n_tokens: u64,
    /// Of a file of conversations: the tokens that training reads; `None` in manifests from before it was counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<TrainingTokens>,
    /// What is absent in this language, by what: `text`, `name`, ...
    pub holes: BTreeMap<String, u64>,
    /// What the rules left out, by the rule's name.
    pub filtered: BTreeMap<String, Tally>,
    /// The scene or scenes of each row.
    pub rows: Vec<RowScenes>,
}

/// Tokens of conversations as training encodes them: system message, template and ends of turns counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingTokens {
    /// All of them, in rows as long as they are.
    pub tokens: u64,
    /// Those that carry loss: what she says, and the ends of her turns.
    pub trained: u64,
}

impl TrainingTokens {
    /// Those of several files or data sets; `None` where none of them has conversations.
    pub fn sum(counts: impl Iterator<Item = Option<TrainingTokens>>) -> Option<TrainingTokens> {
        counts.flatten().reduce(|a, b| TrainingTokens {
            tokens: a.tokens + b.tokens,
            trained: a.trained + b.trained,
        })
    }
}

/// Rows (or lines) and tokens that a rule left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many rows or lines.
    pub rows: u64,
    /// How many tokens in them.
    pub tokens: u64,
}

impl Tally {
    /// Counts another's rows and tokens too.
    pub fn add(&mut self, other: &Tally) {
        self.rows += other.rows;
        self.tokens += other.tokens;
    }
}

/// The scenes of a row, as places in the list of scenes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RowScenes {
    /// All of the row comes from one scene.
    One(u32),
    /// (scene, lines of the content that come from it, their tokens), in the order of the content.
    Several(Vec<(u32, u32, u32)>),
}

/// What a source holds that looks wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// What it is.
    pub text: String,
    /// How often it stands there.
    pub count: u64,
}

impl Manifest {
    /// A manifest without a data set.
    pub fn new() -> Manifest {
        Manifest {
            version: VERSION,
            datasets: BTreeMap::new(),
        }
    }

    /// Reads the manifest of an output folder; `None` if it has none.
    ///
    /// # Errors
    /// It cannot be read, is no manifest, or is one of another version.
    pub fn load(out: &Path) -> Result<Option<Manifest>> {
        let path = out.join(FILE_NAME);
        let bytes = match outside::read(&path, outside::MOST_DATA_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path, source }),
        };
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| Error::Manifest {
                path: path.clone(),
                problem: format!(
                    "is no manifest of data sets ({}); remove it",
                    shorten(&error.to_string(), 200)
                ),
            })?;
        if manifest.version != VERSION {
            return Err(Error::Manifest {
                path,
                problem: format!(
                    "is a manifest of version {}, not {VERSION}; remove it",
                    manifest.version
                ),
            });
        }
        Ok(Some(manifest))
    }

    /// The file's bytes: the same data sets give the same bytes.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        // Only maps with text keys, numbers and texts: this cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Manifest::new()
    }
}

impl Dataset {
    /// Rows of all files.
    pub fn n_rows(&self) -> u64 {
        self.files.iter().map(|f| f.n_rows).sum()
    }

    /// Tokens of all files.
    pub fn n_tokens(&self) -> u64 {
        self.files.iter().map(|f| f.n_tokens).sum()
    }

    /// What training reads of its conversations; `None` for documents.
    pub fn training(&self) -> Option<TrainingTokens> {
        TrainingTokens::sum(self.files.iter().map(|file| file.training))
    }
}
