//! What to train and how: the tables of a recipe that training reads, and the job that the binary builds from them.
//!
//! The binary owns the TOML file, its paths and its defaults' printing; here every key is documented once, and a key that nobody knows is refused.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use model::LoraConfig;
use serde::{Deserialize, Serialize};
use text::Tokenizer;
use text::labels::Encoded;

use crate::error::{Error, Result};

/// `[data]`: the keys that training itself needs; where the rows come from is the binary's part of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Tokens of one packed row at most; a longer document is split at sentence ends, never cut short. Default 5120.
    pub row_tokens: usize,
    /// How documents share a row: `binpack` (fullest rows) or `sequential` (in order, a new row when the next does not fit). Default `binpack`.
    pub packing: Packing,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            row_tokens: 5120,
            packing: Packing::Binpack,
        }
    }
}

/// How documents share a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    Binpack,
    Sequential,
}

/// `[tuner]`: which weights are trained. Default `kind = "full"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TunerConfig {
    /// Every weight of the text model.
    Full {},
    /// Low-rank adapters beside frozen linear layers.
    Lora {
        /// Rank of A [rank, in] and B [out, rank]. Default 16.
        #[serde(default = "default_rank")]
        rank: usize,
        /// The adapter's output is scaled by alpha / rank. Default 32.
        #[serde(default = "default_alpha")]
        alpha: f32,
        /// Share of the adapter's inputs set to zero while training, in [0, 1). Default 0.
        #[serde(default)]
        dropout: f32,
        /// Names of the layers that get an adapter (`q_proj`, `in_proj_qkv`, ...); empty: every linear layer but the head. Default empty.
        #[serde(default)]
        targets: Vec<String>,
    },
}

impl Default for TunerConfig {
    fn default() -> Self {
        TunerConfig::Full {}
    }
}

impl TunerConfig {
    /// The adapter's settings; None where all weights train.
    pub fn lora(&self) -> Option<LoraConfig> {
        match self {
            TunerConfig::Full {} => None,
            TunerConfig::Lora {
                rank,
                alpha,
                dropout,
                targets,
            } => Some(LoraConfig {
                rank: *rank,
                alpha: *alpha,
                dropout: *dropout,
                targets: targets.clone(),
            }),
        }
    }
}

fn default_rank() -> usize {
    16
}

fn default_alpha() -> f32 {
    32.0
}

/// `[optimizer]`: AdamW, its schedule and its clipping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Highest learning rate, reached at the end of the warmup. Default 2e-5.
    pub lr: f64,
    /// Learning rate at the end of the run (`constant` ignores it). Default 2e-6.
    pub min_lr: f64,
    /// `cosine`, `linear` or `constant`. Default `cosine`.
    pub schedule: ScheduleKind,
    /// Share of all steps that warm up; steps = ceil(total · ratio). Default 0.1.
    pub warmup_ratio: f64,
    /// Warmup in steps; overrides `warmup_ratio` where given. Default absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Decay rates of the first and second moment. Default [0.9, 0.95].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Decoupled decay of weights; norms, biases and `dt_bias` are spared. Default 0.1.
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down; 0 turns clipping off. Default 1.0.
    pub grad_clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            lr: 2e-5,
            min_lr: 2e-6,
            schedule: ScheduleKind::Cosine,
            warmup_ratio: 0.1,
            warmup_steps: None,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
        }
    }
}

/// Shape of the learning rate after warmup; see [`crate::schedule::Schedule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Cosine,
    Linear,
    Constant,
}

/// `[batch]`: how many rows an optimizer step sees: rows · accumulate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Packed rows of one micro-batch, laid end to end as one. Default 3.
    pub rows: usize,
    /// Micro-batches of one optimizer step. Default 8.
    pub accumulate: usize,
}

impl Default for BatchConfig {
    fn default() -> Self {
        BatchConfig {
            rows: 3,
            accumulate: 8,
        }
    }
}

