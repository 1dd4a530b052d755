//! What to train and how: the tables of a recipe that training reads, and the job that the binary builds from them.
//!
//! The binary owns the TOML file, its paths and its defaults' printing; here every key is documented once, and a key that nobody knows is refused.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use model::LoraConfig;
use serde::{Deserialize, Serialize};
use text::pack::Packing;
use text::{Example, Tokenizer};

use crate::error::{Error, Result};
use crate::recipe_table::{Key, check, recipe_table};

/// The shortest time between checkpoints, in minutes: writing one takes longer.
const LEAST_MINUTES: f64 = 0.01;

recipe_table! {
    /// `[data]`: the keys that training itself needs; where the rows come from is the binary's part of the table.
    DataConfig as "data" {
        /// tokens of a packed row; longer documents are split at sentence ends, longer conversations between rounds; nothing is cut off
        row_tokens: usize = 5120, from 2 to 1048576;
        /// binpack: fullest rows; sequential: in order
        packing: Packing = Packing::BinPack => with_default "\"binpack\"";
    }
}

/// `[tuner]`: which weights are trained. Default `kind = "full"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TunerConfig {
    /// Every weight of the text model.
    Full {},
    /// Low-rank adapters beside frozen linear layers.
    Lora(LoraTuner),
}

recipe_table! {
    /// The keys of `[tuner]` with `kind = "lora"`.
    LoraTuner as "tuner" {
        /// lora: rank of A [rank, in] and B [out, rank]; default 16
        rank: usize = 16 => optional "16", from 1 to 65536;
        /// lora: the adapter's output is scaled by alpha / rank; default 32
        alpha: f32 = 32.0 => optional "32", from 0.001 to 1000000;
        /// lora: share of the adapter's inputs zeroed while training; default 0
        dropout: f32 = 0.0 => optional "0.0";
        /// lora: names of layers (q_proj, in_proj_qkv, ...); empty means every linear layer but the head
        targets: Vec<String> = Vec::new() => optional "[]";
    }
}

impl Default for TunerConfig {
    fn default() -> Self {
        TunerConfig::Full {}
    }
}

impl TunerConfig {
    /// The key that chooses between the variants.
    pub const KIND: Key = Key::with_default(
        "tuner.kind",
        "\"full\"",
        "full: every weight of the text model; lora: low-rank adapters beside frozen linear layers",
    );

    /// The adapter's settings; None where all weights train.
    pub fn lora(&self) -> Option<LoraConfig> {
        match self {
            TunerConfig::Full {} => None,
            TunerConfig::Lora(lora) => Some(LoraConfig {
                rank: lora.rank,
                alpha: lora.alpha,
                dropout: lora.dropout,
                targets: lora.targets.clone(),
            }),
        }
    }
}

recipe_table! {
    /// `[optimizer]`: AdamW, its schedule and its clipping.
    OptimizerConfig as "optimizer" {
        /// AdamW: highest learning rate, reached when the warmup ends
        lr: f64 = 2e-5, from 0 to 1e30;
        /// learning rate at the end; above lr (a warning says so) the rate would rise
        min_lr: f64 = 2e-6, from 0 to 1e30;
        /// cosine, linear or constant
        schedule: ScheduleKind = ScheduleKind::Cosine => with_default "\"cosine\"";
        /// share of all steps that warm up
        warmup_ratio: f64 = 0.1, from 0 to 1;
        /// warmup in steps; overrides warmup_ratio
        #[serde(skip_serializing_if = "Option::is_none")]
        warmup_steps: Option<u64> = None => optional "20", from 0 to 10000000;
        /// decay of the first and second moment
        betas: [f64; 2] = [0.9, 0.95];
        /// added to the root of the second moment
        eps: f64 = 1e-8, from 0 to 1;
        /// decoupled; norms, biases and dt_bias are spared
        weight_decay: f64 = 0.1, from 0 to 1000;
        /// global gradient norm above which gradients are scaled down; 0: never
        grad_clip: f64 = 1.0, from 0 to 1e30;
    }
}

/// Shape of the learning rate after warmup; see [`crate::schedule::Schedule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from `lr` to `min_lr`.
    Cosine,
    /// A straight line from `lr` to `min_lr`.
    Linear,
    /// `lr` throughout.
    Constant,
}

recipe_table! {
    /// `[batch]`: how many rows an optimizer step sees: rows · accumulate.
    BatchConfig as "batch" {
        /// rows of a micro-batch
        rows: usize = 3, from 1 to 65536;
        /// micro-batches of an optimizer step; a last step may be smaller
        accumulate: usize = 8, from 1 to 65536;
    }
}

