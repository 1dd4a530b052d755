//! What can go wrong between a story's files and the data sets; each text names the place and the remedy.

use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `corpus`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot read {path}: {source}; check that it exists and may be read")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write {path}: {source}; check the free space and the folder's permissions")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is and holds no .jsonl or .jsonl.gz file; a story is one such file or a folder of them (docs/story-format.md)"
    )]
    NoStoryFile { path: PathBuf },
    #[error("{path} holds no scene and no text; docs/story-format.md says how lines look")]
    EmptyStory { path: PathBuf },
    #[error(
        "{path}: the gzip stream breaks off or is damaged after line {line} ({problem}); copy the file again"
    )]
    Gzip {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error("{path} begins with a byte order mark; save it as UTF-8 without one")]
    ByteOrderMark { path: PathBuf },
    #[error("{path}:{line}:{column}: this byte is not UTF-8; save the file as UTF-8")]
    NotUtf8 {
        path: PathBuf,
        line: usize,
        column: usize,
    },
    #[error("{path}:{line}:{column}: {problem}; mend the JSON there")]
    Json {
        path: PathBuf,
        line: usize,
        column: usize,
        problem: String,
    },
    #[error("{path}:{line}: `{key}` is missing{near}; add it (docs/story-format.md)")]
    MissingField {
        path: PathBuf,
        line: usize,
        key: String,
        near: String,
    },
    #[error(
        "{path}:{line}: `{key}` is missing in this row; the table is damaged or of another game version"
    )]
    MissingCell {
        path: PathBuf,
        line: usize,
        key: &'static str,
    },
    #[error(
        "{table} {id}: `{field}` has the text hash {hash}, which the text map of {language} lacks; the map is incomplete or of another game version"
    )]
    UnknownText {
        table: &'static str,
        id: String,
        field: &'static str,
        hash: String,
        language: &'static str,
    },
    #[error(
        "{table} {id}: there is no row {wanted} in {target}; the tables are incomplete or of different game versions"
    )]
    UnknownRow {
        table: &'static str,
        id: String,
        target: &'static str,
        wanted: String,
    },
    #[error("{path}:{line}: `{key}` must be {expected}, not {got}")]
    WrongType {
        path: PathBuf,
        line: usize,
        key: String,
        expected: &'static str,
        got: String,
    },
    #[error(
        "{path}:{line}: `{key}` names the unknown language `{code}` (known are chs cht de en es fr id jp kr pt ru th vi){near}"
    )]
    UnknownLanguage {
        path: PathBuf,
        line: usize,
        key: String,
        code: String,
        near: String,
    },
    #[error(
        "{path}:{line}: `{key}` names the language `{code}` twice, by two of its codes; keep one of the texts"
    )]
    LanguageTwice {
        path: PathBuf,
        line: usize,
        key: String,
        code: &'static str,
    },
    #[error(
        "{path}:{line}: scene id `{scene}` was already used at {first_path}:{first_line}; give every scene its own id"
    )]
    DuplicateScene {
        path: PathBuf,
        line: usize,
        scene: String,
        first_path: PathBuf,
        first_line: usize,
    },
    #[error("{path}:{line}:{column}: {problem}; mend the character file there")]
    Character {
        path: PathBuf,
        line: usize,
        column: usize,
        problem: String,
    },
    #[error("{path}:{line}:{column}: unknown key `{key}` (known here: {known}){near}")]
    UnknownKey {
        path: PathBuf,
        line: usize,
        column: usize,
        key: String,
        near: String,
        known: String,
    },
    #[error("{path}: {problem}")]
    CharacterValue { path: PathBuf, problem: String },
    #[error("unknown task `{task}` (known are {known}){near}")]
    UnknownTask {
        task: String,
        near: String,
        known: String,
    },
    #[error("unknown source `{name}` (known are story and turn-based-game){near}")]
    UnknownSource { name: String, near: String },
    #[error("unknown language `{code}` (known are chs cht de en es fr id jp kr pt ru th vi){near}")]
    UnknownLanguageCode { code: String, near: String },
    #[error("task {task} cannot be built from source {origin}: {reason}")]
    TaskOfSource {
        task: String,
        origin: &'static str,
        reason: String,
    },
    #[error(
        "no line of the story is spoken by {ids} of {character}; set [story] speaker_ids. Most lines have: {most}"
    )]
    NoSuchSpeaker {
        character: PathBuf,
        ids: String,
        most: String,
    },
    #[error(
        "{path} holds a row of more than 2 GB, which Parquet cannot; cut the scene it comes from"
    )]
    RowTooLong { path: PathBuf },
    #[error("{path}: {problem}; build the data set again")]
    Manifest { path: PathBuf, problem: String },
    #[error("{path} holds scene `{scene}`, which the split does not know; {remedy}")]
    UnknownScene {
        path: PathBuf,
        scene: String,
        remedy: &'static str,
    },
    #[error("{path}: {problem}; write it again with `cyrene corpus split --force`")]
    Split { path: PathBuf, problem: String },
    #[error(
        "{path}: the split was made from another version of the story's `{file}`; build the data sets from the story as it is now and split it again with `cyrene corpus split --force`"
    )]
    StoryChanged { path: PathBuf, file: String },
    #[error(
        "the text `{text}` ({language}{hash}) stands in {held_out} (held out) and in {train} (training); split the story again with `cyrene corpus split --force`"
    )]
    Leak {
        text: String,
        language: &'static str,
        /// `, hash N` where the source names its texts by numbers.
        hash: String,
        held_out: String,
        train: String,
    },
    /// A file or folder that `corpus import` reads stands where a story was expected.
    #[error("{0}")]
    Importable(crate::import::Recognised),
    /// A file to import whose bytes are no UTF-8.
    #[error("{path} is {found}; {remedy}")]
    Encoding {
        /// The file.
        path: PathBuf,
        /// What its bytes are.
        found: String,
        /// What to do about it.
        remedy: String,
    },
    /// A file to import that is larger than any story.
    #[error("{path} is larger than {most_mib} MiB; cut it into several files")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in MiB.
        most_mib: u64,
    },
    /// A file to import that is broken.
    #[error("{path}:{line}: {problem}")]
    Import {
        /// The file.
        path: PathBuf,
        /// The line there, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A file to import of which nothing tells what it is.
    #[error(
        "{path} is of no form that is known; name its form with --form ({known}), or see docs/import.md"
    )]
    UnknownForm {
        /// The file.
        path: PathBuf,
        /// The names of all forms.
        known: String,
    },
    /// A file to import that is a story in the plain format.
    #[error("{path} is a story already; give it to `cyrene corpus build --root` as it is")]
    StoryAlready {
        /// The file.
        path: PathBuf,
    },
    /// Files to import without a single line.
    #[error("{path} holds no line of a story; docs/import.md says what is read of each form")]
    NothingToImport {
        /// The file or folder.
        path: PathBuf,
    },
    #[error(
        "{split} exists already and was made with other settings ({problem}); use --force to replace it"
    )]
    SplitExists { split: PathBuf, problem: String },
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}

impl Error {
    /// The byte behind `before`, the beginning of a file, is not UTF-8.
    pub(crate) fn not_utf8(path: &Path, before: &[u8]) -> Error {
        let in_line = before.iter().rev().take_while(|b| **b != b'\n').count();
        Error::NotUtf8 {
            path: path.to_owned(),
            line: before.iter().filter(|b| **b == b'\n').count() + 1,
            column: in_line + 1,
        }
    }
}

/// What a file holds, for a message: its beginning if it is longer than `most` characters.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// A message of serde_json without the " at line 1 column 7" behind it, which our own place in front replaces, and
/// without the whole of a long text that it may quote.
pub(crate) fn without_position(message: &str) -> String {
    let end = message.rfind(" at line ").unwrap_or(message.len());
    shorten(&message[..end], 200)
}
