//! What can go wrong between a story's files and the data sets; each text names the place and the remedy.

use std::path::{Path, PathBuf};

use files::outside::TooMuch;

use crate::row_problems::BadRows;

/// What functions of this crate give back.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `corpus`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}; check that it exists and may be read")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}; check the free space and the folder's permissions")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder without a story.
    #[error(
        "{path} is no story: it neither is nor holds a .jsonl or .jsonl.gz file, and a story is one such file or a folder of them (docs/story-format.md)"
    )]
    NoStoryFile {
        /// The file or folder.
        path: PathBuf,
    },
    /// A path at which no rows lie.
    #[error(
        "{path} {problem}; rows are a .jsonl or .json file, gzipped or not, or a folder of them (`cyrene corpus build` makes some, docs/rows.md says what else they may be)"
    )]
    NoRowFile {
        /// The file or folder.
        path: PathBuf,
        /// What is there in place of rows.
        problem: &'static str,
    },
    /// A file of another kind, with what makes rows of it.
    #[error("{path} is {what}, which holds no rows to train on; {remedy}")]
    ForeignRows {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// The command or setting that makes rows of it.
        remedy: String,
    },
    /// Rows that cannot be used.
    #[error("{0}")]
    BadRows(BadRows),
    /// A conversation that the rules made and that is none.
    #[error("{0}")]
    Conversation(#[from] text::Error),
    /// Rows of which a split says nothing.
    #[error(
        "{path} is no folder (or file) of a data set with a {manifest} beside it, so nobody knows which of its rows data.split holds out; build it with `cyrene corpus build`, or take data.split away"
    )]
    NotOfTheSplit {
        /// The file or folder.
        path: PathBuf,
        /// Name of the file that is missing.
        manifest: &'static str,
    },
    /// A row of a data set that cannot be trained on.
    #[error("{path}, a row of scene {scene}: {problem}; build the data set again")]
    BuiltRow {
        /// The file or folder.
        path: PathBuf,
        /// Its scene.
        scene: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Text in another encoding.
    #[error("{path} is UTF-16; save it as UTF-8")]
    Utf16 {
        /// The file or folder.
        path: PathBuf,
    },
    /// A story in which nothing is said.
    #[error("{path} holds no scene and no text; docs/story-format.md says how lines look")]
    EmptyStory {
        /// The file or folder.
        path: PathBuf,
    },
    /// A file, a line or a row that is larger than any can be.
    #[error("{path}{}: {problem}", place(*.line))]
    TooMuch {
        /// The file.
        path: PathBuf,
        /// Its line, from 1; 0 for the whole file.
        line: usize,
        /// What there is too much of, with the limit.
        problem: String,
    },
    /// A packed file that is damaged.
    #[error(
        "{path}: the gzip stream breaks off or is damaged after line {line} ({problem}); copy the file again"
    )]
    Gzip {
        /// The file or folder.
        path: PathBuf,
        /// The last whole line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A file that begins with a mark that does not belong there.
    #[error("{path} begins with a byte order mark; save it as UTF-8 without one")]
    ByteOrderMark {
        /// The file or folder.
        path: PathBuf,
    },
    /// Text in another encoding, or none.
    #[error("{path}:{line}:{column}: this byte is not UTF-8; save the file as UTF-8")]
    NotUtf8 {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Its column there, in bytes, from 1.
        column: usize,
    },
    /// A line that is no JSON.
    #[error("{path}:{line}:{column}: {problem}; mend the JSON there")]
    Json {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Its column there, in bytes, from 1.
        column: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A line of a story without a key that it needs.
    #[error("{path}:{line}: `{key}` is missing{near}; add it (docs/story-format.md)")]
    MissingField {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key, as the file spells it.
        key: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
    },
    /// A row of a table without a cell that it needs.
    #[error(
        "{path}:{line}: `{key}` is missing in this row; the table is damaged or of another game version"
    )]
    MissingCell {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The column.
        key: &'static str,
    },
    /// A text that the text map lacks.
    #[error(
        "{table} {id}: `{field}` has the text hash {hash}, which the text map of {language} lacks; the map is incomplete or of another game version"
    )]
    UnknownText {
        /// The table.
        table: &'static str,
        /// The row's id.
        id: String,
        /// The column.
        field: &'static str,
        /// Its value there.
        hash: String,
        /// Code of the language.
        language: &'static str,
    },
    /// A row that another table lacks.
    #[error(
        "{table} {id}: there is no row {wanted} in {target}; the tables are incomplete or of different game versions"
    )]
    UnknownRow {
        /// The table that names it.
        table: &'static str,
        /// Id of the row that names it.
        id: String,
        /// The table that lacks it.
        target: &'static str,
        /// Its id.
        wanted: String,
    },
    /// A value of another kind than expected.
    #[error("{path}:{line}: `{key}` must be {expected}, not {got}")]
    WrongType {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key, as the file spells it.
        key: String,
        /// What is expected.
        expected: &'static str,
        /// What stands there.
        got: String,
    },
    /// A language code in a story that nobody knows.
    #[error(
        "{path}:{line}: `{key}` names the unknown language `{code}` (known are chs cht de en es fr id jp kr pt ru th vi){near}"
    )]
    UnknownLanguage {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key, as the file spells it.
        key: String,
        /// The code that was given.
        code: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
    },
    /// Two texts of one language under two of its codes.
    #[error(
        "{path}:{line}: `{key}` names the language `{code}` twice, by two of its codes; keep one of the texts"
    )]
    LanguageTwice {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The key, as the file spells it.
        key: String,
        /// The code that this project writes.
        code: &'static str,
    },
    /// A scene id that stands twice in a story.
    #[error(
        "{path}:{line}: scene id `{scene}` was already used at {first_path}:{first_line}; give every scene its own id"
    )]
    DuplicateScene {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// The id.
        scene: String,
        /// The file that had it first.
        first_path: PathBuf,
        /// Its line there, from 1.
        first_line: usize,
    },
    /// A character file that is no TOML.
    #[error("{path}:{line}:{column}: {problem}; mend the character file there")]
    Character {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Its column there, in bytes, from 1.
        column: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A key of a character file that nobody knows.
    #[error("{path}:{line}:{column}: unknown key `{key}` (known here: {known}){near}")]
    UnknownKey {
        /// The file or folder.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Its column there, in bytes, from 1.
        column: usize,
        /// The key, as the file spells it.
        key: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
        /// Names that there are.
        known: String,
    },
    /// A value of a character file that cannot be.
    #[error("{path}: {problem}")]
    CharacterValue {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A name that no data set has.
    #[error("unknown task `{task}` (known are {known}){near}")]
    UnknownTask {
        /// The name that was given.
        task: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
        /// Names that there are.
        known: String,
    },
    /// A name that no source has.
    #[error("unknown source `{name}` (known are story and turn-based-game){near}")]
    UnknownSource {
        /// The name that was given.
        name: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
    },
    /// A language code that nobody knows.
    #[error("unknown language `{code}` (known are chs cht de en es fr id jp kr pt ru th vi){near}")]
    UnknownLanguageCode {
        /// The code that was given.
        code: String,
        /// `; did you mean X?` where something is spelled alike, else empty.
        near: String,
    },
    /// A data set that a source cannot give.
    #[error("task {task} cannot be built from source {origin}: {reason}")]
    TaskOfSource {
        /// The data set.
        task: String,
        /// The source.
        origin: &'static str,
        /// What the source has not.
        reason: String,
    },
    /// A character that says nothing in the story.
    #[error(
        "no line of the story is spoken by {ids} of {character}; set [story] speaker_ids. Most lines have: {most}"
    )]
    NoSuchSpeaker {
        /// The character file.
        character: PathBuf,
        /// Speaker ids that it gives.
        ids: String,
        /// The ids with most lines, and how many.
        most: String,
    },
    /// A row that Parquet cannot hold.
    #[error(
        "{path} holds a row of more than 2 GB, which Parquet cannot; cut the scene it comes from"
    )]
    RowTooLong {
        /// The file or folder.
        path: PathBuf,
    },
    /// A data set that does not fit its manifest, or a manifest that is none.
    #[error("{path}: {problem}; build the data set again")]
    Manifest {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A scene that the split does not know.
    #[error("{path} holds scene `{scene}`, which the split does not know; {remedy}")]
    UnknownScene {
        /// The file or folder.
        path: PathBuf,
        /// Its id.
        scene: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A split that is none, or of another version.
    #[error("{path}: {problem}; write it again with `cyrene corpus split --force`")]
    Split {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A split of another version of the story.
    #[error(
        "{path}: the split was made from another version of the story's `{file}`; build the data sets from the story as it is now and split it again with `cyrene corpus split --force`"
    )]
    StoryChanged {
        /// The file or folder.
        path: PathBuf,
        /// The file of the story that differs.
        file: String,
    },
    /// A text that is held out and trained on.
    #[error(
        "the text `{text}` ({language}{hash}) stands in {held_out} (held out) and in {train} (training); split the story again with `cyrene corpus split --force`"
    )]
    Leak {
        /// Its beginning.
        text: String,
        /// Code of its language.
        language: &'static str,
        /// `, hash N` where the source names its texts by numbers.
        hash: String,
        /// A scene that is held out.
        held_out: String,
        /// A scene that is trained on.
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
    /// The tokenizer that was to count.
    #[error(transparent)]
    Tokenizer(text::Error),
    /// A text that cannot be counted.
    #[error("counting tokens")]
    Counting(#[source] text::Error),
    /// A mixture all of whose rows are held out, or that has none.
    #[error("{}", nothing_to_train(*.n_held_out, .split.as_deref(), *.validation_share))]
    NothingToTrain {
        /// Rows that are held out.
        n_held_out: usize,
        /// The split that holds them out, as the recipe names it.
        split: Option<PathBuf>,
        /// What is held out where there is no split.
        validation_share: f64,
    },
    /// A split that would be replaced by another.
    #[error(
        "{split} exists already and was made with other settings ({problem}); use --force to replace it"
    )]
    SplitExists {
        /// Its file.
        split: PathBuf,
        /// The setting that differs.
        problem: String,
    },
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}

