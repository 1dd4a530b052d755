//! `cyrene bench train`: optimizer steps on random tokens and random weights of a real shape.

use std::time::Instant;

use anyhow::Result;
use kernel::host::HostMemory;
use kernel::{DType, Device};
use model::{Config, LoraConfig, Model};
use serde::Serialize;
use text::pack::Row;
use train::OptimizerConfig;
use train::memory::{Bytes, MemoryPlan, StepRows, Training};
use train::step::Trainer;

use super::{ceiling, device_name, shapes, storage};
use crate::cli::{BenchTrain as Args, TunerArg};
use crate::commands::doctor::cpu_bytes;
use crate::ui::{Ui, size};
use crate::{load, misuse};

/// Steps before the clock starts: kernels are compiled, memory taken.
const WARMUP: usize = 2;

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
    /// Layers that kept all, what costs products, that but for the feed-forward, their input alone.
    keeps: [usize; 4],
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
    let (needed, free) = (cpu_bytes(&training), HostMemory::now().available_bytes);
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

pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
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
    let document_tokens = args.document_tokens.unwrap_or(args.row_tokens);
    if n_tokens == 0 || document_tokens == 0 || args.steps == 0 || args.accumulate == 0 {
        misuse!("rows, row-tokens, document-tokens, accumulate and steps must be 1 or more");
    }

    let ceiling_tflops = match device {
        Device::Cpu => None,
        Device::Cuda(card) => Some(ceiling::product_tflops(card)?),
    };
    // 1. weights
    let device_name = device_name(device);
    let n_params = config.n_params();
    ui.note(format_args!(
        "{n_params} parameters, random, on {device_name}"
    ));
    let dtype = storage(args.dtype, device);
    if device == Device::Cpu {
        refuse_too_large(&config, args, dtype)?;
    }
    let vocab_size = config.vocab_size;
    let flops_per_token = flops_per_token(&config, args.tuner, document_tokens);
    let mut model = Model::init(config, 1, dtype)?.to_device(device)?;
    if let Some(lora) = lora(args) {
        model.attach_lora(&lora, 2)?;
    }
    if let Device::Cuda(card) = device {
        card.reset_peak();
    }
    let rows = step_rows(args);
    let mut trainer = Trainer::new(model, &OptimizerConfig::default(), 3, rows)?;
    let memory = trainer.memory.clone();
    if let Some(memory) = &memory {
        let peak = size(memory.peak_bytes() as u64);
        ui.note(format_args!("{}; {peak} at most", memory.describe()));
    }
    let micro_rows = memory.as_ref().map_or(args.rows, |memory| memory.rows);
    let micro_batches = |step: usize| -> Vec<Row> {
        let n_rows = args.rows * args.accumulate;
        (0..n_rows)
            .step_by(micro_rows)
            .map(|first| {
                let n_tokens = micro_rows.min(n_rows - first) * args.row_tokens;
                let seed = (step * n_rows + first) as u64;
                random_row(n_tokens, document_tokens, vocab_size, seed)
            })
            .collect()
    };

    // 2. steps
    let mut milliseconds = Vec::new();
    let mut loss = 0.0;
    for step in 0..WARMUP + args.steps {
        let rows = micro_batches(step);
        let n_targets = n_targets(&rows);
        let start = Instant::now();
        loss = trainer.step(rows.into_iter(), n_targets, 2e-5)?.loss;
        device.synchronize()?;
        milliseconds.push(1e3 * start.elapsed().as_secs_f64());
        ui.note(format_args!(
            "step {}: {:.1} ms, loss {loss:.4}",
            step + 1,
            milliseconds[step]
        ));
    }

    let profile = match device {
        Device::Cuda(card) if args.profile => {
            card.start_profile();
            let rows = micro_batches(0);
            let n_targets = n_targets(&rows);
            trainer.step(rows.into_iter(), n_targets, 2e-5)?;
            card.take_profile()
        }
        _ => Vec::new(),
    };
    for (name, ms, calls) in profile {
        ui.note(format_args!("{ms:9.2} ms {calls:5} x {name}"));
    }

    // 3. figures
    let ms_first_step = milliseconds[0];
    let mut timed = milliseconds.split_off(WARMUP);
    timed.sort_by(f64::total_cmp);
    let ms_step = timed[timed.len() / 2];
    let tokens_per_s = n_tokens as f64 / ms_step * 1e3;
    let line = Line {
        bench: "train",
        size: args.size.clone(),
        tuner: match args.tuner {
            TunerArg::Full => "full",
            TunerArg::Lora => "lora",
        },
        dtype: dtype.to_string(),
        rows: args.rows,
        row_tokens: args.row_tokens,
        document_tokens,
        accumulate: args.accumulate,
        tokens_per_s,
        ms_step,
        ms_first_step,
        micro_rows,
        keeps: memory.as_ref().map_or([0; 4], MemoryPlan::kept),
        offloaded_bytes: memory.as_ref().map_or(0, |memory| memory.host_bytes),
        peak_bytes: match device {
            Device::Cpu => None,
            Device::Cuda(card) => Some(card.allocated_bytes().1),
        },
        predicted_peak_bytes: memory.as_ref().map(MemoryPlan::peak_bytes),
        predicted: memory.as_ref().map(|memory| memory.bytes),
        overhead_bytes: match device {
            Device::Cpu => None,
            Device::Cuda(card) => {
                let in_use = card.total_bytes().saturating_sub(card.free_bytes()?);
                Some(in_use.saturating_sub(card.allocated_bytes().0))
            }
        },
        model_tflops: tokens_per_s * flops_per_token / 1e12,
        ceiling_tflops,
        device: device.to_string(),
        device_name,
        loss,
    };
    ui.result(&line, || {
        format!(
            "{} {} · {} x {} tokens: {:.0} tokens/s, {:.1} ms a step (first {:.0}), {:.1} TFLOP/s{}{}",
            line.size,
            line.tuner,
            line.rows,
            line.row_tokens,
            line.tokens_per_s,
            line.ms_step,
            line.ms_first_step,
            line.model_tflops,
            line.ceiling_tflops.map_or(String::new(), |ceiling| format!(
                " ({:.0} % of {ceiling:.0})",
                100.0 * line.model_tflops / ceiling
            )),
            line.peak_bytes.map_or(String::new(), |bytes| format!(", peak {}", size(bytes as u64)))
        )
    })
}

