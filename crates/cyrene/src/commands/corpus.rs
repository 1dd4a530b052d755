//! `cyrene corpus build | split | encode`.

use anyhow::{Context, Result};
use corpus::{
    BuildReport, BuildRequest, Character, Language, SourceKind, SplitOptions, SplitRequest, Task,
};
use text::labels::LossScale;
use text::{Tokenizer, WordPattern};

use crate::cli::{self, Corpus, CorpusBuild, CorpusEncode, CorpusSplit, CountWith, TrainStage};
use crate::dataset::{self, Encoding};
use crate::misuse;
use crate::recipe::StageKind;
use crate::ui::{Misuse, Ui};

pub fn run(command: Corpus, ui: &Ui) -> Result<()> {
    match command {
        Corpus::Build(args) => run_build(&args, ui),
        Corpus::Split(args) => run_split(&args, ui),
        Corpus::Encode(args) => run_encode(&args, ui),
    }
}

fn run_build(args: &CorpusBuild, ui: &Ui) -> Result<()> {
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

fn run_split(args: &CorpusSplit, ui: &Ui) -> Result<()> {
    let character = Character::load(&args.character)?;
    let request = SplitRequest {
        source: as_misuse(SourceKind::parse(&args.source))?,
        root: &args.root,
        character: &character,
        options: SplitOptions {
            seed: args.seed,
            share: args.share,
            share_rest: args.share_rest,
        },
    };
    let split = corpus::make_split(&request)?;
    split.save(&args.out, args.force)?;
    ui.result(
        &serde_json::json!({ "out": args.out, "held_out": split.held_out.len(), "train": split.train.len(), "contaminated": split.contaminated.len() }),
        || format!("{} scenes held out, {} to train on, {} set aside as contaminated: {}", split.held_out.len(), split.train.len(), split.contaminated.len(), args.out.display()),
    )
}

fn run_encode(args: &CorpusEncode, ui: &Ui) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let encoding = Encoding {
        stage: match args.stage {
            TrainStage::Cpt => StageKind::Cpt,
            TrainStage::Sft => StageKind::Sft,
        },
        loss_scale: match args.loss_scale {
            cli::LossScale::IgnoreEmptyThink => LossScale::IgnoreEmptyThink,
            cli::LossScale::Default => LossScale::Default,
            cli::LossScale::LastRound => LossScale::LastRound,
        },
        tokenizer: Some(&tokenizer),
    };
    if !args.file.is_file() {
        misuse!("{} is no file; expected JSON lines", args.file.display());
    }
    for row in dataset::read(&args.file, encoding)? {
        ui.line(&serde_json::json!({ "input_ids": row.encoded.input_ids, "labels": row.encoded.labels }).to_string())?;
    }
    Ok(())
}

fn known_languages() -> String {
    Language::ALL.map(Language::code).join(", ")
}

fn as_misuse<T>(result: corpus::Result<T>) -> Result<T> {
    result.map_err(|error| anyhow::Error::new(Misuse(error.to_string())))
}