recipe_table! {
    /// `[run]`: how long, and what happens on the way. Only `epochs` and `steps` change what is learned.
    RunConfig as "run" {
        /// passes over the sources, each as often as its weight says
        epochs: u64 = 1, from 0 to 100000;
        /// optimizer steps; overrides epochs
        #[serde(skip_serializing_if = "Option::is_none")]
        steps: Option<u64> = None => optional "1200", from 1 to 10000000;
        /// steps between validations; 0: only at the start and the end
        validate_every: u64 = 50;
        /// held-out loss of the untrained model as step 0
        validate_at_start: bool = true;
        /// minutes between checkpoints; 0: none by the clock
        save_every_minutes: f64 = 10.0, from 0 to 1000000;
        /// steps between checkpoints; 0: none by count
        save_every: u64 = 0;
        /// newest checkpoints kept beside the best; 0: all
        keep_last: usize = 2;
        /// a checkpoint whenever the held-out loss is the lowest so far
        save_best: bool = true;
        /// number type of the result: base (as the base has it), bf16 or f32
        save_dtype: SaveDType = SaveDType::Base => with_default "\"base\"";
        /// weights the run ends with: last, or best (lowest held-out loss)
        result: ResultKind = ResultKind::Last => with_default "\"last\"";
    }
}

/// Number type of the saved result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveDType {
    /// As the base has it.
    Base,
    /// Two bytes a weight; what releases hold in f32 stays so.
    Bf16,
    /// Four bytes a weight.
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

/// Held-out examples that are measured together.
#[derive(Debug, Clone)]
pub struct ValidationSet {
    /// Name in `metrics.jsonl` (`split`): `val`, `val-strict`, `probe-x`.
    pub name: String,
    /// What is measured.
    pub examples: Vec<Example>,
}

/// Everything one run needs besides the model.
pub struct Job {
    /// Seed of the order of documents, of adapters and of dropout.
    pub seed: u64,
    /// `[data]`.
    pub data: DataConfig,
    /// `[tuner]`.
    pub tuner: TunerConfig,
    /// `[optimizer]`.
    pub optimizer: OptimizerConfig,
    /// `[batch]`.
    pub batch: BatchConfig,
    /// `[run]`.
    pub run: RunConfig,
    /// What is learned from.
    pub train: Vec<Example>,
    /// Passes of each source in one epoch, indexed by [`text::Origin::source_idx`]; a source beyond the end has weight 1.
    /// A weight of 2.25 means two whole passes and a seeded quarter of the documents, drawn anew each epoch.
    pub source_weights: Vec<f64>,
    /// Held-out examples by side of the split; none: no validation. The first set is compared with training examples
    /// of the same kind and decides which weights are best.
    pub validation: Vec<ValidationSet>,
    /// Shows where sentences end, so that long documents are cut there; None: they are cut where a row is full.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Where everything is written; made if absent.
    pub out_dir: PathBuf,
    /// Name of the base model, as the adapter's configuration records it.
    pub base_name: String,
    /// SHA-256 of the base's files, in hex: who goes on with another base of the same name is told. None: nobody computed it.
    pub base_sha256: Option<String>,
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
        self.data.check_ranges()?;
        self.optimizer.check()?;
        self.batch.check_ranges()?;
        self.run.check_ranges()?;
        if let TunerConfig::Lora(lora) = &self.tuner {
            lora.check()?;
        }
        require(
            self.run.epochs >= 1 || self.run.steps.is_some(),
            "run.epochs",
            self.run.epochs,
            "at least 1",
        )?;
        let minutes = self.run.save_every_minutes;
        require(
            minutes == 0.0 || minutes >= LEAST_MINUTES,
            "run.save_every_minutes",
            minutes,
            "0 (never by the clock), or from 0.01 to 1000000",
        )?;
        require(
            self.run.result == ResultKind::Last
                || (self.run.save_best && self.held_out().next().is_some()),
            "run.result",
            "best",
            "last where nothing is held out or run.save_best is false",
        )?;
        for weight in &self.source_weights {
            check(
                "data.sources.weight",
                weight,
                ["0", "1000"],
                "from 0 to 1000",
            )?;
        }
        Ok(())
    }

    /// All held-out examples, set after set.
    pub fn held_out(&self) -> impl Iterator<Item = &Example> {
        self.validation.iter().flat_map(|set| &set.examples)
    }

    /// Weight of a source; 1 where the job names none.
    pub fn source_weight(&self, source: u32) -> f64 {
        self.source_weights
            .get(source as usize)
            .copied()
            .unwrap_or(1.0)
    }
}

