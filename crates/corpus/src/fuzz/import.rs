//! Imports: any bytes taken for a file of every form, and what was made of them read back.

use std::path::{Path, PathBuf};

use super::put;
use crate::character::Character;
use crate::error::Error;
use crate::import::{Form, ImportRequest, Outcome, import as import_files, recognise};
use crate::language::Language;
use crate::source::story;

/// A file, read as each form and as what it looks like.
pub(super) fn import(data: &[u8], folder: &Path) {
    let path = folder.join("some.txt");
    put(folder, "some.txt", data);
    let _ = recognise(&path);
    let forms = Form::names();
    let forms = forms.split(", ").map(Form::from_name);
    for form in forms.chain([None]) {
        let request = ImportRequest {
            paths: std::slice::from_ref(&path),
            language: Language::Jp,
            campaign: None,
            player: None,
            form,
        };
        match import_files(&request) {
            Ok(outcome) => check(&outcome, folder),
            Err(error) => check_place(&error, &path, data),
        }
    }
}

/// What was made can be read, and is all there.
fn check(outcome: &Outcome, folder: &Path) {
    match outcome {
        Outcome::Character(made) => {
            let path = PathBuf::from("made.toml");
            let read = Character::parse(&made.toml, &path);
            assert!(read.is_ok(), "{read:?}");
        }
        Outcome::Story(made) => {
            put(folder, "made.jsonl", &made.to_jsonl());
            let read = match story::read(&folder.join("made.jsonl")) {
                Ok(read) => read,
                Err(error) => panic!("what was made cannot be read: {error}"),
            };
            assert!(read.unknown_keys.is_empty());
            assert_eq!(read.scenes.len(), made.n_scenes());
            let n_lines: usize = read.scenes.iter().map(|scene| scene.lines.len()).sum();
            assert_eq!(n_lines, made.n_lines());
            assert!(read.scenes.iter().all(|scene| !scene.lines.is_empty()));
        }
    }
}

fn check_place(error: &Error, path: &Path, data: &[u8]) {
    let text = error.to_string();
    assert!(text.len() < 1500, "an error to be read: {text}");
    assert!(text.contains(&path.display().to_string()), "{text}");
    if let Error::Import { line, .. } = error {
        let n_ends = data.iter().filter(|b| matches!(b, b'\n' | b'\r')).count();
        assert!((1..=n_ends + 1).contains(line), "no such line: {text}");
    }
}