impl Error {
    /// Whether a file of rows that somebody named is at fault: what it is, or what stands in it.
    pub fn is_of_rows(&self) -> bool {
        matches!(
            self,
            Error::NoRowFile { .. }
                | Error::ForeignRows { .. }
                | Error::Importable(_)
                | Error::BadRows(_)
                | Error::NotOfTheSplit { .. }
                | Error::Utf16 { .. }
                | Error::Gzip { .. }
                | Error::TooMuch { .. }
                | Error::NotUtf8 { .. }
                | Error::Json { .. }
                | Error::Read { .. }
                | Error::NothingToTrain { .. }
        )
    }

    /// What a reading said that was at `line`, from 1 (0 for the whole file).
    pub(crate) fn reading(path: &Path, line: usize, source: std::io::Error) -> Error {
        let path = path.to_owned();
        match TooMuch::is(&source) {
            true => Error::TooMuch {
                path,
                line,
                problem: source.to_string(),
            },
            false => Error::Read { path, source },
        }
    }

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

/// `:7`, or nothing for the whole file.
fn place(line: usize) -> String {
    match line {
        0 => String::new(),
        line => format!(":{line}"),
    }
}

/// Why no row is there to train on, and what would bring some.
fn nothing_to_train(n_held_out: usize, split: Option<&Path>, validation_share: f64) -> String {
    match split {
        _ if n_held_out == 0 => {
            "data.sources hold no row to train on; name files or folders that do".to_owned()
        }
        Some(split) => format!(
            "data.split ({}) holds out every row of data.sources ({n_held_out}), so that none is left to train on; name data sets with scenes of its training side",
            split.display()
        ),
        None => format!(
            "data.validation_share = {validation_share} holds out every row of data.sources ({n_held_out}), so that none is left to train on; lower it (0 holds out none) or give more rows"
        ),
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
