//! Builds data sets: reads the source once, writes every task in every language, then names the files.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::character::{Character, GameRules};
use crate::dataset::{DatasetPart, DatasetWriter};
use crate::error::{Error, Result};
use crate::language::Language;
use crate::manifest::{Manifest, SourceFiles};
use crate::output;
use crate::rows;
use crate::rules::Counter;
use crate::source::SourceKind;
use crate::source::story::{self, StoryDocuments};
use crate::source::turn_based_game::{self as game, GameDocuments, Tables, vendor};
use crate::split::{Split, SplitOptions};
use crate::staged::{BuildReport, Built, Staged, Warnings};
use crate::stopwatch::Stopwatch;
use crate::task::Task;

/// What to build from what.
#[derive(Debug, Clone, Copy)]
pub struct BuildRequest<'a> {
    pub source: SourceKind,
    /// The story's file or folder; the game's tree; for `pt/vendor` the vendor folder.
    pub root: &'a Path,
    pub character: &'a Character,
    /// What is named twice is built once.
    pub tasks: &'a [Task],
    /// Languages to build; `None`: those of the character file.
    pub languages: Option<&'a [Language]>,
    /// Output folder; data sets of other tasks in it stay.
    pub out: &'a Path,
}

/// How far a build is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The file just finished; `None` at the beginning.
    pub file: Option<(Task, Option<Language>)>,
    pub done: usize,
    pub total: usize,
}

/// Builds data sets; files get their names only when all of them are complete.
///
/// # Errors
/// Whatever is wrong with the source or the character file, or a file that cannot be written.
pub fn build(
    request: &BuildRequest<'_>,
    count: Counter<'_>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<BuildReport> {
    stage(request, count, progress)?.publish()
}

/// Builds data sets up to the point where their files need only their names.
///
/// # Errors
/// As [`build`].
pub fn stage<'a>(
    request: &BuildRequest<'a>,
    count: Counter<'_>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Staged<'a>> {
    let manifest = Manifest::load(request.out)?.unwrap_or_default();
    output::remove_leftovers(request.out);
    let times = Stopwatch::default();
    // Two writers of one file would tear it.
    let mut seen = BTreeSet::new();
    let tasks = request.tasks.iter().copied().filter(|t| seen.insert(*t));
    let once = BuildRequest {
        tasks: &tasks.collect::<Vec<_>>(),
        ..*request
    };
    let built = match request.source {
        SourceKind::Story => build_story(&once, count, progress, &times)?,
        SourceKind::TurnBasedGame => build_game(&once, count, progress, &times)?,
    };
    Ok(Staged {
        request: *request,
        manifest,
        built,
        times: times.total(),
    })
}

/// Which story to split for which character.
#[derive(Debug, Clone, Copy)]
pub struct SplitRequest<'a> {
    pub source: SourceKind,
    pub root: &'a Path,
    /// The vendor folder of a game's tree, whose pages are split with it.
    pub vendor: Option<&'a Path>,
    pub character: &'a Character,
    pub options: SplitOptions,
}

/// Splits a story; the same request gives the same split.
///
/// # Errors
/// Whatever is wrong with the source.
pub fn make_split(request: &SplitRequest<'_>) -> Result<Split> {
    match request.source {
        SourceKind::Story => {
            let story = story::read(request.root)?;
            story::split(&story, request.character, request.options)
        }
        SourceKind::TurnBasedGame => {
            let rules = game_rules(request.character)?;
            game::split(roots(request), request.character, rules, request.options)
        }
    }
}

/// Holds a split made earlier against what is about to be built beside it: it was made from this story, knows every scene, and has no
/// text of twelve characters or more on both sides. The pages of the vendor folder are built apart from their story: alone they are held
/// against each other, and the story against those that lie in the output folder already.
///
/// # Errors
/// The text and the two scenes that hold it, the scene that is unknown, the file that has changed, or whatever is wrong with the source.
pub fn check_split(request: &BuildRequest<'_>, split: &Split) -> Result<()> {
    match request.source {
        SourceKind::Story => {
            let story = story::read(request.root)?;
            story::guard(&story, request.root, request.character, split)
        }
        SourceKind::TurnBasedGame => {
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
            game::guard(request.root, rules, split, &pages)
        }
    }
}

fn roots<'a>(request: &SplitRequest<'a>) -> game::Roots<'a> {
    game::Roots {
        tree: request.root,
        vendor: request.vendor,
    }
}

/// The character file's rules of the game.
fn game_rules(character: &Character) -> Result<&GameRules> {
    character.turn_based_game.as_ref().ok_or_else(|| Error::CharacterValue {
        path: character.origin.path.clone(),
        problem: "has no table [turn_based_game], which this source needs; characters/cyrene.toml shows one".to_owned(),
    })
}

