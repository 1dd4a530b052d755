//! Which files are imported: those named, and of a folder those of the form that most of its files have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ::files::outside::{self, TooMuch};

use super::{Form, ImportRequest, Note, card, decode, in_file, png};
use crate::error::{Error, Result};

/// The largest file that is read, in bytes.
const MOST_BYTES: u64 = 256 << 20;
/// How deep folders may lie in folders.
const MOST_DEPTH: usize = 16;

const OTHERS: &str = "files of other forms or of none";

/// A file to import.
pub(crate) struct Found {
    pub path: PathBuf,
    pub form: Form,
    /// Its text; of a PNG the card's JSON.
    pub text: String,
    /// Whether the text was in a picture, which has no lines.
    pub in_picture: bool,
    /// The chapter, where a story has several files: the path below the folder, without ending.
    pub scenario: String,
}

/// All files of one import.
pub(crate) struct Files {
    pub files: Vec<Found>,
    pub campaign: String,
    pub notes: Vec<Note>,
}

/// Finds, reads and tells the files of an import.
pub(crate) fn find(request: &ImportRequest<'_>) -> Result<Files> {
    let mut files = Vec::new();
    let mut notes = Vec::new();
    for path in request.paths {
        if path.is_dir() {
            files.extend(of_folder(path, request, &mut notes)?);
        } else {
            files.push(load(path, stem(path), request)?);
        }
    }
    if let [file] = &mut files[..]
        && request.paths.len() == 1
        && !request.paths[0].is_dir()
    {
        file.scenario.clear();
    }
    let campaign = match (request.campaign, request.paths) {
        (Some(campaign), _) => campaign.to_owned(),
        (None, [path]) => stem(path),
        (None, paths) => {
            let first = paths.first().map_or(Path::new(""), PathBuf::as_path);
            let folder = first.parent().map(stem).filter(|name| !name.is_empty());
            folder.unwrap_or_else(|| stem(first))
        }
    };
    let campaign = if campaign.trim().is_empty() {
        "story".to_owned()
    } else {
        campaign
    };
    Ok(Files {
        files,
        campaign,
        notes,
    })
}

/// The name of a file without its ending, or of a folder.
fn stem(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn of_folder(
    folder: &Path,
    request: &ImportRequest<'_>,
    notes: &mut Vec<Note>,
) -> Result<Vec<Found>> {
    let mut paths = Vec::new();
    walk(folder, 0, &mut paths)?;
    let mut found: BTreeMap<Form, Vec<Found>> = BTreeMap::new();
    let mut broken: Vec<(Option<Form>, PathBuf, Error)> = Vec::new();
    let mut others: Vec<PathBuf> = Vec::new();
    for path in paths {
        if is_picture(&path) {
            others.push(path);
            continue;
        }
        let below = path
            .strip_prefix(folder)
            .unwrap_or(&path)
            .with_extension("");
        let scenario = below.to_string_lossy().replace('\\', "/");
        match load(&path, scenario, request) {
            Ok(file) if file.form != Form::Card => found.entry(file.form).or_default().push(file),
            Ok(_) | Err(Error::UnknownForm { .. }) => others.push(path),
            Err(error @ Error::Read { .. }) => return Err(error),
            Err(error) => {
                let form = request.form.or_else(|| Form::by_ending(&path));
                broken.push((form, path, error));
            }
        }
    }
    // Files that cannot be told count by their endings: subtitles in another encoding are not passed over for the one readable note.
    let mut counts: BTreeMap<Form, usize> = BTreeMap::new();
    let told = found.iter().map(|(form, files)| (*form, files.len()));
    let by_ending = broken.iter().filter_map(|(form, ..)| Some(((*form)?, 1)));
    for (form, n) in told.chain(by_ending) {
        *counts.entry(form).or_default() += n;
    }
    let most = counts.values().copied().max();
    let mut forms = counts.iter();
    let chosen = forms.find(|(_, n)| Some(**n) == most);
    let chosen = chosen.map(|(form, _)| *form);
    let mut problem = None;
    for (form, path, error) in broken {
        if form.is_some() && form == chosen {
            return Err(error);
        }
        others.push(path);
        problem.get_or_insert(error);
    }
    let files = chosen.and_then(|form| found.remove(&form));
    let Some(files) = files else {
        return Err(problem.unwrap_or(Error::NothingToImport {
            path: folder.to_owned(),
        }));
    };
    others.extend(found.into_values().flatten().map(|file| file.path));
    others.sort();
    if let Some(path) = others.first() {
        notes.push(Note {
            what: OTHERS.to_owned(),
            count: others.len(),
            path: path.clone(),
            line: 1,
        });
    }
    Ok(files)
}

/// Whether a file is a picture by its ending. Of pictures only cards are read, and a folder is a story, which cards are not.
fn is_picture(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("png"))
}

/// Files below a folder that may be of a form, in the order of their names; hidden ones and links to folders are passed by.
pub(crate) fn walk(folder: &Path, depth: usize, paths: &mut Vec<PathBuf>) -> Result<()> {
    let read_error = |source| Error::Read {
        path: folder.to_owned(),
        source,
    };
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        entries.push(entry.map_err(read_error)?);
    }
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let is_folder = entry.file_type().map_err(read_error)?.is_dir();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if is_folder && depth < MOST_DEPTH {
            walk(&path, depth + 1, paths)?;
        } else if path.is_file() && Form::is_candidate(&path) {
            paths.push(path);
        }
    }
    Ok(())
}

fn load(path: &Path, scenario: String, request: &ImportRequest<'_>) -> Result<Found> {
    let bytes = read(path)?;
    if bytes.starts_with(png::MAGIC) {
        let text = card::of_png(&bytes).map_err(|fault| in_file(path, fault))?;
        return Ok(Found {
            path: path.to_owned(),
            form: Form::Card,
            text,
            in_picture: true,
            scenario,
        });
    }
    let text = decode::text(path, &bytes, request.language)?;
    let form = request.form.or_else(|| Form::of(path, &bytes, &text));
    match form {
        Some(form) => Ok(Found {
            path: path.to_owned(),
            form,
            text,
            in_picture: false,
            scenario,
        }),
        None if super::recognise::is_story(&text) => Err(Error::StoryAlready {
            path: path.to_owned(),
        }),
        None => Err(Error::UnknownForm {
            path: path.to_owned(),
            known: Form::names(),
        }),
    }
}

/// The bytes of a file of bearable size.
fn read(path: &Path) -> Result<Vec<u8>> {
    let path = path.to_owned();
    match outside::read(&path, MOST_BYTES) {
        Ok(bytes) => Ok(bytes),
        Err(error) if TooMuch::is(&error) => Err(Error::TooLarge {
            path,
            most_mib: MOST_BYTES >> 20,
        }),
        Err(source) => Err(Error::Read { path, source }),
    }
}
