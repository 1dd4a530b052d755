//! `cyrene corpus import`: stories and character cards of other forms into files of ours.

use std::path::{Path, PathBuf};

use anyhow::Result;
use corpus::Language;
use corpus::import::{Form, ImportRequest, ImportedCharacter, ImportedStory, Note, Outcome};

use crate::cli::CorpusImport;
use crate::misuse;
use crate::ui::{Ui, misused};

/// Speakers and places that are listed.
const LISTED: usize = 12;

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &CorpusImport, ui: &Ui) -> Result<()> {
    let Some(language) = Language::from_name(&args.language) else {
        let known = Language::ALL.map(Language::code).join(", ");
        misuse!("unknown language `{}`; known are {known}", args.language);
    };
    let form = match &args.form {
        None => None,
        Some(name) => match Form::from_name(name) {
            Some(form) => Some(form),
            None => misuse!("unknown form `{name}`; known are {}", Form::names()),
        },
    };
    let outcome = misused(corpus::import::import(&ImportRequest {
        paths: &args.paths,
        language,
        campaign: args.campaign.as_deref(),
        player: args.player.as_deref(),
        form,
    }))?;
    match outcome {
        Outcome::Story(story) => give_story(args, &story, ui),
        Outcome::Character(character) => give_character(args, &character, ui),
    }
}

fn give_story(args: &CorpusImport, story: &ImportedStory, ui: &Ui) -> Result<()> {
    write(args, "jsonl", "a story", &story.to_jsonl())?;
    let speakers = story.speakers();
    let files = story.files.iter();
    let files: Vec<_> = files
        .map(|(path, form)| serde_json::json!({ "path": path, "form": form.name() }))
        .collect();
    ui.result(
        &serde_json::json!({
            "out": args.out, "files": files, "scenes": story.n_scenes(), "lines": story.n_lines(),
            "speakers": speakers, "notes": story.notes,
        }),
        || {
            let form = story.files.first().map_or("", |(_, form)| form.title());
            let from = match story.files.len() {
                1 => form.to_owned(),
                n => format!("{n} files, the first {form}"),
            };
            let mut text = format!(
                "{}: {} scenes, {} lines ({from})",
                args.out.display(),
                story.n_scenes(),
                story.n_lines(),
            );
            text.push_str(
                "\nspeakers, by id, for [story] and [player] speaker_ids of the character file:",
            );
            for speaker in speakers.iter().take(LISTED) {
                text.push_str(&format!(
                    "\n{:>8} lines  {}  {}",
                    speaker.lines, speaker.id, speaker.name
                ));
            }
            match speakers.len() {
                0 => text.push_str("\n         nobody: no line names its speaker"),
                n if n > LISTED => text.push_str(&format!("\n         and {} more", n - LISTED)),
                _ => {}
            }
            text + &describe(&story.notes)
        },
    )
}

fn give_character(args: &CorpusImport, character: &ImportedCharacter, ui: &Ui) -> Result<()> {
    write(args, "toml", "a character", character.toml.as_bytes())?;
    ui.result(
        &serde_json::json!({ "out": args.out, "name": character.name, "notes": character.notes }),
        || {
            let text = format!("{}: {}", args.out.display(), character.name);
            text + &describe(&character.notes)
        },
    )
}

/// What was not kept, a line a kind.
fn describe(notes: &[Note]) -> String {
    let mut text = String::new();
    if !notes.is_empty() {
        text.push_str("\nleft out or changed:");
    }
    for note in notes {
        text.push_str(&format!(
            "\n{:>8}  {} (first at {}:{})",
            note.count,
            note.what,
            note.path.display(),
            note.line
        ));
    }
    text
}

/// Writes the file, unless its ending says that something else was expected or another file is there.
fn write(args: &CorpusImport, ending: &str, what: &str, bytes: &[u8]) -> Result<()> {
    let out = &args.out;
    if out.extension().is_none_or(|given| given != ending) {
        misuse!(
            "this is {what}, which goes into a .{ending} file; write --out {}",
            out.with_extension(ending).display()
        );
    }
    // By any spelling.
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let is_out = |path: &PathBuf| path == out || (out.exists() && real(path) == real(out));
    if args.paths.iter().any(is_out) {
        misuse!(
            "--out {} is what is imported; name another file",
            out.display()
        );
    }
    // The same again is no loss.
    if !args.force && out.exists() && std::fs::read(out).ok().as_deref() != Some(bytes) {
        misuse!(
            "{} exists already; use --force to replace it",
            out.display()
        );
    }
    Ok(files::write(out, bytes)?)
}
