//! Builds the data sets of a game's tree: a language at a time, or the pages of its vendor folder.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{
    GameDocuments, Roots, Tables, TextMapFiles, Texts, add_map, guard, split, table_files, vendor,
};
use crate::character::{Character, GameRules};
use crate::dataset::{DatasetPart, DatasetWriter};
use crate::error::{Error, Result};
use crate::language::Language;
use crate::manifest::{Manifest, SourceFiles};
use crate::request::{BuildRequest, Progress, SplitRequest, Steps};
use crate::rows;
use crate::rules::Counters;
use crate::split::Split;
use crate::staged::{Built, Warnings};
use crate::stopwatch::Stopwatch;
use crate::task::Task;

/// See [`crate::source::Source::split`].
pub(crate) fn make_split(request: &SplitRequest<'_>) -> Result<Split> {
    let rules = game_rules(request.character)?;
    let roots = Roots {
        tree: request.root,
        vendor: request.vendor,
    };
    split(roots, request.character, rules, request.options)
}

/// See [`crate::source::Source::check`].
pub(crate) fn check_split(request: &BuildRequest<'_>, split: &Split) -> Result<()> {
    let rules = game_rules(request.character)?;
    if request.tasks.contains(&Task::PtVendor) {
        return vendor::guard(request.root, rules, split);
    }
    let task = Task::PtVendor.name();
    let manifest = Manifest::load(request.out)?.unwrap_or_default();
    let pages = match manifest.datasets.get(task) {
        // A line of an exercise may hold line feeds, so its row does not say where it ends; a page's lines are a row's.
        Some(_) => {
            let file = format!("{task}/{}.jsonl", vendor::PAGES);
            rows::load(&request.out.join(file), None)?
        }
        None => Vec::new(),
    };
    guard(request.root, rules, split, &pages)
}

/// The character file's rules of the game.
fn game_rules(character: &Character) -> Result<&GameRules> {
    character.turn_based_game.as_ref().ok_or_else(|| Error::CharacterValue {
        path: character.origin.path.clone(),
        problem: "has no table [turn_based_game], which this source needs; characters/cyrene.toml shows one".to_owned(),
    })
}

/// See [`crate::source::Source::build`].
pub(crate) fn build(
    request: &BuildRequest<'_>,
    counters: Counters<'_>,
    progress: &(dyn Fn(Progress) + Sync),
    times: &Stopwatch,
) -> Result<Vec<Built>> {
    let rules = game_rules(request.character)?;
    let tasks: Vec<Task> = request
        .tasks
        .iter()
        .copied()
        .filter(|t| *t != Task::PtVendor)
        .collect();
    let has_vendor = tasks.len() < request.tasks.len();
    if has_vendor && !tasks.is_empty() {
        return Err(Error::TaskOfSource {
            task: Task::PtVendor.to_string(),
            origin: request.source.name(),
            reason:
                "its root is the vendor folder, that of the other tasks the tree; build it apart"
                    .to_owned(),
        });
    }
    if has_vendor {
        return build_vendor(request, rules, counters, progress, times);
    }
    let tables = times.tables(|| Tables::read(request.root, &tasks))?;
    let documents = GameDocuments::new(&tables, rules);
    let languages = request.languages();
    let steps = Steps::new(tasks.len() * languages.len(), progress);
    // A language at a time on every core: its map is read once for all tasks. The largest come first, so that no core is left with one.
    let mut order: Vec<usize> = (0..languages.len()).collect();
    order.sort_by_key(|idx| Reverse(TextMapFiles::bytes(request.root, languages[*idx])));
    let mut built = order
        .into_iter()
        .par_bridge()
        .map(|idx| {
            let language = languages[idx];
            let parts = build_language(
                request, &documents, &tasks, language, counters, &steps, times,
            )?;
            Ok((idx, parts))
        })
        .collect::<Result<Vec<_>>>()?;
    built.sort_by_key(|(idx, _)| *idx);
    let built: Vec<LanguageParts> = built.into_iter().map(|(_, parts)| parts).collect();

    let mut source = Sha256::new();
    for (name, hash) in &tables.hashes {
        source.update(name);
        source.update(hash);
    }
    for language in &built {
        source.update(language.map_sha256);
    }
    let source_sha256 = files::hex(&source.finalize());
    let mut source_files = table_files(&tables);
    for (language, parts) in languages.iter().zip(&built) {
        add_map(&mut source_files, *language, parts.map_sha256);
    }
    let mut by_task: Vec<Built> = tasks
        .iter()
        .map(|task| Built {
            task: *task,
            source_sha256: source_sha256.clone(),
            source_files: source_files.clone(),
            parts: Vec::new(),
            warnings: Warnings::default(),
        })
        .collect();
    for language in built {
        for (task, (part, unknown)) in by_task.iter_mut().zip(language.parts) {
            if language.map_is_missing {
                let text = format!("there is no text map of {}", part.file.key);
                task.warnings.add(text, 1);
            }
            task.parts.push(part);
            task.warnings.add_markup(unknown);
        }
    }
    Ok(by_task)
}

/// All tasks of one language.
struct LanguageParts {
    map_sha256: [u8; 32],
    map_is_missing: bool,
    parts: Vec<(DatasetPart, BTreeMap<String, usize>)>,
}

fn build_language(
    request: &BuildRequest<'_>,
    documents: &GameDocuments<'_>,
    tasks: &[Task],
    language: Language,
    counters: Counters<'_>,
    steps: &Steps<'_>,
    times: &Stopwatch,
) -> Result<LanguageParts> {
    let text_map = times.maps(|| TextMapFiles::read(request.root, language))?;
    let map = times.maps(|| text_map.parse())?;
    let parts = tasks
        .iter()
        .map(|task| {
            let relative = format!("{task}/{language}.jsonl");
            let mut out = DatasetWriter::create(
                request.out,
                relative,
                language.code(),
                Some(language),
                counters,
            )?;
            let texts = Texts::new(language, &map, documents.tables);
            let unknown = times.rows(|| documents.write(*task, texts, &mut out))?;
            let part = out.finish()?;
            steps.done(*task, Some(language));
            Ok((part, unknown))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(LanguageParts {
        map_sha256: times.maps(|| text_map.sha256()),
        map_is_missing: text_map.is_missing(),
        parts,
    })
}

fn build_vendor(
    request: &BuildRequest<'_>,
    rules: &GameRules,
    counters: Counters<'_>,
    progress: &(dyn Fn(Progress) + Sync),
    times: &Stopwatch,
) -> Result<Vec<Built>> {
    let task = Task::PtVendor;
    // The pages are in simplified Chinese.
    let nickname = rules.nickname.get_or_any(Language::Chs).unwrap_or_default();
    let steps = Steps::new(vendor::SETS.len(), progress);
    let mut parts = Vec::new();
    let mut source = Sha256::new();
    let mut source_files = SourceFiles::new();
    for set in vendor::SETS {
        let relative = format!("{task}/{set}.jsonl");
        let mut out = DatasetWriter::create(request.out, relative, set, None, counters)?;
        let sha256 = times.rows(|| vendor::write(set, request.root, nickname, &mut out))?;
        source.update(sha256);
        source_files.insert(vendor::source_file(set), files::hex(&sha256));
        parts.push(out.finish()?);
        steps.done(task, None);
    }
    Ok(vec![Built {
        task,
        source_sha256: files::hex(&source.finalize()),
        source_files,
        parts,
        warnings: Warnings::default(),
    }])
}
