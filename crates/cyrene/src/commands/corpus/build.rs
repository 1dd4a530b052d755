//! `cyrene corpus build`: a story to data sets.

use anyhow::{Context, Result};
use corpus::{
    BuildReport, BuildRequest, Character, Language, SourceKind, Split, SplitRequest, Task,
};
use text::{Tokenizer, WordPattern};

use super::as_misuse;
use crate::cli::{CorpusBuild, CountWith};
use crate::misuse;
use crate::ui::Ui;

pub fn run(args: &CorpusBuild, ui: &Ui) -> Result<()> {
    let pattern = match args.count_with {
        CountWith::Qwen2 => WordPattern::Qwen2,
        CountWith::Qwen3_5 => WordPattern::Qwen3_5,
    };
    let tokenizer = Tokenizer::load(&args.tokenizer)?.with_pattern(pattern)?;
    let character = Character::load(&args.character)?;
    let tasks = args
        .tasks
        .iter()
        .map(|name| as_misuse(Task::parse(name)))
        .collect::<Result<Vec<_>>>()?;
    let mut languages = Vec::new();
    for code in &args.languages {
        match Language::from_code(code) {
            Some(language) => languages.push(language),
            None => misuse!("unknown language `{code}`; known are {}", known_languages()),
        }
    }
    let request = BuildRequest {
        source: as_misuse(SourceKind::parse(&args.source))?,
        root: &args.root,
        character: &character,
        tasks: &tasks,
        languages: (!languages.is_empty()).then_some(&languages[..]),
        out: &args.out,
    };
    guard(&request)?;
    let report = build(&request, &tokenizer, ui)?;
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
            "datasets": report.datasets.iter().map(|(task, dataset)| serde_json::json!({
                "task": task.name(), "rows": dataset.n_rows(), "tokens": dataset.n_tokens(), "warnings": dataset.warnings,
                "files": dataset.files.iter().map(|file| serde_json::json!({ "path": file.path, "rows": file.n_rows, "tokens": file.n_tokens, "holes": file.holes, "filtered": file.filtered })).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
        }),
        || format!("Estimated number of tokens: {}", report.n_tokens()),
    )
}

/// Refuses to build beside a split that has a text on two sides.
fn guard(request: &BuildRequest<'_>) -> Result<()> {
    let path = request.out.join("split.json");
    // The vendor folder is no story; `corpus split --vendor` guards its pages with the tree's texts.
    if !path.exists() || request.tasks == [Task::PtVendor] {
        return Ok(());
    }
    let split = Split::load(&path)?;
    let story = SplitRequest {
        source: request.source,
        root: request.root,
        vendor: None,
        character: request.character,
        options: split.options,
    };
    corpus::check_split(&story, &split).with_context(|| format!("checking {}", path.display()))
}

/// Builds with a progress bar, and says what looked wrong.
///
/// # Errors
/// What `corpus` reports; a text that cannot be counted.
pub fn build(request: &BuildRequest<'_>, tokenizer: &Tokenizer, ui: &Ui) -> Result<BuildReport> {
    let bar = std::sync::Mutex::new(None);
    // Counting cannot fail on valid UTF-8; should it, the first failure is kept and reported after the build.
    let failure = std::sync::Mutex::new(None);
    let count = |text: &str| {
        tokenizer.count(text).unwrap_or_else(|error| {
            failure
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .get_or_insert(error);
            0
        })
    };
    let report = corpus::build(request, &count, &|progress| {
        let mut bar = bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let bar = bar.get_or_insert_with(|| ui.bar("corpus", progress.total as u64));
        let name = progress.file.map_or(String::new(), |(task, language)| {
            format!("{task} {}", language.map_or("", |l| l.code()))
        });
        bar.set(progress.done as u64, &name);
    });
    if let Some(bar) = bar
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
    {
        bar.finish();
    }
    let report = report?;
    if let Some(error) = failure
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
    {
        return Err(error).context("counting tokens");
    }
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

fn known_languages() -> String {
    Language::ALL.map(Language::code).join(", ")
}
