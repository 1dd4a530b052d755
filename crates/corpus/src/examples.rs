//! Examples to train and evaluate on: rows of any file or of a built data set as ids and labels, with language, scene and side of the split.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use text::json::Unambiguous;
use text::labels::{self, LossScale};
use text::{Conversation, Example, IGNORE, Message, Role, Tokenizer, WrittenTokens, pack};

use crate::error::{Error, Result, shorten};
use crate::foreign;
use crate::language::Language;
use crate::manifest;
use crate::packed::IdsPart;
use crate::row_file::{self, RowFile, RowText};
use crate::row_form::{self, PlainRow};
use crate::row_notes::{Remark, RowNotes};
use crate::row_problems::{BadRow, BadRows};
use crate::rows::{self, BuiltRow};
use crate::split::{Side, Split};
use crate::stats;

/// What rows are made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainingStage {
    /// Continued pre-training: documents, loss on all text.
    Cpt,
    /// Fine-tuning: conversations, loss on what the assistant says.
    Sft,
}

/// How rows become ids.
#[derive(Clone, Copy)]
pub struct Encoding<'a> {
    /// What they are made into.
    pub stage: TrainingStage,
    /// Which parts of answers carry loss.
    pub loss_scale: LossScale,
    /// Rows of `input_ids` need none.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Ids and labels of rows of `input_ids` are held below this, the size of the model's vocabulary, where it is known.
    pub vocab_size: Option<usize>,
    /// Tokens of a training row, where they are to be trained: a conversation that none has room for is refused.
    pub row_tokens: Option<usize>,
}

/// A row in token ids, with where it belongs.
#[derive(Debug, Clone)]
pub struct SourceExample {
    /// Ids and labels, with the language where the file's name or the data set says one.
    pub encoded: Example,
    /// What the model is to say, as text; empty for rows that came as ids.
    pub text: String,
    /// The messages, for rows that have them.
    pub messages: Vec<Message>,
    /// Added tokens that the row's contents spell: they are encoded as text.
    pub written: WrittenTokens,
    /// Scene that the row comes from, where a manifest says so.
    pub scene: Option<String>,
    /// Side of the split in this language; `Train` without a split.
    pub side: Side,
}

impl SourceExample {
    /// Ids that came from nowhere in particular.
    fn new(encoded: Example) -> Self {
        SourceExample {
            encoded,
            text: String::new(),
            messages: Vec::new(),
            written: WrittenTokens::default(),
            scene: None,
            side: Side::Train,
        }
    }
}

/// An example of a sample and where its row stands.
#[derive(Debug, Clone)]
pub struct SampledExample {
    /// File of the row.
    pub path: PathBuf,
    /// Place among the rows of its file, from 1.
    pub row_number: usize,
    /// Side of the split, if one was given.
    pub side: Option<Side>,
    /// The row in ids.
    pub example: SourceExample,
}

/// Examples of a reading.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    /// In the order of files and rows.
    pub examples: Vec<SourceExample>,
    /// What is worth saying about rows that were read all the same.
    pub notes: RowNotes,
}

impl Examples {
    fn extend(&mut self, examples: Vec<SourceExample>) {
        for example in &examples {
            self.notes.add_written(&example.written);
        }
        self.examples.extend(examples);
    }
}

/// Examples of one file, in order. The language is the file's name where it is a language code.
///
/// # Errors
/// As [`RowFile::open`]; [`Error::BadRows`] names the rows that cannot be used, [`Error::ForeignRows`] a file of another kind.
pub fn of_file(path: &Path, encoding: Encoding<'_>) -> Result<Examples> {
    let file = RowFile::open(path)?;
    let mut bad = BadRows::default();
    let mut all = Examples::default();
    // A part at a time, so that what was read of the rows does not stand in memory beside all their ids.
    let places: Vec<usize> = (0..file.n_rows()).collect();
    for places in places.chunks(ROWS_AT_ONCE) {
        let read: Vec<_> = places
            .par_iter()
            .map(|idx| of_text(&file, file.row(*idx), encoding))
            .collect();
        for row in read {
            match row {
                Ok((examples, remarks)) => {
                    all.extend(examples);
                    all.notes.add(remarks);
                }
                Err(row) => bad.add(row),
            }
        }
    }
    if bad.n_rows() == file.n_rows() {
        foreign::check_rows(&file)?;
    }
    bad.into_result()?;
    Ok(all)
}

/// Characters that are said of a row: it may quote what its owner wrote.
const MOST_SAID: usize = 350;

/// Rows that are read before their remarks are counted.
const ROWS_AT_ONCE: usize = 4096;

type RowExamples = (Vec<SourceExample>, Vec<Remark>);

