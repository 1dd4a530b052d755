//! `cyrene doctor`: what this machine has, what a recipe will need of it, and whether that fits, before an hour is spent.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use kernel::cuda::DeviceProperties;
use kernel::host::HostMemory;
use kernel::{DType, Device, Tensor, ops};
use model::{Config, LoraConfig, sizes};
use serde::Serialize;
use train::launch;
use train::memory::{Bytes, MemoryPlan, Recomputing, Room, StepRows, Training};
use train::{BatchConfig, DataConfig};

use super::train::{base_folder, load_split, rows};
use crate::cli::Doctor;
use crate::recipe::{Recipe, Storage};
use crate::ui::{Ui, clock, misused, size};
use crate::{env, load, misuse};

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub device: String,
    pub processor: String,
    /// The instructions that the CPU's arithmetic has chosen.
    pub vectors: &'static str,
    pub threads: usize,
    pub memory_bytes: u64,
    pub memory_free_bytes: u64,
    pub disk_free_bytes: Option<u64>,
    /// What is missing to use a GPU; None where there is one that can be used.
    pub gpu_missing: Option<String>,
}

/// One recipe's needs, or one size's.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    pub name: String,
    /// Most bytes of buffers: weights, gradients, moments, activations, scratch. Where nothing fits, the least that is needed.
    pub peak_bytes: u64,
    /// What training may take.
    pub available_bytes: u64,
    /// Host memory that may be locked for moments; None on a CPU, and for a GPU whose host is not known.
    pub host_available_bytes: Option<u64>,
    pub fits: bool,
    /// What to change where it does not fit.
    pub remedy: Option<String>,
    /// Tokens that the run processes; of a size none, since it names no data.
    pub tokens: Option<u64>,
    /// From the matrix-product rate measured now, on the device that is planned for.
    pub eta_s: Option<f64>,
    pub choices: Choices,
    /// The parts of the peak on a GPU.
    pub bytes: Option<Bytes>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Choices {
    pub tuner: &'static str,
    pub dtype: &'static str,
    /// Rows at a time: the recipe's, or fewer with as many more micro-batches.
    pub rows: usize,
    pub row_tokens: usize,
    /// Processes that train together, a GPU each, as WORLD_SIZE has it; the plan is that of the one with most moments.
    pub ranks: usize,
    /// Layers that recompute matrix products in the backward pass, because the GPU has no room to keep them.
    pub recomputing_layers: usize,
    /// Layers by what they recompute in the backward pass.
    pub recompute: Recomputing,
    /// Tensors whose moments lie in pinned host memory, and their bytes there.
    pub offloaded_tensors: usize,
    pub offloaded_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    machine: Machine,
    stages: Vec<StagePlan>,
}

/// Host memory of a machine that nobody described: enough.
const UNKNOWN: usize = usize::MAX;

/// Where the planned training is to run.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    Cpu {
        free_bytes: u64,
    },
    /// GPUs, here or not, one for each of the processes that train together, and what training may take of each and of their host.
    Gpu {
        card: DeviceProperties,
        room: Room,
        n_ranks: usize,
    },
}

impl Place {
    /// A device of this machine for one process, as training finds it.
    ///
    /// # Errors
    /// A GPU that does not answer.
    pub fn here(device: Device, machine: &Machine) -> Result<Place> {
        Ok(match device {
            Device::Cpu => Place::Cpu {
                free_bytes: machine.memory_free_bytes,
            },
            Device::Cuda(cuda) => Place::Gpu {
                card: cuda.properties(),
                room: Room {
                    gpu_bytes: cuda.available_bytes()?,
                    host_bytes: HostMemory::now().lockable_bytes(),
                },
                n_ranks: 1,
            },
        })
    }

    fn n_ranks(self) -> usize {
        match self {
            // All share this machine's memory and cores.
            Place::Cpu { .. } => 1,
            Place::Gpu { n_ranks, .. } => n_ranks,
        }
    }
}

