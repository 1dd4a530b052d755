//! `cyrene corpus build`: a story to data sets.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use corpus::{
    BuildReport, BuildRequest, Character, Counters, Language, Progress, SourceKind, Split, Task,
};
use report::look::thousands;
use text::{Tokenizer, WordPattern};

use crate::cli::{CorpusBuild, CountWith};
use crate::ui::{Ui, misused};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &CorpusBuild, ui: &Ui) -> Result<()> {
    let (character, plan) = plan(args)?;
    let request = plan.request(&character);
    guard(&request)?;
    let report = build(
        &request,
        || Tokenizers::load(&args.tokenizer, args.count_with),
        ui,
    )?;
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

/// What counts: training's tokenizer, and with another pattern of words the one that the rules count with.
pub struct Tokenizers {
    /// Qwen3.5's own.
    pub training: Tokenizer,
    rules: Option<Tokenizer>,
}

impl Tokenizers {
    /// What the rules cut and drop by.
    pub fn rules(&self) -> &Tokenizer {
        self.rules.as_ref().unwrap_or(&self.training)
    }

    /// Loads Qwen3.5's tokenizer, with the older pattern of words for the rules where `count_with` says so.
    pub fn load(path: &Path, count_with: CountWith) -> Result<Tokenizers> {
        let training = Tokenizer::load(path)?;
        let rules = match count_with {
            CountWith::Qwen2 => Some(training.clone().with_pattern(WordPattern::Qwen2)),
            CountWith::Qwen3_5 => None,
        };
        Ok(Tokenizers { training, rules })
    }
}

/// The arguments as `corpus` takes them.
pub struct Plan<'a> {
    source: SourceKind,
    root: &'a Path,
    /// Which data sets.
    pub tasks: Vec<Task>,
    languages: Vec<Language>,
    out: &'a Path,
}

/// # Errors
/// A character file that cannot be read, an unknown task, language or source.
pub fn plan(args: &CorpusBuild) -> Result<(Character, Plan<'_>)> {
    let character = misused(Character::load(&args.character))?;
    let tasks = args.tasks.iter().map(|name| misused(Task::parse(name)));
    let tasks = tasks.collect::<Result<Vec<_>>>()?;
    let languages = misused(Language::parse_all(&args.languages))?;
    let plan = Plan {
        source: misused(SourceKind::parse(&args.source))?,
        root: &args.root,
        tasks,
        languages,
        out: &args.out,
    };
    Ok((character, plan))
}

impl Plan<'_> {
    /// What `corpus` is asked for.
    pub fn request<'r>(&'r self, character: &'r Character) -> BuildRequest<'r> {
        BuildRequest {
            source: self.source,
            root: self.root,
            character,
            tasks: &self.tasks,
            languages: (!self.languages.is_empty()).then_some(&self.languages[..]),
            out: self.out,
        }
    }
}

/// Builds with a progress bar, and says what looked wrong.
///
/// # Errors
/// What `load` or `corpus` report; a text that cannot be counted. Then no data set is left or changed.
pub fn build(
    request: &BuildRequest<'_>,
    load: impl FnOnce() -> Result<Tokenizers> + Send,
    ui: &Ui,
) -> Result<BuildReport> {
    let bar = Mutex::new(None);
    let progress = |progress: Progress| {
        let mut bar = lock(&bar);
        let bar = bar.get_or_insert_with(|| ui.bar("corpus", progress.total as u64));
        let name = progress.file.map_or(String::new(), |(task, language)| {
            format!("{task} {}", language.map_or("", |l| l.code()))
        });
        bar.set(progress.done as u64, &name);
    };
    let report = quietly(request, load, &progress);
    if let Some(bar) = lock(&bar).take() {
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

/// Builds; the tokenizers are loaded while the source is read.
///
/// # Errors
/// As [`build`].
pub fn quietly(
    request: &BuildRequest<'_>,
    load: impl FnOnce() -> Result<Tokenizers> + Send,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<BuildReport> {
    let tokenizers = Awaited(OnceLock::new());
    // Counting cannot fail on valid UTF-8; should it, the first failure is kept and reported before anything gets its name.
    let failure = Mutex::new(None);
    let counted = |counted: std::result::Result<usize, text::Error>| {
        counted.unwrap_or_else(|error| {
            lock(&failure).get_or_insert(error);
            0
        })
    };
    let rules = |text: &str| match tokenizers.0.wait() {
        Some(t) => counted(t.rules().count(text)),
        None => 0,
    };
    let training = |text: &str| match tokenizers.0.wait() {
        Some(t) => counted(t.training.count(text)),
        None => 0,
    };
    let counters = Counters {
        rules: &rules,
        training: &training,
    };
    let staged = std::thread::scope(|scope| {
        let loading = scope.spawn(|| tokenizers.load(load));
        let staged = corpus::stage(request, counters, progress);
        match loading.join() {
            Ok(loaded) => loaded?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        anyhow::Ok(staged?)
    })?;
    if let Some(error) = lock(&failure).take() {
        return Err(error).context("counting tokens");
    }
    Ok(staged.publish()?)
}

/// Tokenizers on their way; `None` once it is known not to come.
struct Awaited(OnceLock<Option<Tokenizers>>);

impl Awaited {
    fn load(&self, load: impl FnOnce() -> Result<Tokenizers>) -> Result<()> {
        /// Nobody may wait for ever, even if loading panics.
        struct Give<'a>(&'a OnceLock<Option<Tokenizers>>, Option<Tokenizers>);
        impl Drop for Give<'_> {
            fn drop(&mut self) {
                self.0.get_or_init(|| self.1.take());
            }
        }
        let mut give = Give(&self.0, None);
        give.1 = Some(load()?);
        Ok(())
    }
}

/// The value of a mutex, even after a panic elsewhere.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
