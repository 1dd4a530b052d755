//! What a training needs of a device, here or not, and whether that fits: for those who ask before an hour is spent.

use kernel::cuda::DeviceProperties;
use kernel::host::HostMemory;
use kernel::{DType, Device};
use model::{Config, LoraConfig, TensorSpec};
use serde::Serialize;

use crate::error::{Error, Result, lighter};
use crate::job::{BatchConfig, DataConfig, LoraTuner, RunConfig, TunerConfig};
use crate::memory::{Bytes, MemoryPlan, Recomputing, Room, StepRows, Training};

/// One recipe's needs, or one size's.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    /// The recipe, or the size and how it is trained.
    pub name: String,
    /// Most bytes of buffers: weights, gradients, moments, activations, scratch. Where nothing fits, the least that is needed, or all that
    /// training may take where the host is what is too small.
    pub peak_bytes: u64,
    /// What training may take.
    pub available_bytes: u64,
    /// Host memory that may be locked for moments; None on a CPU, and for a GPU whose host is not known.
    pub host_available_bytes: Option<u64>,
    /// The least of it that is needed, where that is more than there is.
    pub host_needed_bytes: Option<u64>,
    /// Whether it fits.
    pub fits: bool,
    /// What to change where it does not fit.
    pub remedy: Option<String>,
    /// Tokens that the run processes; of a size none, since it names no data.
    pub tokens: Option<u64>,
    /// From the matrix-product rate measured now, on the device that is planned for.
    pub eta_s: Option<f64>,
    /// What training would choose.
    pub choices: Choices,
    /// The parts of the peak on a GPU.
    pub bytes: Option<Bytes>,
}

impl StagePlan {
    /// The memory that decides whether the training fits.
    pub fn limit(&self) -> Limit {
        match self.host_needed_bytes {
            Some(needed_bytes) => Limit {
                needed_bytes,
                available_bytes: self.host_available_bytes.unwrap_or_default(),
                what: "host memory",
            },
            None => Limit {
                needed_bytes: self.peak_bytes,
                available_bytes: self.available_bytes,
                what: "memory",
            },
        }
    }
}

/// What a training needs of one memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Bytes at most, or the least of all ways where none fits.
    pub needed_bytes: u64,
    /// Bytes that training may take.
    pub available_bytes: u64,
    /// `memory`, of the device, or `host memory`.
    pub what: &'static str,
}

/// How a run would be trained.
#[derive(Debug, Clone, Serialize)]
pub struct Choices {
    /// `full` or `lora`.
    pub tuner: &'static str,
    /// `f32` or `bf16`.
    pub dtype: &'static str,
    /// Rows at a time: the recipe's, or fewer with as many more micro-batches.
    pub rows: usize,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// Processes that train together, a GPU each, as WORLD_SIZE has it; the plan is that of the one with most moments.
    pub ranks: usize,
    /// Layers that recompute matrix products in the backward pass, because the GPU has no room to keep them.
    pub recomputing_layers: usize,
    /// Layers by what they recompute in the backward pass.
    pub recompute: Recomputing,
    /// Tensors whose moments lie in pinned host memory, and their bytes there.
    pub offloaded_tensors: usize,
    /// Bytes of those moments.
    pub offloaded_bytes: u64,
}

/// Host memory of a machine that nobody described: enough.
pub const UNKNOWN: usize = usize::MAX;

/// Where the planned training is to run.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// This machine's processor.
    Cpu {
        /// Memory that nobody uses.
        free_bytes: u64,
    },
    /// GPUs, here or not, one for each of the processes that train together, and what training may take of each and of their host.
    Gpu {
        /// What the GPU is.
        gpu: DeviceProperties,
        /// What training may take.
        room: Room,
        /// How many train together.
        n_ranks: usize,
    },
}

impl Target {
    /// A device of this machine, of whose memory a CPU has `free_bytes`, for one process, as training finds it.
    ///
    /// # Errors
    /// A GPU that does not answer.
    pub fn here(device: Device, free_bytes: u64) -> Result<Target> {
        Ok(match device {
            Device::Cpu => Target::Cpu { free_bytes },
            Device::Cuda(cuda) => Target::Gpu {
                gpu: cuda.properties(),
                room: Room {
                    gpu_bytes: cuda.available_bytes()?,
                    host_bytes: HostMemory::now().lockable_bytes(),
                },
                n_ranks: 1,
            },
        })
    }

    /// Processes that train together.
    pub fn n_ranks(self) -> usize {
        match self {
            // All share this machine's memory and cores.
            Target::Cpu { .. } => 1,
            Target::Gpu { n_ranks, .. } => n_ranks,
        }
    }
}