/// What a row becomes: several examples where documents were packed into it.
fn of_text(
    file: &RowFile,
    row: RowText<'_>,
    encoding: Encoding<'_>,
) -> std::result::Result<RowExamples, BadRow> {
    let Unambiguous(value) = file.parse(row)?;
    let bad = |problem: String| file.bad(row, shorten(&problem, MOST_SAID));
    let (plain, remarks) = row_form::read(value, encoding.stage).map_err(bad)?;
    let mut examples = encode(plain, encoding).map_err(bad)?;
    let language = file.language().map(|language| language.code().to_owned());
    for example in &mut examples {
        example.encoded.origin.language = language.clone();
    }
    Ok((examples, remarks))
}

/// A row in token ids, or what is wrong with it.
fn encode(
    row: PlainRow,
    encoding: Encoding<'_>,
) -> std::result::Result<Vec<SourceExample>, String> {
    match row {
        PlainRow::Ids(parts) => {
            let example = |part: IdsPart| {
                if let Some(n_ids) = encoding.vocab_size {
                    check_ids(&part, n_ids)?;
                }
                let IdsPart {
                    input_ids,
                    mut labels,
                } = part;
                // Nothing stands before the first token that it could be predicted from.
                labels[0] = IGNORE;
                Ok(SourceExample::new(Example::document(input_ids, labels)))
            };
            parts.into_iter().map(example).collect()
        }
        PlainRow::Text(_) if encoding.stage == TrainingStage::Sft => Err(
            "a row of `text` in an sft stage; it needs a conversation, such as `messages`"
                .to_owned(),
        ),
        PlainRow::Text(text) => {
            let tokenizer = tokenizer_of(encoding)?;
            let mut encoded = labels::pt(tokenizer, &text).map_err(|error| error.to_string())?;
            encoded.origin.bytes = labels::text_bytes(tokenizer, &encoded);
            Ok(vec![SourceExample {
                written: WrittenTokens::of_text(tokenizer, &text),
                text,
                ..SourceExample::new(encoded)
            }])
        }
        PlainRow::Conversation(messages) => Ok(vec![conversation(messages, encoding)?]),
    }
}

/// That every id and label is one of the model's.
fn check_ids(part: &IdsPart, n_ids: usize) -> std::result::Result<(), String> {
    let unknown = |id: u32| id as usize >= n_ids;
    if let Some(at) = part.input_ids.iter().position(|id| unknown(*id)) {
        return Err(format!(
            "token id {} at position {at}, but the model's vocabulary has {n_ids}; encode the rows with this model's tokenizer",
            part.input_ids[at]
        ));
    }
    let unknown = |label: i32| u32::try_from(label).is_ok_and(unknown);
    match part.labels.iter().position(|label| unknown(*label)) {
        None => Ok(()),
        Some(at) => Err(format!(
            "the label at position {at} is {}, but the model's vocabulary has {n_ids}; a label is {IGNORE} (no loss) or the id itself",
            part.labels[at]
        )),
    }
}

fn tokenizer_of(encoding: Encoding<'_>) -> std::result::Result<&Tokenizer, String> {
    let missing = "a row of text, but the base model's folder has no tokenizer.json";
    encoding.tokenizer.ok_or_else(|| missing.to_owned())
}

/// What messages become.
fn conversation(
    messages: Vec<Message>,
    encoding: Encoding<'_>,
) -> std::result::Result<SourceExample, String> {
    let tokenizer = tokenizer_of(encoding)?;
    let joined = |wanted: &dyn Fn(Role) -> bool| -> String {
        let said = messages.iter().filter(|message| wanted(message.role));
        let said: Vec<&str> = said.map(|message| message.content.as_str()).collect();
        said.join("\n")
    };
    let (encoded, written) = match encoding.stage {
        TrainingStage::Cpt => {
            let document = joined(&|_| true);
            let written = WrittenTokens::of_text(tokenizer, &document);
            (labels::pt(tokenizer, &document), written)
        }
        TrainingStage::Sft => {
            let conversation = Conversation::new(messages.iter().cloned());
            let written = WrittenTokens::of_conversation(tokenizer, &conversation);
            let encoded = labels::sft(tokenizer, &conversation, encoding.loss_scale);
            (encoded, written)
        }
    };
    let mut encoded = encoded.map_err(|error| error.to_string())?;
    if let Some(row_tokens) = encoding.row_tokens {
        pack::check_room(&encoded, row_tokens).map_err(|error| error.to_string())?;
    }
    encoded.origin.bytes = labels::text_bytes(tokenizer, &encoded);
    Ok(SourceExample {
        text: joined(&|role| role == Role::Assistant),
        messages,
        written,
        ..SourceExample::new(encoded)
    })
}