/// Operations a token: 6 a weight of the matrices (4 where the base is frozen), and the attention of a document's mean context.
fn flops_per_token(config: &Config, tuner: TunerArg, document_tokens: usize) -> f64 {
    let head = config.vocab_size * config.hidden_size;
    let tables = if config.tie_word_embeddings {
        head
    } else {
        2 * head
    };
    let matrices = (config.n_params() as usize - tables + head) as f64;
    let n_attention = config
        .layer_types
        .iter()
        .filter(|layer| **layer == model::LayerType::Full)
        .count();
    let attention = (n_attention * config.num_attention_heads * config.head_dim) as f64
        * 2.0
        * document_tokens as f64;
    let passes = match tuner {
        TunerArg::Full => 3.0,
        TunerArg::Lora => 2.0,
    };
    passes * 2.0 * matrices + 3.5 * attention
}

fn n_targets(rows: &[Row]) -> u64 {
    let targets = rows.iter().flat_map(|row| &row.targets_t);
    targets.filter(|target| **target >= 0).count() as u64
}

fn random_row(n_tokens: usize, document_tokens: usize, vocab_size: usize, seed: u64) -> Row {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed;
    let tokens_t: Vec<u32> = (0..n_tokens)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as usize % vocab_size) as u32
        })
        .collect();
    let mut cu_seqlens: Vec<u32> = (0..n_tokens)
        .step_by(document_tokens)
        .map(|t| t as u32)
        .collect();
    cu_seqlens.push(n_tokens as u32);
    let mut targets_t: Vec<i32> = tokens_t.iter().skip(1).map(|id| *id as i32).collect();
    targets_t.push(-1);
    for end in &cu_seqlens[1..] {
        targets_t[*end as usize - 1] = -1;
    }
    Row {
        tokens_t,
        targets_t,
        documents: (0..cu_seqlens.len() - 1).collect(),
        cu_seqlens,
    }
}
