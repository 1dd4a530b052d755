//! Gated RMSNorm per head: out = x rstd w silu(z), rstd = 1 / sqrt(mean(x²) + eps): normalise, scale by w (not 1 + w), then gate.
//!
//! Gradients, with y = x rstd and e = d_out w silu(z): d_x = rstd (e - y mean(e y)), d_w = Σ_rows d_out y silu(z),
//! d_z = d_out y w silu'(z).
//! Source: `Qwen3_5RMSNormGated` of transformers 5.17.

use super::check;
use crate::cuda::DeviceProperties;
use crate::{Device, Result, Tensor};

/// What both passes read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// [T,H,V]
    pub x_thv: &'a Tensor,
    /// [T,H,V]
    pub z_thv: &'a Tensor,
    /// [V]
    pub w_v: &'a Tensor,
}

/// The gradients of [`Inputs`].
#[derive(Debug)]
pub struct Gradients<'a> {
    /// [T,H,V], assigned.
    pub d_x_thv: &'a mut Tensor,
    /// [T,H,V], assigned.
    pub d_z_thv: &'a mut Tensor,
    /// [V] f32, added to; None: frozen.
    pub d_w_v: Option<&'a mut Tensor>,
}

/// `out` [T,H,V] and `rstd` [T,H] f32 assigned. `eps` is added to mean(x²).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd is not f32.
pub fn forward(
    out_thv: &mut Tensor,
    rstd_th: &mut Tensor,
    inputs: &Inputs,
    eps: f32,
) -> Result<()> {
    const OP: &str = "gated_rms_norm::forward";
    check::shape(OP, "out_thv", out_thv, inputs.x_thv.shape())?;
    inputs.check(OP, rstd_th)?;
    match inputs.device(OP, out_thv, &[("rstd_th", &*rstd_th)])? {
        Device::Cpu => cpu::forward(out_thv, rstd_th, inputs, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, rstd_th, inputs, eps)?,
    }
    Ok(())
}

/// d_x, d_z assigned, d_w added to, from d_out [T,H,V] and what [`forward`] gave as rstd.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where rstd or d_w is not f32.
pub fn backward(
    gradients: Gradients,
    d_out_thv: &Tensor,
    inputs: &Inputs,
    rstd_th: &Tensor,
) -> Result<()> {
    const OP: &str = "gated_rms_norm::backward";
    let mut others = vec![
        ("d_x_thv", &*gradients.d_x_thv),
        ("d_z_thv", &*gradients.d_z_thv),
        ("d_out_thv", d_out_thv),
    ];
    for (arg, tensor) in &others {
        check::shape(OP, arg, tensor, inputs.x_thv.shape())?;
    }
    if let Some(d_w_v) = gradients.d_w_v.as_deref() {
        check::shape(OP, "d_w_v", d_w_v, inputs.w_v.shape())?;
        check::f32(OP, "d_w_v", d_w_v)?;
        others.push(("d_w_v", d_w_v));
    }
    others.push(("rstd_th", rstd_th));
    inputs.check(OP, rstd_th)?;
    match inputs.device(OP, gradients.d_x_thv, &others)? {
        Device::Cpu => cpu::backward(gradients, d_out_thv, inputs, rstd_th),
        Device::Cuda(cuda) => cuda::backward(cuda, gradients, d_out_thv, inputs, rstd_th)?,
    }
    Ok(())
}

impl Inputs<'_> {
    fn check(&self, op: &'static str, rstd_th: &Tensor) -> Result<()> {
        let [t, h, v] = check::dims(op, "x_thv", self.x_thv, "[T,H,V]")?;
        check::shape(op, "z_thv", self.z_thv, &[t, h, v])?;
        check::shape(op, "w_v", self.w_v, &[v])?;
        check::shape(op, "rstd_th", rstd_th, &[t, h])?;
        check::f32(op, "rstd_th", rstd_th)
    }

    /// Where `first`, the inputs and `others` all lie.
    fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        check::device(op, first, others)?;
        let inputs = [
            ("x_thv", self.x_thv),
            ("z_thv", self.z_thv),
            ("w_v", self.w_v),
        ];
        check::device(op, first, &inputs)
    }
}

/// Bytes of scratch that [`backward`] takes on a GPU for `n_rows` rows of `width`.
pub fn backward_scratch_bytes(gpu: DeviceProperties, n_rows: usize, width: usize) -> usize {
    cuda::scratch_bytes(gpu, n_rows, width)
}

