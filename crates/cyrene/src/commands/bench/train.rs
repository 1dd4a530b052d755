//! `cyrene bench train`: optimizer steps on random tokens and random weights of a real shape.

use anyhow::Result;
use kernel::host::HostMemory;
use kernel::{DType, Device, timing};
use model::{Config, LoraConfig, Model};
use serde::Serialize;
use train::OptimizerConfig;
use train::bench::{RandomSteps, Timing, flops_per_token};
use train::memory::{Bytes, MemoryPlan, Recomputing, StepRows, Training};
use train::step::Trainer;

use super::{device_name, shapes, storage};
use crate::cli::{BenchTrain as Args, TunerArg};
use crate::ui::{Ui, size};
use crate::{load, misuse};

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    size: String,
    tuner: &'static str,
    dtype: String,
    rows: usize,
    row_tokens: usize,
    document_tokens: usize,
    accumulate: usize,
    tokens_per_s: f64,
    /// Median of an optimizer step.
    ms_step: f64,
    /// From the call of the first step to its end: what a user waits at the start, after the weights are there.
    ms_first_step: f64,
    /// Rows that went at once, of `rows`.
    micro_rows: usize,
    /// Layers by what they recomputed in the backward pass.
    recompute: Recomputing,
    /// Bytes of moments in host memory.
    offloaded_bytes: usize,
    /// Most bytes of buffers at once, in the driver's pages; `None` on a CPU, as the three below.
    peak_bytes: Option<usize>,
    /// What the memory plan said before anything was allocated.
    predicted_peak_bytes: Option<usize>,
    /// The plan's parts.
    predicted: Option<Bytes>,
    /// What is in use of the GPU beyond buffers: context, kernels, other programs.
    overhead_bytes: Option<usize>,
    /// 10¹² operations a second that the arithmetic needs, recomputation not counted.
    model_tflops: f64,
    /// What the GPU reaches in one large product, in the same run; `None` on a CPU.
    ceiling_tflops: Option<f64>,
    device: String,
    device_name: String,
    loss: f64,
}

/// The adapter that is timed, if one is.
fn lora(args: &Args) -> Option<LoraConfig> {
    (args.tuner == TunerArg::Lora).then(|| LoraConfig {
        rank: 16,
        alpha: 32.0,
        dropout: 0.01,
        targets: Vec::new(),
    })
}

fn step_rows(args: &Args) -> StepRows {
    StepRows {
        rows: args.rows,
        row_tokens: args.row_tokens,
        accumulate: args.accumulate,
        at_once: args.rows,
    }
}

/// A GPU's memory is planned by the trainer; a CPU would swap, or end the program.
///
/// # Errors
/// Misuse, where the machine has less memory free than the steps need.
fn refuse_too_large(config: &Config, args: &Args, dtype: DType) -> Result<()> {
    let lora = lora(args);
    let training = Training {
        config,
        dtype,
        lora: lora.as_ref(),
        rows: step_rows(args),
        rank: 0,
        n_ranks: 1,
    };
    let (needed, free) = (training.cpu_bytes(), HostMemory::now().available_bytes);
    if needed > free {
        misuse!(
            "the steps need {} of memory, and {} are free; choose a smaller --size, fewer --rows or --row-tokens{}",
            size(needed),
            size(free),
            match args.tuner {
                TunerArg::Full => ", or --tuner lora",
                TunerArg::Lora => "",
            }
        );
    }
    Ok(())
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
    check(args, device)?;
    let document_tokens = args.document_tokens.unwrap_or(args.row_tokens);
    let ceiling_tflops = match device {
        Device::Cpu => None,
        Device::Cuda(card) => Some(timing::product_tflops(card)?),
    };

    // 1. weights
    let device_name = device_name(device);
    ui.note(format_args!(
        "{} parameters, random, on {device_name}",
        config.n_params()
    ));
    let dtype = storage(args.dtype, device);
    if device == Device::Cpu {
        refuse_too_large(&config, args, dtype)?;
    }
    let flops_per_token = flops_per_token(&config, args.tuner == TunerArg::Lora, document_tokens);
    let vocab_size = config.vocab_size;
    let model = random_model(args, config, dtype, device)?;
    let rows = step_rows(args);
    let mut trainer = Trainer::new(model, &OptimizerConfig::default(), 3, rows)?;
    let memory = trainer.memory.clone();
    if let Some(memory) = &memory {
        let peak = size(memory.peak_bytes() as u64);
        ui.note(format_args!("{}; {peak} at most", memory.describe()));
    }

    // 2. steps
    let steps = RandomSteps {
        rows,
        document_tokens,
        vocab_size,
        micro_rows: memory.as_ref().map_or(args.rows, |memory| memory.rows),
    };
    let timing = steps.time(&mut trainer, args.steps, |step, ms, loss| {
        ui.note(format_args!("step {step}: {ms:.1} ms, loss {loss:.4}"));
    })?;
    if args.profile {
        profile(&steps, &mut trainer, device, ui)?;
    }

    // 3. figures
    let tokens_per_s = steps.n_tokens() as f64 / timing.ms_step * 1e3;
    let line = Line {
        model_tflops: tokens_per_s * flops_per_token / 1e12,
        tokens_per_s,
        ceiling_tflops,
        device_name,
        ..line(args, &steps, &timing, memory.as_ref(), dtype, device)?
    };
    ui.result(&line, || line.text())
}

