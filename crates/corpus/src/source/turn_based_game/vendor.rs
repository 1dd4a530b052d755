//! Pre-training extras that have no language: wiki pages and programming exercises.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::json::{JsonFile, json_error};
use crate::character::GameRules;
use crate::dataset::DatasetWriter;
use crate::error::{Error, Result, shorten};
use crate::language::Language;
use crate::manifest::SourceFiles;
use crate::rules::{Shown, paragraph};
use crate::split::Split;
use crate::splitter::{self, Splittable, Unit, UnitText};
use files::hex;

/// The sets of the vendor folder, by the names of their files.
pub(crate) const SETS: [&str; 2] = [PAGES, "coig"];
/// The set of wiki pages.
pub(crate) const PAGES: &str = "miyoushe";

/// What the pages are written in.
pub(crate) const LANGUAGE: Language = Language::Chs;

/// A page or an exercise.
pub(crate) struct Page {
    /// `<set>/<file>` or `<set>/<line>`: the scene of its row.
    pub scene: String,
    pub lines: Vec<String>,
}

/// Writes one set; gives the SHA-256 of what it was made from. `nickname`: what `{NICKNAME}` becomes.
///
/// # Errors
/// As [`read`], or the file cannot be written.
pub(crate) fn write(
    set: &str,
    root: &Path,
    nickname: &str,
    out: &mut DatasetWriter<'_>,
) -> Result<[u8; 32]> {
    let (pages, sha256) = read(set, root)?;
    for page in pages {
        let lines = page.lines.iter();
        let sentences: Vec<_> = lines
            .map(|line| {
                Shown::new(
                    line.replace("{NICKNAME}", nickname).into(),
                    out.counters.rules,
                )
            })
            .collect();
        out.row(&sentences, &[&page.scene])?;
    }
    Ok(sha256)
}

/// What a manifest and a split call a set.
pub(crate) fn source_file(set: &str) -> String {
    format!("vendor/{set}")
}

/// Holds the pages against a split.
///
/// # Errors
/// As [`read`]; the split does not know a page, or a text of twelve characters or more stands on both sides.
pub(crate) fn guard(root: &Path, rules: &GameRules, split: &Split) -> Result<()> {
    let mut source_files = SourceFiles::new();
    let mut pages = Vec::new();
    for set in SETS {
        let (of_set, sha256) = read(set, root)?;
        source_files.insert(source_file(set), hex(&sha256));
        pages.extend(of_set);
    }
    split.check_files(root, &source_files)?;
    name_player(&mut pages, rules);
    let units = pages.iter().map(Page::unit).collect();
    splitter::guard(&Pages { pages, units }, root, split, &[])
}

/// Puts the player's name in, as the rows have it.
pub(crate) fn name_player(pages: &mut [Page], rules: &GameRules) {
    let nickname = rules.nickname.get_or_any(LANGUAGE).unwrap_or_default();
    for line in pages.iter_mut().flat_map(|page| &mut page.lines) {
        *line = line.replace("{NICKNAME}", nickname);
    }
}

/// Pages alone, as splitting sees them.
struct Pages {
    pages: Vec<Page>,
    units: Vec<Unit>,
}

impl Splittable for Pages {
    fn units(&self) -> &[Unit] {
        &self.units
    }

    fn with_texts<R>(
        &self,
        language: Language,
        f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
    ) -> Result<R> {
        let pages = if language == LANGUAGE {
            &self.pages[..]
        } else {
            &[]
        };
        let texts = pages.iter().enumerate().flat_map(|(unit, page)| {
            let lines = page.lines.iter();
            lines.map(move |line| UnitText::new(unit, line))
        });
        f(&texts.collect::<Vec<_>>())
    }
}

impl Page {
    pub fn unit(&self) -> Unit {
        Unit {
            id: self.scene.clone(),
            stratum: self.scene.split('/').next().unwrap_or_default().to_owned(),
            mission: None,
            n_own_lines: 0,
            n_lines: self.lines.len(),
        }
    }
}