/// Examples of one source of a recipe: a file or folder. Rows that `corpus build` wrote carry their scene, and with a split their side;
/// rows on neither side (contaminated, filtered) are left out. With a split every row needs a side: rows that no manifest lists are refused.
///
/// # Errors
/// A missing path, rows that cannot be used, a split of another story.
pub fn source(path: &Path, split: Option<&Split>, encoding: Encoding<'_>) -> Result<Examples> {
    let files = row_file::files(path)?;
    if was_built(path)? {
        let examples = rows::load(path, split)?
            .into_par_iter()
            .filter(|row| row.side == Side::Train || row.side.is_held_out())
            .map(|row| of_built(row, path, encoding))
            .collect::<Result<Vec<_>>>()?;
        let mut all = Examples::default();
        all.extend(examples);
        return Ok(all);
    }
    if split.is_some() {
        return Err(Error::NotOfTheSplit {
            path: path.to_owned(),
            manifest: manifest::FILE_NAME,
        });
    }
    let mut all = Examples::default();
    let mut bad = BadRows::default();
    for file in &files {
        match of_file(file, encoding) {
            Ok(of_file) => {
                all.examples.extend(of_file.examples);
                all.notes.append(of_file.notes);
            }
            Err(Error::BadRows(rows)) => bad.append(rows),
            Err(error) => return Err(error),
        }
    }
    bad.into_result()?;
    Ok(all)
}

/// Whether the manifest of a build says which scenes a path's rows come from.
///
/// # Errors
/// The working folder is gone.
pub fn was_built(path: &Path) -> Result<bool> {
    Ok(rows::output_folder(path)?.is_some())
}

fn of_built(row: BuiltRow, path: &Path, encoding: Encoding<'_>) -> Result<SourceExample> {
    let mut example = conversation(row.messages, encoding).map_err(|problem| Error::BuiltRow {
        path: path.to_owned(),
        scene: row.scene.clone(),
        problem,
    })?;
    example.encoded.origin.language = row.language.map(|language| language.code().to_owned());
    Ok(SourceExample {
        scene: Some(row.scene),
        side: row.side,
        ..example
    })
}

/// What a sample is drawn from, and how.
#[derive(Clone, Copy)]
pub struct SampleRequest<'a> {
    /// A source of a recipe: a file or folder.
    pub path: &'a Path,
    /// Whose sides the rows are on.
    pub split: Option<&'a Split>,
    /// Rows of this language alone.
    pub language: Option<Language>,
    /// How many rows at most.
    pub n_rows: usize,
    /// The same seed draws the same rows.
    pub seed: u64,
}

/// Rows drawn by seed from what [`source`] would give, encoded the same way.
///
/// # Errors
/// As [`source`].
pub fn sample(request: SampleRequest<'_>, encoding: Encoding<'_>) -> Result<Vec<SampledExample>> {
    let SampleRequest {
        path,
        split,
        language,
        n_rows,
        seed,
    } = request;
    let files = row_file::files(path)?;
    if was_built(path)? {
        return stats::peek(path, split, language, n_rows, seed)?
            .into_iter()
            .map(|one| {
                Ok(SampledExample {
                    side: split.map(|_| one.row.side),
                    example: of_built(one.row, &one.path, encoding)?,
                    path: one.path,
                    row_number: one.line,
                })
            })
            .collect();
    }
    let files = files.iter().map(|path| RowFile::open(path));
    let mut files = files.collect::<Result<Vec<_>>>()?;
    files.retain(|file| language.is_none() || file.language() == language);
    let places: Vec<(usize, usize)> = files
        .iter()
        .enumerate()
        .flat_map(|(file_idx, file)| (0..file.n_rows()).map(move |row_idx| (file_idx, row_idx)))
        .collect();
    let mut bad = BTreeMap::new();
    let mut sampled = Vec::new();
    for at in stats::draw(places.len(), n_rows, seed) {
        let file = &files[places[at].0];
        let row = file.row(places[at].1);
        match of_text(file, row, encoding) {
            Ok((examples, _)) => {
                sampled.extend(examples.into_iter().map(|example| SampledExample {
                    path: file.path().to_owned(),
                    row_number: row.number,
                    side: None,
                    example,
                }))
            }
            Err(row) => {
                bad.insert(places[at], row);
            }
        }
    }
    let mut in_order = BadRows::default();
    bad.into_values().for_each(|row| in_order.add(row));
    in_order.into_result()?;
    Ok(sampled)
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
            stage: TrainingStage::Cpt,
            loss_scale: LossScale::default(),
            tokenizer: None,
            vocab_size: None,
            row_tokens: None,
        };
        for path in [&own, &file] {
            assert_eq!(source(path, None, encoding).unwrap().examples.len(), 1);
        }
        // A data set's own folder is another matter: its manifest must list the rows.
        let set = folder.path().join("pt/everything");
        std::fs::create_dir_all(&set).unwrap();
        std::fs::copy(&file, set.join("en.jsonl")).unwrap();
        let error = source(&set, None, encoding).unwrap_err().to_string();
        assert!(error.contains("is no manifest of data sets"), "{error}");
    }
}
