//! Reads stories and character cards in the forms in which people have them (docs/import.md): each form is a file here, a
//! pure function of its text, and says what of it it could not keep.

mod card;
mod chat_log;
mod decode;
mod discord;
mod files;
mod form;
mod html;
mod macros;
mod name;
mod plain;
mod png;
mod recognise;
mod renpy;
mod scenes;
mod subtitles;
mod table;
mod twee;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::character::Character;
use crate::error::{Error, Result, without_position};
use crate::language::Language;
use crate::output::push_json_string;
use crate::scene::{Line, LineKind, Scene};
use files::Found;
pub use form::Form;
pub use recognise::{Recognised, recognise};
use scenes::{Fault, Imported, Notes};

/// What to import.
#[derive(Debug, Clone, Copy)]
pub struct ImportRequest<'a> {
    /// Files and folders of one story, or one character card.
    pub paths: &'a [PathBuf],
    /// The language of the texts.
    pub language: Language,
    /// The campaign of all scenes; else the name of the file or folder.
    pub campaign: Option<&'a str>,
    /// What a card's `{{user}}` becomes.
    pub player: Option<&'a str>,
    /// The form of all files; else told by content and ending.
    pub form: Option<Form>,
}

/// What came of it.
#[derive(Debug)]
pub enum Outcome {
    /// A story in the plain format.
    Story(ImportedStory),
    /// A character file.
    Character(ImportedCharacter),
}

/// A story, and what was not kept.
#[derive(Debug)]
pub struct ImportedStory {
    scenes: Vec<Scene>,
    /// What was left out or changed.
    pub notes: Vec<Note>,
    /// The files that were read, with their forms.
    pub files: Vec<(PathBuf, Form)>,
}

/// A character file, and what was not kept of the card.
#[derive(Debug)]
pub struct ImportedCharacter {
    /// The character's name.
    pub name: String,
    /// The character file.
    pub toml: String,
    /// What was left out or changed.
    pub notes: Vec<Note>,
}

/// A kind of thing that was left out or changed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Note {
    /// What it is, in the plural.
    pub what: String,
    /// How often it stands in the files.
    pub count: usize,
    /// The file where it stands first.
    pub path: PathBuf,
    /// The line there (of a Discord chat the message), from 1.
    pub line: usize,
}

/// Who speaks in a story.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SpeakerCount {
    /// The id, for a character file.
    pub id: String,
    /// The first name shown; the id where none is.
    pub name: String,
    /// Lines that this speaker says.
    pub lines: usize,
}

/// Imports a story or a card.
///
/// # Errors
/// A file that cannot be read, is too large, in another encoding, of no known form, or broken (with its line); files that
/// make no one story; nothing in them.
pub fn import(request: &ImportRequest<'_>) -> Result<Outcome> {
    let found = files::find(request)?;
    if let [file] = &found.files[..]
        && file.form == Form::Card
    {
        return character(file, request).map(Outcome::Character);
    }
    let mut definitions = renpy::Definitions::default();
    for file in found.files.iter().filter(|file| file.form == Form::RenPy) {
        renpy::define(&file.text, &mut definitions).map_err(|fault| in_file(&file.path, fault))?;
    }
    let mut story = ImportedStory {
        scenes: Vec::new(),
        notes: found.notes,
        files: Vec::new(),
    };
    let mut ids = HashMap::new();
    for file in &found.files {
        let imported = read(file, &definitions, request.language)
            .map_err(|fault| in_file(&file.path, fault))?;
        add_notes(&mut story.notes, &file.path, imported.notes);
        for mut scene in imported.scenes {
            scene.campaign.clone_from(&found.campaign);
            if scene.scenario.is_empty() {
                scene.scenario.clone_from(&file.scenario);
            }
            name_scene(&mut scene, &mut ids);
            story.scenes.push(scene);
        }
        story.files.push((file.path.clone(), file.form));
    }
    if story.scenes.is_empty() {
        return Err(Error::NothingToImport {
            path: request.paths.first().cloned().unwrap_or_default(),
        });
    }
    Ok(Outcome::Story(story))
}

fn read(
    file: &Found,
    definitions: &renpy::Definitions,
    language: Language,
) -> std::result::Result<Imported, Fault> {
    let text = &file.text;
    match file.form {
        Form::RenPy => renpy::read(text, definitions, language),
        Form::Subtitles => subtitles::read_srt(text, language),
        Form::SubStation => subtitles::read_ass(text, language),
        Form::Twee => Ok(twee::read(text, language)),
        Form::Twine => Ok(twee::read_page(text, language)),
        Form::Table => table::read(text, language),
        Form::ChatLog => chat_log::read(text, language),
        Form::Discord => discord::read(text, language),
        Form::Plain => Ok(plain::read(text, language)),
        Form::Card => Err(Fault::new(
            1,
            "a character card is no part of a story; import it by itself into a character file",
        )),
    }
}

