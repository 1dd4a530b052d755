//! Gated RMSNorm per head: out = x rstd w silu(z), rstd = 1 / sqrt(mean(x²) + eps): normalise, scale by w (not 1 + w), then gate.
//!
//! Gradients, with y = x rstd and e = d_out w silu(z): d_x = rstd (e - y mean(e y)), d_w = Σ_rows d_out y silu(z),
//! d_z = d_out y w silu'(z).
//! Source: `Qwen3_5RMSNormGated` of transformers 5.17.

use super::check;
use crate::cuda::Card;
use crate::{Device, Result, Tensor};

/// `out` and `rstd` assigned. Shapes: out_thv, x_thv, z_thv [T,H,V]; w_v [V]; rstd_th [T,H] f32. `eps` is added to mean(x²).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd is not f32.
pub fn forward(
    out_thv: &mut Tensor,
    rstd_th: &mut Tensor,
    x_thv: &Tensor,
    z_thv: &Tensor,
    w_v: &Tensor,
    eps: f32,
) -> Result<()> {
    const OP: &str = "gated_rms_norm::forward";
    check::shape(OP, "out_thv", out_thv, x_thv.shape())?;
    check_inputs(OP, x_thv, z_thv, w_v, rstd_th)?;
    let others = [
        ("rstd_th", &*rstd_th),
        ("x_thv", x_thv),
        ("z_thv", z_thv),
        ("w_v", w_v),
    ];
    match check::device(OP, out_thv, &others)? {
        Device::Cpu => cpu::forward(out_thv, rstd_th, x_thv, z_thv, w_v, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, rstd_th, x_thv, z_thv, w_v, eps)?,
    }
    Ok(())
}

/// d_x, d_z assigned; d_w_v [V] f32 added to (None: frozen). Shapes as in [`forward`].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd or d_w_v is not f32.
pub fn backward(
    d_x_thv: &mut Tensor,
    d_z_thv: &mut Tensor,
    d_w_v: Option<&mut Tensor>,
    d_out_thv: &Tensor,
    x_thv: &Tensor,
    z_thv: &Tensor,
    w_v: &Tensor,
    rstd_th: &Tensor,
) -> Result<()> {
    const OP: &str = "gated_rms_norm::backward";
    check::shape(OP, "d_x_thv", d_x_thv, x_thv.shape())?;
    check::shape(OP, "d_z_thv", d_z_thv, x_thv.shape())?;
    check::shape(OP, "d_out_thv", d_out_thv, x_thv.shape())?;
    let mut others = vec![
        ("d_z_thv", &*d_z_thv),
        ("d_out_thv", d_out_thv),
        ("x_thv", x_thv),
        ("z_thv", z_thv),
        ("w_v", w_v),
        ("rstd_th", rstd_th),
    ];
    if let Some(d_w_v) = d_w_v.as_deref() {
        check::shape(OP, "d_w_v", d_w_v, w_v.shape())?;
        check::f32(OP, "d_w_v", d_w_v)?;
        others.push(("d_w_v", d_w_v));
    }
    check_inputs(OP, x_thv, z_thv, w_v, rstd_th)?;
    match check::device(OP, d_x_thv, &others)? {
        Device::Cpu => cpu::backward(
            d_x_thv, d_z_thv, d_w_v, d_out_thv, x_thv, z_thv, w_v, rstd_th,
        ),
        Device::Cuda(cuda) => cuda::backward(
            cuda, d_x_thv, d_z_thv, d_w_v, d_out_thv, x_thv, z_thv, w_v, rstd_th,
        )?,
    }
    Ok(())
}

fn check_inputs(
    op: &'static str,
    x_thv: &Tensor,
    z_thv: &Tensor,
    w_v: &Tensor,
    rstd_th: &Tensor,
) -> Result<()> {
    let [t, h, v] = check::dims(op, "x_thv", x_thv, "[T,H,V]")?;
    check::shape(op, "z_thv", z_thv, &[t, h, v])?;
    check::shape(op, "w_v", w_v, &[v])?;
    check::shape(op, "rstd_th", rstd_th, &[t, h])?;
    check::f32(op, "rstd_th", rstd_th)
}

