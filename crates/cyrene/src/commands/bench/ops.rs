//! `cyrene bench ops`: each primitive of a training step by itself at the shapes of a model, held against the time that its bytes and
//! operations need at the least on this machine.

use std::time::Instant;

use anyhow::Result;
use kernel::cuda::Timer;
use kernel::example::{Example, Sizes};
use kernel::ops::{EXAMPLES, copy, matmul};
use kernel::{DType, Device, Tensor, random};
use model::Config;
use rayon::prelude::*;
use serde::Serialize;

use super::{ceiling, device_name, shapes, storage};
use crate::cli::BenchOps as Args;
use crate::ui::Ui;
use crate::{load, misuse};

/// Runs of each case before those that count.
const WARMUP: usize = 2;
/// Elements that are copied to see what memory can do: beyond any cache.
const COPIED: usize = if cfg!(test) { 1 << 16 } else { 1 << 28 };
/// Rows, columns and terms of the product that shows what a CPU can do.
const CPU_PRODUCT: usize = if cfg!(test) { 64 } else { 1024 };

/// Of the adapters that `bench train --tuner lora` has.
const RANK: usize = 16;

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    size: String,
    /// Primitive and direction, such as `swiglu/backward`.
    op: &'static str,
    /// Such as `t5120_f9216`.
    shape: String,
    dtype: String,
    /// Median of the runs.
    ms: f64,
    /// The longest run less the shortest.
    spread_ms: f64,
    /// Bytes that are read or written at the least: each input once, each result once.
    bytes: f64,
    /// Operations of products at the least.
    operations: f64,
    /// What the larger of the two takes at the ceilings; what fits into a cache can be faster.
    floor_ms: f64,
    /// Which of the two: `memory` or `arithmetic`.
    bound: &'static str,
    /// Floor over median.
    share: f64,
    copy_bytes_per_s: f64,
    ceiling_tflops: f64,
    device_name: String,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
    let document_tokens = args.document_tokens.unwrap_or(args.row_tokens);
    if args.row_tokens == 0 || document_tokens == 0 || args.runs == 0 {
        misuse!("row-tokens, document-tokens and runs must be 1 or more");
    }
    let dtype = storage(args.dtype, device);
    let sizes = sizes(&config, args, dtype);
    let timed: Vec<(&str, Vec<Example>)> = EXAMPLES
        .iter()
        .map(|examples| (examples.op, (examples.timed)(&sizes)))
        .filter(|(_, examples)| !examples.is_empty())
        .collect();
    for name in &args.ops {
        if !timed.iter().any(|(known, _)| known == name) {
            let known: Vec<&str> = timed.iter().map(|(known, _)| *known).collect();
            misuse!(
                "no primitive `{name}` is measured; there are {}",
                known.join(", ")
            );
        }
    }
    let bench = Bench::new(args, device, dtype)?;
    ui.note(format_args!(
        "{}: copies move {:.0} GB/s, products {:.1} TFLOP/s",
        bench.device_name,
        bench.copy_bytes_per_s / 1e9,
        bench.ceiling_tflops
    ));
    if !ui.json() {
        ui.line("      ms   floor  share  bound       case")?;
    }
    for (name, examples) in timed {
        if !args.ops.is_empty() && !args.ops.iter().any(|op| op == name) {
            continue;
        }
        for example in examples {
            let line = bench.measure(&example)?;
            ui.result(&line, || {
                format!(
                    "{:8.3} {:7.3} {:5.0}%  {:10}  {} {}",
                    line.ms,
                    line.floor_ms,
                    100.0 * line.share,
                    line.bound,
                    line.op,
                    line.shape
                )
            })?;
        }
    }
    Ok(())
}

/// At which every primitive is timed.
fn sizes(config: &Config, args: &Args, dtype: DType) -> Sizes {
    let t = args.row_tokens;
    let document_tokens = args.document_tokens.unwrap_or(t).min(t);
    let borders = (0..t).step_by(document_tokens).chain([t]);
    Sizes {
        dtype,
        n_tokens: t,
        cu_seqlens: borders.map(|border| border as u32).collect(),
        hidden: config.hidden_size,
        feed_forward: config.intermediate_size,
        vocabulary: config.vocab_size,
        attention: [
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        ],
        rotary_dims: config.rotary_dims,
        rope_theta: config.rope_theta,
        delta: [
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        ],
        rank: RANK,
    }
}

/// What the lines share: the device and its ceilings.
struct Bench {
    size: String,
    device: Device,
    device_name: String,
    dtype: DType,
    runs: usize,
    copy_bytes_per_s: f64,
    ceiling_tflops: f64,
}

impl Bench {
    fn new(args: &Args, device: Device, dtype: DType) -> Result<Bench> {
        let mut bench = Bench {
            size: args.size.clone(),
            device,
            device_name: device_name(device),
            dtype,
            runs: args.runs,
            copy_bytes_per_s: 0.0,
            ceiling_tflops: 0.0,
        };
        let from = bench.random(&[COPIED], DType::Bf16)?;
        let mut to = Tensor::zeros_on(&[COPIED], DType::Bf16, device)?;
        let copied = bench.times(|| copy::forward(&mut to, 0, &from, 0, COPIED))?;
        bench.copy_bytes_per_s = 2.0 * from.bytes() as f64 / copied.median_ms * 1e3;
        bench.ceiling_tflops = match device {
            Device::Cuda(card) => ceiling::product_tflops(card)?,
            Device::Cpu => {
                let n = CPU_PRODUCT;
                let x = bench.random(&[n, n], dtype)?;
                let mut y = Tensor::zeros_on(&[n, n], dtype, device)?;
                let product = bench.times(|| matmul::forward(&mut y, &x, &x))?;
                2.0 * (n as f64).powi(3) / product.median_ms / 1e9
            }
        };
        Ok(bench)
    }

