//! How fast a device is: single primitives, held against the time that their bytes and operations need at the least there.

use std::time::Instant;

use rayon::prelude::*;

use crate::cuda::{Cuda, Timer};
use crate::example::Example;
use crate::ops::{copy, matmul};
use crate::{DType, Device, Result, Tensor, random};

/// Runs of a case before those that count.
const WARMUP: usize = 2;
/// Elements that are copied to see what memory can do: beyond any cache.
const COPIED: usize = if cfg!(test) { 1 << 16 } else { 1 << 28 };
/// Rows, columns and terms of the product that shows what a CPU can do.
const CPU_PRODUCT: usize = if cfg!(test) { 64 } else { 1024 };
/// The same of a GPU.
const GPU_PRODUCT: usize = 8192;
/// Runs of that one.
const GPU_RUNS: usize = 9;

/// What a number of runs took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// Median of the runs, in milliseconds.
    pub median_ms: f64,
    /// The longest run less the shortest, in milliseconds.
    pub spread_ms: f64,
}

impl Times {
    /// Times `n_runs`, 1 or more, after two that do not count: by the clock on a CPU, by events on a GPU.
    ///
    /// # Errors
    /// What `work` or the device reports.
    pub fn of(
        device: Device,
        n_runs: usize,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Times> {
        for _ in 0..WARMUP {
            work()?;
        }
        device.synchronize()?;
        let mut milliseconds = Vec::with_capacity(n_runs);
        for _ in 0..n_runs {
            milliseconds.push(match device {
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
            median_ms: milliseconds[n_runs / 2],
            spread_ms: milliseconds[n_runs - 1] - milliseconds[0],
        })
    }
}

/// What nothing on a device can pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes a second that a large copy reads and writes.
    pub copy_bytes_per_s: f64,
    /// 10¹² operations a second of a large product.
    pub tflops: f64,
}

impl Ceilings {
    /// Measures both in `n_runs` runs; products of a CPU in `dtype`, of a GPU in bf16.
    ///
    /// # Errors
    /// No room for 1 GB, or a device that fails.
    pub fn measure(device: Device, dtype: DType, n_runs: usize) -> Result<Ceilings> {
        let from = noise(device, &[COPIED], DType::Bf16)?;
        let mut to = Tensor::zeros_on(&[COPIED], DType::Bf16, device)?;
        let copied = Times::of(device, n_runs, || {
            copy::forward(&mut to, 0, &from, 0, COPIED)
        })?;
        let tflops = match device {
            Device::Cuda(card) => product_tflops(card)?,
            Device::Cpu => {
                let n = CPU_PRODUCT;
                let x = noise(device, &[n, n], dtype)?;
                let mut y = Tensor::zeros_on(&[n, n], dtype, device)?;
                let product = Times::of(device, n_runs, || matmul::forward(&mut y, &x, &x))?;
                2.0 * (n as f64).powi(3) / product.median_ms / 1e9
            }
        };
        Ok(Ceilings {
            copy_bytes_per_s: 2.0 * from.bytes() as f64 / copied.median_ms * 1e3,
            tflops,
        })
    }

    /// The least time of an example.
    pub fn floor(&self, example: &Example) -> Floor {
        let by_memory = 1e3 * example.bytes() / self.copy_bytes_per_s;
        let by_arithmetic = example.operations() / self.tflops / 1e9;
        Floor {
            ms: by_memory.max(by_arithmetic),
            bound: match by_memory > by_arithmetic {
                true => "memory",
                false => "arithmetic",
            },
        }
    }
}

/// The least time that something can take; what fits into a cache can be faster.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Floor {
    /// In milliseconds.
    pub ms: f64,
    /// What it is bound by: `memory` or `arithmetic`.
    pub bound: &'static str,
}

/// Times an example by itself.
///
/// # Errors
/// No room for its tensors, or a device that fails.
pub fn example(example: &Example, device: Device, n_runs: usize) -> Result<Times> {
    let (mut outs, ins) = example.tensors(device)?;
    Times::of(device, n_runs, || example.call(&mut outs, &ins))
}

