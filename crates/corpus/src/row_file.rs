//! Files of JSON rows as people have them: JSON lines or one array, plain or gzipped, with or without a byte order mark.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use files::outside::{self, Bounded, MOST_DATA_BYTES, MOST_LINE_BYTES, TooMuch};
use flate2::read::MultiGzDecoder;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::value::RawValue;

use crate::error::{Error, Result, without_position};
use crate::foreign;
use crate::language::Language;
use crate::row_form;
use crate::row_problems::{BadRow, BadRows};

/// Endings of files of rows; each may stand before `.gz`.
pub const ENDINGS: [&str; 3] = ["jsonl", "ndjson", "json"];

/// What names standard input where a file is asked for.
const STDIN: &str = "-";

/// Files that other tools lay beside rows and that hold none: a folder's reader passes over them.
const NO_ROWS: [&str; 8] = [
    "manifest.json",
    "split.json",
    "account.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
];

/// What a UTF-8 file may begin with, and a line that was the beginning of one before files were joined.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The text of a file and where its rows stand in it; what a row means is not looked at.
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    text: String,
    rows: Vec<Place>,
}

#[derive(Debug, Clone)]
struct Place {
    /// Line of the file that the row begins on, from 1.
    line: usize,
    bytes: Range<usize>,
}

/// A row as text.
#[derive(Debug, Clone, Copy)]
pub struct RowText<'a> {
    /// Place among the rows of its file, from 1.
    pub number: usize,
    /// Line of the file that the row begins on, from 1.
    pub line: usize,
    /// The JSON of the row.
    pub json: &'a str,
}

impl RowFile {
    /// Reads a file and finds its rows: the elements of one array, or values behind each other (a line each, as a rule).
    ///
    /// # Errors
    /// A file that cannot be read or is known to hold something else, a gzip stream that breaks off, text that is not UTF-8, an array that
    /// is not JSON.
    pub fn open(path: &Path) -> Result<RowFile> {
        if path.is_file()
            && !has_row_ending(path)
            && let Some(error) = foreign::of_file(path)
        {
            return Err(error);
        }
        RowFile::of_bytes(path, read_bytes(path)?)
    }

    /// Finds the rows in what standard input brings, up to its end; errors name it `-`.
    ///
    /// # Errors
    /// As [`RowFile::open`].
    pub fn from_stdin() -> Result<RowFile> {
        let mut bytes = Vec::new();
        let stdin = std::io::stdin().lock();
        let read = Bounded::new(stdin, MOST_DATA_BYTES).read_to_end(&mut bytes);
        let path = Path::new(STDIN);
        read.map_err(|source| Error::reading(path, 0, source))?;
        RowFile::of_bytes(path, bytes)
    }

    fn of_bytes(path: &Path, bytes: Vec<u8>) -> Result<RowFile> {
        let text = text_of(path, bytes)?;
        let rows = find_rows(&text).map_err(|(line, error)| Error::Json {
            path: path.to_owned(),
            line: line + error.line().max(1) - 1,
            column: error.column().max(1),
            problem: without_position(&error.to_string()),
        })?;
        let is_too_long = |place: &&Place| place.bytes.len() as u64 > MOST_LINE_BYTES;
        if let Some(place) = rows.iter().find(is_too_long) {
            return Err(Error::reading(path, place.line, TooMuch::Line.into()));
        }
        Ok(RowFile {
            path: path.to_owned(),
            text,
            rows,
        })
    }

