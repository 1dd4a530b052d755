//! Zero-centred RMSNorm over the last dimension: out = x rstd (1 + w), rstd = 1 / sqrt(mean(x²) + eps).
//!
//! Gradients, with y = x rstd and e = d_out (1 + w): d_x = rstd (e - y mean(e y)), d_w = Σ_rows d_out y.
//! Source: arXiv 1910.07467; `Qwen3_5RMSNorm` of transformers 5.17 (the stored weight is the multiplier less 1).

use super::{check, copy};
use crate::cuda::DeviceProperties;
use crate::{Device, Result, Tensor};

/// `out` and `rstd` assigned. Shapes: out, x [..., D]; w_d [D]; rstd one f32 a row, in any shape. `eps` is added to mean(x²).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd is not f32.
pub fn forward(
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    w_d: &Tensor,
    eps: f32,
) -> Result<()> {
    const OP: &str = "rms_norm::forward";
    check::shape(OP, "out", out, x.shape())?;
    check_rows(OP, x, w_d, rstd)?;
    match check::device(OP, out, &[("rstd", &*rstd), ("x", x), ("w_d", w_d)])? {
        Device::Cpu => cpu::forward(out, rstd, x, w_d, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, out, rstd, x, w_d, eps)?,
    }
    Ok(())
}

/// d_x assigned; d_w_d [D] f32 added to (None: frozen). Shapes as in [`forward`].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd or d_w_d is not f32.
pub fn backward(
    d_x: &mut Tensor,
    d_w_d: Option<&mut Tensor>,
    d_out: &Tensor,
    x: &Tensor,
    w_d: &Tensor,
    rstd: &Tensor,
) -> Result<()> {
    const OP: &str = "rms_norm::backward";
    match check_backward(OP, d_x, d_w_d.as_deref(), d_out, x, w_d, rstd)? {
        Device::Cpu => {
            let d_x = crate::cpu::Out::assign(d_x, w_d.numel());
            cpu::backward(
                d_x,
                d_w_d,
                d_out,
                x,
                w_d,
                rstd,
                #[inline(always)]
                |d_x, share| *d_x = share,
            );
        }
        Device::Cuda(cuda) => {
            let written = cuda::Written {
                d_x,
                d_branch: None,
            };
            cuda::backward(cuda, written, d_w_d, d_out, x, w_d, rstd)?;
        }
    }
    Ok(())
}

/// As [`backward`], but d_x is added to: the branch's share of the residual stream's gradient. `d_branch` is assigned the sum as it
/// enters the branch before, of d_x's shape in a storage type of its own.
///
/// # Errors
/// As [`backward`].
pub fn backward_accumulate(
    d_x: &mut Tensor,
    d_branch: &mut Tensor,
    d_w_d: Option<&mut Tensor>,
    d_out: &Tensor,
    x: &Tensor,
    w_d: &Tensor,
    rstd: &Tensor,
) -> Result<()> {
    const OP: &str = "rms_norm::backward_accumulate";
    check::shape(OP, "d_branch", d_branch, x.shape())?;
    check::device(OP, d_x, &[("d_branch", &*d_branch)])?;
    match check_backward(OP, d_x, d_w_d.as_deref(), d_out, x, w_d, rstd)? {
        Device::Cpu => {
            cpu::backward(
                crate::cpu::Out::update(d_x, w_d.numel()),
                d_w_d,
                d_out,
                x,
                w_d,
                rstd,
                #[inline(always)]
                |d_x, share| *d_x += share,
            );
            copy::forward(d_branch, 0, d_x, 0, d_x.numel())?;
        }
        Device::Cuda(cuda) => {
            let written = cuda::Written {
                d_x,
                d_branch: Some(d_branch),
            };
            cuda::backward(cuda, written, d_w_d, d_out, x, w_d, rstd)?;
        }
    }
    Ok(())
}

