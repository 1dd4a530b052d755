//! Builds the data sets of a plain story.

use rayon::prelude::*;

use super::{StoryDocuments, guard, read, source_files, split};
use crate::dataset::DatasetWriter;
use crate::error::Result;
use crate::language::Language;
use crate::request::{BuildRequest, Progress, SplitRequest, Steps};
use crate::rules::Counters;
use crate::split::Split;
use crate::staged::{Built, Warnings};
use crate::stopwatch::Stopwatch;
use crate::task::Task;

/// See [`crate::source::Source::split`].
pub(crate) fn make_split(request: &SplitRequest<'_>) -> Result<Split> {
    split(&read(request.root)?, request.character, request.options)
}

/// See [`crate::source::Source::check`].
pub(crate) fn check_split(request: &BuildRequest<'_>, split: &Split) -> Result<()> {
    guard(&read(request.root)?, request.root, request.character, split)
}

/// See [`crate::source::Source::build`].
pub(crate) fn build(
    request: &BuildRequest<'_>,
    counters: Counters<'_>,
    progress: &(dyn Fn(Progress) + Sync),
    times: &Stopwatch,
) -> Result<Vec<Built>> {
    let story = times.tables(|| read(request.root))?;
    let documents = StoryDocuments::new(&story, request.character);
    for task in request.tasks {
        documents.check(*task)?;
    }
    let languages = request.languages();
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
                counters,
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
                source_files: source_files(&story),
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