/// Bytes of scratch that [`backward`] takes on a GPU for `n_rows` rows of `width`.
pub fn backward_scratch_bytes(card: Card, n_rows: usize, width: usize) -> usize {
    cuda::scratch_bytes(card, n_rows, width)
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::{add, dot, sigmoid, silu, sum_squares};
    use crate::cpu::{In, Out, for_rows, for_rows_summing};

    pub(super) fn forward(
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        z: &Tensor,
        w_v: &Tensor,
        eps: f32,
    ) {
        let v = w_v.numel();
        let w_v = w_v.to_f32_vec();
        for_rows(
            [Out::assign(out, v), Out::assign(rstd, 1)],
            [In::new(x, v), In::new(z, v)],
            #[inline(always)]
            |_, [out, rstd], [x, z]| {
                let ins = x.chunks_exact(v).zip(z.chunks_exact(v));
                for ((out, rstd), (x, z)) in out.chunks_exact_mut(v).zip(rstd).zip(ins) {
                    let r = 1.0 / (sum_squares(x) / v as f32 + eps).sqrt();
                    *rstd = r;
                    for (((out, x), z), w) in out.iter_mut().zip(x).zip(z).zip(&w_v) {
                        *out = x * r * w * silu(*z);
                    }
                }
            },
        );
    }

    pub(super) fn backward(
        d_x: &mut Tensor,
        d_z: &mut Tensor,
        d_w_v: Option<&mut Tensor>,
        d_out: &Tensor,
        x: &Tensor,
        z: &Tensor,
        w_v: &Tensor,
        rstd: &Tensor,
    ) {
        let v = w_v.numel();
        let w_v = w_v.to_f32_vec();
        let n_sums = if d_w_v.is_some() { v } else { 0 };
        let sums = for_rows_summing(
            [Out::assign(d_x, v), Out::assign(d_z, v)],
            [
                In::new(d_out, v),
                In::new(x, v),
                In::new(z, v),
                In::new(rstd, 1),
            ],
            n_sums,
            #[inline(always)]
            |_, [d_x, d_z], [d_out, x, z, rstd], d_w| {
                let outs = d_x.chunks_exact_mut(v).zip(d_z.chunks_exact_mut(v));
                let ins = d_out
                    .chunks_exact(v)
                    .zip(x.chunks_exact(v))
                    .zip(z.chunks_exact(v))
                    .zip(rstd);
                for ((d_x, d_z), (((d_out, x), z), r)) in outs.zip(ins) {
                    // d_z holds silu(z) and d_x holds e until both are final.
                    for (d_z, z) in d_z.iter_mut().zip(z) {
                        *d_z = silu(*z);
                    }
                    for ((d_w, silu), (d_out, x)) in
                        d_w.iter_mut().zip(&*d_z).zip(d_out.iter().zip(x))
                    {
                        *d_w += d_out * (x * r) * silu;
                    }
                    for (((d_x, d_out), silu), w) in d_x.iter_mut().zip(d_out).zip(&*d_z).zip(&w_v)
                    {
                        *d_x = d_out * w * silu;
                    }
                    let pull = dot(d_x, x) * (r * r) / v as f32;
                    for (d_x, x) in d_x.iter_mut().zip(x) {
                        *d_x = r * (*d_x - x * pull);
                    }
                    for (((d_z, z), (d_out, x)), w) in
                        d_z.iter_mut().zip(z).zip(d_out.iter().zip(x)).zip(&w_v)
                    {
                        let s = sigmoid(*z);
                        *d_z = d_out * (x * r) * w * (s * (1.0 + z * (1.0 - s)));
                    }
                }
            },
        );
        if let Some(d_w_v) = d_w_v {
            add(d_w_v.f32s_mut(), &sums);
        }
    }
}

mod cuda {
    use crate::cuda::sources::GATED_RMS_NORM;
    use crate::cuda::{Args, Card, Cuda};
    use crate::ops::rows::{self, Partials, Rows};
    use crate::{Result, Tensor};

    pub(super) fn forward(
        cuda: Cuda,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        z: &Tensor,
        w_v: &Tensor,
        eps: f32,
    ) -> Result<()> {
        let (n_rows, v) = (rstd.numel(), w_v.numel());
        let rows = Rows::new("gated_rms_norm::forward", n_rows, v)?;
        let names = ["gated_rms_norm_forward_bf16", "gated_rms_norm_forward_any"];
        let kernel = rows::instance(names, &[out, x, z], &[v]);
        let args = Args::new()
            .view_mut(out)
            .tensor_mut(rstd)
            .view(x)
            .view(z)
            .view(w_v)
            .u32(n_rows)
            .u32(v)
            .u32(rows.group)
            .f32(eps);
        cuda.launch(&GATED_RMS_NORM, kernel, rows.grid(), args)
    }