fn check_backward(
    op: &'static str,
    d_x: &Tensor,
    d_w_d: Option<&Tensor>,
    d_out: &Tensor,
    x: &Tensor,
    w_d: &Tensor,
    rstd: &Tensor,
) -> Result<Device> {
    check::shape(op, "d_x", d_x, x.shape())?;
    check::shape(op, "d_out", d_out, x.shape())?;
    let mut others = vec![("d_out", d_out), ("x", x), ("w_d", w_d), ("rstd", rstd)];
    if let Some(d_w_d) = d_w_d {
        check::shape(op, "d_w_d", d_w_d, w_d.shape())?;
        check::f32(op, "d_w_d", d_w_d)?;
        others.push(("d_w_d", d_w_d));
    }
    check_rows(op, x, w_d, rstd)?;
    check::device(op, d_x, &others)
}

fn check_rows(op: &'static str, x: &Tensor, w_d: &Tensor, rstd: &Tensor) -> Result<()> {
    let (rows, d) = check::matrix(op, "x", x)?;
    check::shape(op, "w_d", w_d, &[d])?;
    check::numel(op, "rstd", rstd, rows)?;
    check::f32(op, "rstd", rstd)
}

/// Bytes of scratch that [`backward`] and [`backward_accumulate`] take on a GPU for `n_rows` rows of `width`.
pub fn backward_scratch_bytes(gpu: DeviceProperties, n_rows: usize, width: usize) -> usize {
    cuda::scratch_bytes(gpu, n_rows, width)
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::{add, dot3, sum_squares};
    use crate::cpu::{In, Out, for_rows, for_rows_summing};

    pub(super) fn forward(out: &mut Tensor, rstd: &mut Tensor, x: &Tensor, w_d: &Tensor, eps: f32) {
        let d = w_d.numel();
        let scale_d = one_plus(w_d);
        for_rows(
            [Out::assign(out, d), Out::assign(rstd, 1)],
            [In::new(x, d)],
            #[inline(always)]
            |_, [out, rstd], [x]| {
                let rows = out.chunks_exact_mut(d).zip(rstd).zip(x.chunks_exact(d));
                for ((out, rstd), x) in rows {
                    let r = 1.0 / (sum_squares(x) / d as f32 + eps).sqrt();
                    *rstd = r;
                    for ((out, x), scale) in out.iter_mut().zip(x).zip(&scale_d) {
                        *out = x * r * scale;
                    }
                }
            },
        );
    }

    pub(super) fn backward(
        d_x: Out,
        d_w_d: Option<&mut Tensor>,
        d_out: &Tensor,
        x: &Tensor,
        w_d: &Tensor,
        rstd: &Tensor,
        put: impl Fn(&mut f32, f32) + Sync,
    ) {
        let d = w_d.numel();
        let scale_d = one_plus(w_d);
        let n_sums = if d_w_d.is_some() { d } else { 0 };
        let sums = for_rows_summing(
            [d_x],
            [In::new(d_out, d), In::new(x, d), In::new(rstd, 1)],
            n_sums,
            #[inline(always)]
            |_, [d_x], [d_out, x, rstd], d_w| {
                let ins = d_out.chunks_exact(d).zip(x.chunks_exact(d)).zip(rstd);
                for (d_x, ((d_out, x), r)) in d_x.chunks_exact_mut(d).zip(ins) {
                    // rstd² mean(e y) with y = x rstd: what x is multiplied by.
                    let pull = dot3(d_out, &scale_d, x) * (r * r) / d as f32;
                    let ins = d_out.iter().zip(x).zip(&scale_d);
                    for (d_x, ((d_out, x), scale)) in d_x.iter_mut().zip(ins) {
                        put(d_x, r * (d_out * scale - x * pull));
                    }
                    for ((d_w, d_out), x) in d_w.iter_mut().zip(d_out).zip(x) {
                        *d_w += d_out * (x * r);
                    }
                }
            },
        );
        if let Some(d_w_d) = d_w_d {
            add(d_w_d.f32s_mut(), &sums);
        }
    }

    fn one_plus(w_d: &Tensor) -> Vec<f32> {
        w_d.to_f32_vec().into_iter().map(|w| 1.0 + w).collect()
    }
}

mod cuda {
    use crate::cuda::sources::RMS_NORM;
    use crate::cuda::{Args, Cuda, DeviceProperties};
    use crate::ops::rows::{self, Partials, Rows};
    use crate::{Result, Tensor};