/// A recipe's training, as far as it decides needs.
#[derive(Debug, Clone, Copy)]
pub struct PlannedRun<'a> {
    /// Of the model.
    pub config: &'a Config,
    /// Of weights and activations.
    pub dtype: DType,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// What trains.
    pub tuner: &'a TunerConfig,
    /// Rows of a step.
    pub batch: &'a BatchConfig,
    /// How long.
    pub run: &'a RunConfig,
}

impl PlannedRun<'_> {
    /// Memory, tokens and time of the run, of which an epoch has `epoch_tokens` tokens, on a device that does `flops` operations a second.
    ///
    /// # Errors
    /// As [`plan`].
    pub fn plan(
        &self,
        name: &str,
        epoch_tokens: f64,
        target: Target,
        flops: Option<f64>,
    ) -> Result<StagePlan> {
        let tokens = self.tokens(epoch_tokens);
        // 6 operations a weight and token, 4 where the base is frozen.
        let each = if self.tuner.lora().is_none() {
            6.0
        } else {
            4.0
        };
        let per_token = each * self.config.n_params() as f64;
        let lora = self.tuner.lora();
        let training = self.training(lora.as_ref(), target.n_ranks());
        Ok(StagePlan {
            tokens: Some(tokens as u64),
            eta_s: flops.map(|flops| tokens * per_token / flops / target.n_ranks() as f64),
            ..plan(name.to_owned(), &training, target)?
        })
    }

    /// Bytes that the run leaves on the disk: the checkpoints that are kept, each with two moments of what trains, and the result.
    pub fn disk_bytes(&self) -> u64 {
        let lora = self.tuner.lora();
        let pass = self.training(lora.as_ref(), 1).pass(1);
        let trained: usize = pass.trained().iter().map(TensorSpec::numel).sum();
        let weights = match lora {
            None => self.config.checkpoint_bytes(),
            Some(_) => 4 * trained as u64,
        };
        let kept = self.run.keep_last.max(1) as u64 + u64::from(self.run.save_best);
        kept * (weights + 8 * trained as u64) + weights
    }

    /// Tokens of the whole run, in whole rows where steps are counted.
    fn tokens(&self, epoch_tokens: f64) -> f64 {
        let a_step = (self.batch.rows * self.batch.accumulate * self.row_tokens) as f64;
        match self.run.steps {
            Some(steps) => steps as f64 * a_step.min(epoch_tokens),
            None => epoch_tokens * self.run.epochs as f64,
        }
    }

    fn training<'a>(&'a self, lora: Option<&'a LoraConfig>, n_ranks: usize) -> Training<'a> {
        Training {
            config: self.config,
            dtype: self.dtype,
            lora,
            rows: StepRows {
                rows: self.batch.rows,
                row_tokens: self.row_tokens,
                accumulate: self.batch.accumulate,
                at_once: self.batch.rows,
            },
            rank: 0,
            n_ranks,
        }
    }
}

/// What a size needs with the rows of the default recipe: all weights trained, then a LoRA of rank 16.
///
/// # Errors
/// As [`plan`].
pub fn of_size(size: &str, config: &Config, target: Target) -> Result<[StagePlan; 2]> {
    let (batch, run) = (BatchConfig::default(), RunConfig::default());
    let of = |name: &str, tuner: &TunerConfig| {
        let run = PlannedRun {
            config,
            dtype: match target {
                Target::Cpu { .. } => DType::F32,
                Target::Gpu { .. } => DType::Bf16,
            },
            row_tokens: DataConfig::default().row_tokens,
            tuner,
            batch: &batch,
            run: &run,
        };
        let lora = tuner.lora();
        let training = run.training(lora.as_ref(), target.n_ranks());
        plan(format!("{size} {name}"), &training, target)
    };
    Ok([
        of("full", &TunerConfig::Full {})?,
        of("LoRA", &TunerConfig::Lora(LoraTuner::default()))?,
    ])
}

