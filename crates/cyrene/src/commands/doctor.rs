//! `cyrene doctor`: what this machine has, what a recipe will need of it, and whether that fits, before an hour is spent.

use std::path::Path;

use anyhow::Result;
use kernel::cuda::DeviceProperties;
use kernel::host::HostMemory;
use kernel::{Device, timing};
use model::{Config, sizes};
use serde::Serialize;
use train::launch;
use train::memory::Room;
use train::needs::{self, StagePlan, Target, UNKNOWN};

use crate::cli::Doctor;
use crate::machine::Machine;
use crate::recipe::Recipe;
use crate::recipe_inputs::{self, Inputs};
use crate::ui::{Ui, clock_of, misused, size};
use crate::{env, load, misuse};

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
    let mut machine = Machine::here(Path::new("."));
    machine.device = device.to_string();
    let target = match (device, limit) {
        (Device::Cuda(cuda), limit) => {
            if let Some(bytes) = limit {
                cuda.limit_memory(bytes);
            }
            machine.memory_bytes = cuda.total_bytes() as u64;
            machine.memory_free_bytes = cuda.free_bytes()? as u64;
            Target::Gpu {
                gpu: cuda.properties(),
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
            let gpu = DeviceProperties::with_memory(bytes);
            Target::Gpu {
                gpu,
                room: Room {
                    gpu_bytes: gpu.buffer_bytes(),
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
        true => Some(timing::matmul_flops(device)?),
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
    let limit = plan.limit();
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
        Some(remedy) => format!("DOES NOT FIT in {}: {remedy}", size(limit.available_bytes)),
    };
    let tokens = plan
        .tokens
        .map_or(String::new(), |tokens| format!("; {tokens} tokens"));
    let eta = plan.eta_s.map_or(String::new(), |seconds| {
        format!(", about {}", clock_of(seconds))
    });
    let each = match plan.choices.ranks {
        1 => String::new(),
        n_ranks => format!(" on each of {n_ranks} GPUs"),
    };
    format!(
        "{}: {} of {} at most{each}, {verdict}{tokens}{eta}",
        plan.name,
        size(limit.needed_bytes),
        limit.what
    )
}

/// What a recipe needs, from its base's configuration and its data.
fn recipe_plan(path: &Path, target: Target, flops: Option<f64>) -> Result<StagePlan> {
    let recipe = Recipe::load(path, &[])?;
    recipe_inputs::check(&recipe)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let base = recipe_inputs::base_folder(&recipe.base, folder)?;
    let inputs = Inputs::open(&recipe, folder, base)?;
    // Each source as often as its weight says.
    let an_epoch: f64 = inputs
        .examples
        .train
        .iter()
        .map(|one| {
            let source = &recipe.data.sources[one.encoded.origin.source_idx as usize];
            one.encoded.input_ids.len() as f64 * source.weight
        })
        .sum();
    let name = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("recipe");
    let run = recipe.planned(&inputs.config);
    Ok(run.plan(name, an_epoch, target, flops)?)
}

/// What a size needs with the rows of the default recipe.
fn size_plans(size: &str, target: Target) -> Result<[StagePlan; 2]> {
    let Some(json) = sizes::config(size) else {
        misuse!("no size `{size}`; there are {}", sizes::names());
    };
    Ok(needs::of_size(size, &Config::from_json(&json)?, target)?)
}
