//! What a recipe names, opened: the base model's folder, its tokenizer, the rows by side, and the job that training makes of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use corpus::examples::{Encoding, SourceExample};
use corpus::{MixedExamples, Split};
use model::Config;
use text::{Example, Tokenizer};
use train::job::ResultKind;
use train::{DataConfig, Job, ValidationSet};

use crate::recipe::Recipe;
use crate::ui::{Misuse, misused, of_rows};
use crate::{load, misuse};

/// What a training reads.
pub struct Inputs {
    /// Folder of the base model.
    pub base: PathBuf,
    /// Its shape.
    pub config: Config,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The split that the recipe names.
    pub split: Option<Split>,
    /// The rows in its ids.
    pub examples: MixedExamples,
}

impl Inputs {
    /// Reads what `recipe`, whose paths are relative to `folder`, trains the model in `base` on.
    ///
    /// # Errors
    /// [`Misuse`] for rows that cannot be used, with file and line, and where none is left to train on; a base or a split that cannot be read.
    pub fn open(recipe: &Recipe, folder: &Path, base: PathBuf) -> Result<Inputs> {
        let tokenizer = load::tokenizer(&base)?.map(Arc::new);
        let mixture = recipe.mixture(folder);
        let split = misused(mixture.load_split())?;
        let config = Config::load(&base)?;
        let encoding = Encoding {
            stage: recipe.stage,
            loss_scale: recipe.data.loss_scale,
            tokenizer: tokenizer.as_deref(),
            vocab_size: Some(config.vocab_size),
            row_tokens: Some(recipe.data.row_tokens),
        };
        let examples = of_rows(mixture.examples(split.as_ref(), encoding))?;
        Ok(Inputs {
            base,
            config,
            tokenizer,
            split,
            examples,
        })
    }
}

/// What a recipe and its rows say of a job: nowhere to write to yet, nobody who stops it.
pub fn job(recipe: &Recipe, examples: MixedExamples, tokenizer: Option<Arc<Tokenizer>>) -> Job {
    let encoded = |examples: Vec<SourceExample>| -> Vec<Example> {
        examples.into_iter().map(|one| one.encoded).collect()
    };
    let validation = examples.held_out.into_iter();
    let validation = validation.map(|(side, examples)| ValidationSet {
        name: side.name().to_owned(),
        examples: encoded(examples),
    });
    let sources = recipe.data.sources.iter();
    Job {
        seed: recipe.seed,
        data: DataConfig {
            row_tokens: recipe.data.row_tokens,
            packing: recipe.data.packing,
        },
        tuner: recipe.tuner.clone(),
        optimizer: recipe.optimizer.clone(),
        batch: recipe.batch.clone(),
        run: recipe.run.clone(),
        train: encoded(examples.train),
        source_weights: sources.map(|source| source.weight).collect(),
        validation: validation.collect(),
        tokenizer,
        out_dir: PathBuf::new(),
        base_name: recipe.base.clone(),
        base_sha256: None,
        origin: serde_json::Value::Null,
        rows_at_once: None,
        force: false,
        stop: Arc::default(),
    }
}

/// Whether a recipe's values can be, before its rows are read.
///
/// # Errors
/// [`Misuse`] with the key, and what is expected.
pub fn check(recipe: &Recipe) -> Result<()> {
    let share = recipe.data.validation_share;
    if !(0.0..=1.0).contains(&share) {
        misuse!("`data.validation_share` is {share}, but must be from 0 to 1");
    }
    let mut job = job(recipe, MixedExamples::default(), None);
    // That something is held out shows later.
    job.run.result = ResultKind::Last;
    job.check()
        .map_err(|error| anyhow::Error::new(Misuse(error.to_string())))
}

/// SHA-256 of what decides a model: its weights and its shapes.
///
/// # Errors
/// A file that cannot be read.
pub fn sha256_of_model(folder: &Path) -> files::Result<String> {
    files::sha256_of_files(folder, |name| {
        name == "config.json" || name.ends_with(".safetensors")
    })
}

/// Whether a base that is no folder can be a Hub id: what begins with a folder that is there names a place on the disk, not a repository.
pub fn may_be_of_the_hub(base: &str, folder: &Path) -> bool {
    let first = Path::new(base).components().next();
    let in_a_folder = first.is_some_and(|first| folder.join(first).is_dir());
    hub::is_hub_id(base) && !in_a_folder
}

/// The folder of a recipe's base: a path relative to the recipe, or a Hub id that was fetched.
///
/// # Errors
/// [`Misuse`] if it is neither.
pub fn base_folder(base: &str, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(base);
    if path.is_dir() {
        return Ok(path);
    }
    if !may_be_of_the_hub(base, folder) {
        misuse!(
            "base `{base}` is no folder ({} does not exist); give a model's folder, relative to the recipe, or a Hub id such as Qwen/Qwen3.5-4B-Base",
            path.display()
        );
    }
    let fetched = hub::default_folder(base);
    if fetched.is_dir() {
        return Ok(fetched);
    }
    misuse!(
        "base `{base}` is neither a folder ({}) nor a fetched model ({}); `cyrene fetch {base}` gets it from the Hub",
        path.display(),
        fetched.display()
    );
}
