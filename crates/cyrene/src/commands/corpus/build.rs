//! `cyrene corpus build`: a story to data sets.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use corpus::{BuildReport, BuildRequest, Progress, Split, Tokenizers};
use report::look::thousands;

use crate::cli::CorpusBuild;
use crate::corpus_request;
use crate::ui::Ui;

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &CorpusBuild, ui: &Ui) -> Result<()> {
    let (character, plan) = corpus_request::plan(args)?;
    let request = plan.request(&character);
    guard(&request)?;
    let report = build(&request, || corpus_request::tokenizers(args), ui)?;
    let rows: u64 = report
        .datasets
        .values()
        .map(corpus::manifest::Dataset::n_rows)
        .sum();
    ui.result(
        &serde_json::json!({
            "out": args.out,
            "rows": rows,
            "tokens": report.n_tokens(),
            "training": report.training(),
            "datasets": report.datasets.iter().map(|(task, dataset)| serde_json::json!({
                "task": task.name(), "rows": dataset.n_rows(), "tokens": dataset.n_tokens(), "training": dataset.training(), "warnings": dataset.warnings,
                "files": dataset.files.iter().map(|file| serde_json::json!({ "path": file.path, "rows": file.n_rows, "tokens": file.n_tokens, "training": file.training, "holes": file.holes, "filtered": file.filtered })).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
        }),
        || {
            let conversations = report.training().map_or(String::new(), |training| {
                format!(
                    "conversations as training reads them, with system prompt and template: {} tokens, {} of them trained on\n",
                    thousands(training.tokens),
                    thousands(training.trained)
                )
            });
            format!("{conversations}Estimated number of tokens: {}", report.n_tokens())
        },
    )
}

/// Refuses to build beside a split that is of another story or has a text on two sides.
fn guard(request: &BuildRequest<'_>) -> Result<()> {
    let path = request.out.join("split.json");
    if !path.exists() {
        return Ok(());
    }
    let split = Split::load(&path)?;
    corpus::check_split(request, &split).with_context(|| format!("checking {}", path.display()))
}

/// Builds with a progress bar, and says what looked wrong.
///
/// # Errors
/// What `load` or `corpus` report; a text that cannot be counted. Then no data set is left or changed.
pub fn build(
    request: &BuildRequest<'_>,
    load: impl FnOnce() -> text::Result<Tokenizers> + Send,
    ui: &Ui,
) -> Result<BuildReport> {
    let bar = Mutex::new(None);
    let progress = |progress: Progress| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bar.get_or_insert_with(|| ui.bar("corpus", progress.total as u64));
        let name = progress.file.map_or(String::new(), |(task, language)| {
            format!("{task} {}", language.map_or("", |l| l.code()))
        });
        bar.set(progress.done as u64, &name);
    };
    let report = corpus::build_counting(request, load, &progress);
    if let Some(bar) = bar.into_inner().unwrap_or_else(PoisonError::into_inner) {
        bar.finish();
    }
    let report = report?;
    let mut said = std::collections::BTreeSet::new();
    for warning in report
        .datasets
        .values()
        .flat_map(|dataset| &dataset.warnings)
    {
        if said.insert(&warning.text) {
            ui.note(format_args!(
                "warning: {} ({} times)",
                warning.text, warning.count
            ));
        }
    }
    Ok(report)
}
