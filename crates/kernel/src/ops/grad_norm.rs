//! The global gradient norm: sqrt(Σ g²) over all elements of all tensors.

use super::check;
use crate::{Device, Result, Tensor};

/// Square root of the sum of squares over all tensors (0 for none); NaN and infinity propagate. Sums of fixed blocks are f32,
/// their total f64 in tensor order, so the result does not depend on the number of cores.
///
/// # Errors
/// [`crate::Error::Device`] where they lie on several; [`crate::Error::Cuda`] if a GPU failed.
pub fn forward(grads: &[&Tensor]) -> Result<f32> {
    const OP: &str = "grad_norm::forward";
    let Some((first, rest)) = grads.split_first() else {
        return Ok(0.0);
    };
    let rest: Vec<(&str, &Tensor)> = rest.iter().map(|grad| ("grads", *grad)).collect();
    match check::device(OP, first, &rest)? {
        Device::Cpu => Ok(cpu::forward(grads)),
        Device::Cuda(cuda) => cuda::forward(cuda, grads),
    }
}

/// Bytes of scratch that [`forward`] takes on a GPU for tensors of so many elements.
pub fn scratch_bytes(numels: impl Iterator<Item = usize>) -> usize {
    cuda::scratch_bytes(cuda::n_blocks(numels))
}

mod cpu {
    use rayon::prelude::*;

    use crate::Tensor;
    use crate::cpu::math::sum_squares;
    use crate::cpu::{View, simd};

    /// Elements whose squares are summed in f32.
    const BLOCK: usize = 1 << 13;

    pub(super) fn forward(grads: &[&Tensor]) -> f32 {
        let blocks: Vec<View> = grads
            .iter()
            .flat_map(|grad| {
                let view = View::of(grad);
                let n = view.len();
                (0..n)
                    .step_by(BLOCK)
                    .map(move |start| view.slice(start..(start + BLOCK).min(n)))
            })
            .collect();
        let sums: Vec<f32> = blocks
            .par_iter()
            .with_min_len(8)
            .map_init(Vec::new, |scratch, block| {
                simd(
                    #[inline(always)]
                    || sum_squares(block.load(scratch)),
                )
            })
            .collect();
        sums.into_iter().map(f64::from).sum::<f64>().sqrt() as f32
    }
}

mod cuda {
    use crate::cuda::sources::GRAD_NORM;
    use crate::cuda::{Args, Cuda, Grid, Table};
    use crate::{DType, Result, Tensor};

    const THREADS: u32 = 256;
    /// Elements whose squares one block sums in f32.
    const BLOCK: usize = 8 * 8 * THREADS as usize;

    pub(super) fn n_blocks(numels: impl Iterator<Item = usize>) -> usize {
        numels.map(|numel| numel.div_ceil(BLOCK)).sum()
    }

    /// The norm, then the partial sums.
    pub(super) fn scratch_bytes(n_blocks: usize) -> usize {
        4 * (1 + n_blocks)
    }

    pub(super) fn forward(cuda: Cuda, grads: &[&Tensor]) -> Result<f32> {
        let n_blocks = n_blocks(grads.iter().map(|grad| grad.numel()));
        let norm = cuda.scratch(scratch_bytes(n_blocks))?;
        let partials = norm + 4;
        let mut table = Table::new(grads.len());
        for grad in grads {
            let n = grad.numel();
            table.push(n.div_ceil(BLOCK), |part| {
                part.u64(grad.device_pointer()).u64(n as u64);
                part.u32(u32::from(grad.dtype() == DType::Bf16)).u32(0);
            });
        }
        let args = Args::new().pointer(partials);
        let args = table.upload(cuda, args)?;
        let grid = Grid::line(n_blocks, THREADS);
        cuda.launch(&GRAD_NORM, "grad_norm_partial", grid, args)?;
        let args = Args::new().pointer(norm).pointer(partials);
        let args = args.u64(n_blocks as u64);
        cuda.launch(&GRAD_NORM, "grad_norm_total", Grid::line(1, 1024), args)?;
        let mut bytes = [0; 4];
        cuda.read(norm, &mut bytes)?;
        Ok(f32::from_le_bytes(bytes))
    }
}

pub(crate) mod examples {
    use crate::DType::{Bf16, F32};
    use crate::Tensor;
    use crate::example::{Example, Sizes};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for dtype in [F32, Bf16] {
            let sizes: [&[usize]; 4] = [
                &[1],
                &[16_384, 0, 16_385],
                &[8, 3, 100_003, 7],
                &[2_000_000],
            ];
            for sizes in sizes {
                let example = Example::new("grad_norm/forward", format!("{sizes:?}"));
                let example = example.out("norm", &[1], F32);
                let example = sizes
                    .iter()
                    .fold(example, |example, n| example.input("grad", &[*n], dtype));
                all.push(example.run_all(|outs, ins| {
                    let norm = super::forward(&ins.iter().collect::<Vec<_>>())?;
                    outs[0].copy_from(&Tensor::from_f32(&[1], vec![norm]))
                }));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (d, f) = (sizes.hidden, sizes.feed_forward);
        let example = Example::new("grad_norm/forward", format!("f{f}_d{d}"))
            .input("grad", &[f, d], F32)
            .run(|[], [grad]| super::forward(&[grad]).map(drop));
        vec![example]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{STORAGES, dot, f64s, tensor};

    #[test]
    fn norm_agrees_with_f64() {
        for (dtype, _) in STORAGES {
            let grads = [1, 100, 8192, 300_001].map(|n| tensor(&[n], n as u64, dtype));
            let want: f64 = grads
                .iter()
                .map(|g| dot(&f64s(g), &f64s(g)))
                .sum::<f64>()
                .sqrt();
            let got = forward(&grads.each_ref()).unwrap() as f64;
            assert!((got / want - 1.0).abs() < 1e-6, "{got} for {want}");
        }
    }

    #[test]
    fn nothing_has_norm_zero() {
        assert_eq!(forward(&[]).unwrap(), 0.0);
        assert_eq!(forward(&[&Tensor::zeros(&[0], DType::F32)]).unwrap(), 0.0);
    }

    #[test]
    fn nan_and_infinity_propagate() {
        let mut grad = tensor(&[20_000], 1, DType::F32);
        grad.f32s_mut()[777] = f32::INFINITY;
        assert_eq!(forward(&[&grad]).unwrap(), f32::INFINITY);
        grad.f32s_mut()[19_999] = f32::NAN;
        assert!(forward(&[&grad]).unwrap().is_nan());
    }
}