pub fn run(args: &Doctor, ui: &Ui) -> Result<()> {
    let device = load::device(&args.device.device)?;
    let bytes = |flag, gib: Option<f64>| gib.map(|gib| load::memory_bytes(flag, gib)).transpose();
    let limit = bytes("--memory", args.memory)?;
    let host_bytes = match (bytes("--host-memory", args.host_memory)?, device) {
        (Some(bytes), _) => HostMemory {
            total_bytes: bytes as u64,
            available_bytes: bytes as u64,
        }
        .lockable_bytes(),
        (None, Device::Cuda(_)) => HostMemory::now().lockable_bytes(),
        (None, Device::Cpu) => UNKNOWN,
    };
    // As if all ranks were on one host, which is how training plans.
    let n_ranks = misused(launch::n_ranks(&env::get))?;
    let host_bytes = match host_bytes {
        UNKNOWN => UNKNOWN,
        bytes => bytes / n_ranks,
    };
    let mut machine = machine(Path::new("."));
    machine.device = device.to_string();
    let place = match (device, limit) {
        (Device::Cuda(cuda), limit) => {
            if let Some(bytes) = limit {
                cuda.limit_memory(bytes);
            }
            machine.memory_bytes = cuda.total_bytes() as u64;
            machine.memory_free_bytes = cuda.free_bytes()? as u64;
            Place::Gpu {
                card: cuda.properties(),
                room: Room {
                    gpu_bytes: cuda.available_bytes()?,
                    host_bytes,
                },
                n_ranks,
            }
        }
        (Device::Cpu, None) => Place::Cpu {
            free_bytes: machine.memory_free_bytes,
        },
        (Device::Cpu, Some(bytes)) => {
            let card = DeviceProperties::with_memory(bytes);
            Place::Gpu {
                card,
                room: Room {
                    gpu_bytes: card.buffer_bytes(),
                    host_bytes,
                },
                n_ranks,
            }
        }
    };
    // A rate of this machine says nothing of a GPU that is not there.
    let is_here = matches!(
        (device, place),
        (Device::Cpu, Place::Cpu { .. }) | (Device::Cuda(_), _)
    );
    let flops = match is_here && !args.recipes.is_empty() {
        true => Some(matmul_flops(device)?),
        false => None,
    };
    let mut stages = Vec::new();
    for path in &args.recipes {
        stages.push(recipe_plan(path, place, flops)?);
    }
    if let Some(size) = &args.size {
        stages.extend(size_plans(size, place)?);
    }
    let report = Report { machine, stages };
    ui.result(&report, || {
        let mut text = report.machine.describe();
        for stage in &report.stages {
            text.push('\n');
            text.push_str(&stage.describe());
        }
        text
    })
}

impl StagePlan {
    fn describe(&self) -> String {
        let verdict = match &self.remedy {
            None => format!(
                "fits in {}: {} rows of {} tokens at a time, {} layers recompute matrix products in the backward pass, {} of moments in host memory{}",
                size(self.available_bytes),
                self.choices.rows,
                self.choices.row_tokens,
                self.choices.recomputing_layers,
                size(self.choices.offloaded_bytes),
                self.host_available_bytes
                    .map_or(String::new(), |bytes| format!(
                        " ({} can be had)",
                        size(bytes)
                    ))
            ),
            Some(remedy) => format!("DOES NOT FIT in {}: {remedy}", size(self.available_bytes)),
        };
        let tokens = self
            .tokens
            .map_or(String::new(), |tokens| format!("; {tokens} tokens"));
        let eta = self.eta_s.map_or(String::new(), |seconds| {
            let duration = std::time::Duration::from_secs_f64(seconds);
            format!(", about {}", clock(duration))
        });
        let each = match self.choices.ranks {
            1 => String::new(),
            n_ranks => format!(" on each of {n_ranks} GPUs"),
        };
        format!(
            "{}: {} at most{each}, {verdict}{tokens}{eta}",
            self.name,
            size(self.peak_bytes)
        )
    }
}

impl Machine {
    pub fn describe(&self) -> String {
        let disk = self.disk_free_bytes.map_or(String::new(), |bytes| {
            format!(" · {} of disk free", size(bytes))
        });
        let gpu = self.gpu_missing.as_ref().map_or(String::new(), |missing| {
            format!("\nno GPU that this program can use: {missing}")
        });
        format!(
            "{} ({}) · {} threads · {} of {} memory free{disk}{gpu}",
            self.processor,
            self.vectors,
            self.threads,
            size(self.memory_free_bytes),
            size(self.memory_bytes)
        )
    }
}