fn character(file: &Found, request: &ImportRequest<'_>) -> Result<ImportedCharacter> {
    let made = card::read(&file.text, request.language, request.player).map_err(|mut fault| {
        if file.in_picture {
            fault.line = 1;
        }
        in_file(&file.path, fault)
    })?;
    // What is written must load.
    Character::parse(&made.toml, &file.path)?;
    let mut notes = Vec::new();
    add_notes(&mut notes, &file.path, made.notes);
    Ok(ImportedCharacter {
        name: made.name,
        toml: made.toml,
        notes,
    })
}

fn in_file(path: &Path, fault: Fault) -> Error {
    Error::Import {
        path: path.to_owned(),
        line: fault.line,
        problem: fault.problem,
    }
}

/// A message of serde_json with the column, for a place that has the line.
fn json_problem(error: &serde_json::Error) -> String {
    format!(
        "{} (column {})",
        without_position(&error.to_string()),
        error.column().max(1)
    )
}

fn add_notes(notes: &mut Vec<Note>, path: &Path, new: Notes) {
    for kind in new.0 {
        match notes.iter_mut().find(|note| note.what == kind.what) {
            Some(note) => note.count += kind.count,
            None => notes.push(Note {
                what: kind.what.to_owned(),
                count: kind.count,
                path: path.to_owned(),
                line: kind.line,
            }),
        }
    }
}

/// Makes the id of a scene one of the whole story: campaign, chapter and its own, with `#2`, `#3`, ... behind a repeated
/// one.
fn name_scene(scene: &mut Scene, ids: &mut HashMap<String, usize>) {
    let parts = [&scene.campaign, &scene.scenario, &scene.id].map(String::as_str);
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let mut id = parts.join("/");
    loop {
        let n = ids.entry(id.clone()).or_default();
        *n += 1;
        if *n == 1 {
            break;
        }
        id = format!("{id}#{n}");
    }
    scene.id = id;
}

impl ImportedStory {
    /// The story in the plain format: JSON lines.
    pub fn to_jsonl(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for scene in &self.scenes {
            out.extend_from_slice(b"{\"campaign\":");
            push_json_string(&mut out, &scene.campaign);
            if !scene.scenario.is_empty() {
                out.extend_from_slice(b",\"scenario\":");
                push_json_string(&mut out, &scene.scenario);
            }
            out.extend_from_slice(b",\"scene\":");
            push_json_string(&mut out, &scene.id);
            out.extend_from_slice(b",\"lines\":");
            let lines: Vec<_> = scene.lines.iter().map(line_json).collect();
            out.extend_from_slice(serde_json::Value::Array(lines).to_string().as_bytes());
            out.extend_from_slice(b"}\n");
        }
        out
    }

    /// How many scenes there are.
    pub fn n_scenes(&self) -> usize {
        self.scenes.len()
    }

    /// How many lines there are in all scenes.
    pub fn n_lines(&self) -> usize {
        self.scenes.iter().map(|scene| scene.lines.len()).sum()
    }

    /// Who speaks, those with the most lines first.
    pub fn speakers(&self) -> Vec<SpeakerCount> {
        let mut counts: BTreeMap<&str, SpeakerCount> = BTreeMap::new();
        let spoken = self
            .scenes
            .iter()
            .flat_map(|scene| &scene.lines)
            .filter(|line| line.kind == LineKind::Dialogue);
        for line in spoken {
            let count = counts
                .entry(&line.speaker_id)
                .or_insert_with(|| SpeakerCount {
                    id: line.speaker_id.clone(),
                    name: line
                        .speaker_name
                        .iter()
                        .next()
                        .map_or(line.speaker_id.as_str(), |(_, name)| name)
                        .to_owned(),
                    lines: 0,
                });
            count.lines += 1;
        }
        let mut counts: Vec<SpeakerCount> = counts.into_values().collect();
        counts.sort_by_key(|count| std::cmp::Reverse(count.lines));
        counts
    }
}

fn line_json(line: &Line) -> serde_json::Value {
    let kind = match line.kind {
        LineKind::Dialogue => "dialogue",
        LineKind::Narration => "narration",
        LineKind::Objective => "objective",
        LineKind::Option => "option",
    };
    let mut json = json!({ "kind": kind });
    if !line.speaker_id.is_empty() {
        json["speaker_id"] = json!(line.speaker_id);
    }
    if !line.speaker_name.is_empty() {
        json["speaker_name"] = json!(line.speaker_name);
    }
    json["text"] = json!(line.text);
    if line.has_variables {
        json["variables"] = json!(true);
    }
    json
}

#[cfg(test)]
mod tests;
