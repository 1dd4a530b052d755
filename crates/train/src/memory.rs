//! The memory plan: what of an optimizer step stays on the GPU, what is computed twice, how many rows go at once.
//!
//! Everything is counted before anything is allocated, from the configuration alone, so that `doctor` says what training will do and
//! training does what `doctor` said. Of all plans that fit, the one with the least extra time is chosen; what a plan costs is
//! reckoned in round figures of a card's class, which decide between plans and are shown to nobody.

use kernel::cuda::{Card, WORKSPACE_BYTES, footprint, table_bytes};
use kernel::{DType, Device};
use model::{Config, Keep, LoraConfig, Model, Saved, TensorSpec, TrainPass};

use crate::error::{Error, Result};
use crate::job::Job;

/// The rows of an optimizer step as a recipe asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// Rows of a micro-batch, at most.
    pub rows: usize,
    pub row_tokens: usize,
    /// Micro-batches of that many rows.
    pub accumulate: usize,
}

impl StepRows {
    pub fn of(job: &Job) -> Self {
        StepRows {
            rows: job.batch.rows,
            row_tokens: job.data.row_tokens,
            accumulate: job.batch.accumulate,
        }
    }
}

/// What is to be trained.
#[derive(Debug, Clone, Copy)]
pub struct Training<'a> {
    pub config: &'a Config,
    pub dtype: DType,
    /// None: all weights train.
    pub lora: Option<&'a LoraConfig>,
    pub rows: StepRows,
}

impl<'a> Training<'a> {
    pub fn of(model: &'a Model, rows: StepRows) -> Self {
        Training {
            config: model.config(),
            dtype: model.dtype(),
            lora: model.lora(),
            rows,
        }
    }

    /// The pass over `rows` rows.
    pub fn pass(&self, rows: usize) -> TrainPass<'a> {
        TrainPass {
            config: self.config,
            dtype: self.dtype,
            lora: self.lora,
            n_tokens: rows * self.rows.row_tokens,
            longest: self.rows.row_tokens,
        }
    }
}

/// Bytes on the GPU by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Bytes {
    pub weights: usize,
    pub gradients: usize,
    pub moments: usize,
    pub activations: usize,
    /// Of ops, cuBLASLt's workspace included.
    pub scratch: usize,
    /// Tokens, targets and document borders.
    pub tables: usize,
}

impl Bytes {
    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.moments + self.activations + self.scratch + self.tables
    }
}

/// How an optimizer step is done on a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    /// Rows of a micro-batch; the step has as many rows as were asked for.
    pub rows: usize,
    /// What each layer keeps from forward to backward.
    pub keeps: Vec<Keep>,
    pub bytes: Bytes,
    /// Scratch to reserve, of `bytes.scratch`.
    pub op_scratch_bytes: usize,
}

impl MemoryPlan {
    /// The best plan on `card` whose buffers take at most `budget` bytes, weights included.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] with the least that is needed.
    pub fn new(training: &Training, card: Card, budget: usize) -> Result<MemoryPlan> {
        let choices = Saved::choices(training.config);
        let fixed = Fixed::of(training);
        let mut best: Option<(f64, MemoryPlan)> = None;
        let mut least = usize::MAX;
        for rows in (1..=training.rows.rows.max(1)).rev() {
            let pass = training.pass(rows);
            let n_passes = (training.rows.rows * training.rows.accumulate).div_ceil(rows);
            for keeps in &choices {
                let plan = fixed.plan(&pass, card, rows, keeps);
                least = least.min(plan.bytes.total());
                if plan.bytes.total() > budget {
                    continue;
                }
                let seconds = n_passes as f64 * fixed.pass_seconds(&pass, card, keeps);
                if best.as_ref().is_none_or(|(other, _)| seconds < *other) {
                    best = Some((seconds, plan));
                }
                // Whatever keeps less repeats more.
                break;
            }
        }
        best.map(|(_, plan)| plan).ok_or(Error::DoesNotFit {
            needed: least,
            available: budget,
            row_tokens: training.rows.row_tokens,
        })
    }

    /// The plan for a model that lies on a GPU; None on a CPU, which needs none.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn for_model(model: &Model, rows: StepRows) -> Result<Option<MemoryPlan>> {
        let Device::Cuda(cuda) = model.device() else {
            return Ok(None);
        };
        let training = Training::of(model, rows);
        // The weights are there already.
        let budget = cuda.available_bytes()? + weight_bytes(&training);
        MemoryPlan::new(&training, cuda.card(), budget).map(Some)
    }

    /// Most bytes of buffers at a time.
    pub fn peak_bytes(&self) -> usize {
        self.bytes.total()
    }

    /// Layers that keep all, all but the feed-forward, their input alone.
    pub fn kept(&self) -> [usize; 3] {
        let count = |keep| self.keeps.iter().filter(|k| **k == keep).count();
        [Keep::All, Keep::Mixer, Keep::Input].map(count)
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let [all, mixer, input] = self.kept();
        format!(
            "{} rows at a time; of {} layers, {all} keep all, {mixer} compute their feed-forward twice, {input} everything",
            self.rows,
            self.keeps.len(),
        )
    }
}