mod cpu {
    use super::{Gradients, Inputs};
    use crate::Tensor;
    use crate::cpu::math::{add, dot, sigmoid, silu, sum_squares};
    use crate::cpu::{In, Out, for_rows, for_rows_summing};

    pub(super) fn forward(out: &mut Tensor, rstd: &mut Tensor, inputs: &Inputs, eps: f32) {
        let v = inputs.w_v.numel();
        let w_v = inputs.w_v.to_f32_vec();
        for_rows(
            [Out::assign(out, v), Out::assign(rstd, 1)],
            [In::new(inputs.x_thv, v), In::new(inputs.z_thv, v)],
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

    pub(super) fn backward(gradients: Gradients, d_out: &Tensor, inputs: &Inputs, rstd: &Tensor) {
        let v = inputs.w_v.numel();
        let w_v = inputs.w_v.to_f32_vec();
        let d_w_v = gradients.d_w_v;
        let n_sums = if d_w_v.is_some() { v } else { 0 };
        let sums = for_rows_summing(
            [
                Out::assign(gradients.d_x_thv, v),
                Out::assign(gradients.d_z_thv, v),
            ],
            [
                In::new(d_out, v),
                In::new(inputs.x_thv, v),
                In::new(inputs.z_thv, v),
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
    use super::{Gradients, Inputs};
    use crate::cuda::sources::GATED_RMS_NORM;
    use crate::cuda::{Args, Cuda, DeviceProperties};
    use crate::ops::rows::{self, Partials, Rows};
    use crate::{Result, Tensor};

    pub(super) fn forward(
        cuda: Cuda,
        out: &mut Tensor,
        rstd: &mut Tensor,
        inputs: &Inputs,
        eps: f32,
    ) -> Result<()> {
        let Inputs {
            x_thv: x,
            z_thv: z,
            w_v,
        } = *inputs;
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

    pub(super) fn scratch_bytes(gpu: DeviceProperties, n_rows: usize, width: usize) -> usize {
        let rows = Rows::new("gated_rms_norm::backward", n_rows, width);
        let n = rows.map_or(0, |rows| rows.walking_grid(gpu).blocks[0] as usize);
        Partials::bytes(n, width)
    }

    pub(super) fn backward(
        cuda: Cuda,
        gradients: Gradients,
        d_out: &Tensor,
        inputs: &Inputs,
        rstd: &Tensor,
    ) -> Result<()> {
        let Inputs {
            x_thv: x,
            z_thv: z,
            w_v,
        } = *inputs;
        let Gradients {
            d_x_thv: d_x,
            d_z_thv: d_z,
            d_w_v,
        } = gradients;
        let (n_rows, v) = (rstd.numel(), w_v.numel());
        let rows = Rows::new("gated_rms_norm::backward", n_rows, v)?;
        let grid = rows.walking_grid(cuda.properties());
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

pub(crate) mod examples {
    use super::{Gradients, Inputs};
    use crate::DType::{self, F32};
    use crate::example::{Example, Sizes, TYPES, zeros_like};

    const EPS: f32 = 1e-6;

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for types in TYPES {
            for shape in [
                [1, 16, 128],
                [150, 32, 128],
                [13, 3, 64],
                [5, 2, 256],
                [6, 1, 300],
                [9, 5, 20],
            ] {
                all.push(forward(shape, types));
                all.push(backward(shape, types));
                all.push(backward_frozen(shape, types));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let [_, h, _, v] = sizes.delta;
        let (shape, types) = ([sizes.n_tokens, h, v], [sizes.dtype, sizes.dtype, F32]);
        vec![forward(shape, types), backward(shape, types)]
    }

    fn example(name: &'static str, [t, h, v]: [usize; 3]) -> Example {
        Example::new(name, format!("t{t}_h{h}_v{v}"))
    }

    pub(super) fn forward(shape: [usize; 3], [x_type, out_type, w_type]: [DType; 3]) -> Example {
        example("gated_rms_norm/forward", shape)
            .out("out", &shape, out_type)
            .out("rstd", &shape[..2], F32)
            .input("x", &shape, x_type)
            .input_in("z", &shape, x_type, [-6.0, 6.0])
            .input("w", &shape[2..], w_type)
            .run(|[out_thv, rstd_th], [x_thv, z_thv, w_v]| {
                super::forward(out_thv, rstd_th, &Inputs { x_thv, z_thv, w_v }, EPS)
            })
    }

    fn backward_inputs(
        example: Example,
        shape: [usize; 3],
        [x_type, d_type, w_type]: [DType; 3],
    ) -> Example {
        example
            .input("d_out", &shape, d_type)
            .input("x", &shape, x_type)
            .input_in("z", &shape, x_type, [-6.0, 6.0])
            .input("w", &shape[2..], w_type)
            .saved("rstd", &shape[..2], F32)
            .prepared(|[_, x_thv, z_thv, w_v, rstd_th]| {
                let mut out_thv = zeros_like(x_thv)?;
                super::forward(&mut out_thv, rstd_th, &Inputs { x_thv, z_thv, w_v }, EPS)
            })
    }

    fn backward(shape: [usize; 3], types: [DType; 3]) -> Example {
        let example = example("gated_rms_norm/backward", shape)
            .out("d_x", &shape, types[1])
            .out("d_z", &shape, types[1])
            .updated("d_w", &shape[2..], F32);
        backward_inputs(example, shape, types).run(
            |[d_x_thv, d_z_thv, d_w_v], [d_out, x_thv, z_thv, w_v, rstd]| {
                let gradients = Gradients {
                    d_x_thv,
                    d_z_thv,
                    d_w_v: Some(d_w_v),
                };
                super::backward(gradients, d_out, &Inputs { x_thv, z_thv, w_v }, rstd)
            },
        )
    }

    fn backward_frozen(shape: [usize; 3], types: [DType; 3]) -> Example {
        let example = example("gated_rms_norm/backward", shape)
            .out("d_x, frozen", &shape, types[1])
            .out("d_z, frozen", &shape, types[1]);
        backward_inputs(example, shape, types).run(
            |[d_x_thv, d_z_thv], [d_out, x_thv, z_thv, w_v, rstd]| {
                let gradients = Gradients {
                    d_x_thv,
                    d_z_thv,
                    d_w_v: None,
                };
                super::backward(gradients, d_out, &Inputs { x_thv, z_thv, w_v }, rstd)
            },
        )
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

    fn inputs<'a>(x_thv: &'a Tensor, z_thv: &'a Tensor, w_v: &'a Tensor) -> Inputs<'a> {
        Inputs { x_thv, z_thv, w_v }
    }

    fn rstds(x: &[f64], v: usize) -> Vec<f64> {
        let mean = |x: &[f64]| dot(x, x) / v as f64;
        x.chunks(v)
            .map(|x| 1.0 / (mean(x) + EPS as f64).sqrt())
            .collect()
    }

    #[test]
    fn forward_agrees_with_definition() {
        for types in TYPES {
            for shape in [[1, 1, 1], [3, 2, 5], [70, 4, 128]] {
                let example = examples::forward(shape, types);
                assert_agrees(&example, |ins| {
                    let out = define(&ins[0], &ins[1], &ins[2]);
                    vec![out, rstds(&ins[0], shape[2])]
                });
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
            forward(&mut x.clone(), &mut rstd, &inputs(&x, &z, &w), EPS).unwrap();
            let (mut d_x, mut d_z) = (Tensor::poison(&shape, dtype), Tensor::poison(&shape, dtype));
            let before = tensor(&shape[2..], 5, DType::F32);
            let mut d_w = before.clone();
            let gradients = Gradients {
                d_x_thv: &mut d_x,
                d_z_thv: &mut d_z,
                d_w_v: Some(&mut d_w),
            };
            backward(gradients, &d_out, &inputs(&x, &z, &w), &rstd).unwrap();
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
            let gradients = Gradients {
                d_x_thv: &mut frozen_x,
                d_z_thv: &mut frozen_z,
                d_w_v: None,
            };
            backward(gradients, &d_out, &inputs(&x, &z, &w), &rstd).unwrap();
            assert_eq!((frozen_x, frozen_z), (d_x, d_z));
        }
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let x = tensor(&[2, 3, 4], 1, DType::F32);
        let w = tensor(&[4], 2, DType::F32);
        let mut rstd = Tensor::zeros(&[2, 4], DType::F32);
        let got = forward(&mut x.clone(), &mut rstd, &inputs(&x, &x, &w), EPS);
        assert!(matches!(got, Err(Error::Shape { arg: "rstd_th", .. })));
        let flat = tensor(&[6, 4], 1, DType::F32);
        let got = forward(&mut flat.clone(), &mut rstd, &inputs(&flat, &flat, &w), EPS);
        assert!(matches!(got, Err(Error::Shape { arg: "x_thv", .. })));
    }
}