/// 10¹² operations a second of a bf16 product [8192,8192] of random numbers with f32 sums; median of nine after two.
///
/// # Errors
/// The GPU has no room for 400 MB, or failed.
pub fn product_tflops(card: Cuda) -> Result<f64> {
    let device = Device::Cuda(card);
    let shape = [GPU_PRODUCT, GPU_PRODUCT];
    let x = noise(device, &shape, DType::Bf16)?;
    let mut y = Tensor::zeros_on(&shape, DType::Bf16, device)?;
    let product = Times::of(device, GPU_RUNS, || matmul::forward(&mut y, &x, &x))?;
    Ok(2.0 * (GPU_PRODUCT as f64).powi(3) / product.median_ms / 1e9)
}

/// Operations a second of one product of a middling shape, in the type that training multiplies in there: a figure in a moment, for an
/// estimate of time.
///
/// # Errors
/// No room for it, or a device that fails.
pub fn matmul_flops(device: Device) -> Result<f64> {
    const REPEATS: usize = 4;
    let (t, n, dtype) = match device {
        Device::Cpu => (512, 1024, DType::F32),
        Device::Cuda(_) => (4096, 4096, DType::Bf16),
    };
    let (x, w) = (
        noise(device, &[t, n], dtype)?,
        noise(device, &[n, n], dtype)?,
    );
    let mut y = Tensor::zeros_on(&[t, n], dtype, device)?;
    matmul::forward(&mut y, &x, &w)?;
    device.synchronize()?;
    let started = Instant::now();
    for _ in 0..REPEATS {
        matmul::forward(&mut y, &x, &w)?;
    }
    device.synchronize()?;
    Ok((2 * t * n * n * REPEATS) as f64 / started.elapsed().as_secs_f64())
}

/// Numbers from -1 to 1.
fn noise(device: Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let value = |i: u64| 2.0 * random::uniform(1, 1, i) as f32 - 1.0;
    let data = (0..n as u64).into_par_iter().map(value).collect();
    let tensor = Tensor::from_f32(shape, data).to_dtype(dtype);
    tensor.to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::Sizes;
    use crate::ops::EXAMPLES;

    /// Documents of 33, 33 and 4 tokens in a model of the size `tiny`.
    fn tiny() -> Sizes {
        Sizes {
            dtype: DType::F32,
            n_tokens: 70,
            cu_seqlens: vec![0, 33, 66, 70],
            hidden: 256,
            feed_forward: 768,
            vocabulary: 4096,
            attention: [4, 2, 64],
            rotary_dims: 16,
            rope_theta: 10_000_000.0,
            delta: [4, 8, 32, 32],
            rank: 16,
        }
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
        let ceilings = Ceilings::measure(Device::Cpu, DType::F32, 1).unwrap();
        let mut ops = Vec::new();
        for (op, case) in timed() {
            let (times, floor) = (
                example(&case, Device::Cpu, 1).unwrap(),
                ceilings.floor(&case),
            );
            assert!(case.name().starts_with(op), "{} of {op}", case.name());
            assert!(case.bytes() > 0.0 && floor.ms > 0.0, "{}", case.name());
            let share = floor.ms / times.median_ms;
            assert!(
                times.median_ms.is_finite() && share > 0.0,
                "{}",
                case.name()
            );
            ops.push(op);
        }
        ops.dedup();
        assert_eq!(ops.len(), 16, "{ops:?}");
    }

    #[test]
    fn a_floor_is_the_larger_of_its_two_parts() {
        let (_, product) = timed().find(|(op, _)| *op == "matmul").unwrap();
        for (copy_bytes_per_s, tflops, bound) in [(1e6, 1e6, "memory"), (1e18, 1e-3, "arithmetic")]
        {
            let ceilings = Ceilings {
                copy_bytes_per_s,
                tflops,
            };
            let floor = ceilings.floor(&product);
            let floor_ms = match bound {
                "memory" => 1e3 * product.bytes() / copy_bytes_per_s,
                _ => product.operations() / tflops / 1e9,
            };
            assert!((floor.ms / floor_ms - 1.0).abs() < 1e-9, "{floor:?}");
            assert_eq!(floor.bound, bound);
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
        assert_eq!(tiny().pairs(), 33.0 * 34.0 + 4.0 * 5.0 / 2.0);
    }
}