impl OptimizerConfig {
    /// Refuses values that no run can have.
    fn check(&self) -> Result<()> {
        self.check_ranges()?;
        for beta in self.betas {
            require(
                (0.0..1.0).contains(&beta),
                "optimizer.betas",
                beta,
                "at least 0 and below 1",
            )?;
        }
        Ok(())
    }
}

impl LoraTuner {
    /// Refuses values that no adapter can have.
    fn check(&self) -> Result<()> {
        self.check_ranges()?;
        require(
            (0.0..1.0).contains(&self.dropout),
            "tuner.dropout",
            self.dropout,
            "at least 0 and below 1",
        )
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
    fn values_out_of_range_are_told_with_key_and_range() {
        fn said<T: serde::de::DeserializeOwned>(
            table: serde_json::Value,
            check: fn(&T) -> Result<()>,
        ) -> String {
            let table = serde_json::from_value(table).unwrap();
            check(&table).unwrap_err().to_string()
        }
        let steps = said(json!({ "steps": 1_u64 << 40 }), RunConfig::check_ranges);
        assert_eq!(
            steps,
            "`run.steps` is 1099511627776, but must be from 1 to 10000000"
        );
        let zero = said(json!({ "steps": 0 }), RunConfig::check_ranges);
        assert!(zero.contains("from 1 to 10000000"), "{zero}");
        let rank = said(json!({ "rank": 1_u64 << 40 }), LoraTuner::check);
        assert_eq!(
            rank,
            "`tuner.rank` is 1099511627776, but must be from 1 to 65536"
        );
        let alpha = said(json!({ "alpha": -0.1 }), LoraTuner::check);
        assert!(alpha.starts_with("`tuner.alpha` is -0.1, but"), "{alpha}");
        let rows = said(json!({ "rows": 0 }), BatchConfig::check_ranges);
        assert_eq!(rows, "`batch.rows` is 0, but must be from 1 to 65536");
        let lr = OptimizerConfig {
            lr: f64::NAN,
            ..OptimizerConfig::default()
        };
        let lr = lr.check().unwrap_err().to_string();
        assert_eq!(lr, "`optimizer.lr` is NaN, but must be from 0 to 1e30");
        let ratio = said(json!({ "warmup_ratio": 1.5 }), OptimizerConfig::check);
        assert!(ratio.ends_with("from 0 to 1"), "{ratio}");
    }

    #[test]
    fn defaults_and_examples_are_in_their_ranges_and_the_keys_know_them() {
        OptimizerConfig::default().check().unwrap();
        LoraTuner::default().check().unwrap();
        BatchConfig::default().check_ranges().unwrap();
        RunConfig::default().check_ranges().unwrap();
        DataConfig::default().check_ranges().unwrap();
        let keys = [
            DataConfig::KEYS,
            LoraTuner::KEYS,
            OptimizerConfig::KEYS,
            BatchConfig::KEYS,
            RunConfig::KEYS,
        ];
        for key in keys.into_iter().flatten() {
            let Some(range) = key.range else {
                continue;
            };
            let value: f64 = key.value.parse().unwrap_or(1.0);
            check(key.path, &value, range, "in its range").unwrap();
        }
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

    /// Keys of LoRA are printed as comments, so that no reading of the printed recipe sees what they state.
    #[test]
    fn keys_of_lora_state_their_defaults() {
        let defaults = serde_json::to_value(LoraTuner::default()).unwrap();
        for key in LoraTuner::KEYS {
            let default = &defaults[key.path.strip_prefix("tuner.").unwrap()];
            let stated: serde_json::Value = serde_json::from_str(key.value).unwrap();
            match default.as_f64() {
                Some(number) => {
                    assert_eq!(stated.as_f64(), Some(number), "{}", key.path);
                    let said = format!("; default {number}");
                    assert!(key.doc.ends_with(&said), "{}: {}", key.path, key.doc);
                }
                None => assert_eq!(&stated, default, "{}", key.path),
            }
        }
        assert_eq!(
            defaults.as_object().map(|keys| keys.len()),
            Some(LoraTuner::KEYS.len())
        );
    }

    #[test]
    fn lora_reads_its_keys() {
        let tuner: TunerConfig =
            serde_json::from_value(json!({ "kind": "lora", "rank": 4, "targets": ["q_proj"] }))
                .unwrap();
        assert_eq!(
            tuner,
            TunerConfig::Lora(LoraTuner {
                rank: 4,
                alpha: 32.0,
                dropout: 0.0,
                targets: vec!["q_proj".to_string()],
            })
        );
    }
}
