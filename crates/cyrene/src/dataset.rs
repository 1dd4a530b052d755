//! Rows of JSON lines as training and evaluation take them: ids, labels, language, scene, and the side of the split.
//!
//! Three kinds of rows: `{"messages":[...]}`, `{"text":...}`, `{"input_ids":[...],"labels":[...]}`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use corpus::Language;
use corpus::split::{Side, Split};
use rayon::prelude::*;
use serde::Deserialize;
use text::labels::{self, Encoded, LossScale};
use text::{Conversation, Message, Role, Tokenizer};

use crate::recipe::StageKind;
use crate::{jsonl, misuse};

/// The kinds of rows, for messages.
const KINDS: &str =
    "{\"messages\":[...]}, {\"text\":...} or {\"input_ids\":[...],\"labels\":[...]}";

/// A row as it stands in a file.
#[derive(Debug, Clone, Deserialize)]
pub struct Raw {
    messages: Option<Vec<serde_json::Value>>,
    text: Option<String>,
    input_ids: Option<Vec<u32>>,
    labels: Option<Vec<i32>>,
}

/// A row in token ids.
#[derive(Debug, Clone)]
pub struct Row {
    pub encoded: Encoded,
    /// UTF-8 bytes behind the trained targets; 0 for rows that came as ids.
    pub bytes: usize,
    /// What the model is to say, as text; empty for rows that came as ids.
    pub text: String,
    /// The messages, for rows that have them.
    pub messages: Vec<Message>,
    pub language: Option<String>,
    /// Scene that the row comes from, where a manifest says so.
    pub scene: Option<String>,
    /// Side of the split in this language; `Train` without a split.
    pub side: Side,
}

impl Row {
    /// A row that says nothing yet.
    fn empty() -> Self {
        Row {
            encoded: Encoded::default(),
            bytes: 0,
            text: String::new(),
            messages: Vec::new(),
            language: None,
            scene: None,
            side: Side::Train,
        }
    }
}

/// How rows become ids.
#[derive(Clone, Copy)]
pub struct Encoding<'a> {
    pub stage: StageKind,
    pub loss_scale: LossScale,
    /// Rows of `input_ids` need none.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// The JSON-lines files that a path of a recipe means: itself, or a folder's files in name order.
///
/// # Errors
/// [`crate::ui::Misuse`] if there is nothing of the kind.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        misuse!(
            "{} does not exist; expected a .jsonl file or a folder of them (`cyrene corpus build` makes them)",
            path.display()
        );
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.path()))
                .collect::<std::io::Result<_>>()
        })
        .with_context(|| format!("reading {}", path.display()))?;
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "jsonl")
    });
    files.sort();
    if files.is_empty() {
        misuse!("{} holds no .jsonl file", path.display());
    }
    Ok(files)
}

/// Rows of one file, in order. The language is the file's name where it is a language code.
///
/// # Errors
/// [`crate::ui::Misuse`] names file and line of a row that cannot be used.
pub fn read(path: &Path, encoding: Encoding<'_>) -> Result<Vec<Row>> {
    let raw: Vec<Raw> = jsonl::read(path, KINDS)?;
    let language = language_of(path).map(|language| language.code().to_owned());
    raw.into_par_iter()
        .enumerate()
        .map(|(at, raw)| {
            let mut row = encode(raw, encoding)
                .with_context(|| format!("row {} of {}", at + 1, path.display()))?;
            row.language = language.clone();
            Ok(row)
        })
        .collect()
}

/// One row in token ids.
///
/// # Errors
/// [`crate::ui::Misuse`]: no known kind of row, ids without labels of the same length, or a row that needs a tokenizer and has none.
pub fn encode(raw: Raw, encoding: Encoding<'_>) -> Result<Row> {
    let mut row = Row::empty();
    if let Some(input_ids) = raw.input_ids {
        let labels = match raw.labels {
            Some(labels) => labels,
            None => misuse!("`input_ids` without `labels`"),
        };
        if labels.len() != input_ids.len() {
            misuse!(
                "{} input_ids but {} labels; they must be equally many",
                input_ids.len(),
                labels.len()
            );
        }
        row.encoded = Encoded { input_ids, labels };
        return Ok(row);
    }
    match (raw.messages, raw.text) {
        (Some(messages), None) => match Message::list_from_json(&messages) {
            Ok(messages) => encode_messages(row, messages, encoding),
            Err(error) => misuse!("{error}"),
        },
        (None, Some(text)) => {
            let tokenizer = tokenizer_of(encoding)?;
            match encoding.stage {
                StageKind::Cpt => row.encoded = labels::pt(tokenizer, &text)?,
                StageKind::Sft => misuse!("a row of `text` in an sft stage; it needs `messages`"),
            }
            row.text = text;
            row.bytes = labels::text_bytes(tokenizer, &row.encoded);
            Ok(row)
        }
        _ => misuse!("expected one of `messages`, `text` or `input_ids`"),
    }
}

fn tokenizer_of(encoding: Encoding<'_>) -> Result<&Tokenizer> {
    match encoding.tokenizer {
        Some(tokenizer) => Ok(tokenizer),
        None => misuse!("a row of text, but the base model's folder has no tokenizer.json"),
    }
}

/// Fills a row with what its messages say.
fn encode_messages(mut row: Row, messages: Vec<Message>, encoding: Encoding<'_>) -> Result<Row> {
    let tokenizer = tokenizer_of(encoding)?;
    let joined = |wanted: &dyn Fn(Role) -> bool| -> String {
        let said = messages.iter().filter(|message| wanted(message.role));
        let said: Vec<&str> = said.map(|message| message.content.as_str()).collect();
        said.join("\n")
    };
    row.text = joined(&|role| role == Role::Assistant);
    row.encoded = match encoding.stage {
        StageKind::Cpt => labels::pt(tokenizer, &joined(&|_| true))?,
        StageKind::Sft => {
            let conversation = Conversation::new(messages.iter().cloned());
            labels::sft(tokenizer, &conversation, encoding.loss_scale)?
        }
    };
    row.bytes = labels::text_bytes(tokenizer, &row.encoded);
    row.messages = messages;
    Ok(row)
}