/// Reads one set, and the SHA-256 of its files.
///
/// # Errors
/// A file cannot be read, is not UTF-8, or is no list of exercises.
pub(crate) fn read(set: &str, root: &Path) -> Result<(Vec<Page>, [u8; 32])> {
    let mut hash = Sha256::new();
    let mut pages = Vec::new();
    let folder = root.join(set);
    if set == PAGES {
        for path in plain_files(&folder)? {
            let name = path
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            let file = JsonFile::read(path)?;
            hash.update(&name);
            hash.update(Sha256::digest(&file.bytes));
            let words = file
                .text()?
                .split(paragraph::is_space)
                .filter(|w| !w.is_empty());
            pages.push(Page {
                scene: format!("{set}/{name}"),
                lines: words.map(str::to_owned).collect(),
            });
        }
        return Ok((pages, hash.finalize().into()));
    }
    let file = JsonFile::read(folder.join("leetcode_instructions.jsonl"))?;
    hash.update(&file.bytes);
    let mut columns: Option<[String; 3]> = None;
    for (idx, line) in file.text()?.split('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = Place {
            path: &file.path,
            line: idx + 1,
        };
        let object: Map<String, Value> = serde_json::from_str(line).map_err(|error| {
            let mut problem = json_error(&file.path, &error);
            if let Error::Json { line, .. } = &mut problem {
                *line = idx + 1;
            }
            problem
        })?;
        let columns = match &columns {
            Some(columns) => columns,
            None => columns.insert(place.columns(line)?),
        };
        let [instruction, input, output] = [0, 1, 2].map(|i| place.text(&object, &columns[i]));
        let mut lines = vec![instruction?.to_owned(), unescape(input?), unescape(output?)];
        lines.retain(|line| !line.is_empty());
        pages.push(Page {
            scene: format!("{set}/{}", idx + 1),
            lines,
        });
    }
    Ok((pages, hash.finalize().into()))
}

/// The plain files of a folder, by name.
fn plain_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let read_error = |source| Error::Read {
        path: folder.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

struct Place<'a> {
    path: &'a Path,
    line: usize,
}

impl Place<'_> {
    /// The first three of five fields, as the first line has them.
    fn columns(&self, line: &str) -> Result<[String; 3]> {
        // Fields are taken by place, so the order of the keys matters; repeated keys are one field.
        let fields: Map<String, Value> =
            serde_json::from_str::<Map<String, Value>>(line).unwrap_or_default();
        let mut names = fields.keys().cloned();
        match (names.next(), names.next(), names.next(), names.count()) {
            (Some(a), Some(b), Some(c), 2) => Ok([a, b, c]),
            _ => Err(Error::WrongType {
                path: self.path.to_owned(),
                line: self.line,
                key: "the line".to_owned(),
                expected: "an object of five fields: instruction, input, output and two more",
                got: format!("one of {}", fields.len()),
            }),
        }
    }

    /// A field; absent and null are empty.
    fn text<'o>(&self, object: &'o Map<String, Value>, key: &str) -> Result<&'o str> {
        match object.get(key) {
            None | Some(Value::Null) => Ok(""),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(Error::WrongType {
                path: self.path.to_owned(),
                line: self.line,
                key: key.to_owned(),
                expected: "a text",
                got: shorten(&other.to_string(), 40),
            }),
        }
    }
}

/// Written escapes become what they stand for, in one pass; others stay.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let replaced = match rest.as_bytes().get(at + 1) {
            Some(b'n') => Some('\n'),
            Some(b't') => Some('\t'),
            Some(b'r') => Some('\r'),
            Some(b'f') => Some('\u{c}'),
            Some(b'b') => Some('\u{8}'),
            Some(b'\'') => Some('\''),
            Some(b'"') => Some('"'),
            Some(b'\\') => Some('\\'),
            _ => None,
        };
        out.push(replaced.unwrap_or('\\'));
        rest = &rest[at + if replaced.is_some() { 2 } else { 1 }..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone_once() {
        assert_eq!(
            unescape(r#"a\nb\t\r\f\b\'\"\\n\x\"#),
            "a\nb\t\r\u{c}\u{8}'\"\\n\\x\\"
        );
    }
}