    pub(super) fn forward(
        cuda: Cuda,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        w_d: &Tensor,
        eps: f32,
    ) -> Result<()> {
        let (n_rows, d) = (rstd.numel(), w_d.numel());
        let rows = Rows::new("rms_norm::forward", n_rows, d)?;
        let names = ["rms_norm_forward_bf16", "rms_norm_forward_any"];
        let kernel = rows::instance(names, &[out, x], &[d]);
        let args = Args::new()
            .view_mut(out)
            .tensor_mut(rstd)
            .view(x)
            .view(w_d)
            .u32(n_rows)
            .u32(d)
            .u32(rows.group)
            .f32(eps);
        cuda.launch(&RMS_NORM, kernel, rows.grid(), args)
    }

    pub(super) fn scratch_bytes(gpu: DeviceProperties, n_rows: usize, width: usize) -> usize {
        let rows = Rows::new("rms_norm::backward", n_rows, width);
        let n = rows.map_or(0, |rows| rows.walking_grid(gpu).blocks[0] as usize);
        Partials::bytes(n, width)
    }

    /// What backward writes: d_x assigned, or with a branch added to.
    pub(super) struct Written<'a> {
        pub d_x: &'a mut Tensor,
        pub d_branch: Option<&'a mut Tensor>,
    }

    pub(super) fn backward(
        cuda: Cuda,
        written: Written,
        d_w_d: Option<&mut Tensor>,
        d_out: &Tensor,
        x: &Tensor,
        w_d: &Tensor,
        rstd: &Tensor,
    ) -> Result<()> {
        const ASSIGNING: [&str; 2] = ["rms_norm_backward_bf16", "rms_norm_backward_any"];
        const ADDING: [&str; 2] = [
            "rms_norm_backward_accumulate_bf16",
            "rms_norm_backward_accumulate_any",
        ];
        let (n_rows, d) = (rstd.numel(), w_d.numel());
        let (kernel, outputs) = match written {
            Written {
                d_x,
                d_branch: Some(d_branch),
            } => (
                rows::instance(ADDING, &[d_x, d_branch, d_out, x], &[d]),
                Args::new().view_mut(d_x).view_mut(d_branch),
            ),
            Written { d_x, .. } => (
                rows::instance(ASSIGNING, &[d_x, d_out, x], &[d]),
                Args::new().view_mut(d_x),
            ),
        };
        let rows = Rows::new("rms_norm::backward", n_rows, d)?;
        let grid = rows.walking_grid(cuda.properties());
        let partials = Partials::new(cuda, d_w_d.is_some(), grid.blocks[0] as usize, d)?;
        let args = outputs
            .pointer(partials.pointer)
            .view(d_out)
            .view(x)
            .view(w_d)
            .tensor(rstd)
            .u32(n_rows)
            .u32(d)
            .u32(rows.group);
        cuda.launch(&RMS_NORM, kernel, grid, args)?;
        match d_w_d {
            Some(d_w_d) => partials.add_to(cuda, d_w_d, 0),
            None => Ok(()),
        }
    }
}

pub(crate) mod examples {
    use crate::DType::{self, F32};
    use crate::example::{Example, ROWS, Sizes, TYPES, zeros_like};

