//! Gates of the delta rule: g = -exp(a_log) softplus(a + dt_bias), the natural log of the decay, and beta = sigmoid(b).
//! softplus(x) = ln(1 + e^x), x itself above 20.
//!
//! Gradients, with x = a + dt_bias: d_a = -d_g exp(a_log) softplus'(x), softplus'(x) = sigmoid(x) (1 above 20);
//! d_dt_bias = Σ_t d_a; d_a_log = Σ_t d_g g; d_b = d_beta beta (1 - beta).
//! Source: `Qwen3_5GatedDeltaNet` of transformers 5.17.

use super::check;
use crate::cuda::DeviceProperties;
use crate::ops::rows::Partials;
use crate::{Device, Result, Tensor};

/// What both passes read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// [T,H]
    pub a_th: &'a Tensor,
    /// [T,H]
    pub b_th: &'a Tensor,
    /// [H]
    pub a_log_h: &'a Tensor,
    /// [H]
    pub dt_bias_h: &'a Tensor,
}

/// The gradients of [`Inputs`].
#[derive(Debug)]
pub struct Gradients<'a> {
    /// [T,H], assigned.
    pub d_a_th: &'a mut Tensor,
    /// [T,H], assigned.
    pub d_b_th: &'a mut Tensor,
    /// d_a_log and d_dt_bias [H] f32, added to; None: frozen.
    pub d_params: Option<(&'a mut Tensor, &'a mut Tensor)>,
}

/// Both [T,H] f32, assigned.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where an output is not f32.
pub fn forward(g_th: &mut Tensor, beta_th: &mut Tensor, inputs: &Inputs) -> Result<()> {
    const OP: &str = "delta_gate::forward";
    inputs.check(OP)?;
    for (arg, tensor) in [("g_th", &*g_th), ("beta_th", &*beta_th)] {
        check::shape(OP, arg, tensor, inputs.a_th.shape())?;
        check::f32(OP, arg, tensor)?;
    }
    match inputs.device(OP, g_th, &[("beta_th", &*beta_th)])? {
        Device::Cpu => cpu::forward(g_th, beta_th, inputs),
        Device::Cuda(cuda) => cuda::forward(cuda, g_th, beta_th, inputs)?,
    }
    Ok(())
}

/// d_a, d_b assigned, the parameters' gradients added to, from those of the two outputs [T,H].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where a parameter's gradient is not f32.
pub fn backward(
    gradients: Gradients,
    d_g_th: &Tensor,
    d_beta_th: &Tensor,
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "delta_gate::backward";
    inputs.check(OP)?;
    let mut others = vec![
        ("d_a_th", &*gradients.d_a_th),
        ("d_b_th", &*gradients.d_b_th),
        ("d_g_th", d_g_th),
        ("d_beta_th", d_beta_th),
    ];
    for (arg, tensor) in &others {
        check::shape(OP, arg, tensor, inputs.a_th.shape())?;
    }
    if let Some((d_a_log_h, d_dt_bias_h)) = &gradients.d_params {
        for (arg, tensor) in [("d_a_log_h", d_a_log_h), ("d_dt_bias_h", d_dt_bias_h)] {
            check::shape(OP, arg, tensor, inputs.a_log_h.shape())?;
            check::f32(OP, arg, tensor)?;
            others.push((arg, tensor));
        }
    }
    match inputs.device(OP, gradients.d_a_th, &others)? {
        Device::Cpu => cpu::backward(gradients, d_g_th, d_beta_th, inputs),
        Device::Cuda(cuda) => cuda::backward(cuda, gradients, d_g_th, d_beta_th, inputs)?,
    }
    Ok(())
}