fn build_story(
    request: &BuildRequest<'_>,
    count: Counter<'_>,
    progress: &(dyn Fn(Progress) + Sync),
    times: &Stopwatch,
) -> Result<Vec<Built>> {
    let story = times.tables(|| story::read(request.root))?;
    let documents = StoryDocuments::new(&story, request.character);
    for task in request.tasks {
        documents.check(*task)?;
    }
    let languages = languages(request);
    let jobs: Vec<(Task, Language)> = request
        .tasks
        .iter()
        .flat_map(|task| languages.iter().map(|language| (*task, *language)))
        .collect();
    let steps = Steps::new(jobs.len(), progress);
    let parts = jobs
        .par_iter()
        .map(|(task, language)| {
            let relative = format!("{task}/{language}.jsonl");
            let mut writer = DatasetWriter::create(
                request.out,
                relative,
                language.code(),
                Some(*language),
                count,
            )?;
            let unknown = times.rows(|| documents.write(*task, *language, &mut writer))?;
            let part = writer.finish()?;
            steps.done(*task, Some(*language));
            Ok((*task, part, unknown))
        })
        .collect::<Result<Vec<_>>>()?;

    let mut built: Vec<Built> = Vec::new();
    for (task, part, unknown) in parts {
        if built.last().is_none_or(|b| b.task != task) {
            let mut warnings = Warnings::default();
            for (key, n) in &story.unknown_keys {
                warnings.add(format!("unknown key `{key}`"), *n);
            }
            built.push(Built {
                task,
                source_sha256: story.sha256.clone(),
                source_files: story::source_files(&story),
                parts: Vec::new(),
                warnings,
            });
        }
        if let Some(last) = built.last_mut() {
            last.parts.push(part);
            last.warnings.add_markup(unknown);
        }
    }
    Ok(built)
}

fn build_game(
    request: &BuildRequest<'_>,
    count: Counter<'_>,
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
        return build_vendor(request, rules, count, progress, times);
    }
    let tables = times.tables(|| Tables::read(request.root, &tasks))?;
    let documents = GameDocuments::new(&tables, rules);
    let languages = languages(request);
    let steps = Steps::new(tasks.len() * languages.len(), progress);
    // A language at a time on every core: its map is read once for all tasks. The largest come first, so that no core is left with one.
    let mut order: Vec<usize> = (0..languages.len()).collect();
    order.sort_by_key(|idx| Reverse(game::TextMapFiles::bytes(request.root, languages[*idx])));
    let mut built = order
        .into_iter()
        .par_bridge()
        .map(|idx| {
            let language = languages[idx];
            let parts =
                build_language(request, &documents, &tasks, language, count, &steps, times)?;
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
    let mut source_files = game::table_files(&tables);
    for (language, parts) in languages.iter().zip(&built) {
        game::add_map(&mut source_files, *language, parts.map_sha256);
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
    count: Counter<'_>,
    steps: &Steps<'_>,
    times: &Stopwatch,
) -> Result<LanguageParts> {
    let files = times.maps(|| game::TextMapFiles::read(request.root, language))?;
    let map = times.maps(|| files.parse())?;
    let parts = tasks
        .iter()
        .map(|task| {
            let relative = format!("{task}/{language}.jsonl");
            let mut out = DatasetWriter::create(
                request.out,
                relative,
                language.code(),
                Some(language),
                count,
            )?;
            let texts = game::Texts::new(language, &map, documents.tables);
            let unknown = times.rows(|| documents.write(*task, texts, &mut out))?;
            let part = out.finish()?;
            steps.done(*task, Some(language));
            Ok((part, unknown))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(LanguageParts {
        map_sha256: times.maps(|| files.sha256()),
        map_is_missing: files.is_missing(),
        parts,
    })
}

fn build_vendor(
    request: &BuildRequest<'_>,
    rules: &GameRules,
    count: Counter<'_>,
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
        let mut out = DatasetWriter::create(request.out, relative, set, None, count)?;
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

fn languages(request: &BuildRequest<'_>) -> Vec<Language> {
    match request.languages {
        None => request.character.languages(),
        Some(asked) => Language::ALL
            .into_iter()
            .filter(|l| asked.contains(l))
            .collect(),
    }
}

/// Counts finished files for the progress callback.
struct Steps<'a> {
    done: AtomicUsize,
    total: usize,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Steps<'a> {
    fn new(total: usize, progress: &'a (dyn Fn(Progress) + Sync)) -> Steps<'a> {
        progress(Progress {
            file: None,
            done: 0,
            total,
        });
        Steps {
            done: AtomicUsize::new(0),
            total,
            progress,
        }
    }

    fn done(&self, task: Task, language: Option<Language>) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        (self.progress)(Progress {
            file: Some((task, language)),
            done,
            total: self.total,
        });
    }
}