    const EPS: f32 = 1e-6;

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for types in TYPES {
            for shape in ROWS {
                all.push(forward(shape, types));
                all.push(backward(shape, types));
                let [x_type, d_type, _] = types;
                all.push(backward_accumulate(shape, types, [d_type, x_type]));
                all.push(backward_frozen(shape, types));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (shape, types) = ([sizes.n_tokens, sizes.hidden], [sizes.dtype; 3]);
        // As between two branches: the residual stream's gradient is f32.
        let accumulate = backward_accumulate(shape, types, [F32, sizes.dtype]);
        vec![forward(shape, types), accumulate]
    }

    pub(super) fn forward([t, d]: [usize; 2], [x_type, out_type, w_type]: [DType; 3]) -> Example {
        Example::new("rms_norm/forward", format!("t{t}_d{d}"))
            .out("out", &[t, d], out_type)
            .out("rstd", &[t], F32)
            .input("x", &[t, d], x_type)
            .input("w", &[d], w_type)
            .run(|[out, rstd], [x, w]| super::forward(out, rstd, x, w, EPS))
    }

    fn backward_inputs(
        example: Example,
        [t, d]: [usize; 2],
        [x_type, d_type, w_type]: [DType; 3],
    ) -> Example {
        example
            .input("d_out", &[t, d], d_type)
            .input("x", &[t, d], x_type)
            .input("w", &[d], w_type)
            .saved("rstd", &[t], F32)
            .prepared(|[_, x, w, rstd]| super::forward(&mut zeros_like(x)?, rstd, x, w, EPS))
    }

    pub(super) fn backward([t, d]: [usize; 2], types: [DType; 3]) -> Example {
        let example = Example::new("rms_norm/backward", format!("t{t}_d{d}"))
            .out("d_x", &[t, d], types[1])
            .updated("d_w", &[d], F32);
        backward_inputs(example, [t, d], types).run(|[d_x, d_w], [d_out, x, w, rstd]| {
            super::backward(d_x, Some(d_w), d_out, x, w, rstd)
        })
    }

    fn backward_accumulate(
        [t, d]: [usize; 2],
        types: [DType; 3],
        [d_x_type, branch_type]: [DType; 2],
    ) -> Example {
        let example = Example::new("rms_norm/backward_accumulate", format!("t{t}_d{d}"))
            .updated("d_x", &[t, d], d_x_type)
            .out("d_branch", &[t, d], branch_type)
            .updated("d_w", &[d], F32);
        backward_inputs(example, [t, d], types).run(|[d_x, d_branch, d_w], [d_out, x, w, rstd]| {
            super::backward_accumulate(d_x, d_branch, Some(d_w), d_out, x, w, rstd)
        })
    }

    fn backward_frozen([t, d]: [usize; 2], types: [DType; 3]) -> Example {
        let example = Example::new("rms_norm/backward_accumulate", format!("t{t}_d{d}"))
            .updated("d_x, frozen", &[t, d], types[1])
            .out("d_branch, frozen", &[t, d], types[1]);
        backward_inputs(example, [t, d], types).run(|[d_x, d_branch], [d_out, x, w, rstd]| {
            super::backward_accumulate(d_x, d_branch, None, d_out, x, w, rstd)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::TYPES;
    use crate::ops::testing::{
        STORAGES, assert_agrees, assert_close, dot, f64s, gradient, plus, tensor,
    };
    use crate::{DType, Error};

    const EPS: f32 = 1e-6;

    fn define(x: &[f64], w: &[f64]) -> Vec<f64> {
        x.chunks(w.len())
            .flat_map(|x| {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                let r = 1.0 / (mean + EPS as f64).sqrt();
                x.iter()
                    .zip(w)
                    .map(move |(x, w)| x * r * (1.0 + w))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    fn rstds(x: &[f64], d: usize) -> Vec<f64> {
        let mean = |x: &[f64]| dot(x, x) / d as f64;
        x.chunks(d)
            .map(|x| 1.0 / (mean(x) + EPS as f64).sqrt())
            .collect()
    }

    #[test]
    fn forward_agrees_with_definition() {
        for types in TYPES {
            for shape in [[1, 1], [6, 33], [130, 300], [3, 5000]] {
                let example = examples::forward(shape, types);
                assert_agrees(&example, |ins| {
                    vec![define(&ins[0], &ins[1]), rstds(&ins[0], shape[1])]
                });
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences_in_every_mixture_of_storages() {
        for types in TYPES {
            for shape in [[5, 37], [70, 6]] {
                let example = examples::backward(shape, types);
                assert_agrees(&example, |ins| {
                    let loss = |at: &[Vec<f64>]| dot(&ins[0], &define(&at[0], &at[1]));
                    [0, 1].map(|which| gradient(&ins[1..3], which, loss)).into()
                });
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for (dtype, tolerance) in STORAGES {
            for (rows, d) in [(1, 1), (5, 37), (70, 6)] {
                let (x, w) = (tensor(&[rows, d], 1, dtype), tensor(&[d], 2, dtype));
                let d_out = tensor(&[rows, d], 3, dtype);
                let mut out = Tensor::poison(&[rows, d], dtype);
                let mut rstd = Tensor::poison(&[rows], DType::F32);
                forward(&mut out, &mut rstd, &x, &w, EPS).unwrap();

                let at = [f64s(&x), f64s(&w)];
                let loss = |x: &[Vec<f64>]| dot(&f64s(&d_out), &define(&x[0], &x[1]));
                let (want_x, want_w) = (gradient(&at, 0, loss), gradient(&at, 1, loss));

                let mut d_x = Tensor::poison(&[rows, d], dtype);
                let before_w = tensor(&[d], 4, DType::F32);
                let mut d_w = before_w.clone();
                backward(&mut d_x, Some(&mut d_w), &d_out, &x, &w, &rstd).unwrap();
                // At one element per row out hardly depends on x: only the absolute error means something there.
                if d > 1 {
                    assert_close("d_x", &d_x, &want_x, tolerance);
                }
                assert_close("d_w", &d_w, &plus(&want_w, &before_w), tolerance);

                let before_x = tensor(&[rows, d], 5, dtype);
                for (branch_dtype, _) in STORAGES {
                    let mut d_x = before_x.clone();
                    let mut d_branch = Tensor::poison(&[rows, d], branch_dtype);
                    backward_accumulate(&mut d_x, &mut d_branch, None, &d_out, &x, &w, &rstd)
                        .unwrap();
                    assert_close("d_x added to", &d_x, &plus(&want_x, &before_x), tolerance);
                    let entering = d_x.to_dtype(branch_dtype).to_f32_vec();
                    assert_eq!(d_branch.to_f32_vec(), entering, "{branch_dtype} of {dtype}");
                }
            }
        }
    }

    #[test]
    fn backward_sums_many_rows_into_the_weight() {
        let (rows, d) = (3000, 40);
        let (x, w) = (
            tensor(&[rows, d], 1, DType::F32),
            tensor(&[d], 2, DType::F32),
        );
        let d_out = tensor(&[rows, d], 3, DType::F32);
        let (mut out, mut rstd) = (
            Tensor::poison(&[rows, d], DType::F32),
            Tensor::poison(&[rows], DType::F32),
        );
        forward(&mut out, &mut rstd, &x, &w, EPS).unwrap();
        let mut d_x = Tensor::poison(&[rows, d], DType::F32);
        let mut d_w = Tensor::zeros(&[d], DType::F32);
        backward(&mut d_x, Some(&mut d_w), &d_out, &x, &w, &rstd).unwrap();
        let mut want = vec![0.0; d];
        for ((d_out, x), r) in f64s(&d_out)
            .chunks(d)
            .zip(f64s(&x).chunks(d))
            .zip(f64s(&rstd))
        {
            for i in 0..d {
                want[i] += d_out[i] * x[i] * r;
            }
        }
        assert_close("d_w", &d_w, &want, 1e-5);
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let x = tensor(&[4, 6], 1, DType::F32);
        let w = tensor(&[6], 2, DType::F32);
        let mut out = x.clone();
        let mut rstd = Tensor::zeros(&[3], DType::F32);
        assert!(matches!(
            forward(&mut out, &mut rstd, &x, &w, EPS),
            Err(Error::Shape { arg: "rstd", .. })
        ));
        let mut rstd = Tensor::zeros(&[4], DType::Bf16);
        assert!(matches!(
            forward(&mut out, &mut rstd, &x, &w, EPS),
            Err(Error::DType { arg: "rstd", .. })
        ));
        let mut rstd = Tensor::zeros(&[4], DType::F32);
        let mut narrow = Tensor::zeros(&[4, 5], DType::F32);
        assert!(matches!(
            backward_accumulate(&mut out, &mut narrow, None, &x, &x, &w, &rstd),
            Err(Error::Shape {
                arg: "d_branch",
                ..
            })
        ));
        let w = tensor(&[5], 2, DType::F32);
        assert!(matches!(
            forward(&mut out, &mut rstd, &x, &w, EPS),
            Err(Error::Shape { arg: "w_d", .. })
        ));
    }
}
