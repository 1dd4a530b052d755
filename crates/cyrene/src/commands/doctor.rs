//! `cyrene doctor`: what this machine has, what a recipe will need of it, and whether that fits, before an hour is spent.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use kernel::{DType, Device, Tensor, ops};
use model::{Config, Keep, Saved};
use serde::Serialize;
use text::Tokenizer;
use train::TunerConfig;
use train::step::RESERVE_BYTES;

use super::train::{base_folder, load_split, rows};
use crate::cli::Doctor;
use crate::load;
use crate::recipe::{Recipe, Storage};
use crate::ui::{Ui, clock, size};

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub device: String,
    pub processor: String,
    pub threads: usize,
    pub memory_bytes: u64,
    pub memory_free_bytes: u64,
    pub disk_free_bytes: Option<u64>,
    /// Whether an NVIDIA driver is installed.
    pub nvidia_driver: bool,
}

/// One recipe's needs.
#[derive(Debug, Clone, Serialize)]
pub struct StagePlan {
    pub name: String,
    /// Weights, gradients, optimizer state and saved activations of one micro-batch.
    pub peak_bytes: u64,
    pub fits: bool,
    /// Tokens that the run processes.
    pub tokens: u64,
    /// From the matrix-product rate measured now.
    pub eta_s: f64,
    pub choices: Choices,
}

#[derive(Debug, Clone, Serialize)]
pub struct Choices {
    pub tuner: &'static str,
    pub dtype: &'static str,
    pub rows: usize,
    pub row_tokens: usize,
    /// Layers that compute a part twice because the GPU has no room to keep it.
    pub recomputing_layers: usize,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    machine: Machine,
    stages: Vec<StagePlan>,
}

pub fn run(args: &Doctor, ui: &Ui) -> Result<()> {
    let device = load::device(&args.device.device)?;
    let mut machine = machine(Path::new("."));
    machine.device = device.to_string();
    if let Device::Cuda(card) = device {
        machine.memory_bytes = card.total_bytes() as u64;
        machine.memory_free_bytes = card.free_bytes()? as u64;
    }
    let flops = if args.recipes.is_empty() {
        0.0
    } else {
        matmul_flops(device)?
    };
    let mut stages = Vec::new();
    for path in &args.recipes {
        stages.push(plan(path, device, &machine, flops)?);
    }
    let report = Report { machine, stages };
    ui.result(&report, || {
        let mut text = report.machine.describe();
        for stage in &report.stages {
            let verdict = if stage.fits { "fits" } else { "DOES NOT FIT: lower batch.rows or data.row_tokens, use tuner.kind = \"lora\", or dtype = \"bf16\"" };
            text.push_str(&format!("\n{}: {} at most, {verdict}; {} tokens, about {}", stage.name, size(stage.peak_bytes), stage.tokens, clock(std::time::Duration::from_secs_f64(stage.eta_s))));
        }
        text
    })
}

impl Machine {
    pub fn describe(&self) -> String {
        let disk = self.disk_free_bytes.map_or(String::new(), |bytes| {
            format!(" · {} of disk free", size(bytes))
        });
        let driver = if self.nvidia_driver {
            " · NVIDIA driver present"
        } else {
            ""
        };
        format!(
            "{} · {} threads · {} of {} memory free{disk}{driver}",
            self.processor,
            self.threads,
            size(self.memory_free_bytes),
            size(self.memory_bytes)
        )
    }
}

/// Looks at the machine; `place` decides which disk.
pub fn machine(place: &Path) -> Machine {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    system.refresh_cpu_all();
    let processor = system
        .cpus()
        .first()
        .map_or("unknown processor".to_owned(), |cpu| {
            cpu.brand().trim().to_owned()
        });
    Machine {
        device: "cpu".to_owned(),
        processor,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: system.total_memory(),
        memory_free_bytes: system.available_memory(),
        disk_free_bytes: disk_free(place),
        nvidia_driver: nvidia_driver(),
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

fn nvidia_driver() -> bool {
    let places: &[&str] = if cfg!(windows) {
        &["C:\\Windows\\System32\\nvcuda.dll"]
    } else {
        &[
            "/proc/driver/nvidia/version",
            "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
            "/usr/lib64/libcuda.so.1",
        ]
    };
    places.iter().any(|path| PathBuf::from(path).exists())
}

/// What a recipe needs, from its base's configuration and its data.
fn plan(path: &Path, device: Device, machine: &Machine, flops: f64) -> Result<StagePlan> {
    let recipe = Recipe::load(path, &[])?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let base = base_folder(&recipe.base, folder)?;
    let config = Config::load(&base)?;
    let tokenizer = base
        .join("tokenizer.json")
        .exists()
        .then(|| Tokenizer::load(&base))
        .transpose()?;
    let split = load_split(&recipe, folder)?;
    let data = rows(&recipe, folder, split.as_ref(), tokenizer.as_ref())?;

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
    let a_step = (recipe.batch.rows * recipe.batch.accumulate * recipe.data.row_tokens) as f64;
    let tokens = match recipe.run.steps {
        Some(steps) => steps as f64 * a_step.min(an_epoch),
        None => an_epoch * recipe.run.epochs as f64,
    };

    // 2. memory: weights, what trains with gradient and two moments, activations of a micro-batch
    let dtype = match recipe.dtype {
        Storage::F32 => DType::F32,
        Storage::Bf16 => DType::Bf16,
    };
    let n_params = config.n_params();
    let (tuner, trained) = match &recipe.tuner {
        TunerConfig::Full {} => ("full", n_params),
        TunerConfig::Lora { rank, .. } => ("lora", config.n_adapter_params(*rank)),
    };
    let micro_tokens = recipe.batch.rows * recipe.data.row_tokens;
    let adapter = if tuner == "lora" { 4 * trained } else { 0 };
    let weight_size = if tuner == "lora" {
        4
    } else {
        dtype.size() as u64
    };
    // A gradient in f32 and two moments.
    let (moment_size, reserve) = match device {
        Device::Cpu => (4, 0),
        Device::Cuda(_) => (weight_size, RESERVE_BYTES as u64),
    };
    let held = n_params * dtype.size() as u64 + adapter + (4 + 2 * moment_size) * trained + reserve;
    let keeps = match device {
        Device::Cpu => Vec::new(),
        Device::Cuda(_) => {
            let budget = machine.memory_free_bytes.saturating_sub(held) as usize;
            let least = vec![Keep::Input; config.layer_types.len()];
            Saved::fitting(&config, micro_tokens, dtype, budget).unwrap_or(least)
        }
    };
    let peak_bytes = held + Saved::bytes_for(&config, micro_tokens, dtype, &keeps) as u64;
    let n_twice = keeps.iter().filter(|keep| **keep != Keep::All).count();

    // 3. time: 6 operations a weight and token, 4 where the base is frozen, at the rate just measured
    let per_token = (if tuner == "full" { 6.0 } else { 4.0 }) * n_params as f64;
    Ok(StagePlan {
        name: path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or("recipe")
            .to_owned(),
        peak_bytes,
        fits: peak_bytes < machine.memory_free_bytes,
        tokens: tokens as u64,
        eta_s: tokens * per_token / flops,
        choices: Choices {
            tuner,
            dtype: if dtype == DType::F32 { "f32" } else { "bf16" },
            rows: recipe.batch.rows,
            row_tokens: recipe.data.row_tokens,
            recomputing_layers: n_twice,
        },
    })
}

/// Operations a second of one product of a middling shape, after a first run.
fn matmul_flops(device: Device) -> Result<f64> {
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
