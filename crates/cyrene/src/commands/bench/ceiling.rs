//! What a GPU reaches in one large matrix product: the ceiling that a training step is held against.

use anyhow::Result;
use kernel::cuda::{Cuda, Timer};
use kernel::ops::matmul;
use kernel::{DType, Device, Tensor};
use rayon::prelude::*;

/// Rows, columns and inner dimension.
const SIZE: usize = 8192;
const RUNS: usize = 9;

/// 10¹² operations a second of a bf16 product [8192,8192] of random numbers with f32 sums; median of nine after two.
///
/// # Errors
/// The GPU has no room for 400 MB, or failed.
pub fn product_tflops(card: Cuda) -> Result<f64> {
    let device = Device::Cuda(card);
    let data: Vec<f32> = (0..SIZE * SIZE)
        .into_par_iter()
        .map(|i| {
            let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let shape = [SIZE, SIZE];
    let x = Tensor::from_f32(&shape, data)
        .to_dtype(DType::Bf16)
        .to_device(device)?;
    let mut y = Tensor::zeros_on(&shape, DType::Bf16, device)?;
    for _ in 0..2 {
        matmul::forward(&mut y, &x, &x)?;
    }
    let mut milliseconds = Vec::new();
    for _ in 0..RUNS {
        let timer = Timer::start(card)?;
        matmul::forward(&mut y, &x, &x)?;
        milliseconds.push(f64::from(timer.stop()?));
    }
    milliseconds.sort_by(f64::total_cmp);
    Ok(2.0 * (SIZE as f64).powi(3) / milliseconds[RUNS / 2] / 1e9)
}
