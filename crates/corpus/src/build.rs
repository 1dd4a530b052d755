//! Builds data sets: reads the source once, writes every task in every language, then names the files.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::manifest::Manifest;
use crate::output;
use crate::request::{BuildRequest, Progress, SplitRequest};
use crate::rules::Counters;
use crate::split::Split;
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