    /// The file's path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many rows it has.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// The row at a place, from 0.
    ///
    /// # Panics
    /// There is no such row.
    pub fn row(&self, idx: usize) -> RowText<'_> {
        let place = &self.rows[idx];
        RowText {
            number: idx + 1,
            line: place.line,
            json: &self.text[place.bytes.clone()],
        }
    }

    /// The row as a `T`.
    ///
    /// # Errors
    /// What is wrong with it, where it stands.
    pub fn parse<T: DeserializeOwned>(&self, row: RowText<'_>) -> std::result::Result<T, BadRow> {
        serde_json::from_str(row.json).map_err(|error| {
            let n_lines = error.line().max(1) - 1;
            let n_before = match n_lines {
                0 => self.n_before(row),
                _ => 0,
            };
            BadRow {
                line: row.line + n_lines,
                column: Some(n_before + error.column().max(1)),
                ..self.bad(row, without_position(&error.to_string()))
            }
        })
    }

    /// A row that cannot be used, and why.
    pub(crate) fn bad(&self, row: RowText<'_>, problem: String) -> BadRow {
        let is_on_its_line = |idx: usize| {
            let other = self.rows.get(idx);
            other.is_some_and(|place| place.line == row.line)
        };
        let idx = row.number - 1;
        BadRow {
            path: self.path.clone(),
            number: row.number,
            line: row.line,
            column: None,
            shares_line: is_on_its_line(idx + 1) || idx > 0 && is_on_its_line(idx - 1),
            problem,
        }
    }

    /// Bytes that stand before a row on the line that it begins on.
    fn n_before(&self, row: RowText<'_>) -> usize {
        let before = &self.text[..self.rows[row.number - 1].bytes.start];
        let line = before.rsplit('\n').next().unwrap_or_default();
        line.trim_start_matches(BYTE_ORDER_MARK).len()
    }

    /// The file's language, where its name is a language code (`en.jsonl`, `chs.json.gz`, `zh-TW.json`).
    pub fn language(&self) -> Option<Language> {
        language_of(&self.path)
    }
}

/// Reads every row of a file, or of standard input where the path is `-`, as a `T`; `expected` says in an error what a row looks like.
///
/// # Errors
/// As [`RowFile::open`]; [`Error::BadRows`] names the first rows that are something else.
pub fn read<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<T>> {
    let file = if path == Path::new(STDIN) {
        RowFile::from_stdin()?
    } else {
        RowFile::open(path)?
    };
    let mut bad = BadRows::default();
    let mut rows = Vec::with_capacity(file.n_rows());
    for idx in 0..file.n_rows() {
        match file.parse(file.row(idx)) {
            Ok(row) => rows.push(row),
            Err(mut problem) => {
                problem.problem.push_str("; expected ");
                problem.problem.push_str(expected);
                bad.add(problem);
            }
        }
    }
    bad.into_result()?;
    Ok(rows)
}

/// The files of rows that a path means: itself, or a folder's in name order (without hidden ones, and without those that
/// other tools lay beside rows, such as `dataset_info.json`).
///
/// # Errors
/// There is nothing of the kind; files of another form are named with what turns them into rows.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    // A pipe, as a shell makes them, is no regular file.
    if path.exists() && !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        return Err(Error::NoRowFile {
            path: path.to_owned(),
            problem: "does not exist",
        });
    }
    let read_error = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let mut found = Vec::new();
    let mut others = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read_error)? {
        let file = entry.map_err(read_error)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || NO_ROWS.contains(&&*name) || !file.is_file() {
            continue;
        }
        match has_row_ending(&file) {
            true => found.push(file),
            false => others.push(file),
        }
    }
    found.sort();
    others.sort();
    if found.is_empty() {
        let mut known = others.iter().filter_map(|file| foreign::of_file(file));
        return Err(known.next().unwrap_or(Error::NoRowFile {
            path: path.to_owned(),
            problem: "holds no file of rows",
        }));
    }
    Ok(found)
}

/// Whether a file's name ends as files of rows do, gzipped or not.
pub fn has_row_ending(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    ENDINGS.iter().any(|ending| {
        name.strip_suffix(ending)
            .is_some_and(|stem| stem.ends_with('.'))
    })
}

/// The language that a file's name is the code of.
fn language_of(path: &Path) -> Option<Language> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    Language::from_name(name.rsplit_once('.').map_or(name, |(stem, _)| stem))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    // Rows that the user names may come through a pipe.
    let bytes = outside::read_or_pipe(path, MOST_DATA_BYTES);
    bytes.map_err(|source| Error::reading(path, 0, source))
}