/// The memory of a training, without tokens and time.
///
/// # Errors
/// A model that cannot be trained so; what does not fit is no error, but said in the plan.
pub fn plan(name: String, training: &Training, target: Target) -> Result<StagePlan> {
    let rows = training.rows;
    let mut plan = StagePlan {
        name,
        peak_bytes: 0,
        available_bytes: 0,
        host_available_bytes: None,
        host_needed_bytes: None,
        fits: true,
        remedy: None,
        tokens: None,
        eta_s: None,
        choices: Choices {
            tuner: if training.lora.is_some() {
                "lora"
            } else {
                "full"
            },
            dtype: match training.dtype {
                DType::F32 => "f32",
                DType::Bf16 => "bf16",
            },
            rows: rows.rows,
            row_tokens: rows.row_tokens,
            ranks: training.n_ranks,
            recomputing_layers: 0,
            recompute: Recomputing {
                elementwise: training.config.layer_types.len(),
                ..Recomputing::default()
            },
            offloaded_tensors: 0,
            offloaded_bytes: 0,
        },
        bytes: None,
    };
    match target {
        Target::Cpu { free_bytes } => {
            plan.peak_bytes = training.cpu_bytes();
            plan.available_bytes = free_bytes;
            plan.fits = plan.peak_bytes < free_bytes;
            plan.remedy = (!plan.fits).then(|| {
                let half = match training.dtype {
                    DType::F32 => ", or dtype = \"bf16\"",
                    DType::Bf16 => "",
                };
                let lighter = lighter(training.lora.is_some());
                format!(
                    "lower batch.rows or data.row_tokens, {lighter}{half}, or close other programs"
                )
            });
        }
        Target::Gpu { gpu, room, .. } => {
            plan.available_bytes = room.gpu_bytes as u64;
            plan.host_available_bytes =
                (room.host_bytes != UNKNOWN).then_some(room.host_bytes as u64);
            match tightest(training, gpu, room) {
                Ok(memory) => {
                    plan.peak_bytes = memory.peak_bytes() as u64;
                    plan.choices.rows = memory.rows;
                    plan.choices.recompute = memory.recomputing();
                    plan.choices.offloaded_tensors = memory.n_offloaded();
                    plan.choices.offloaded_bytes = memory.host_bytes as u64;
                    plan.choices.recomputing_layers = memory.recomputing().n_products();
                    plan.bytes = Some(memory.bytes);
                }
                Err(error @ Error::DoesNotFitHost { needed, .. }) => {
                    plan.peak_bytes = room.gpu_bytes as u64;
                    plan.host_needed_bytes = Some(needed as u64);
                    plan.choices.offloaded_bytes = needed as u64;
                    plan.fits = false;
                    plan.remedy = Some(error.to_string());
                }
                Err(error @ Error::DoesNotFit { needed, .. }) => {
                    plan.peak_bytes = needed as u64;
                    plan.fits = false;
                    plan.remedy = Some(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(plan)
}

/// The plan of the rank that has room for the fewest rows, and takes most.
///
/// # Errors
/// As [`MemoryPlan::new`], for any of them.
fn tightest(training: &Training, gpu: DeviceProperties, room: Room) -> Result<MemoryPlan> {
    let mut tightest = MemoryPlan::new(training, gpu, room)?;
    for rank in 1..training.n_ranks {
        let plan = MemoryPlan::new(&Training { rank, ..*training }, gpu, room)?;
        let order = |plan: &MemoryPlan| (std::cmp::Reverse(plan.rows), plan.peak_bytes());
        if order(&plan) > order(&tightest) {
            tightest = plan;
        }
    }
    Ok(tightest)
}

#[cfg(test)]
mod tests {
    use model::{Config, sizes};

    use super::*;
    use crate::memory::StepRows;

    #[test]
    fn what_does_not_fit_is_said_of_the_memory_that_is_short() {
        const GIB: usize = 1 << 30;
        let config = Config::from_json(&sizes::config("4b").unwrap()).unwrap();
        let training = Training {
            config: &config,
            dtype: DType::Bf16,
            lora: None,
            rows: StepRows {
                rows: 1,
                row_tokens: 5120,
                accumulate: 1,
                at_once: 1,
            },
            rank: 0,
            n_ranks: 1,
        };
        let limit = |gpu_bytes, host_bytes| {
            let gpu = DeviceProperties::with_memory(32 * GIB);
            let room = Room {
                gpu_bytes,
                host_bytes,
            };
            let target = Target::Gpu {
                gpu,
                room,
                n_ranks: 1,
            };
            let plan = plan("4b".to_owned(), &training, target).unwrap();
            (plan.fits, plan.limit())
        };
        let (fits, all) = limit(30 * GIB, UNKNOWN);
        assert!(fits && all.what == "memory" && all.needed_bytes <= all.available_bytes);
        // The moments lie in host memory, of which there is too little.
        let (fits, host) = limit(30 * GIB, GIB);
        assert!(!fits && host.what == "host memory");
        assert_eq!(host.available_bytes, GIB as u64);
        assert!(host.needed_bytes > host.available_bytes);
        assert!(limit(30 * GIB, host.needed_bytes as usize).0);
        let (fits, own) = limit(4 * GIB, UNKNOWN);
        assert!(!fits && own.what == "memory");
        assert_eq!(own.available_bytes, 4 * GIB as u64);
        assert!(own.needed_bytes > own.available_bytes);
    }
}
