//! `cyrene bench ops`: each primitive of a training step by itself at the shapes of a model, held against the time that its bytes and
//! operations need at the least on this machine.

mod cases;

use std::time::Instant;

use anyhow::Result;
use kernel::cuda::Timer;
use kernel::ops::{copy, matmul};
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

pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
    let document_tokens = args.document_tokens.unwrap_or(args.row_tokens);
    if args.row_tokens == 0 || document_tokens == 0 || args.runs == 0 {
        misuse!("row-tokens, document-tokens and runs must be 1 or more");
    }
    for name in &args.ops {
        if !cases::ALL.iter().any(|(known, _)| known == name) {
            let known: Vec<&str> = cases::ALL.iter().map(|(known, _)| *known).collect();
            misuse!(
                "no primitive `{name}` is measured; there are {}",
                known.join(", ")
            );
        }
    }
    let dtype = storage(args.dtype, device);
    let mut bench = Bench::new(config, args, device, dtype)?;
    ui.note(format_args!(
        "{}: copies move {:.0} GB/s, products {:.1} TFLOP/s",
        bench.device_name,
        bench.copy_bytes_per_s / 1e9,
        bench.ceiling_tflops
    ));
    if !ui.json() {
        ui.line("      ms   floor  share  bound       case")?;
    }
    for (name, measure) in cases::ALL {
        if !args.ops.is_empty() && !args.ops.iter().any(|op| op == name) {
            continue;
        }
        measure(&mut bench)?;
        for line in bench.lines.drain(..) {
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

/// What a case needs at the least.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    bytes: f64,
    operations: f64,
}

impl Cost {
    /// Inputs that are read and results that are written, all of each.
    fn of(tensors: &[&Tensor]) -> Self {
        Cost::default().and(tensors)
    }

    /// More of these.
    fn and(mut self, tensors: &[&Tensor]) -> Self {
        let bytes: usize = tensors.iter().map(|tensor| tensor.bytes()).sum();
        self.bytes += bytes as f64;
        self
    }

    /// Tensors that are read, changed and written.
    fn updating(self, tensors: &[&Tensor]) -> Self {
        self.and(tensors).and(tensors)
    }

    fn operations(mut self, operations: f64) -> Self {
        self.operations = operations;
        self
    }
}

/// What the cases share: shapes, ceilings, and the lines so far.
struct Bench {
    config: Config,
    size: String,
    device: Device,
    device_name: String,
    dtype: DType,
    /// Tokens of a row.
    t: usize,
    /// Tokens of a document; the last may have fewer.
    document_tokens: usize,
    cu_seqlens: Vec<u32>,
    runs: usize,
    copy_bytes_per_s: f64,
    ceiling_tflops: f64,
    lines: Vec<Line>,
    /// So that no two tensors are alike.
    streams: u64,
}

impl Bench {
    fn new(config: Config, args: &Args, device: Device, dtype: DType) -> Result<Bench> {
        let t = args.row_tokens;
        let document_tokens = args.document_tokens.unwrap_or(t).min(t);
        let borders = (0..t).step_by(document_tokens).chain([t]);
        let mut bench = Bench {
            config,
            size: args.size.clone(),
            device,
            device_name: device_name(device),
            dtype,
            t,
            document_tokens,
            cu_seqlens: borders.map(|border| border as u32).collect(),
            runs: args.runs,
            copy_bytes_per_s: 0.0,
            ceiling_tflops: 0.0,
            lines: Vec::new(),
            streams: 0,
        };
        let from = bench.random(&[COPIED], DType::Bf16)?;
        let mut to = bench.zeros(&[COPIED], DType::Bf16)?;
        let copied = bench.times(|| copy::forward(&mut to, 0, &from, 0, COPIED))?;
        bench.copy_bytes_per_s = 2.0 * from.bytes() as f64 / copied.median_ms * 1e3;
        bench.ceiling_tflops = match device {
            Device::Cuda(card) => ceiling::product_tflops(card)?,
            Device::Cpu => {
                let n = CPU_PRODUCT;
                let x = bench.random(&[n, n], dtype)?;
                let mut y = bench.zeros(&[n, n], dtype)?;
                let product = bench.times(|| matmul::forward(&mut y, &x, &x))?;
                2.0 * (n as f64).powi(3) / product.median_ms / 1e9
            }
        };
        Ok(bench)
    }

    /// Numbers from -1 to 1.
    fn random(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.random_in(shape, dtype, -1.0, 1.0)
    }

    fn random_in(&mut self, shape: &[usize], dtype: DType, from: f32, to: f32) -> Result<Tensor> {
        self.streams += 1;
        let stream = self.streams;
        let n: usize = shape.iter().product();
        let value = |i: u64| from + (to - from) * random::uniform(1, stream, i) as f32;
        let data = (0..n as u64).into_par_iter().map(value).collect();
        let tensor = Tensor::from_f32(shape, data).to_dtype(dtype);
        Ok(tensor.to_device(self.device)?)
    }

    /// In the type of activations.
    fn act(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.random(shape, self.dtype)
    }

    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::zeros_on(shape, dtype, self.device)?)
    }

    fn act_zeros(&self, shape: &[usize]) -> Result<Tensor> {
        self.zeros(shape, self.dtype)
    }

    fn f32_zeros(&self, shape: &[usize]) -> Result<Tensor> {
        self.zeros(shape, DType::F32)
    }

    /// Σ over all pairs of a token and one up to it in its document.
    fn pairs(&self) -> f64 {
        self.cu_seqlens
            .windows(2)
            .map(|ends| f64::from(ends[1] - ends[0]))
            .map(|len| len * (len + 1.0) / 2.0)
            .sum()
    }

    fn measure(
        &mut self,
        op: &'static str,
        shape: String,
        cost: Cost,
        work: impl FnMut() -> kernel::Result<()>,
    ) -> Result<()> {
        let times = self.times(work)?;
        let by_memory = 1e3 * cost.bytes / self.copy_bytes_per_s;
        let by_arithmetic = cost.operations / self.ceiling_tflops / 1e9;
        let floor_ms = by_memory.max(by_arithmetic);
        self.lines.push(Line {
            bench: "ops",
            size: self.size.clone(),
            op,
            shape,
            dtype: self.dtype.to_string(),
            ms: times.median_ms,
            spread_ms: times.spread_ms,
            bytes: cost.bytes,
            operations: cost.operations,
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
        });
        Ok(())
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

    fn bench(args: &Args) -> Bench {
        let config = shapes(&args.size).unwrap();
        Bench::new(config, args, Device::Cpu, DType::F32).unwrap()
    }

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

    #[test]
    fn every_case_runs_and_has_a_floor() {
        let mut bench = bench(&args());
        for (name, measure) in cases::ALL {
            measure(&mut bench).unwrap();
            let lines = std::mem::take(&mut bench.lines);
            assert!(!lines.is_empty(), "{name} measures nothing");
            for line in lines {
                assert!(line.op.starts_with(name), "{} of {name}", line.op);
                assert!(line.bytes > 0.0 && line.floor_ms > 0.0, "{}", line.op);
                assert!(line.ms.is_finite() && line.share > 0.0, "{}", line.op);
            }
        }
    }

    #[test]
    fn a_floor_is_the_larger_of_its_two_parts() {
        let mut bench = bench(&args());
        (bench.copy_bytes_per_s, bench.ceiling_tflops) = (1e9, 1e-3);
        let tensor = Tensor::zeros(&[250], DType::F32);
        let cost = Cost::of(&[&tensor]).updating(&[&tensor]);
        for (operations, floor_ms, bound) in [(0.0, 3e-3, "memory"), (1e7, 10.0, "arithmetic")] {
            let cost = cost.operations(operations);
            bench
                .measure("none", String::new(), cost, || Ok(()))
                .unwrap();
            let line = bench.lines.pop().unwrap();
            assert!((line.floor_ms / floor_ms - 1.0).abs() < 1e-9, "{line:?}");
            assert_eq!(line.bound, bound);
        }
    }

    #[test]
    fn pairs_are_those_of_each_document() {
        let bench = bench(&args());
        assert_eq!(bench.cu_seqlens, [0, 33, 66, 70]);
        assert_eq!(bench.pairs(), 33.0 * 34.0 + 4.0 * 5.0 / 2.0);
    }
}