impl Inputs<'_> {
    fn check(&self, op: &'static str) -> Result<()> {
        let [t, h] = check::dims(op, "a_th", self.a_th, "[T,H]")?;
        check::shape(op, "b_th", self.b_th, &[t, h])?;
        check::shape(op, "a_log_h", self.a_log_h, &[h])?;
        check::shape(op, "dt_bias_h", self.dt_bias_h, &[h])
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
            ("a_th", self.a_th),
            ("b_th", self.b_th),
            ("a_log_h", self.a_log_h),
            ("dt_bias_h", self.dt_bias_h),
        ];
        check::device(op, first, &inputs)
    }
}

/// Bytes of scratch that [`backward`] takes on a GPU for [T,H] gates.
pub fn backward_scratch_bytes(gpu: DeviceProperties, [t, h]: [usize; 2]) -> usize {
    Partials::bytes(cuda::backward_blocks(gpu, t, h).n, 2 * h)
}

mod cpu {
    use super::{Gradients, Inputs};
    use crate::Tensor;
    use crate::cpu::math::{add, sigmoid, softplus};
    use crate::cpu::{In, Out, for_rows, for_rows_summing};

    pub(super) fn forward(g_th: &mut Tensor, beta_th: &mut Tensor, inputs: &Inputs) {
        let h = inputs.a_log_h.numel();
        let rate_h = rates(inputs.a_log_h);
        let dt_bias_h = inputs.dt_bias_h.to_f32_vec();
        for_rows(
            [Out::assign(g_th, h), Out::assign(beta_th, h)],
            [In::new(inputs.a_th, h), In::new(inputs.b_th, h)],
            #[inline(always)]
            |_, [g, beta], [a, b]| {
                for (beta, b) in beta.iter_mut().zip(b) {
                    *beta = sigmoid(*b);
                }
                for (g, a) in g.chunks_exact_mut(h).zip(a.chunks_exact(h)) {
                    for (((g, a), rate), dt_bias) in
                        g.iter_mut().zip(a).zip(&rate_h).zip(&dt_bias_h)
                    {
                        *g = rate * softplus(a + dt_bias);
                    }
                }
            },
        );
    }

    pub(super) fn backward(
        gradients: Gradients,
        d_g_th: &Tensor,
        d_beta_th: &Tensor,
        inputs: &Inputs,
    ) {
        let h = inputs.a_log_h.numel();
        let rate_h = rates(inputs.a_log_h);
        let dt_bias_h = inputs.dt_bias_h.to_f32_vec();
        let d_params = gradients.d_params;
        let n_sums = if d_params.is_some() { 2 * h } else { 0 };
        let sums = for_rows_summing(
            [
                Out::assign(gradients.d_a_th, h),
                Out::assign(gradients.d_b_th, h),
            ],
            [
                In::new(d_g_th, h),
                In::new(d_beta_th, h),
                In::new(inputs.a_th, h),
                In::new(inputs.b_th, h),
            ],
            n_sums,
            #[inline(always)]
            |_, [d_a, d_b], [d_g, d_beta, a, b], sums| {
                for ((d_b, d_beta), b) in d_b.iter_mut().zip(d_beta).zip(b) {
                    let beta = sigmoid(*b);
                    *d_b = d_beta * (beta * (1.0 - beta));
                }
                let rows = d_a
                    .chunks_exact_mut(h)
                    .zip(d_g.chunks_exact(h))
                    .zip(a.chunks_exact(h));
                for ((d_a, d_g), a) in rows {
                    for i in 0..h {
                        let x = a[i] + dt_bias_h[i];
                        d_a[i] = d_g[i] * rate_h[i] * sigmoid(x);
                        if let Some((d_a_log, d_dt_bias)) = sums.split_at_mut_checked(h) {
                            d_a_log[i] += d_g[i] * rate_h[i] * softplus(x);
                            d_dt_bias[i] += d_a[i];
                        }
                    }
                }
            },
        );
        if let Some((d_a_log_h, d_dt_bias_h)) = d_params {
            add(d_a_log_h.f32s_mut(), &sums[..h]);
            add(d_dt_bias_h.f32s_mut(), &sums[h..]);
        }
    }