/// Bytes of the weights on a GPU.
pub fn weight_bytes(training: &Training) -> usize {
    spec_bytes(&training.pass(1).weights(), |spec| spec.dtype)
}

fn spec_bytes(specs: &[TensorSpec], dtype: impl Fn(&TensorSpec) -> DType) -> usize {
    let specs = specs.iter();
    specs
        .map(|spec| footprint(spec.numel() * dtype(spec).size()))
        .sum()
}

/// What does not depend on rows and keeps.
struct Fixed {
    weights: usize,
    gradients: usize,
    moments: usize,
    n_trained: usize,
    n_layers: usize,
}

impl Fixed {
    fn of(training: &Training) -> Self {
        let trained = training.pass(1).trained();
        Fixed {
            weights: weight_bytes(training),
            gradients: spec_bytes(&trained, |_| DType::F32),
            // Both have the weight's type: see `optimizer::moment_dtype`.
            moments: 2 * spec_bytes(&trained, |spec| spec.dtype),
            n_trained: trained.iter().map(TensorSpec::numel).sum(),
            n_layers: training.config.layer_types.len(),
        }
    }

    fn plan(&self, pass: &TrainPass, card: Card, rows: usize, keeps: &[Keep]) -> MemoryPlan {
        let op_scratch_bytes = pass.scratch_bytes(card);
        MemoryPlan {
            rows,
            keeps: keeps.to_vec(),
            bytes: Bytes {
                weights: self.weights,
                gradients: self.gradients,
                moments: self.moments,
                activations: pass.activation_bytes(keeps),
                scratch: op_scratch_bytes + footprint(WORKSPACE_BYTES),
                tables: table_bytes(pass.n_tokens),
            },
            op_scratch_bytes,
        }
    }

    /// What one pass costs beside the arithmetic that every plan needs: work done twice, weights and gradients read and gradients
    /// written once more, launches.
    fn pass_seconds(&self, pass: &TrainPass, card: Card, keeps: &[Keep]) -> f64 {
        let rates = Rates::of(card);
        let moved = 3 * self.weights + 2 * 4 * self.n_trained;
        pass.repeated_operations(keeps) / rates.operations
            + moved as f64 / rates.memory_bytes
            + self.n_layers as f64 * LAUNCHES_PER_LAYER * LAUNCH_S
    }
}

/// Kernels of a layer, forward and backward, and what the host takes to launch one.
const LAUNCHES_PER_LAYER: f64 = 100.0;
const LAUNCH_S: f64 = 4e-6;

/// A second's work of a card's class, in round figures.
struct Rates {
    /// Of bf16 products.
    operations: f64,
    memory_bytes: f64,
}

impl Rates {
    fn of(card: Card) -> Self {
        let (operations_per_multiprocessor, memory_bytes) = match card.compute {
            90 => (4.2e12, 2.6e12),
            100.. if card.compute < 120 => (1e13, 6e12),
            120.. => (1.1e12, 1.5e12),
            80 => (2.2e12, 1.6e12),
            _ => (1.1e12, 8e11),
        };
        Rates {
            operations: f64::from(card.n_multiprocessors) * operations_per_multiprocessor,
            memory_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GIB: usize = 1 << 30;

    fn config_4b() -> Config {
        let layer_types: Vec<&str> = (1..=32)
            .map(|layer| match layer % 4 {
                0 => "full_attention",
                _ => "linear_attention",
            })
            .collect();
        let json = json!({
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "vocab_size": 248_320,
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "layer_types": layer_types,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "tie_word_embeddings": true,
            "rope_parameters": { "rope_theta": 1e7, "partial_rotary_factor": 0.25 }
        });
        Config::from_json(&json).unwrap()
    }

    fn h100(memory_bytes: usize) -> Card {
        Card {
            compute: 90,
            n_multiprocessors: 132,
            memory_bytes,
        }
    }

    fn training(config: &Config, rows: usize) -> Training<'_> {
        Training {
            config,
            dtype: DType::Bf16,
            lora: None,
            rows: StepRows {
                rows,
                row_tokens: 5120,
                accumulate: 1,
            },
        }
    }

    #[test]
    fn plans_stay_within_their_budget_and_use_what_helps() {
        let config = config_4b();
        let training = training(&config, 3);
        for gib in [60, 76, 90, 140] {
            let card = h100(gib * GIB);
            let budget = card.buffer_bytes();
            let plan = MemoryPlan::new(&training, card, budget).unwrap();
            assert!(plan.peak_bytes() <= budget);
            println!("{gib} GiB: {} {:?}", plan.describe(), plan.bytes);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_it_needs() {
        let config = config_4b();
        let training = training(&config, 3);
        let card = h100(24 * GIB);
        let refused = MemoryPlan::new(&training, card, card.buffer_bytes()).err();
        let Some(Error::DoesNotFit { needed, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(needed > card.buffer_bytes());
        let plan = MemoryPlan::new(&training, card, needed).unwrap();
        assert_eq!((plan.rows, plan.peak_bytes()), (1, needed));
    }
}
