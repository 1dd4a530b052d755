//! SHA-256 of every file of a folder, in a list beside them: whoever reads the folder later sees whether its bytes are those that were written.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{During, Result};
use crate::file;
use crate::hash::{sha256, sha256_of};
use crate::outside;

/// Name of the list: a line a file, in the form that `sha256sum -c` reads.
pub const SUMS: &str = "SHA256SUMS";

/// What a folder's list says of the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wholeness {
    /// Every listed file has the bytes that were written, and no weights lie there that are not listed.
    Whole,
    /// There is no list.
    Unlisted,
    /// Something is wrong with this file.
    Damaged(Damage),
}

/// The first file, in name order, that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Relative to the folder.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a listed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// It is gone.
    Missing,
    /// Its bytes are others.
    Changed,
    /// Weights that are in the folder and not on the list, and would be read with the others.
    Unlisted,
    /// A line of the list that is none, or names a place outside the folder.
    BadList,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        match self.problem {
            Problem::Missing => write!(f, "{file} is missing"),
            Problem::Changed => write!(f, "{file} has other bytes than were written"),
            Problem::Unlisted => write!(f, "{file} was not there when it was written"),
            Problem::BadList => write!(f, "{file} cannot be read as a list of SHA-256 sums"),
        }
    }
}

/// Writes the list for all files below `folder`.
///
/// # Errors
/// Names the file that cannot be read or written, or whose name has a line feed or is not UTF-8.
pub fn write_sums(folder: &Path) -> Result<()> {
    let names = names_below(folder)?;
    let sums = sums_of(folder, &names)?;
    let mut list = String::new();
    for (name, sum) in names.iter().zip(sums) {
        // Infallible into a string.
        let _ = writeln!(list, "{sum}  {name}");
    }
    file::write(&folder.join(SUMS), list.as_bytes())
}

/// Holds the files of a folder against its list.
///
/// # Errors
/// Names the file that cannot be read for another reason than that it is gone.
pub fn check_sums(folder: &Path) -> Result<Wholeness> {
    let path = folder.join(SUMS);
    let list = match outside::read(&path, outside::MOST_SETTINGS_BYTES) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Wholeness::Unlisted);
        }
        list => list.during("read", &path)?,
    };
    let Some(listed) = parse(&list) else {
        return Ok(damaged(SUMS, Problem::BadList));
    };
    let there: BTreeSet<String> = names_below(folder)?.into_iter().collect();
    // 1. names, which cost nothing
    if let Some((_, name)) = listed.iter().find(|(_, name)| !there.contains(name)) {
        return Ok(damaged(name, Problem::Missing));
    }
    let known: BTreeSet<&String> = listed.iter().map(|(_, name)| name).collect();
    let mut unlisted = there.iter().filter(|name| !known.contains(name));
    if let Some(name) = unlisted.find(|name| is_read_unasked(name)) {
        return Ok(damaged(name, Problem::Unlisted));
    }
    // 2. bytes
    let names: Vec<String> = listed.iter().map(|(_, name)| name.clone()).collect();
    let sums = sums_of(folder, &names)?;
    let mut pairs = listed.iter().zip(sums);
    Ok(match pairs.find(|((sum, _), is)| sum != is) {
        Some(((_, name), _)) => damaged(name, Problem::Changed),
        None => Wholeness::Whole,
    })
}

/// Whether a file is read because it lies there: weights and their index. A tokenizer that somebody puts beside them to try a checkpoint, or
/// what a desktop leaves in every folder, changes nothing.
fn is_read_unasked(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
}

/// SHA-256 of the files in `folder`, without those of its folders, whose names `counts`, by name and bytes, in hex.
///
/// # Errors
/// Names the file that cannot be read.
pub fn sha256_of_files(folder: &Path, counts: impl Fn(&str) -> bool) -> Result<String> {
    let entries = fs::read_dir(folder).during("list", folder)?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.during("list", folder)?;
        names.extend(
            entry
                .file_name()
                .into_string()
                .ok()
                .filter(|name| counts(name)),
        );
    }
    names.sort_unstable();
    let sums = sums_of(folder, &names)?;
    let lines = names
        .iter()
        .zip(sums)
        .map(|(name, sum)| format!("{sum}  {name}\n"));
    Ok(sha256(lines.collect::<String>().as_bytes()))
}

fn damaged(name: &str, problem: Problem) -> Wholeness {
    Wholeness::Damaged(Damage {
        file: PathBuf::from(name),
        problem,
    })
}

/// Sum and name of each line; `None` if one is none, or leads out of the folder.
fn parse(list: &[u8]) -> Option<Vec<(String, String)>> {
    let list = std::str::from_utf8(list).ok()?;
    let line = |line: &str| {
        let (sum, name) = line.split_once("  ")?;
        let is_sum = sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_hexdigit());
        let mut parts = Path::new(name).components();
        let is_inside = !name.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)));
        (is_sum && is_inside).then(|| (sum.to_ascii_lowercase(), name.to_owned()))
    };
    let lines: Option<Vec<_>> = list.lines().map(line).collect();
    lines.filter(|lines| !lines.is_empty())
}

