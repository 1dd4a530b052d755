//! y += alpha x, element by element: residual streams, and gradients of several micro-batches.

use super::check;
use crate::{Device, Result, Tensor};

/// `y += alpha * x`, in f32, stored in y's type. Shapes: any, both alike.
///
/// # Errors
/// [`crate::Error::Shape`] where the shapes differ.
pub fn forward_residual(y: &mut Tensor, x: &Tensor, alpha: f32) -> Result<()> {
    const OP: &str = "accumulate::forward_residual";
    check::shape(OP, "x", x, y.shape())?;
    match check::device(OP, y, &[("x", x)])? {
        Device::Cpu => cpu::forward_residual(y, x, alpha),
        Device::Cuda(cuda) => cuda::forward_residual(cuda, y, x, alpha)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::add_scaled;
    use crate::cpu::{In, Out, for_rows};

    pub(super) fn forward_residual(y: &mut Tensor, x: &Tensor, alpha: f32) {
        for_rows(
            [Out::update(y, 1)],
            [In::new(x, 1)],
            #[inline(always)]
            |_, [y], [x]| add_scaled(y, x, alpha),
        );
    }
}

mod cuda {
    use crate::cuda::sources::ACCUMULATE;
    use crate::cuda::{Args, Cuda};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    pub(super) fn forward_residual(
        cuda: Cuda,
        y: &mut Tensor,
        x: &Tensor,
        alpha: f32,
    ) -> Result<()> {
        let n = x.numel();
        let names = [
            "accumulate_forward_residual_bf16",
            "accumulate_forward_residual_any",
        ];
        let kernel = rows::instance(names, &[y, x], &[n]);
        let args = Args::new().view_mut(y).view(x).f32(alpha).u64(n as u64);
        cuda.launch(&ACCUMULATE, kernel, rows::eights(n), args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{STORAGES, assert_close, f64s, tensor};

    #[test]
    fn forward_adds_a_multiple() {
        for (dtype, tolerance) in STORAGES {
            for n in [1, 17, 70_001] {
                let (x, before) = (tensor(&[n], 1, dtype), tensor(&[n], 2, dtype));
                let mut y = before.clone();
                forward_residual(&mut y, &x, -0.75).unwrap();
                let want: Vec<f64> = f64s(&before)
                    .iter()
                    .zip(f64s(&x))
                    .map(|(y, x)| y - 0.75 * x)
                    .collect();
                assert_close("y", &y, &want, tolerance);
            }
        }
    }

    #[test]
    fn differing_shapes_are_refused() {
        let mut y = Tensor::zeros(&[2, 3], DType::F32);
        assert!(forward_residual(&mut y, &Tensor::zeros(&[6], DType::F32), 1.0).is_err());
    }
}
