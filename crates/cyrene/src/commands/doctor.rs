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
use train::memory::{Room, StepRows, Training};
use train::needs::{self, StagePlan, Target, UNKNOWN};
use train::{BatchConfig, DataConfig};

use super::train::{base_folder, load_split, rows};
use crate::cli::Doctor;
use crate::recipe::{Recipe, Storage};
use crate::ui::{Ui, clock, misused, size};
use crate::{env, load, misuse};

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// Name of the CPU.
    pub processor: String,
    /// The instructions that the CPU's arithmetic has chosen.
    pub vectors: &'static str,
    /// Threads that it runs at once.
    pub threads: usize,
    /// Memory of the device.
    pub memory_bytes: u64,
    /// What of it is free.
    pub memory_free_bytes: u64,
    /// Free on the disk of the working folder; None where the system does not say.
    pub disk_free_bytes: Option<u64>,
    /// What is missing to use a GPU; None where there is one that can be used.
    pub gpu_missing: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    machine: Machine,
    stages: Vec<StagePlan>,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
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
    let target = match (device, limit) {
        (Device::Cuda(cuda), limit) => {
            if let Some(bytes) = limit {
                cuda.limit_memory(bytes);
            }
            machine.memory_bytes = cuda.total_bytes() as u64;
            machine.memory_free_bytes = cuda.free_bytes()? as u64;
            Target::Gpu {
                card: cuda.properties(),
                room: Room {
                    gpu_bytes: cuda.available_bytes()?,
                    host_bytes,
                },
                n_ranks,
            }
        }
        (Device::Cpu, None) => Target::Cpu {
            free_bytes: machine.memory_free_bytes,
        },
        (Device::Cpu, Some(bytes)) => {
            let card = DeviceProperties::with_memory(bytes);
            Target::Gpu {
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
        (device, target),
        (Device::Cpu, Target::Cpu { .. }) | (Device::Cuda(_), _)
    );
    let flops = match is_here && !args.recipes.is_empty() {
        true => Some(matmul_flops(device)?),
        false => None,
    };
    let mut stages = Vec::new();
    for path in &args.recipes {
        stages.push(recipe_plan(path, target, flops)?);
    }
    if let Some(size) = &args.size {
        stages.extend(size_plans(size, target)?);
    }
    let report = Report { machine, stages };
    ui.result(&report, || {
        let mut text = report.machine.describe();
        for stage in &report.stages {
            text.push('\n');
            text.push_str(&describe(stage));
        }
        text
    })
}

/// A line for the terminal.
fn describe(plan: &StagePlan) -> String {
    let verdict = match &plan.remedy {
        None => format!(
            "fits in {}: {} rows of {} tokens at a time, {} layers recompute matrix products in the backward pass, {} of moments in host memory{}",
            size(plan.available_bytes),
            plan.choices.rows,
            plan.choices.row_tokens,
            plan.choices.recomputing_layers,
            size(plan.choices.offloaded_bytes),
            plan.host_available_bytes
                .map_or(String::new(), |bytes| format!(
                    " ({} can be had)",
                    size(bytes)
                ))
        ),
        Some(remedy) => format!("DOES NOT FIT in {}: {remedy}", size(plan.available_bytes)),
    };
    let tokens = plan
        .tokens
        .map_or(String::new(), |tokens| format!("; {tokens} tokens"));
    let eta = plan.eta_s.map_or(String::new(), |seconds| {
        let duration = std::time::Duration::from_secs_f64(seconds);
        format!(", about {}", clock(duration))
    });
    let each = match plan.choices.ranks {
        1 => String::new(),
        n_ranks => format!(" on each of {n_ranks} GPUs"),
    };
    format!(
        "{}: {} at most{each}, {verdict}{tokens}{eta}",
        plan.name,
        size(plan.peak_bytes)
    )
}

impl Machine {
    /// A line for the terminal.
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
fn recipe_plan(path: &Path, target: Target, flops: Option<f64>) -> Result<StagePlan> {
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
        n_ranks: target.n_ranks(),
    };
    let name = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("recipe");
    let plan = needs::plan(name.to_owned(), &training, target)?;

    // 3. time: 6 operations a weight and token, 4 where the base is frozen, at the rate just measured
    let per_token = if lora.is_none() { 6.0 } else { 4.0 } * config.n_params() as f64;
    Ok(StagePlan {
        tokens: Some(tokens as u64),
        eta_s: flops.map(|flops| tokens * per_token / flops / target.n_ranks() as f64),
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
fn size_plans(size: &str, target: Target) -> Result<Vec<StagePlan>> {
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
                dtype: match target {
                    Target::Cpu { .. } => DType::F32,
                    Target::Gpu { .. } => DType::Bf16,
                },
                lora,
                rows: StepRows {
                    rows: batch.rows,
                    row_tokens: data.row_tokens,
                    accumulate: batch.accumulate,
                    at_once: batch.rows,
                },
                rank: 0,
                n_ranks: target.n_ranks(),
            };
            Ok(needs::plan(format!("{size} {tuner}"), &training, target)?)
        })
        .collect()
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
