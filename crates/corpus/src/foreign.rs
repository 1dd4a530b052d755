//! Files that hold something else than rows, and what makes rows of them.

use std::path::Path;

use files::outside;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::import;
use crate::row_file::RowFile;

/// What a file is, with its article, and how it becomes rows; `FILE` stands for its path.
type Form = (&'static str, &'static str);

const STORY: Form = (
    "a story",
    "`cyrene corpus build --source story --root FILE` makes rows of it",
);

/// Forms by endings in lower case, without the point. What `corpus import` reads is told by that, plain text aside, which may be a document too.
const ENDINGS: &[(&[&str], Form)] = &[
    (
        &["txt", "md", "text"],
        (
            "plain text",
            "lines of `Name: text` become a story with `cyrene corpus import FILE --out story.jsonl`; for one document to pre-train on write `jq -Rsc '{text: .}' FILE > rows.jsonl`",
        ),
    ),
    (
        &["parquet"],
        (
            "a Parquet file",
            "write its rows as JSON lines: `python3 -c \"import pandas; pandas.read_parquet(r'FILE').to_json('rows.jsonl', orient='records', lines=True, force_ascii=False)\"`",
        ),
    ),
    (
        &["arrow"],
        (
            "an Arrow file",
            "write its rows as JSON lines: `python3 -c \"import datasets; datasets.Dataset.from_file(r'FILE').to_json('rows.jsonl', force_ascii=False)\"`",
        ),
    ),
    (
        &["xlsx", "xls", "ods"],
        (
            "a spreadsheet",
            "save it as CSV, which becomes a story with `cyrene corpus import`",
        ),
    ),
    (
        &["yaml", "yml", "toml"],
        ("a file of settings", "write its rows as JSON lines"),
    ),
    (
        &["zip", "7z", "rar", "tar", "tgz", "zst", "xz", "bz2"],
        ("packed", "unpack FILE and name what was in it"),
    ),
];

/// Forms of JSON by keys of the first value: all of one of the lists.
const OBJECTS: &[(&[&str], Form)] = &[
    (&["scene", "lines"], STORY),
    (&["campaign", "kind", "text"], STORY),
    (
        &["mapping", "title"],
        (
            "an export of ChatGPT's conversations",
            "write what was said in each as a row of `messages`",
        ),
    ),
];

/// What a file that is not called as files of rows are holds instead, where that is a known form. A file that begins as JSON does may hold
/// rows all the same.
pub(crate) fn of_file(path: &Path) -> Option<Error> {
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    let ending = ending.to_ascii_lowercase();
    let mut known = ENDINGS.iter();
    let known = known.find(|(endings, _)| endings.contains(&ending.as_str()));
    if begins_as_json(path) {
        return None;
    }
    match known {
        Some((_, form)) => Some(error(path, *form)),
        None => import::recognise(path).map(Error::Importable),
    }
}

fn begins_as_json(path: &Path) -> bool {
    use std::io::Read;
    let mut head = Vec::new();
    let file = outside::open(path);
    let read = file.and_then(|file| file.take(64).read_to_end(&mut head));
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head);
    let first = head.iter().find(|byte| !byte.is_ascii_whitespace());
    read.is_ok() && matches!(first, Some(b'{' | b'['))
}

/// Refuses a file whose first value shows that it is no file of rows.
///
/// # Errors
/// What it is and what makes rows of it.
pub(crate) fn check_rows(file: &RowFile) -> Result<()> {
    if file.n_rows() == 0 {
        return Ok(());
    }
    if let Ok(Value::Object(first)) = file.parse::<Value>(file.row(0)) {
        let has_all = |keys: &[&str]| keys.iter().all(|key| first.contains_key(*key));
        if let Some((_, form)) = OBJECTS.iter().find(|(keys, _)| has_all(keys)) {
            return Err(error(file.path(), *form));
        }
    }
    match import::recognise(file.path()) {
        Some(recognised) => Err(Error::Importable(recognised)),
        None => Ok(()),
    }
}

fn error(path: &Path, (what, remedy): Form) -> Error {
    Error::ForeignRows {
        path: path.to_owned(),
        what,
        remedy: remedy.replace("FILE", &path.display().to_string()),
    }
}
