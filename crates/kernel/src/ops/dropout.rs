//! Inverted dropout: each element is zero with some chance, the others are scaled up so that the mean stays.
//!
//! An element's fate depends on (seed, stream, index) alone, so the backward pass is the same call on the gradient. Four
//! neighbours share one random number, 15 of its 64 bits each: making the numbers is what dropout costs on a GPU.

use super::check;
use crate::{Device, Result, Tensor, random};

/// What is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of elements that become zero, 0 or more and less than 1; rounded to a multiple of 2^-15.
    pub rate: f32,
    /// Of a pass.
    pub seed: u64,
    /// Of a place within the pass, so that no two places drop the same pattern.
    pub stream: u64,
}

/// y = dropout(x), assigned. Shapes: any, of as many elements.
///
/// # Errors
/// [`crate::Error::Shape`] where the numbers of elements differ.
pub fn forward(y: &mut Tensor, x: &Tensor, dropout: &Dropout) -> Result<()> {
    const OP: &str = "dropout::forward";
    check::numel(OP, "x", x, y.numel())?;
    match check::device(OP, y, &[("x", x)])? {
        Device::Cpu => cpu::forward(y, x, dropout),
        Device::Cuda(cuda) => cuda::forward(cuda, y, x, dropout)?,
    }
    Ok(())
}

/// y += dropout(x). Shapes: any, of as many elements.
///
/// # Errors
/// As [`forward`].
pub fn forward_residual(y: &mut Tensor, x: &Tensor, dropout: &Dropout) -> Result<()> {
    const OP: &str = "dropout::forward_residual";
    check::numel(OP, "x", x, y.numel())?;
    match check::device(OP, y, &[("x", x)])? {
        Device::Cpu => cpu::forward_residual(y, x, dropout),
        Device::Cuda(cuda) => cuda::forward_residual(cuda, y, x, dropout)?,
    }
    Ok(())
}

impl Dropout {
    /// Elements whose 15 random bits, as a number, are below this are dropped: not all of them, whatever the rate.
    pub(super) fn threshold(&self) -> u32 {
        (f64::from(self.rate) * 32768.0).round().min(32767.0) as u32
    }

    /// One over the share that is kept, so that the mean stays exactly.
    pub(super) fn keep_scale(&self) -> f32 {
        32768.0 / (32768 - self.threshold()) as f32
    }

    /// What the elements of one stream and seed have in common.
    pub(super) fn key(&self) -> u64 {
        random::key(self.seed, self.stream)
    }
}

pub(super) mod cpu {
    use super::Dropout;
    use crate::cpu::{In, Out, for_rows};
    use crate::{Tensor, random};

    pub(super) fn forward(y: &mut Tensor, x: &Tensor, dropout: &Dropout) {
        for_rows(
            [Out::assign(y, 1)],
            [In::new(x, 1)],
            #[inline(always)]
            |first, [y], [x]| {
                y.copy_from_slice(x);
                apply(y, first as u64, dropout);
            },
        );
    }

    pub(super) fn forward_residual(y: &mut Tensor, x: &Tensor, dropout: &Dropout) {
        for_rows(
            [Out::update(y, 1)],
            [In::new(x, 1)],
            #[inline(always)]
            |first, [y], [x]| {
                let mut dropped = [0.0; 256];
                let pieces = y.chunks_mut(256).zip(x.chunks(256));
                for (at, (y, x)) in (first as u64..).step_by(256).zip(pieces) {
                    let dropped = &mut dropped[..x.len()];
                    dropped.copy_from_slice(x);
                    apply(dropped, at, dropout);
                    for (y, dropped) in y.iter_mut().zip(dropped) {
                        *y += *dropped;
                    }
                }
            },
        );
    }

    /// Drops among values of which the first is element `first` of its tensor.
    #[inline(always)]
    pub(in crate::ops) fn apply(values: &mut [f32], first: u64, dropout: &Dropout) {
        let (key, threshold, scale) = (dropout.key(), dropout.threshold(), dropout.keep_scale());
        let drop = |value: &mut f32, bits: u64| {
            let kept = (bits & 0x7fff) as u32 >= threshold;
            *value = if kept { *value * scale } else { 0.0 };
        };
        let n_before = (first.wrapping_neg() % 4).min(values.len() as u64);
        let (before, fours) = values.split_at_mut(n_before as usize);
        for (i, value) in (first..).zip(before) {
            drop(value, random::bits_of(key, i / 4) >> (16 * (i % 4)));
        }
        for (four, values) in ((first + n_before) / 4..).zip(fours.chunks_mut(4)) {
            let bits = random::bits_of(key, four);
            for (j, value) in values.iter_mut().enumerate() {
                drop(value, bits >> (16 * j));
            }
        }
    }
}