/// Rows of one source of a recipe: a file or folder. Rows that `corpus build` wrote carry their scene, and with a split their side;
/// rows on neither side (contaminated, filtered) are left out. With a split every row needs a side: rows that no manifest lists are refused.
///
/// # Errors
/// [`crate::ui::Misuse`] or what `corpus` says: a missing path, a row that cannot be used, a split of another story.
pub fn source(path: &Path, split: Option<&Split>, encoding: Encoding<'_>) -> Result<Vec<Row>> {
    let files = files(path)?;
    if !was_built(path)? {
        if split.is_some() {
            misuse!(
                "{} is no folder (or file) of a data set with a {} beside it, so nobody knows which of its rows data.split holds out; build it with `cyrene corpus build`, or take data.split away",
                path.display(),
                corpus::manifest::FILE_NAME
            );
        }
        let mut rows = Vec::new();
        for file in &files {
            rows.extend(read(file, encoding)?);
        }
        return Ok(rows);
    }
    let rows =
        corpus::rows::load(path, split).with_context(|| format!("reading {}", path.display()))?;
    rows.into_par_iter()
        .filter(|row| row.side == Side::Train || row.side.is_held_out())
        .map(|row| encode_built(row, encoding))
        .collect()
}

/// Whether the manifest of a build says which scenes a path's rows come from.
///
/// # Errors
/// The working folder is gone.
pub fn was_built(path: &Path) -> Result<bool> {
    Ok(corpus::rows::output_folder(path)?.is_some())
}

fn encode_built(row: corpus::Row, encoding: Encoding<'_>) -> Result<Row> {
    let mut encoded = encode_messages(Row::empty(), row.messages, encoding)
        .with_context(|| format!("a row of scene {}", row.scene))?;
    encoded.language = row.language.map(|language| language.code().to_owned());
    encoded.scene = Some(row.scene);
    encoded.side = row.side;
    Ok(encoded)
}

/// A row of a sample and where it stands.
#[derive(Debug, Clone)]
pub struct Sampled {
    pub path: PathBuf,
    /// Place among the rows of its file, from 1.
    pub row_number: usize,
    /// Side of the split, if one was given.
    pub side: Option<Side>,
    pub row: Row,
}

/// `n_rows` rows drawn by seed from what [`source`] would give, encoded the same way.
///
/// # Errors
/// As [`source`].
pub fn sample(
    path: &Path,
    split: Option<&Split>,
    language: Option<Language>,
    n_rows: usize,
    seed: u64,
    encoding: Encoding<'_>,
) -> Result<Vec<Sampled>> {
    let files = files(path)?;
    if was_built(path)? {
        let drawn = corpus::stats::peek(path, split, language, n_rows, seed)
            .with_context(|| format!("reading {}", path.display()))?;
        return drawn
            .into_iter()
            .map(|one| {
                Ok(Sampled {
                    side: split.map(|_| one.row.side),
                    row: encode_built(one.row, encoding)
                        .with_context(|| format!("{}:{}", one.path.display(), one.line))?,
                    path: one.path,
                    row_number: one.line,
                })
            })
            .collect();
    }
    let mut rows = Vec::new();
    for file in files {
        let known = language_of(&file);
        if language.is_none() || known == language {
            let raw: Vec<Raw> = jsonl::read(&file, KINDS)?;
            rows.extend(
                raw.into_iter()
                    .enumerate()
                    .map(|(at, raw)| (file.clone(), known, at + 1, raw)),
            );
        }
    }
    let drawn = corpus::stats::draw(rows.len(), n_rows, seed);
    drawn
        .into_iter()
        .map(|at| {
            let (path, language, row_number, raw) = rows[at].clone();
            let mut row = encode(raw, encoding)
                .with_context(|| format!("row {row_number} of {}", path.display()))?;
            row.language = language.map(|language| language.code().to_owned());
            Ok(Sampled {
                path,
                row_number,
                side: None,
                row,
            })
        })
        .collect()
}

fn language_of(file: &Path) -> Option<Language> {
    file.file_stem()
        .and_then(|stem| stem.to_str())
        .and_then(Language::from_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_of_somebody_else_does_not_claim_rows() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("data/mine");
        std::fs::create_dir_all(&own).unwrap();
        let file = own.join("rows.jsonl");
        std::fs::write(&file, "{\"input_ids\":[1,2],\"labels\":[1,2]}\n").unwrap();
        for place in ["", "data", "data/mine"] {
            let manifest = folder.path().join(place).join("manifest.json");
            std::fs::write(manifest, "{\"name\": \"a web page\"}").unwrap();
        }
        let encoding = Encoding {
            stage: StageKind::Cpt,
            loss_scale: LossScale::default(),
            tokenizer: None,
        };
        for path in [&own, &file] {
            assert_eq!(source(path, None, encoding).unwrap().len(), 1);
        }
        // A data set's own folder is another matter: its manifest must list the rows.
        let set = folder.path().join("pt/everything");
        std::fs::create_dir_all(&set).unwrap();
        std::fs::copy(&file, set.join("en.jsonl")).unwrap();
        let error = format!("{:#}", source(&set, None, encoding).unwrap_err());
        assert!(error.contains("is no manifest of data sets"), "{error}");
    }
}