/// `[run]`: how long, and what happens on the way. Only `epochs` and `steps` change what is learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Passes over the training documents (each source as often as its weight says in one pass). Default 1.
    pub epochs: u64,
    /// Optimizer steps; where given it overrides `epochs`, with as many passes as it takes. Default absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Held-out loss every so many steps; 0: only at the start and the end. Default 50.
    pub validate_every: u64,
    /// Held-out loss of the untrained model as step 0, the line that all gains are read against. Default true.
    pub validate_at_start: bool,
    /// Minutes between checkpoints; 0: none by the clock. Default 10.
    pub save_every_minutes: f64,
    /// Steps between checkpoints; 0: none by count. Default 0.
    pub save_every: u64,
    /// Newest checkpoints that are kept, beside the best; 0: all. Default 2.
    pub keep_last: usize,
    /// A checkpoint whenever the held-out loss is the lowest so far. Default true.
    pub save_best: bool,
    /// Number type of the result's weights: `base` (as the base has them), `bf16` or `f32`. Default `base`.
    pub save_dtype: SaveDType,
    /// Weights that the run ends with: `last`, or `best` (lowest held-out loss; needs `save_best` and held-out data). Default `last`.
    pub result: ResultKind,
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            epochs: 1,
            steps: None,
            validate_every: 50,
            validate_at_start: true,
            save_every_minutes: 10.0,
            save_every: 0,
            keep_last: 2,
            save_best: true,
            save_dtype: SaveDType::Base,
            result: ResultKind::Last,
        }
    }
}

/// Number type of the saved result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveDType {
    Base,
    Bf16,
    F32,
}

/// Which weights a run ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResultKind {
    /// Those after the last step.
    Last,
    /// Those of the checkpoint with the lowest held-out loss.
    Best,
}

/// One document of training or held-out data, already in token ids.
#[derive(Debug, Clone)]
pub struct Document {
    /// Ids and labels (unshifted, -100 = no loss).
    pub encoded: Encoded,
    /// Index into [`Job::source_weights`].
    pub source: u32,
    /// Language code, for the held-out loss by language and the probe's mix.
    pub language: Option<String>,
    /// UTF-8 bytes of the text behind the trained targets, for bits per byte; 0 where unknown.
    pub bytes: usize,
}

/// Held-out documents that are measured together.
#[derive(Debug, Clone)]
pub struct ValidationSet {
    /// Name in `metrics.jsonl` (`split`): `val`, `val-strict`, `probe-x`.
    pub name: String,
    pub documents: Vec<Document>,
}

/// Everything one run needs besides the model.
pub struct Job {
    /// Seed of the order of documents, of adapters and of dropout.
    pub seed: u64,
    pub data: DataConfig,
    pub tuner: TunerConfig,
    pub optimizer: OptimizerConfig,
    pub batch: BatchConfig,
    pub run: RunConfig,
    pub train: Vec<Document>,
    /// Passes of each source in one epoch, indexed by [`Document::source`]; a source beyond the end has weight 1.
    /// A weight of 2.25 means two whole passes and a seeded quarter of the documents, drawn anew each epoch.
    pub source_weights: Vec<f64>,
    /// Held-out documents by side of the split; none: no validation. The first set is compared with training documents
    /// of the same kind and decides which weights are best.
    pub validation: Vec<ValidationSet>,
    /// Shows where sentences end, so that long documents are cut there; None: they are cut where a row is full.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Where everything is written; made if absent.
    pub out_dir: PathBuf,
    /// Name of the base model, as the adapter's configuration records it.
    pub base_name: String,
    /// Where this run comes from (recipe hash, commit, data manifest, device): copied into every checkpoint, compared with nothing.
    pub origin: serde_json::Value,
    /// Rows that this process computes at a time, at most; None: as many as [`BatchConfig::rows`], or as a GPU's memory plan finds best.
    /// Fewer take less memory and more time; the steps stay the same.
    pub rows_at_once: Option<usize>,
    /// Continue from a checkpoint although the recipe or the data differ from those it was made with.
    pub force: bool,
    /// Set by another thread (Ctrl-C): the running step is finished, a checkpoint written, [`Error::Interrupted`] returned.
    pub stop: Arc<AtomicBool>,
}

