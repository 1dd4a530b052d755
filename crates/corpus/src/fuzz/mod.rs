//! Every reader and rule as a function of bytes that anybody may have written, for the fuzzer and for the tests that
//! replay its seeds (`fuzz/README.md`). A target panics when a reader breaks a promise: it crashes, disagrees with a
//! plain second reading of the rules, or reports an error without its place.

mod build;
mod import;
mod maps;
mod readers;
mod rules;

use std::path::Path;

use crate::error::Error;

/// A target: bytes, and a folder to lay files in (it may hold those of the last call).
pub type Target = fn(&[u8], &Path);

/// All targets by name; the seeds of each lie in `fuzz/seeds/<name>`.
pub const TARGETS: [(&str, Target); 13] = [
    ("text_map", maps::text_map),
    ("tables", maps::tables),
    ("game", build::game),
    ("exercises", build::exercises),
    ("story", build::story),
    ("import", import::import),
    ("rows", build::rows),
    ("row_forms", readers::row_forms),
    ("cleanup", rules::cleanup),
    ("lines", rules::lines),
    ("markup", rules::markup),
    ("character", readers::character),
    ("split", readers::split),
];

/// Lays a file.
fn put(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        let made = std::fs::create_dir_all(parent);
        assert!(made.is_ok(), "{}: {made:?}", parent.display());
    }
    let written = std::fs::write(&path, bytes);
    assert!(written.is_ok(), "{}: {written:?}", path.display());
}

/// Takes away what an earlier call laid.
fn clear(folder: &Path, name: &str) {
    let path = folder.join(name);
    // Not there the first time.
    let _ = std::fs::remove_dir_all(&path);
    let _ = std::fs::remove_file(&path);
}

/// The sections of an input: each begins with a line `== NAME`. What stands before the first is nobody's.
fn sections(data: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut sections: Vec<(String, Vec<u8>)> = Vec::new();
    for line in data.split_inclusive(|b| *b == b'\n') {
        match line.strip_prefix(b"== ") {
            Some(name) => {
                let name = String::from_utf8_lossy(name).trim().to_owned();
                sections.push((name, Vec::new()));
            }
            None => {
                if let Some((_, text)) = sections.last_mut() {
                    text.extend_from_slice(line);
                }
            }
        }
    }
    sections
}

/// The place that an error names must be one of the file it names.
fn check_place(error: &Error) {
    let (path, line, column) = match error {
        Error::BadRows(bad) => {
            for row in bad.named() {
                check_line(&row.path, row.line, None, &row.to_string());
            }
            return;
        }
        Error::Json {
            path, line, column, ..
        }
        | Error::NotUtf8 {
            path, line, column, ..
        }
        | Error::Character {
            path, line, column, ..
        }
        | Error::UnknownKey {
            path, line, column, ..
        } => (path, *line, Some(*column)),
        Error::MissingField { path, line, .. }
        | Error::MissingCell { path, line, .. }
        | Error::WrongType { path, line, .. }
        | Error::UnknownLanguage { path, line, .. }
        | Error::DuplicateScene { path, line, .. } => (path, *line, None),
        _ => return,
    };
    check_line(path, line, column, &error.to_string());
}

/// That a file has this line, and the line this column.
fn check_line(path: &Path, line: usize, column: Option<usize>, error: &str) {
    // Gzipped and unwritten files cannot be looked at.
    let Ok(bytes) = std::fs::read(path) else {
        return;
    };
    if path.extension().is_some_and(|e| e == "gz") || bytes.starts_with(&[0x1f, 0x8b]) {
        return;
    }
    let text = bytes.split(|b| *b == b'\n').nth(line.wrapping_sub(1));
    // A file that ends in a line feed may break off on the line behind it.
    assert!(text.is_some(), "no such line: {error}");
    let length = text.map_or(0, <[u8]>::len);
    if let Some(column) = column {
        assert!(
            (1..=length + 1).contains(&column),
            "no such column: {error}"
        );
    }
    assert!(error.len() < 1500, "an error to be read: {error}");
}