    /// -exp(a_log).
    fn rates(a_log_h: &Tensor) -> Vec<f32> {
        a_log_h
            .to_f32_vec()
            .into_iter()
            .map(|a_log| -a_log.exp())
            .collect()
    }
}

mod cuda {
    use super::{Gradients, Inputs};
    use crate::cuda::sources::DELTA_GATE;
    use crate::cuda::{Args, Cuda, DeviceProperties, Grid};
    use crate::ops::rows::Partials;
    use crate::{Error, Result, Tensor};

    const THREADS: usize = 256;
    const MAX_THREADS: usize = 1024;

    pub(super) fn forward(
        cuda: Cuda,
        g_th: &mut Tensor,
        beta_th: &mut Tensor,
        inputs: &Inputs,
    ) -> Result<()> {
        let n = inputs.a_th.numel();
        let args = Args::new()
            .tensor_mut(g_th)
            .tensor_mut(beta_th)
            .view(inputs.a_th)
            .view(inputs.b_th)
            .view(inputs.a_log_h)
            .view(inputs.dt_bias_h)
            .u64(n as u64)
            .u32(inputs.a_log_h.numel());
        let grid = Grid::each(n, THREADS as u32);
        cuda.launch(&DELTA_GATE, "delta_gate_forward", grid, args)
    }

    /// Blocks of backward, each with a row of partial sums.
    pub(super) struct Blocks {
        pub n: usize,
        threads: usize,
    }

    pub(super) fn backward_blocks(
        gpu: DeviceProperties,
        n_tokens: usize,
        n_heads: usize,
    ) -> Blocks {
        let threads = n_heads.next_multiple_of(32).max(THREADS);
        let at_a_time = gpu.n_multiprocessors as usize * MAX_THREADS / threads;
        Blocks {
            n: n_tokens.div_ceil(threads / n_heads).min(at_a_time),
            threads,
        }
    }

    pub(super) fn backward(
        cuda: Cuda,
        gradients: Gradients,
        d_g_th: &Tensor,
        d_beta_th: &Tensor,
        inputs: &Inputs,
    ) -> Result<()> {
        let h = inputs.a_log_h.numel();
        if h > MAX_THREADS {
            return Err(Error::Unsupported {
                op: "delta_gate::backward",
                what: format!("{h} heads (at most {MAX_THREADS})"),
            });
        }
        if inputs.a_th.numel() == 0 {
            return Ok(());
        }
        let n_tokens = inputs.a_th.numel() / h;
        let blocks = backward_blocks(cuda.properties(), n_tokens, h);
        let partials = Partials::new(cuda, gradients.d_params.is_some(), blocks.n, 2 * h)?;
        let args = Args::new()
            .view_mut(gradients.d_a_th)
            .view_mut(gradients.d_b_th)
            .pointer(partials.pointer)
            .view(d_g_th)
            .view(d_beta_th)
            .view(inputs.a_th)
            .view(inputs.b_th)
            .view(inputs.a_log_h)
            .view(inputs.dt_bias_h)
            .u32(n_tokens)
            .u32(h);
        let grid = Grid::line(blocks.n, blocks.threads as u32);
        cuda.launch(&DELTA_GATE, "delta_gate_backward", grid, args)?;
        if let Some((d_a_log_h, d_dt_bias_h)) = gradients.d_params {
            partials.add_to(cuda, d_a_log_h, 0)?;
            partials.add_to(cuda, d_dt_bias_h, h)?;
        }
        Ok(())
    }
}