/// Whether the numbers of the command line can be computed with.
fn check(args: &Args, device: Device) -> Result<()> {
    let n_rows = args.rows.checked_mul(args.accumulate);
    let Some(n_tokens) = n_rows.and_then(|n| n.checked_mul(args.row_tokens)) else {
        misuse!(
            "{} times {} rows of {} tokens are too many",
            args.accumulate,
            args.rows,
            args.row_tokens
        );
    };
    if args.profile && device == Device::Cpu {
        misuse!("--profile times the kernels of a GPU; this is the CPU");
    }
    if n_tokens == 0 || args.document_tokens == Some(0) || args.steps == 0 {
        misuse!("rows, row-tokens, document-tokens, accumulate and steps must be 1 or more");
    }
    Ok(())
}

/// Weights from a seed, with an adapter if one is to be trained.
fn random_model(args: &Args, config: Config, dtype: DType, device: Device) -> Result<Model> {
    let mut model = Model::init(config, 1, dtype).to_device(device)?;
    if let Some(lora) = lora(args) {
        model.attach_lora(&lora, 2)?;
    }
    if let Device::Cuda(card) = device {
        card.reset_peak();
    }
    Ok(model)
}

/// Says what each kernel of a step took.
fn profile(steps: &RandomSteps, trainer: &mut Trainer, device: Device, ui: &Ui) -> Result<()> {
    let Device::Cuda(card) = device else {
        return Ok(());
    };
    card.start_profile();
    steps.once(trainer)?;
    for (name, ms, calls) in card.take_profile() {
        ui.note(format_args!("{ms:9.2} ms {calls:5} x {name}"));
    }
    Ok(())
}

/// What is known of a case but for its rates.
fn line(
    args: &Args,
    steps: &RandomSteps,
    timing: &Timing,
    memory: Option<&MemoryPlan>,
    dtype: DType,
    device: Device,
) -> Result<Line> {
    Ok(Line {
        bench: "train",
        size: args.size.clone(),
        tuner: match args.tuner {
            TunerArg::Full => "full",
            TunerArg::Lora => "lora",
        },
        dtype: dtype.to_string(),
        rows: args.rows,
        row_tokens: args.row_tokens,
        document_tokens: steps.document_tokens,
        accumulate: args.accumulate,
        tokens_per_s: 0.0,
        ms_step: timing.ms_step,
        ms_first_step: timing.ms_first_step,
        micro_rows: steps.micro_rows,
        recompute: memory.map_or_else(Recomputing::default, MemoryPlan::recomputing),
        offloaded_bytes: memory.map_or(0, |memory| memory.host_bytes),
        peak_bytes: match device {
            Device::Cpu => None,
            Device::Cuda(card) => Some(card.allocated_bytes().1),
        },
        predicted_peak_bytes: memory.map(MemoryPlan::peak_bytes),
        predicted: memory.map(|memory| memory.bytes),
        overhead_bytes: match device {
            Device::Cpu => None,
            Device::Cuda(card) => {
                let in_use = card.total_bytes().saturating_sub(card.free_bytes()?);
                Some(in_use.saturating_sub(card.allocated_bytes().0))
            }
        },
        model_tflops: 0.0,
        ceiling_tflops: None,
        device: device.to_string(),
        device_name: String::new(),
        loss: timing.loss,
    })
}

impl Line {
    fn text(&self) -> String {
        let share = self.ceiling_tflops.map_or(String::new(), |ceiling| {
            let share = 100.0 * self.model_tflops / ceiling;
            format!(" ({share:.0} % of {ceiling:.0})")
        });
        let peak = self.peak_bytes.map_or(String::new(), |bytes| {
            format!(", peak {}", size(bytes as u64))
        });
        format!(
            "{} {} · {} x {} tokens: {:.0} tokens/s, {:.1} ms a step (first {:.0}), {:.1} TFLOP/s{share}{peak}",
            self.size,
            self.tuner,
            self.rows,
            self.row_tokens,
            self.tokens_per_s,
            self.ms_step,
            self.ms_first_step,
            self.model_tflops,
        )
    }
}