    /// Numbers from -1 to 1.
    fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let n: usize = shape.iter().product();
        let value = |i: u64| 2.0 * random::uniform(1, 1, i) as f32 - 1.0;
        let data = (0..n as u64).into_par_iter().map(value).collect();
        let tensor = Tensor::from_f32(shape, data).to_dtype(dtype);
        Ok(tensor.to_device(self.device)?)
    }

    fn measure(&self, example: &Example) -> Result<Line> {
        let (mut outs, ins) = example.tensors(self.device)?;
        let times = self.times(|| example.call(&mut outs, &ins))?;
        let by_memory = 1e3 * example.bytes() / self.copy_bytes_per_s;
        let by_arithmetic = example.operations() / self.ceiling_tflops / 1e9;
        let floor_ms = by_memory.max(by_arithmetic);
        Ok(Line {
            bench: "ops",
            size: self.size.clone(),
            op: example.name(),
            shape: example.shape().to_owned(),
            dtype: self.dtype.to_string(),
            ms: times.median_ms,
            spread_ms: times.spread_ms,
            bytes: example.bytes(),
            operations: example.operations(),
            floor_ms,
            bound: if by_memory > by_arithmetic {
                "memory"
            } else {
                "arithmetic"
            },
            share: floor_ms / times.median_ms,
            copy_bytes_per_s: self.copy_bytes_per_s,
            ceiling_tflops: self.ceiling_tflops,
            device_name: self.device_name.clone(),
        })
    }

    fn times(&self, mut work: impl FnMut() -> kernel::Result<()>) -> Result<Times> {
        for _ in 0..WARMUP {
            work()?;
        }
        self.device.synchronize()?;
        let mut milliseconds = Vec::with_capacity(self.runs);
        for _ in 0..self.runs {
            milliseconds.push(match self.device {
                Device::Cpu => {
                    let start = Instant::now();
                    work()?;
                    1e3 * start.elapsed().as_secs_f64()
                }
                Device::Cuda(card) => {
                    let timer = Timer::start(card)?;
                    work()?;
                    f64::from(timer.stop()?)
                }
            });
        }
        milliseconds.sort_by(f64::total_cmp);
        Ok(Times {
            median_ms: milliseconds[self.runs / 2],
            spread_ms: milliseconds[self.runs - 1] - milliseconds[0],
        })
    }
}

struct Times {
    median_ms: f64,
    spread_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args {
            ops: Vec::new(),
            size: "tiny".to_owned(),
            row_tokens: 70,
            document_tokens: Some(33),
            runs: 1,
            dtype: None,
            device: crate::cli::Device {
                device: "cpu".to_owned(),
            },
            memory: crate::cli::Memory { memory: None },
        }
    }

    fn tiny() -> Sizes {
        sizes(&shapes("tiny").unwrap(), &args(), DType::F32)
    }

    fn timed() -> impl Iterator<Item = (&'static str, Example)> {
        let sizes = tiny();
        EXAMPLES.iter().flat_map(move |examples| {
            let timed = (examples.timed)(&sizes).into_iter();
            timed.map(|example| (examples.op, example))
        })
    }

    #[test]
    fn every_case_runs_and_has_a_floor() {
        let bench = Bench::new(&args(), Device::Cpu, DType::F32).unwrap();
        let mut ops = Vec::new();
        for (op, example) in timed() {
            let line = bench.measure(&example).unwrap();
            assert!(line.op.starts_with(op), "{} of {op}", line.op);
            assert!(line.bytes > 0.0 && line.floor_ms > 0.0, "{}", line.op);
            assert!(line.ms.is_finite() && line.share > 0.0, "{}", line.op);
            ops.push(op);
        }
        ops.dedup();
        assert_eq!(ops.len(), 16, "{ops:?}");
    }

    #[test]
    fn a_floor_is_the_larger_of_its_two_parts() {
        let mut bench = Bench::new(&args(), Device::Cpu, DType::F32).unwrap();
        let (_, product) = timed().find(|(op, _)| *op == "matmul").unwrap();
        for (bytes_per_s, tflops, bound) in [(1e6, 1e6, "memory"), (1e18, 1e-3, "arithmetic")] {
            (bench.copy_bytes_per_s, bench.ceiling_tflops) = (bytes_per_s, tflops);
            let line = bench.measure(&product).unwrap();
            let floor_ms = match bound {
                "memory" => 1e3 * line.bytes / bytes_per_s,
                _ => line.operations / tflops / 1e9,
            };
            assert!((line.floor_ms / floor_ms - 1.0).abs() < 1e-9, "{line:?}");
            assert_eq!(line.bound, bound);
        }
    }

    #[test]
    fn inputs_count_once_and_what_is_added_to_twice() {
        let sizes = tiny();
        let numel = |a: usize, b: usize| 4.0 * (a * b) as f64;
        let (t, d, f) = (sizes.n_tokens, sizes.hidden, sizes.feed_forward);
        let bytes_of = |name| {
            let (_, example) = timed().find(|(_, example)| example.name() == name).unwrap();
            example.bytes()
        };
        let forward = numel(t, d) + numel(f, d) + numel(t, f);
        assert_eq!(bytes_of("matmul/forward"), forward);
        assert_eq!(bytes_of("matmul/backward_weight"), forward + numel(f, d));
        assert_eq!(bytes_of("embedding/forward"), 2.0 * numel(t, d));
    }

    #[test]
    fn pairs_are_those_of_each_document() {
        let sizes = tiny();
        assert_eq!(sizes.cu_seqlens, [0, 33, 66, 70]);
        assert_eq!(sizes.pairs(), 33.0 * 34.0 + 4.0 * 5.0 / 2.0);
    }
}
