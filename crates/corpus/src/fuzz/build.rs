//! Whole builds from small sources, and the rows read back.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::{check_place, clear, put, sections};
use crate::build::{build, make_split};
use crate::character::Character;
use crate::error::Error;
use crate::language::Language;
use crate::request::{BuildRequest, SplitRequest};
use crate::rows;
use crate::source::SourceKind;
use crate::source::turn_based_game::Tables;
use crate::split::{Split, SplitOptions};
use crate::task::Task;

/// Somebody of a game and of a story.
const ADA: &str = r#"
name = { en = "Ada" }
languages = ["chs", "en"]
[player]
speaker_ids = ["me"]
[story]
speaker_ids = ["ada"]
markup = { strip = ["i"], remove = ["img"], text_attribute = ["ref"] }
variables = { name = "Sam" }
[turn_based_game]
nickname = { chs = "小山", en = "Sam" }
player_name_hash = 7
name_hashes = ["18446744073709551615", 3]
avatar_id = 2
people = [{ avatar_id = 2, name_hash = "18446744073709551615" }, { avatar_id = 1, name_hash = 10 }]
mission_prefixes = [104]
book_worlds = [5]
fine_talk_blocks = [500]
replacements = [{ from = "{MCV#1}", to = "3" }]
"#;

const STORY_TASKS: [Task; 5] = [
    Task::PtEverything,
    Task::PtAmphoreus,
    Task::SftEverything,
    Task::SftAmphoreus,
    Task::SftCyrene,
];

/// A tree: a section for each table that is not empty, and sections `CHS`, `EN`, `EN_0`, `EN_1` for maps.
pub(super) fn game(data: &[u8], folder: &Path) {
    clear(folder, "TextMap");
    for table in Tables::names() {
        put(folder, &format!("ExcelOutput/{table}.json"), b"[]");
    }
    for (name, text) in sections(data) {
        if Tables::names().any(|table| table == name) {
            put(folder, &format!("ExcelOutput/{name}.json"), &text);
        } else if ["CHS", "EN", "EN_0", "EN_1"].contains(&name.as_str()) {
            put(folder, &format!("TextMap/TextMap{name}.json"), &text);
        }
    }
    build_all(SourceKind::TurnBasedGame, folder, folder, &STORY_TASKS);
}

/// A vendor folder whose exercises, and whose only page, the bytes are.
pub(super) fn exercises(data: &[u8], folder: &Path) {
    put(folder, "coig/leetcode_instructions.jsonl", data);
    put(folder, "miyoushe/page", data);
    build_all(SourceKind::TurnBasedGame, folder, folder, &[Task::PtVendor]);
}

/// A story: as it is, gzipped, gzipped and cut short, and as if it were gzip already.
pub(super) fn story(data: &[u8], folder: &Path) {
    let plain = folder.join("story.jsonl");
    put(folder, "story.jsonl", data);
    let got = build_all(SourceKind::Story, &plain, folder, &STORY_TASKS);

    let zipped = folder.join("story.jsonl.gz");
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    let written = gzip.write_all(data);
    assert!(written.is_ok());
    let bytes = gzip.finish().unwrap_or_default();
    put(folder, "story.jsonl.gz", &bytes);
    let got_zipped = build_all(SourceKind::Story, &zipped, folder, &STORY_TASKS);
    assert_eq!(got, got_zipped, "the same story, zipped");

    let cut = bytes.len() - 1 - data.len() % (bytes.len() - 1).min(40);
    put(folder, "story.jsonl.gz", &bytes[..cut]);
    let got_cut = build_all(SourceKind::Story, &zipped, folder, &STORY_TASKS);
    assert!(got_cut.is_none(), "a file that breaks off was taken");

    put(folder, "story.jsonl.gz", data);
    build_all(SourceKind::Story, &zipped, folder, &STORY_TASKS);
}

/// A built data set: sections `manifest.json`, `pt/everything/en.jsonl` and `split.json`.
pub(super) fn rows(data: &[u8], folder: &Path) {
    const NAMES: [&str; 3] = ["manifest.json", "pt/everything/en.jsonl", "split.json"];
    for name in NAMES {
        put(folder, name, b"");
    }
    for (name, text) in sections(data) {
        if NAMES.contains(&name.as_str()) {
            put(folder, &name, &text);
        }
    }
    let set = folder.join("pt/everything");
    let whole = rows::load(&set, None);
    if let Err(error) = &whole {
        check_place(error);
    }
    let Ok(split) = Split::load(&folder.join("split.json")) else {
        return;
    };
    match (whole, rows::load(&set, Some(&split))) {
        (Ok(whole), Ok(parts)) => assert!(parts.len() >= whole.len()),
        (Err(error), Ok(_)) => panic!("read with a split only: {error}"),
        (_, Err(error)) => check_place(&error),
    }
}

/// Builds, splits and reads back; gives the rows, or `None` after an error.
fn build_all(
    source: SourceKind,
    root: &Path,
    folder: &Path,
    tasks: &[Task],
) -> Option<Vec<rows::BuiltRow>> {
    let out = folder.join("out");
    clear(folder, "out");
    let character = match Character::parse(ADA, Path::new("ada.toml")) {
        Ok(character) => character,
        Err(error) => panic!("{error}"),
    };
    let request = BuildRequest {
        source,
        root,
        character: &character,
        tasks,
        languages: None,
        out: &out,
    };
    let report = match build(
        &request,
        crate::Counters::of_rules(&|text| text.chars().count()),
        &|_| {},
    ) {
        Ok(report) => report,
        Err(error @ Error::NoSuchSpeaker { .. }) if tasks.len() > 1 => {
            // Nobody knows Ada here; the tasks that do without her must build.
            drop(error);
            return build_all(source, root, folder, &[Task::PtEverything]);
        }
        Err(error) => {
            check_place(&error);
            assert_nothing_named(&out);
            return None;
        }
    };
    let split = if tasks.contains(&Task::PtVendor) {
        None
    } else {
        let options = SplitOptions::default();
        let split = make_split(&SplitRequest {
            source,
            root,
            vendor: None,
            character: &character,
            options,
        });
        split.ok()
    };
    let mut all = Vec::new();
    for (task, dataset) in &report.datasets {
        let set = out.join(task.name());
        let rows = match rows::load(&set, None) {
            Ok(rows) => rows,
            Err(error) => panic!("what was built cannot be read: {error}"),
        };
        assert_eq!(rows.len() as u64, dataset.n_rows());
        let languages = dataset.files.iter().map(|f| f.language);
        assert!(languages.eq(languages_of(*task)));
        if let Some(split) = &split
            && let Err(error) = rows::load(&set, Some(split))
        {
            panic!("the split does not fit what it was made for: {error}");
        }
        all.extend(rows);
    }
    Some(all)
}

fn languages_of(task: Task) -> Vec<Option<Language>> {
    match task {
        Task::PtVendor => vec![None, None],
        _ => vec![Some(Language::Chs), Some(Language::En)],
    }
}

/// After an error no file has its final name, and none its temporary one.
fn assert_nothing_named(out: &Path) {
    let Ok(entries) = std::fs::read_dir(out) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            assert_nothing_named(&entry.path());
        } else {
            panic!("left over: {}", entry.path().display());
        }
    }
}