/// A file's text: unpacked where it is gzipped, whatever its name says.
fn text_of(path: &Path, mut bytes: Vec<u8>) -> Result<String> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        let decoder = MultiGzDecoder::new(&bytes[..]);
        let read = Bounded::unpacking(decoder, bytes.len() as u64).read_to_end(&mut unpacked);
        read.map_err(|error| match TooMuch::is(&error) {
            true => Error::reading(path, 0, error),
            false => Error::Gzip {
                path: path.to_owned(),
                line: unpacked.iter().filter(|byte| **byte == b'\n').count(),
                problem: error.to_string(),
            },
        })?;
        bytes = unpacked;
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(Error::Utf16 {
            path: path.to_owned(),
        });
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        Error::not_utf8(path, &error.as_bytes()[..valid])
    })
}

/// Where the rows of a text stand. One line, one row, unless the text is one array, or values that go over several lines.
///
/// # Errors
/// The line on which an array begins, and what is wrong with it.
fn find_rows(text: &str) -> std::result::Result<Vec<Place>, (usize, serde_json::Error)> {
    let lines = lines(text);
    let Some(first) = lines.first() else {
        return Ok(lines);
    };
    let is_whole = serde_json::from_str::<IgnoredAny>(&text[first.bytes.clone()]).is_ok();
    let start = first.bytes.start;
    if text[start..].starts_with('[') && (lines.len() == 1 || !is_whole) {
        let elements = serde_json::from_str::<Vec<&RawValue>>(&text[start..]);
        let elements = elements.map_err(|error| (first.line, error))?;
        let elements: Vec<&str> = elements.into_iter().map(RawValue::get).collect();
        // A list of messages is one row: a conversation.
        let is_conversation = elements.first().is_some_and(|json| is_message(json));
        return Ok(match is_conversation {
            true => vec![Place {
                line: first.line,
                bytes: start..text.trim_end().len(),
            }],
            false => places(text, &elements),
        });
    }
    if is_whole {
        return Ok(lines);
    }
    let values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<&RawValue>();
    let values: serde_json::Result<Vec<&RawValue>> = values.collect();
    // Where they are none, the lines are what is wrong.
    Ok(match values {
        Ok(values) => {
            let values: Vec<&str> = values.into_iter().map(RawValue::get).collect();
            places(text, &values)
        }
        Err(_) => lines,
    })
}

/// The lines that hold something, without the white space around it.
fn lines(text: &str) -> Vec<Place> {
    let mut places = Vec::new();
    let mut start = 0;
    for (idx, line) in text.split_inclusive('\n').enumerate() {
        let blank = |c: char| c == BYTE_ORDER_MARK || c.is_ascii_whitespace();
        let row = line.trim_start_matches(blank);
        let first = start + line.len() - row.len();
        let row = row.trim_end();
        if !row.is_empty() {
            places.push(Place {
                line: idx + 1,
                bytes: first..first + row.len(),
            });
        }
        start += line.len();
    }
    places
}

/// Where parts of a text stand in it, in their order.
fn places(text: &str, parts: &[&str]) -> Vec<Place> {
    let mut line = 1;
    let mut done = 0;
    let place = |part: &&str| {
        let start = part.as_ptr() as usize - text.as_ptr() as usize;
        line += text[done..start].bytes().filter(|b| *b == b'\n').count();
        done = start;
        Place {
            line,
            bytes: start..start + part.len(),
        }
    };
    parts.iter().map(place).collect()
}

/// Whether a value is a message rather than a row: it says who speaks, by a name that is a role's or beside what is said. A row may say
/// as well where it is `from`.
fn is_message(json: &str) -> bool {
    let object = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(json);
    object.is_ok_and(|object| {
        let says = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
        let who = ["role", "from"].into_iter().find(|key| says(key));
        let is_role = |key: &str| object[key].as_str().is_some_and(row_form::is_role);
        who.is_some_and(|key| is_role(key) || says("content") || says("value"))
    })
}