    pub(super) fn scratch_bytes(card: Card, n_rows: usize, width: usize) -> usize {
        let rows = Rows::new("gated_rms_norm::backward", n_rows, width);
        let n = rows.map_or(0, |rows| rows.walking_grid(card).blocks[0] as usize);
        Partials::bytes(n, width)
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_x: &mut Tensor,
        d_z: &mut Tensor,
        d_w_v: Option<&mut Tensor>,
        d_out: &Tensor,
        x: &Tensor,
        z: &Tensor,
        w_v: &Tensor,
        rstd: &Tensor,
    ) -> Result<()> {
        let (n_rows, v) = (rstd.numel(), w_v.numel());
        let rows = Rows::new("gated_rms_norm::backward", n_rows, v)?;
        let grid = rows.walking_grid(cuda.card());
        let partials = Partials::new(cuda, d_w_v.is_some(), grid.blocks[0] as usize, v)?;
        let names = [
            "gated_rms_norm_backward_bf16",
            "gated_rms_norm_backward_any",
        ];
        let kernel = rows::instance(names, &[d_x, d_z, d_out, x, z], &[v]);
        let args = Args::new()
            .view_mut(d_x)
            .view_mut(d_z)
            .pointer(partials.pointer)
            .view(d_out)
            .view(x)
            .view(z)
            .view(w_v)
            .tensor(rstd)
            .u32(n_rows)
            .u32(v)
            .u32(rows.group);
        cuda.launch(&GATED_RMS_NORM, kernel, grid, args)?;
        match d_w_v {
            Some(d_w_v) => partials.add_to(cuda, d_w_v, 0),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, assert_close, dot, f64s, gradient, plus, tensor};
    use crate::{DType, Error};

    const EPS: f32 = 1e-6;

    fn define(x: &[f64], z: &[f64], w: &[f64]) -> Vec<f64> {
        let v = w.len();
        x.chunks(v)
            .zip(z.chunks(v))
            .flat_map(|(x, z)| {
                let r = 1.0 / (dot(x, x) / v as f64 + EPS as f64).sqrt();
                (0..v).map(move |i| x[i] * r * w[i] * z[i] / (1.0 + (-z[i]).exp()))
            })
            .collect()
    }

    #[test]
    fn forward_agrees_with_definition() {
        for (dtype, tolerance) in STORAGES {
            for shape in [[1, 1, 1], [3, 2, 5], [70, 4, 128]] {
                let (x, z) = (tensor(&shape, 1, dtype), tensor(&shape, 2, dtype));
                let w = tensor(&shape[2..], 3, DType::F32);
                let mut out = Tensor::poison(&shape, dtype);
                let mut rstd = Tensor::poison(&shape[..2], DType::F32);
                forward(&mut out, &mut rstd, &x, &z, &w, EPS).unwrap();
                let want = define(&f64s(&x), &f64s(&z), &f64s(&w));
                assert_close("out", &out, &want, tolerance);
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for (dtype, tolerance) in STORAGES {
            let shape = [4, 3, 19];
            let (x, z) = (tensor(&shape, 1, dtype), tensor(&shape, 2, dtype));
            let w = tensor(&shape[2..], 3, dtype);
            let d_out = tensor(&shape, 4, dtype);
            let mut rstd = Tensor::poison(&shape[..2], DType::F32);
            forward(&mut x.clone(), &mut rstd, &x, &z, &w, EPS).unwrap();
            let (mut d_x, mut d_z) = (Tensor::poison(&shape, dtype), Tensor::poison(&shape, dtype));
            let before = tensor(&shape[2..], 5, DType::F32);
            let mut d_w = before.clone();
            backward(
                &mut d_x,
                &mut d_z,
                Some(&mut d_w),
                &d_out,
                &x,
                &z,
                &w,
                &rstd,
            )
            .unwrap();
            let at = [f64s(&x), f64s(&z), f64s(&w)];
            let loss = |x: &[Vec<f64>]| dot(&f64s(&d_out), &define(&x[0], &x[1], &x[2]));
            assert_close("d_x", &d_x, &gradient(&at, 0, loss), tolerance);
            assert_close("d_z", &d_z, &gradient(&at, 1, loss), tolerance);
            assert_close(
                "d_w",
                &d_w,
                &plus(&gradient(&at, 2, loss), &before),
                tolerance,
            );

            let (mut frozen_x, mut frozen_z) =
                (Tensor::poison(&shape, dtype), Tensor::poison(&shape, dtype));
            backward(
                &mut frozen_x,
                &mut frozen_z,
                None,
                &d_out,
                &x,
                &z,
                &w,
                &rstd,
            )
            .unwrap();
            assert_eq!((frozen_x, frozen_z), (d_x, d_z));
        }
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let x = tensor(&[2, 3, 4], 1, DType::F32);
        let w = tensor(&[4], 2, DType::F32);
        let mut rstd = Tensor::zeros(&[2, 4], DType::F32);
        let got = forward(&mut x.clone(), &mut rstd, &x, &x, &w, EPS);
        assert!(matches!(got, Err(Error::Shape { arg: "rstd_th", .. })));
        let flat = tensor(&[6, 4], 1, DType::F32);
        let got = forward(&mut flat.clone(), &mut rstd, &flat, &flat, &w, EPS);
        assert!(matches!(got, Err(Error::Shape { arg: "x_thv", .. })));
    }
}