pub(crate) mod examples {
    use super::{Gradients, Inputs};
    use crate::DType::{self, F32};
    use crate::example::{Example, PAIRS, Sizes, TYPES};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for shape in [[1, 16], [700, 32], [123, 48], [5, 3], [4, 300]] {
            // Of x and of dt_bias: what forward writes is f32 always.
            for [x_type, w_type] in PAIRS {
                all.push(forward(shape, [x_type, x_type, w_type]));
            }
            for types in TYPES {
                all.push(backward(shape, types));
                all.push(backward_frozen(shape, types));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let [_, h, ..] = sizes.delta;
        let (shape, types) = ([sizes.n_tokens, h], [sizes.dtype; 3]);
        vec![forward(shape, types), backward(shape, types)]
    }

    fn example(name: &'static str, [t, h]: [usize; 2]) -> Example {
        Example::new(name, format!("t{t}_h{h}"))
    }

    fn inputs(example: Example, [t, h]: [usize; 2], [x_type, _, w_type]: [DType; 3]) -> Example {
        example
            // Both sides of the threshold of softplus.
            .input_in("a", &[t, h], x_type, [-8.0, 30.0])
            .input_in("b", &[t, h], x_type, [-4.0, 4.0])
            .input_in("a_log", &[h], F32, [-2.0, 3.0])
            .input("dt_bias", &[h], w_type)
    }

    fn forward(shape: [usize; 2], types: [DType; 3]) -> Example {
        let example = example("delta_gate/forward", shape)
            .out("g", &shape, F32)
            .out("beta", &shape, F32);
        inputs(example, shape, types).run(|[g, beta], [a_th, b_th, a_log_h, dt_bias_h]| {
            let inputs = Inputs {
                a_th,
                b_th,
                a_log_h,
                dt_bias_h,
            };
            super::forward(g, beta, &inputs)
        })
    }

    fn backward(shape: [usize; 2], types: [DType; 3]) -> Example {
        let example = example("delta_gate/backward", shape)
            .out("d_a", &shape, types[1])
            .out("d_b", &shape, types[1])
            .updated("d_a_log", &shape[1..], F32)
            .updated("d_dt_bias", &shape[1..], F32)
            .input("d_g", &shape, F32)
            .input("d_beta", &shape, F32);
        inputs(example, shape, types).run(
            |[d_a_th, d_b_th, d_a_log, d_dt_bias],
             [d_g, d_beta, a_th, b_th, a_log_h, dt_bias_h]| {
                let gradients = Gradients {
                    d_a_th,
                    d_b_th,
                    d_params: Some((d_a_log, d_dt_bias)),
                };
                let inputs = Inputs {
                    a_th,
                    b_th,
                    a_log_h,
                    dt_bias_h,
                };
                super::backward(gradients, d_g, d_beta, &inputs)
            },
        )
    }

    fn backward_frozen(shape: [usize; 2], types: [DType; 3]) -> Example {
        let example = example("delta_gate/backward", shape)
            .out("d_a, frozen", &shape, types[1])
            .out("d_b, frozen", &shape, types[1])
            .input("d_g", &shape, F32)
            .input("d_beta", &shape, F32);
        inputs(example, shape, types).run(
            |[d_a_th, d_b_th], [d_g, d_beta, a_th, b_th, a_log_h, dt_bias_h]| {
                let gradients = Gradients {
                    d_a_th,
                    d_b_th,
                    d_params: None,
                };
                let inputs = Inputs {
                    a_th,
                    b_th,
                    a_log_h,
                    dt_bias_h,
                };
                super::backward(gradients, d_g, d_beta, &inputs)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, assert_close, dot, f64s, gradient, plus, tensor};
    use crate::{DType, Error};

    /// Of a, b, a_log, dt_bias.
    fn define(x: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
        let h = x[2].len();
        let g = x[0].iter().enumerate().map(|(i, a)| {
            let x_dt = a + x[3][i % h];
            -x[2][i % h].exp()
                * if x_dt > 20.0 {
                    x_dt
                } else {
                    x_dt.exp().ln_1p()
                }
        });
        let beta = x[1].iter().map(|b| 1.0 / (1.0 + (-b).exp()));
        (g.collect(), beta.collect())
    }

    /// a of a wide range, so that both branches of softplus occur; b; a_log; dt_bias.
    fn inputs(t: usize, h: usize, dtype: DType) -> [Tensor; 4] {
        let mut a = tensor(&[t, h], 1, DType::F32);
        a.f32s_mut().iter_mut().for_each(|a| *a *= 20.0);
        [
            a.to_dtype(dtype),
            tensor(&[t, h], 2, dtype),
            tensor(&[h], 3, DType::F32),
            tensor(&[h], 4, dtype),
        ]
    }

    fn as_inputs([a_th, b_th, a_log_h, dt_bias_h]: &[Tensor; 4]) -> Inputs<'_> {
        Inputs {
            a_th,
            b_th,
            a_log_h,
            dt_bias_h,
        }
    }

    #[test]
    fn forward_agrees_with_definition() {
        for (dtype, _) in STORAGES {
            for (t, h) in [(1, 1), (7, 3), (2100, 32)] {
                let x = inputs(t, h, dtype);
                let (mut g, mut beta) = (
                    Tensor::poison(&[t, h], DType::F32),
                    Tensor::poison(&[t, h], DType::F32),
                );
                forward(&mut g, &mut beta, &as_inputs(&x)).unwrap();
                let (g_want, beta_want) = define(&x.each_ref().map(f64s));
                assert_close("g", &g, &g_want, 1e-6);
                assert_close("beta", &beta, &beta_want, 1e-6);
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for (dtype, tolerance) in STORAGES {
            let (t, h) = (11, 5);
            let x = inputs(t, h, dtype);
            let (d_g, d_beta) = (
                tensor(&[t, h], 5, DType::F32),
                tensor(&[t, h], 6, DType::F32),
            );
            let (mut d_a, mut d_b) = (
                Tensor::poison(&[t, h], dtype),
                Tensor::poison(&[t, h], dtype),
            );
            let before = [7, 8].map(|seed| tensor(&[h], seed, DType::F32));
            let [mut d_a_log, mut d_dt_bias] = before.clone();
            let gradients = Gradients {
                d_a_th: &mut d_a,
                d_b_th: &mut d_b,
                d_params: Some((&mut d_a_log, &mut d_dt_bias)),
            };
            backward(gradients, &d_g, &d_beta, &as_inputs(&x)).unwrap();

            let at = x.each_ref().map(f64s);
            let loss = |x: &[Vec<f64>]| {
                let (g, beta) = define(x);
                dot(&f64s(&d_g), &g) + dot(&f64s(&d_beta), &beta)
            };
            assert_close("d_a", &d_a, &gradient(&at, 0, loss), tolerance);
            assert_close("d_b", &d_b, &gradient(&at, 1, loss), tolerance);
            assert_close(
                "d_a_log",
                &d_a_log,
                &plus(&gradient(&at, 2, loss), &before[0]),
                1e-5,
            );
            assert_close(
                "d_dt_bias",
                &d_dt_bias,
                &plus(&gradient(&at, 3, loss), &before[1]),
                1e-5,
            );

            let (mut frozen_a, mut frozen_b) = (
                Tensor::poison(&[t, h], dtype),
                Tensor::poison(&[t, h], dtype),
            );
            let gradients = Gradients {
                d_a_th: &mut frozen_a,
                d_b_th: &mut frozen_b,
                d_params: None,
            };
            backward(gradients, &d_g, &d_beta, &as_inputs(&x)).unwrap();
            assert_eq!((frozen_a, frozen_b), (d_a, d_b));
        }
    }

    #[test]
    fn gates_must_be_f32() {
        let x = inputs(2, 3, DType::F32);
        let mut out = Tensor::zeros(&[2, 3], DType::Bf16);
        let got = forward(&mut out.clone(), &mut out, &as_inputs(&x));
        assert!(matches!(got, Err(Error::DType { arg: "g_th", .. })));
    }
}