/// Every file below `folder` but the list itself, with `/` between the parts, in name order. What is no regular file counts too: it cannot
/// be on a list, so it is noticed.
fn names_below(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut folders = vec![(folder.to_owned(), String::new())];
    while let Some((path, prefix)) = folders.pop() {
        for entry in fs::read_dir(&path).during("list", &path)? {
            let entry = entry.during("list", &path)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| !name.contains(['\n', '\r'])) else {
                let source = std::io::Error::other("its name is no line of UTF-8");
                return Err(source).during("list", &entry.path());
            };
            let name = format!("{prefix}{name}");
            // A folder that was moved to another disk and left as a link is a folder.
            if fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir()) {
                folders.push((entry.path(), format!("{name}/")));
            } else if name != SUMS {
                names.push(name);
            }
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The sum of each file, several at a time.
fn sums_of(folder: &Path, names: &[String]) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, Result<String>)>> = Mutex::new(Vec::new());
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..n_threads.min(names.len()) {
            scope.spawn(|| {
                while let Some((idx, name)) = take(&next, names) {
                    let sum = sha256_of(&folder.join(name));
                    let mut found = found.lock().unwrap_or_else(|poison| poison.into_inner());
                    found.push((idx, sum));
                }
            });
        }
    });
    let mut found = found
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner());
    found.sort_by_key(|(idx, _)| *idx);
    found.into_iter().map(|(_, sum)| sum).collect()
}

fn take<'n>(next: &AtomicUsize, names: &'n [String]) -> Option<(usize, &'n String)> {
    let idx = next.fetch_add(1, Ordering::Relaxed);
    Some((idx, names.get(idx)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        file::write(&dir.path().join("model/a.safetensors"), b"weights").unwrap();
        file::write(&dir.path().join("state.json"), b"{}").unwrap();
        write_sums(dir.path()).unwrap();
        dir
    }

    fn problem(dir: &tempfile::TempDir) -> (String, Problem) {
        match check_sums(dir.path()).unwrap() {
            Wholeness::Damaged(damage) => (damage.file.display().to_string(), damage.problem),
            whole => panic!("{whole:?}"),
        }
    }

    #[test]
    fn a_folder_as_it_was_written_is_whole_and_its_list_is_that_of_sha256sum() {
        let dir = listed();
        assert_eq!(check_sums(dir.path()).unwrap(), Wholeness::Whole);
        let list = fs::read_to_string(dir.path().join(SUMS)).unwrap();
        let line = format!("{}  state.json", crate::sha256(b"{}"));
        assert_eq!(list.lines().nth(1), Some(line.as_str()));
        fs::remove_file(dir.path().join(SUMS)).unwrap();
        assert_eq!(check_sums(dir.path()).unwrap(), Wholeness::Unlisted);
    }

    #[test]
    fn each_kind_of_damage_is_named_with_its_file() {
        let dir = listed();
        fs::write(dir.path().join("model/a.safetensors"), "weighTs").unwrap();
        assert_eq!(
            problem(&dir),
            ("model/a.safetensors".to_owned(), Problem::Changed)
        );
        let dir = listed();
        fs::remove_file(dir.path().join("state.json")).unwrap();
        assert_eq!(problem(&dir), ("state.json".to_owned(), Problem::Missing));
        let dir = listed();
        let more = "model/b.safetensors";
        fs::write(dir.path().join(more), "").unwrap();
        assert_eq!(problem(&dir), (more.to_owned(), Problem::Unlisted));
        let dir = listed();
        for harmless in ["model/tokenizer.json", ".DS_Store", "model/desktop.ini"] {
            fs::write(dir.path().join(harmless), "x").unwrap();
        }
        assert_eq!(check_sums(dir.path()).unwrap(), Wholeness::Whole);
        for list in ["", "half a line", "../x", "zz  state.json"] {
            let dir = listed();
            fs::write(dir.path().join(SUMS), list).unwrap();
            assert_eq!(problem(&dir), (SUMS.to_owned(), Problem::BadList), "{list}");
        }
    }

    #[test]
    fn a_list_that_leads_out_of_its_folder_is_no_list() {
        for name in [
            "../state.json",
            "/etc/passwd",
            "model/../../x",
            "./state.json",
        ] {
            let dir = listed();
            let line = format!("{}  {name}\n", crate::sha256(b"{}"));
            fs::write(dir.path().join(SUMS), line).unwrap();
            assert_eq!(problem(&dir).1, Problem::BadList, "{name}");
        }
    }
}
