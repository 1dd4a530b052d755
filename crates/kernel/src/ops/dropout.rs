//! Inverted dropout: each element is zero with some chance, the others are scaled up so that the mean stays.
//!
//! An element's fate depends on (seed, stream, index) alone, so the backward pass is the same call on the gradient.

use super::check;
use crate::{Device, Result, Tensor};

/// What is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of elements that become zero, 0 or more and less than 1.
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
    /// Elements whose upper 52 random bits, as a number, are below this are dropped: those whose uniform number is below the rate.
    fn threshold(&self) -> u64 {
        // (k + 1/2) / 2^52 < rate, exactly.
        (f64::from(self.rate) * (1u64 << 52) as f64 - 0.5).ceil() as u64
    }

    fn keep_scale(&self) -> f32 {
        1.0 / (1.0 - self.rate)
    }
}

mod cpu {
    use super::Dropout;
    use crate::cpu::{In, Out, for_rows};
    use crate::{Tensor, random};

    pub(super) fn forward(y: &mut Tensor, x: &Tensor, dropout: &Dropout) {
        let drop = drop(dropout);
        for_rows(
            [Out::assign(y, 1)],
            [In::new(x, 1)],
            #[inline(always)]
            |first, [y], [x]| {
                for (index, (y, x)) in (first as u64..).zip(y.iter_mut().zip(x)) {
                    *y = drop(index, *x);
                }
            },
        );
    }

    pub(super) fn forward_residual(y: &mut Tensor, x: &Tensor, dropout: &Dropout) {
        let drop = drop(dropout);
        for_rows(
            [Out::update(y, 1)],
            [In::new(x, 1)],
            #[inline(always)]
            |first, [y], [x]| {
                for (index, (y, x)) in (first as u64..).zip(y.iter_mut().zip(x)) {
                    *y += drop(index, *x);
                }
            },
        );
    }

    #[inline(always)]
    fn drop(dropout: &Dropout) -> impl Fn(u64, f32) -> f32 + Sync {
        let key = random::key(dropout.seed, dropout.stream);
        let (threshold, scale) = (dropout.threshold(), dropout.keep_scale());
        #[inline(always)]
        move |index, x| match random::bits_of(key, index) >> 12 < threshold {
            true => 0.0,
            false => x * scale,
        }
    }
}

mod cuda {
    use super::Dropout;
    use crate::cuda::sources::DROPOUT;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{Result, Tensor, random};

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
            .u64(random::key(dropout.seed, dropout.stream))
            .u64(dropout.threshold())
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
    fn forward_drops_where_the_uniform_number_is_below_the_rate() {
        for rate in [0.0, 0.05, 0.3, 0.999] {
            let dropout = Dropout { rate, ..DROPOUT };
            let x = tensor(&[70_001], 1, DType::F32);
            let mut y = Tensor::poison(&[70_001], DType::F32);
            forward(&mut y, &x, &dropout).unwrap();
            for (i, (y, x)) in (0..).zip(y.f32s().iter().zip(x.f32s())) {
                let dropped = random::uniform(17, 5, i) < f64::from(rate);
                let want = if dropped {
                    0.0
                } else {
                    x * (1.0 / (1.0 - rate))
                };
                assert_eq!(*y, want, "{i}");
            }
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