mod cuda {
    use super::Dropout;
    use crate::cuda::sources::DROPOUT;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{Result, Tensor};

    const THREADS: u32 = 256;

    pub(super) fn forward(cuda: Cuda, y: &mut Tensor, x: &Tensor, dropout: &Dropout) -> Result<()> {
        queue(
            cuda,
            ["dropout_forward", "dropout_forward_8"],
            y,
            x,
            dropout,
        )
    }

    pub(super) fn forward_residual(
        cuda: Cuda,
        y: &mut Tensor,
        x: &Tensor,
        dropout: &Dropout,
    ) -> Result<()> {
        const KERNELS: [&str; 2] = ["dropout_forward_residual", "dropout_forward_residual_8"];
        queue(cuda, KERNELS, y, x, dropout)
    }

    fn queue(
        cuda: Cuda,
        [one, eight]: [&'static str; 2],
        y: &mut Tensor,
        x: &Tensor,
        dropout: &Dropout,
    ) -> Result<()> {
        let n = y.numel();
        let args = Args::new()
            .view_mut(y)
            .view(x)
            .u64(n as u64)
            .u64(dropout.key())
            .u32(dropout.threshold() as usize)
            .f32(dropout.keep_scale());
        if n.is_multiple_of(8) {
            return cuda.launch(&DROPOUT, eight, Grid::each(n / 8, THREADS), args);
        }
        cuda.launch(&DROPOUT, one, Grid::each(n, THREADS), args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, tensor};
    use crate::{DType, random};

    const DROPOUT: Dropout = Dropout {
        rate: 0.3,
        seed: 17,
        stream: 5,
    };

    #[test]
    fn forward_drops_where_an_element_s_bits_are_below_the_rate() {
        for rate in [0.0, 0.05, 0.3, 0.999, 0.999_999] {
            let dropout = Dropout { rate, ..DROPOUT };
            let x = tensor(&[70_001], 1, DType::F32);
            let mut y = Tensor::poison(&[70_001], DType::F32);
            forward(&mut y, &x, &dropout).unwrap();
            let below = (f64::from(rate) * 32768.0).round().min(32767.0);
            let scale = (32768.0 / (32768.0 - below)) as f32;
            for (i, (y, x)) in (0u64..).zip(y.f32s().iter().zip(x.f32s())) {
                let bits = random::bits(17, 5, i / 4) >> (16 * (i % 4)) & 0x7fff;
                let want = if (bits as f64) < below {
                    0.0
                } else {
                    x * scale
                };
                assert_eq!(*y, want, "{i}");
            }
        }
    }

    #[test]
    fn a_part_of_a_tensor_is_dropped_as_in_the_whole() {
        let x = tensor(&[64], 1, DType::F32);
        let mut whole = x.f32s().to_vec();
        cpu::apply(&mut whole, 0, &DROPOUT);
        for (first, len) in [(0, 64), (1, 2), (3, 17), (5, 0), (62, 2)] {
            let mut part = x.f32s()[first..first + len].to_vec();
            cpu::apply(&mut part, first as u64, &DROPOUT);
            assert_eq!(part, whole[first..first + len]);
        }
    }

    #[test]
    fn forward_keeps_the_mean() {
        let n = 100_000;
        let mut y = Tensor::poison(&[n], DType::F32);
        forward(&mut y, &Tensor::from_f32(&[n], vec![1.0; n]), &DROPOUT).unwrap();
        let zeros = y.f32s().iter().filter(|y| **y == 0.0).count();
        let mean = y.f32s().iter().sum::<f32>() / n as f32;
        assert!((zeros as f64 / n as f64 - 0.3).abs() < 0.01, "{zeros}");
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
    }

    #[test]
    fn forward_residual_adds_what_forward_assigns() {
        for (dtype, _) in STORAGES {
            let x = tensor(&[33, 8], 1, dtype);
            let before = tensor(&[33, 8], 2, DType::F32);
            let mut dropped = Tensor::poison(&[33, 8], DType::F32);
            forward(&mut dropped, &x, &DROPOUT).unwrap();
            let mut y = before.clone();
            forward_residual(&mut y, &x, &DROPOUT).unwrap();
            let parts = before.f32s().iter().zip(dropped.f32s());
            let want: Vec<f32> = parts.map(|(before, dropped)| before + dropped).collect();
            assert_eq!(y.f32s(), want);
        }
    }

    #[test]
    fn differing_numbers_of_elements_are_refused() {
        let mut y = Tensor::zeros(&[4], DType::F32);
        assert!(forward(&mut y, &Tensor::zeros(&[5], DType::F32), &DROPOUT).is_err());
    }
}