/// Looks at the machine; `place` decides which disk.
pub fn machine(place: &Path) -> Machine {
    let mut system = sysinfo::System::new();
    system.refresh_cpu_all();
    let memory = HostMemory::now();
    let processor = system
        .cpus()
        .first()
        .map_or("unknown processor".to_owned(), |cpu| {
            cpu.brand().trim().to_owned()
        });
    Machine {
        device: "cpu".to_owned(),
        processor,
        vectors: kernel::cpu_vectors(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory.total_bytes,
        memory_free_bytes: memory.available_bytes,
        disk_free_bytes: disk_free(place),
        gpu_missing: kernel::cuda::missing().map(|missing| missing.to_string()),
    }
}

/// Free bytes on the disk that holds `place`: the mount point with the longest matching path.
fn disk_free(place: &Path) -> Option<u64> {
    let place = std::path::absolute(place).ok()?;
    let disks = sysinfo::Disks::new_with_refreshed_list();
    let holding = disks
        .iter()
        .filter(|disk| place.starts_with(disk.mount_point()));
    holding
        .max_by_key(|disk| disk.mount_point().as_os_str().len())
        .map(sysinfo::Disk::available_space)
}

/// What a recipe needs, from its base's configuration and its data.
fn recipe_plan(path: &Path, place: Place, flops: Option<f64>) -> Result<StagePlan> {
    let recipe = Recipe::load(path, &[])?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let base = base_folder(&recipe.base, folder)?;
    let config = Config::load(&base)?;
    let tokenizer = load::tokenizer(&base)?;
    let split = load_split(&recipe, folder)?;
    let data = rows(
        &recipe,
        folder,
        split.as_ref(),
        tokenizer.as_ref(),
        config.vocab_size,
    )?;

    // 1. tokens of the whole run: each source as often as its weight says, in whole rows where steps are counted
    let weights: Vec<f64> = recipe
        .data
        .sources
        .iter()
        .map(|source| source.weight)
        .collect();
    let an_epoch: f64 = data
        .train
        .iter()
        .map(|document| document.encoded.input_ids.len() as f64 * weights[document.source as usize])
        .sum();
    let tokens = run_tokens(&recipe, an_epoch);

    // 2. memory
    let lora = recipe.tuner.lora();
    let training = Training {
        config: &config,
        dtype: match recipe.dtype {
            Storage::F32 => DType::F32,
            Storage::Bf16 => DType::Bf16,
        },
        lora: lora.as_ref(),
        rows: StepRows {
            rows: recipe.batch.rows,
            row_tokens: recipe.data.row_tokens,
            accumulate: recipe.batch.accumulate,
            at_once: recipe.batch.rows,
        },
        rank: 0,
        n_ranks: place.n_ranks(),
    };
    let name = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("recipe");
    let plan = memory_plan(name.to_owned(), &training, place)?;

    // 3. time: 6 operations a weight and token, 4 where the base is frozen, at the rate just measured
    let per_token = if lora.is_none() { 6.0 } else { 4.0 } * config.n_params() as f64;
    Ok(StagePlan {
        tokens: Some(tokens as u64),
        eta_s: flops.map(|flops| tokens * per_token / flops / place.n_ranks() as f64),
        ..plan
    })
}

/// Tokens of a whole run, of which an epoch has `an_epoch`.
pub fn run_tokens(recipe: &Recipe, an_epoch: f64) -> f64 {
    let a_step = (recipe.batch.rows * recipe.batch.accumulate * recipe.data.row_tokens) as f64;
    match recipe.run.steps {
        Some(steps) => steps as f64 * a_step.min(an_epoch),
        None => an_epoch * recipe.run.epochs as f64,
    }
}

/// What a size needs with the rows of the default recipe.
fn size_plans(size: &str, place: Place) -> Result<Vec<StagePlan>> {
    let Some(json) = sizes::config(size) else {
        misuse!("no size `{size}`; there are {}", sizes::names());
    };
    let config = Config::from_json(&json)?;
    let (batch, data) = (BatchConfig::default(), DataConfig::default());
    let lora = LoraConfig {
        rank: 16,
        alpha: 32.0,
        dropout: 0.0,
        targets: Vec::new(),
    };
    [("full", None), ("LoRA", Some(&lora))]
        .into_iter()
        .map(|(tuner, lora)| {
            let training = Training {
                config: &config,
                dtype: match place {
                    Place::Cpu { .. } => DType::F32,
                    Place::Gpu { .. } => DType::Bf16,
                },
                lora,
                rows: StepRows {
                    rows: batch.rows,
                    row_tokens: data.row_tokens,
                    accumulate: batch.accumulate,
                    at_once: batch.rows,
                },
                rank: 0,
                n_ranks: place.n_ranks(),
            };
            memory_plan(format!("{size} {tuner}"), &training, place)
        })
        .collect()
}

/// The memory of a training, without tokens and time.
pub fn memory_plan(name: String, training: &Training, place: Place) -> Result<StagePlan> {
    let rows = training.rows;
    let mut plan = StagePlan {
        name,
        peak_bytes: 0,
        available_bytes: 0,
        host_available_bytes: None,
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
    match place {
        Place::Cpu { free_bytes } => {
            plan.peak_bytes = training.cpu_bytes();
            plan.available_bytes = free_bytes;
            plan.fits = plan.peak_bytes < free_bytes;
            plan.remedy = (!plan.fits).then(|| {
                let half = match training.dtype {
                    DType::F32 => ", or dtype = \"bf16\"",
                    DType::Bf16 => "",
                };
                let lighter = train::lighter(training.lora.is_some());
                format!(
                    "lower batch.rows or data.row_tokens, {lighter}{half}, or close other programs"
                )
            });
        }
        Place::Gpu { card, room, .. } => {
            plan.available_bytes = room.gpu_bytes as u64;
            plan.host_available_bytes =
                (room.host_bytes != UNKNOWN).then_some(room.host_bytes as u64);
            match tightest(training, card, room) {
                Ok(memory) => {
                    plan.peak_bytes = memory.peak_bytes() as u64;
                    plan.choices.rows = memory.rows;
                    plan.choices.recompute = memory.recomputing();
                    plan.choices.offloaded_tensors = memory.n_offloaded();
                    plan.choices.offloaded_bytes = memory.host_bytes as u64;
                    plan.choices.recomputing_layers = memory.recomputing().n_products();
                    plan.bytes = Some(memory.bytes);
                }
                Err(error @ train::Error::DoesNotFitHost { needed, .. }) => {
                    plan.peak_bytes = room.gpu_bytes as u64;
                    plan.choices.offloaded_bytes = needed as u64;
                    plan.fits = false;
                    plan.remedy = Some(error.to_string());
                }
                Err(error @ train::Error::DoesNotFit { needed, .. }) => {
                    plan.peak_bytes = needed as u64;
                    plan.fits = false;
                    plan.remedy = Some(error.to_string());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(plan)
}

/// The plan of the rank that has room for the fewest rows, and takes most.
///
/// # Errors
/// As [`MemoryPlan::new`], for any of them.
fn tightest(training: &Training, card: DeviceProperties, room: Room) -> train::Result<MemoryPlan> {
    let mut tightest = MemoryPlan::new(training, card, room)?;
    for rank in 1..training.n_ranks {
        let plan = MemoryPlan::new(&Training { rank, ..*training }, card, room)?;
        let order = |plan: &MemoryPlan| (std::cmp::Reverse(plan.rows), plan.peak_bytes());
        if order(&plan) > order(&tightest) {
            tightest = plan;
        }
    }
    Ok(tightest)
}

/// Operations a second of one product of a middling shape, after a first run.
pub fn matmul_flops(device: Device) -> Result<f64> {
    let values = |n: usize| {
        (0..n)
            .map(|i| ((i * 2_654_435_761) % 1000) as f32 / 1000.0 - 0.5)
            .collect::<Vec<f32>>()
    };
    // In the type that training multiplies in there.
    let (t, n, dtype) = match device {
        Device::Cpu => (512, 1024, DType::F32),
        Device::Cuda(_) => (4096, 4096, DType::Bf16),
    };
    let matrix = |rows: usize, cols: usize| {
        Tensor::from_f32(&[rows, cols], values(rows * cols))
            .to_dtype(dtype)
            .to_device(device)
    };
    let (x, w) = (matrix(t, n)?, matrix(n, n)?);
    let mut y = Tensor::zeros_on(&[t, n], dtype, device)?;
    ops::matmul::forward(&mut y, &x, &w)?;
    device.synchronize()?;
    let started = Instant::now();
    const REPEATS: usize = 4;
    for _ in 0..REPEATS {
        ops::matmul::forward(&mut y, &x, &w)?;
    }
    device.synchronize()?;
    Ok((2 * t * n * n * REPEATS) as f64 / started.elapsed().as_secs_f64())
}
