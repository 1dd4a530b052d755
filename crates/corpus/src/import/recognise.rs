//! Tells what somebody gave in place of a story, rows or a character file, and the command that turns it into one.

use std::io::Read;
use std::path::{Path, PathBuf};

use ::files::outside;
use serde_json::{Map, Value};

use super::{Form, decode, files};
use crate::language::Language;

/// Bytes of a file that are looked at.
const MOST_BYTES: u64 = 16 << 20;
/// Files of a folder that are looked at.
const MOST_FILES: usize = 64;

/// A file or folder that `cyrene corpus import` reads. Displayed, it is a sentence with that command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recognised {
    /// The file or folder.
    pub path: PathBuf,
    /// Its form; of a folder that of its first file.
    pub form: Form,
    /// Whether it is a folder.
    pub is_folder: bool,
}

impl std::fmt::Display for Recognised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        let title = self.form.title();
        let (into, ending) = match self.form {
            Form::Card => ("a character file", "toml"),
            _ => ("a story", "jsonl"),
        };
        let mut out = self.path.with_extension(ending);
        if self.is_folder {
            out = PathBuf::from(format!(
                "{}.{ending}",
                path.to_string().trim_end_matches(std::path::is_separator)
            ));
        } else if out == self.path {
            out = self.path.with_extension(format!("story.{ending}"));
        }
        match self.is_folder {
            true => write!(
                f,
                "{path} holds no story but {}",
                title.trim_start_matches("a file of ")
            )?,
            false => write!(f, "{path} is {title}")?,
        }
        write!(
            f,
            "; turn it into {into} with `cyrene corpus import {} --out {}`",
            quoted(&self.path),
            quoted(&out)
        )
    }
}

/// A path as a shell of the system takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    match cfg!(windows) {
        true => quoted_for_windows(&text),
        false => quoted_for_unix(&text),
    }
}

fn quoted_for_unix(text: &str) -> String {
    match is_plain(text, "/._-+:=@%") {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// cmd.exe knows double quotes alone, which no path of Windows holds.
fn quoted_for_windows(text: &str) -> String {
    match is_plain(text, "\\/._-+:@") {
        true => text.to_owned(),
        false => format!("\"{text}\""),
    }
}

fn is_plain(text: &str, marks: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || marks.contains(c);
    !text.is_empty() && text.chars().all(is_plain)
}

/// What a file that is no story, no row and no character file is, if `cyrene corpus import` reads it; of a folder, if it
/// holds such files and nothing that looks like a story. `None` for whatever cannot be read.
pub fn recognise(path: &Path) -> Option<Recognised> {
    let recognised = |form, is_folder| Recognised {
        path: path.to_owned(),
        form,
        is_folder,
    };
    if !path.is_dir() {
        return Some(recognised(form_of(path)?, false));
    }
    let is_story_file = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".jsonl.gz"))
    };
    if std::fs::read_dir(path).ok()?.any(is_story_file) {
        return None;
    }
    let mut paths = Vec::new();
    files::walk(path, 0, &mut paths).ok()?;
    let mut first = None;
    for path in paths.iter().take(MOST_FILES) {
        let form = form_of(path).filter(|form| *form != Form::Card);
        if form.is_none() && path.extension().is_some_and(|ending| ending == "jsonl") {
            return None;
        }
        first = first.or(form);
    }
    first.map(|form| recognised(form, true))
}

fn form_of(path: &Path) -> Option<Form> {
    if !path.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    let file = outside::open(path).ok()?;
    file.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    // The encoding is told by the import itself.
    let text = decode::text(path, &bytes, Language::En).unwrap_or_default();
    Form::of(path, &bytes, &text)
}

/// Whether a text is a story in the plain format.
pub(crate) fn is_story(text: &str) -> bool {
    let first = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("");
    let object = serde_json::from_str::<Map<String, Value>>(first).unwrap_or_default();
    let has = |key: &str| object.contains_key(key);
    has("campaign") && (has("scene") || has("kind")) || has("scene") && has("lines")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_as_the_shell_needs_it() {
        assert_eq!(quoted_for_unix("a/b.txt"), "a/b.txt");
        assert_eq!(quoted_for_unix("Bo's sea.txt"), r"'Bo'\''s sea.txt'");
        assert_eq!(quoted_for_windows(r"C:\sea\new.txt"), r"C:\sea\new.txt");
        assert_eq!(quoted_for_windows(r"C:\my sea.txt"), "\"C:\\my sea.txt\"");
    }
}
