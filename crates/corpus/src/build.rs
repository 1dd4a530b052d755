//! Builds data sets: reads the source once, writes every task in every language, then names the files.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::manifest::Manifest;
use crate::output;
use crate::request::{BuildRequest, Progress, SplitRequest};
use crate::rows;
use crate::rules::Counters;
use crate::split::{Side, Split};
use crate::staged::{BuildReport, Staged};
use crate::stopwatch::Stopwatch;

/// Builds data sets; files get their names only when all of them are complete.
///
/// # Errors
/// Whatever is wrong with the source or the character file, or a file that cannot be written.
pub fn build(
    request: &BuildRequest<'_>,
    counters: Counters<'_>,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<BuildReport> {
    stage(request, counters, progress)?.publish()
}

/// Builds data sets up to the point where their files need only their names.
///
/// # Errors
/// As [`build`].
pub fn stage<'a>(
    request: &BuildRequest<'a>,
    counters: Counters<'_>,
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
    let built = (request.source.source().build)(&once, counters, progress, &times)?;
    Ok(Staged {
        request: *request,
        manifest,
        built,
        times: times.total(),
    })
}

/// The texts of a story without those of held-out scenes, for a tokenizer: one that had seen them would know their words. What is built on
/// the way lies in the request's output folder, and is removed.
///
/// # Errors
/// Whatever is wrong with the source or the split, or a folder that cannot be written.
pub fn training_texts(request: &BuildRequest<'_>, split: &Split) -> Result<Vec<String>> {
    // Counts only decide where long documents are cut, and here nobody looks at the cuts.
    build(
        request,
        Counters::of_rules(&|text| text.chars().count()),
        &|_| {},
    )?;
    let mut texts = Vec::new();
    for task in request.tasks {
        let rows = rows::load(&request.out.join(task.name()), Some(split))?;
        let train = rows.into_iter().filter(|row| row.side == Side::Train);
        texts.extend(
            train
                .flat_map(|row| row.messages)
                .map(|message| message.content),
        );
    }
    let removed = std::fs::remove_dir_all(request.out);
    removed.map_err(|source| Error::Write {
        path: request.out.to_owned(),
        source,
    })?;
    Ok(texts)
}

/// Splits a story; the same request gives the same split.
///
/// # Errors
/// Whatever is wrong with the source.
pub fn make_split(request: &SplitRequest<'_>) -> Result<Split> {
    (request.source.source().split)(request)
}

/// Holds a split made earlier against what is about to be built beside it: it was made from this story, knows every scene, and has no
/// text of twelve characters or more on both sides. The pages of the vendor folder are built apart from their story: alone they are held
/// against each other, and the story against those that lie in the output folder already.
///
/// # Errors
/// The text and the two scenes that hold it, the scene that is unknown, the file that has changed, or whatever is wrong with the source.
pub fn check_split(request: &BuildRequest<'_>, split: &Split) -> Result<()> {
    (request.source.source().check)(request, split)
}
