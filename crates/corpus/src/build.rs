//! Builds data sets: reads the source once, writes every task in every language, then names the files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::character::Character;
use crate::dataset::{DatasetPart, DatasetWriter};
use crate::error::{Error, Result};
use crate::language::Language;
use crate::manifest::{self, Dataset, Manifest, RowScenes, Warning};
use crate::output::{self, Pending};
use crate::rules::Counter;
use crate::source::SourceKind;
use crate::source::story;
use crate::source::story_documents::StoryDocuments;
use crate::source::story_units;
use crate::split::{Split, SplitOptions};
use crate::task::Task;

/// What to build from what.
#[derive(Debug, Clone, Copy)]
pub struct BuildRequest<'a> {
    pub source: SourceKind,
    /// The story's file or folder; the game's tree; for `pt/vendor` the vendor folder.
    pub root: &'a Path,
    pub character: &'a Character,
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

/// What was built.
#[derive(Debug, Clone)]
pub struct BuildReport {
    pub datasets: BTreeMap<Task, Dataset>,
}

impl BuildReport {
    /// Tokens over all data sets, records and languages.
    pub fn n_tokens(&self) -> u64 {
        self.datasets.values().map(Dataset::n_tokens).sum()
    }
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
    let mut manifest = Manifest::load(request.out)?.unwrap_or_default();
    let built = match request.source {
        SourceKind::Story => build_story(request, count, progress)?,
        SourceKind::TurnBasedGame => return Err(no_game_yet(request.tasks.first())),
    };
    publish(request, &mut manifest, built)
}

/// Which story to split for which character.
#[derive(Debug, Clone, Copy)]
pub struct SplitRequest<'a> {
    pub source: SourceKind,
    pub root: &'a Path,
    pub character: &'a Character,
    pub options: SplitOptions,
}

/// Splits a story; the same request gives the same split.
///
/// # Errors
/// Whatever is wrong with the source.
pub fn make_split(request: &SplitRequest<'_>) -> Result<Split> {
    if request.source == SourceKind::TurnBasedGame {
        return Err(no_game_yet(None));
    }
    let story = story::read(request.root)?;
    let split = story_units::split(&story, request.character, request.options);
    story_units::guard(&story, &split)?;
    Ok(split)
}

/// The guard of a split made earlier: no text of twelve characters or more stands on both sides.
///
/// # Errors
/// The text and the two scenes that hold it, or whatever is wrong with the source.
pub fn check_split(source: SourceKind, root: &Path, split: &Split) -> Result<()> {
    if source == SourceKind::TurnBasedGame {
        return Err(no_game_yet(None));
    }
    story_units::guard(&story::read(root)?, split)
}

fn no_game_yet(task: Option<&Task>) -> Error {
    Error::TaskOfSource {
        task: task.map_or_else(|| "split".to_owned(), Task::to_string),
        origin: SourceKind::TurnBasedGame.name(),
        reason: "this version reads the source story only".to_owned(),
    }
}

/// A data set whose files are complete but not yet named.
struct Built {
    task: Task,
    source_sha256: String,
    parts: Vec<DatasetPart>,
    warnings: Vec<Warning>,
}

fn build_story(
    request: &BuildRequest<'_>,
    count: Counter<'_>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Vec<Built>> {
    let story = story::read(request.root)?;
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
            let unknown = documents.write(*task, *language, &mut writer)?;
            let part = writer.finish()?;
            steps.done(*task, Some(*language));
            Ok((*task, part, unknown))
        })
        .collect::<Result<Vec<_>>>()?;

    let mut built: Vec<Built> = Vec::new();
    for (task, part, unknown) in parts {
        if built.last().is_none_or(|b| b.task != task) {
            let keys = story.unknown_keys.iter();
            built.push(Built {
                task,
                source_sha256: story.sha256.clone(),
                parts: Vec::new(),
                warnings: keys
                    .map(|(key, n)| warning(format!("unknown key `{key}`"), *n))
                    .collect(),
            });
        }
        if let Some(last) = built.last_mut() {
            last.parts.push(part);
            merge_markup(&mut last.warnings, unknown);
        }
    }
    Ok(built)
}

fn merge_markup(warnings: &mut Vec<Warning>, unknown: BTreeMap<String, usize>) {
    for (tag, n) in unknown {
        let text = format!("unknown markup {tag}");
        match warnings.iter_mut().find(|w| w.text == text) {
            Some(known) => known.count += n as u64,
            None => warnings.push(warning(text, n)),
        }
    }
}

fn warning(text: String, count: usize) -> Warning {
    Warning {
        text,
        count: count as u64,
    }
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

/// Writes the token counts, then gives all files their names; the manifest comes last.
fn publish(
    request: &BuildRequest<'_>,
    manifest: &mut Manifest,
    built: Vec<Built>,
) -> Result<BuildReport> {
    let mut pending: Vec<Pending> = Vec::new();
    let mut datasets = BTreeMap::new();
    for Built {
        task,
        source_sha256,
        parts,
        warnings,
    } in built
    {
        let tokens_file = format!("{task}.json");
        let mut counts = Pending::create(request.out.join(&tokens_file))?;
        counts.write(&output::tokens_json(
            parts.iter().map(|p| (p.file.key.as_str(), &p.tokens[..])),
        ))?;
        let tokens_sha256 = counts.finish()?.sha256;
        pending.push(counts);
        let mut dataset = Dataset {
            source: request.source.name().to_owned(),
            source_sha256,
            character: request.character.origin.id.clone(),
            character_sha256: request.character.origin.sha256.clone(),
            tokens_file,
            tokens_sha256,
            scenes: Vec::new(),
            files: Vec::new(),
            warnings,
        };
        let mut scene_idx = BTreeMap::new();
        for mut part in parts {
            let places: Vec<u32> = part
                .scenes
                .into_iter()
                .map(|scene| {
                    *scene_idx.entry(scene).or_insert_with_key(|scene| {
                        dataset.scenes.push(scene.clone());
                        dataset.scenes.len() as u32 - 1
                    })
                })
                .collect();
            for row in &mut part.file.rows {
                match row {
                    RowScenes::One(idx) => *idx = places[*idx as usize],
                    RowScenes::Several(parts) => {
                        for (idx, _) in parts {
                            *idx = places[*idx as usize];
                        }
                    }
                }
            }
            dataset.files.push(part.file);
            pending.push(part.pending);
        }
        manifest.datasets.insert(task.to_string(), dataset.clone());
        datasets.insert(task, dataset);
    }
    for file in pending {
        file.publish()?;
    }
    output::write_file(&request.out.join(manifest::FILE_NAME), &manifest.to_json())?;
    Ok(BuildReport { datasets })
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