impl Job {
    /// Refuses values that no run can have.
    ///
    /// # Errors
    /// [`Error::BadValue`] with the key's name as the recipe has it.
    pub fn check(&self) -> Result<()> {
        let optimizer = &self.optimizer;
        require(
            self.data.row_tokens >= 2,
            "data.row_tokens",
            self.data.row_tokens,
            "at least 2",
        )?;
        require(
            self.batch.rows >= 1,
            "batch.rows",
            self.batch.rows,
            "at least 1",
        )?;
        require(
            self.batch.accumulate >= 1,
            "batch.accumulate",
            self.batch.accumulate,
            "at least 1",
        )?;
        require(
            self.run.steps != Some(0),
            "run.steps",
            0,
            "at least 1, or leave the key out",
        )?;
        require(
            self.run.epochs >= 1 || self.run.steps.is_some(),
            "run.epochs",
            self.run.epochs,
            "at least 1",
        )?;
        require(
            self.run.save_every_minutes >= 0.0,
            "run.save_every_minutes",
            self.run.save_every_minutes,
            "0 or more",
        )?;
        for (key, value) in [
            ("optimizer.lr", optimizer.lr),
            ("optimizer.min_lr", optimizer.min_lr),
            ("optimizer.eps", optimizer.eps),
            ("optimizer.weight_decay", optimizer.weight_decay),
            ("optimizer.grad_clip", optimizer.grad_clip),
        ] {
            require(
                value.is_finite() && value >= 0.0,
                key,
                value,
                "a finite number, 0 or more",
            )?;
        }
        require(
            (0.0..=1.0).contains(&optimizer.warmup_ratio),
            "optimizer.warmup_ratio",
            optimizer.warmup_ratio,
            "a share from 0 to 1",
        )?;
        for beta in optimizer.betas {
            require(
                (0.0..1.0).contains(&beta),
                "optimizer.betas",
                beta,
                "at least 0 and below 1",
            )?;
        }
        require(
            self.run.result == ResultKind::Last
                || (self.run.save_best && self.held_out().next().is_some()),
            "run.result",
            "best",
            "last where nothing is held out or run.save_best is false",
        )?;
        for weight in &self.source_weights {
            require(
                weight.is_finite() && *weight >= 0.0,
                "data.sources.weight",
                weight,
                "a finite number, 0 or more",
            )?;
        }
        if let TunerConfig::Lora {
            rank,
            alpha,
            dropout,
            ..
        } = &self.tuner
        {
            require(*rank >= 1, "tuner.rank", rank, "at least 1")?;
            require(
                alpha.is_finite() && *alpha > 0.0,
                "tuner.alpha",
                alpha,
                "a number above 0",
            )?;
            require(
                (0.0..1.0).contains(dropout),
                "tuner.dropout",
                dropout,
                "at least 0 and below 1",
            )?;
        }
        Ok(())
    }

    /// All held-out documents, set after set.
    pub fn held_out(&self) -> impl Iterator<Item = &Document> {
        self.validation.iter().flat_map(|set| &set.documents)
    }

    /// Weight of a source; 1 where the job names none.
    pub fn source_weight(&self, source: u32) -> f64 {
        self.source_weights
            .get(source as usize)
            .copied()
            .unwrap_or(1.0)
    }
}

fn require(
    holds: bool,
    key: &'static str,
    value: impl std::fmt::Display,
    expected: &'static str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::BadValue {
        key,
        value: value.to_string(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error_of<T: serde::de::DeserializeOwned>(table: serde_json::Value) -> String {
        match serde_json::from_value::<T>(table) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn empty_tables_are_the_documented_defaults() {
        let optimizer: OptimizerConfig = serde_json::from_value(json!({})).unwrap();
        assert_eq!(optimizer, OptimizerConfig::default());
        assert_eq!(
            (optimizer.lr, optimizer.min_lr, optimizer.warmup_ratio),
            (2e-5, 2e-6, 0.1)
        );
        let batch: BatchConfig = serde_json::from_value(json!({})).unwrap();
        assert_eq!((batch.rows, batch.accumulate), (3, 8));
        let run: RunConfig = serde_json::from_value(json!({})).unwrap();
        assert_eq!(
            (run.epochs, run.validate_every, run.save_every_minutes),
            (1, 50, 10.0)
        );
    }

    #[test]
    fn unknown_keys_are_named() {
        let unknown = json!({ "learning_rate": 1 });
        for error in [
            error_of::<DataConfig>(unknown.clone()),
            error_of::<OptimizerConfig>(unknown.clone()),
            error_of::<BatchConfig>(unknown.clone()),
            error_of::<RunConfig>(unknown.clone()),
            error_of::<TunerConfig>(json!({ "kind": "lora", "learning_rate": 1 })),
            error_of::<TunerConfig>(json!({ "kind": "full", "learning_rate": 1 })),
        ] {
            assert!(error.contains("unknown field `learning_rate`"), "{error}");
        }
    }

    #[test]
    fn lora_reads_its_keys() {
        let tuner: TunerConfig =
            serde_json::from_value(json!({ "kind": "lora", "rank": 4, "targets": ["q_proj"] }))
                .unwrap();
        assert_eq!(
            tuner,
            TunerConfig::Lora {
                rank: 4,
                alpha: 32.0,
                dropout: 0.0,
                targets: vec!["q_proj".to_string()],
            }
        );
    }
}
