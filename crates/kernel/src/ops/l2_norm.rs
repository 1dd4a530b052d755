//! Scaled L2 normalisation over the last dimension: out = scale x rstd, rstd = 1 / sqrt(Σ x² + eps).
//!
//! Forward alone, for single steps: [`super::delta_inputs`] has it with its gradient.
//! Source: `l2norm` of transformers 5.17 (Qwen3.5's q and k; q is also scaled by K^-0.5).

use super::check;
use crate::{Device, Result, Tensor};

/// `out` and `rstd` assigned. Shapes: out, x [..., K]; rstd one f32 a row, in any shape. `eps` is added to Σ x².
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd is not f32.
pub fn forward(
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    scale: f32,
    eps: f32,
) -> Result<()> {
    const OP: &str = "l2_norm::forward";
    check::shape(OP, "out", out, x.shape())?;
    let (rows, k) = check::matrix(OP, "x", x)?;
    check::numel(OP, "rstd", rstd, rows)?;
    check::f32(OP, "rstd", rstd)?;
    match check::device(OP, out, &[("rstd", &*rstd), ("x", x)])? {
        Device::Cpu => cpu::forward(out, rstd, x, k, scale, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, out, rstd, x, k, scale, eps)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::sum_squares;
    use crate::cpu::{In, Out, for_rows};

    pub(super) fn forward(
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        k: usize,
        scale: f32,
        eps: f32,
    ) {
        for_rows(
            [Out::assign(out, k), Out::assign(rstd, 1)],
            [In::new(x, k)],
            #[inline(always)]
            |_, [out, rstd], [x]| {
                let rows = out.chunks_exact_mut(k).zip(rstd).zip(x.chunks_exact(k));
                for ((out, rstd), x) in rows {
                    let r = 1.0 / (sum_squares(x) + eps).sqrt();
                    *rstd = r;
                    let factor = scale * r;
                    for (out, x) in out.iter_mut().zip(x) {
                        *out = x * factor;
                    }
                }
            },
        );
    }
}

mod cuda {
    use crate::cuda::sources::L2_NORM;
    use crate::cuda::{Args, Cuda};
    use crate::ops::rows::{self, Rows};
    use crate::{Result, Tensor};

    pub(super) fn forward(
        cuda: Cuda,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        k: usize,
        scale: f32,
        eps: f32,
    ) -> Result<()> {
        let n_rows = rstd.numel();
        let rows = Rows::new("l2_norm::forward", n_rows, k)?;
        let names = ["l2_norm_forward_bf16", "l2_norm_forward_any"];
        let kernel = rows::instance(names, &[out, x], &[k]);
        let args = Args::new()
            .view_mut(out)
            .tensor_mut(rstd)
            .view(x)
            .u32(n_rows)
            .u32(k)
            .u32(rows.group)
            .f32(scale)
            .f32(eps);
        cuda.launch(&L2_NORM, kernel, rows.grid(), args)
    }
}

pub(crate) mod examples {
    use crate::DType::{self, F32};
    use crate::example::{Example, PAIRS, ROWS};

    pub(crate) fn compared() -> Vec<Example> {
        let shapes = PAIRS
            .into_iter()
            .flat_map(|types| ROWS.map(|shape| (shape, types)));
        shapes.map(|(shape, types)| forward(shape, types)).collect()
    }

    pub(super) fn forward([t, k]: [usize; 2], [x_type, out_type]: [DType; 2]) -> Example {
        let scale = 1.0 / (k as f32).sqrt();
        Example::new("l2_norm/forward", format!("t{t}_k{k}"))
            .out("out", &[t, k], out_type)
            .out("rstd", &[t], F32)
            .input("x", &[t, k], x_type)
            .run(move |[out, rstd], [x]| super::forward(out, rstd, x, scale, 1e-6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::PAIRS;
    use crate::ops::testing::{assert_agrees, dot, tensor};
    use crate::{DType, Error};

    const EPS: f32 = 1e-6;

    /// out, then rstd.
    fn define(x: &[f64], k: usize) -> [Vec<f64>; 2] {
        let scale = 1.0 / (k as f64).sqrt();
        let rstds = x.chunks(k).map(|x| 1.0 / (dot(x, x) + EPS as f64).sqrt());
        let rstds: Vec<f64> = rstds.collect();
        let rows = x.chunks(k).zip(&rstds);
        let out = rows.flat_map(|(x, r)| x.iter().map(move |x| scale * x * r));
        [out.collect(), rstds]
    }

    #[test]
    fn forward_agrees_with_definition() {
        for types in PAIRS {
            for [t, k] in [[1, 1], [15, 7], [640, 128], [9, 2048], [11, 37]] {
                let example = examples::forward([t, k], types);
                assert_agrees(&example, |ins| define(&ins[0], k).into());
            }
        }
    }

    #[test]
    fn zero_row_gives_zeros_and_a_finite_rstd() {
        let x = Tensor::zeros(&[1, 8], DType::F32);
        let (mut out, mut rstd) = (
            Tensor::poison(&[1, 8], DType::F32),
            Tensor::poison(&[1], DType::F32),
        );
        forward(&mut out, &mut rstd, &x, 1.0, EPS).unwrap();
        assert_eq!(out, x);
        assert!(rstd.f32s()[0].is_finite());
    }

    #[test]
    fn wrong_rstd_is_refused() {
        let x = tensor(&[4, 6], 1, DType::F32);
        let mut rstd = Tensor::zeros(&[6], DType::F32);
        let got = forward(&mut x.clone(), &mut rstd, &x, 1.0, EPS);
        assert!(matches!(got, Err(Error::Shape { arg: "rstd", .. })));
    }
}
