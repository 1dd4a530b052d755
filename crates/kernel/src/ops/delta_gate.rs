//! Gates of the delta rule: g = -exp(a_log) softplus(a + dt_bias), the natural log of the decay, and beta = sigmoid(b).
//! softplus(x) = ln(1 + e^x), x itself above 20.
//!
//! Gradients, with x = a + dt_bias: d_a = -d_g exp(a_log) softplus'(x), softplus'(x) = sigmoid(x) (1 above 20);
//! d_dt_bias = Σ_t d_a; d_a_log = Σ_t d_g g; d_b = d_beta beta (1 - beta).
//! Source: `Qwen3_5GatedDeltaNet` of transformers 5.17.

use super::check;
use crate::cuda::Card;
use crate::ops::rows::Partials;
use crate::{Device, Result, Tensor};

/// Both assigned. Shapes: g_th, beta_th [T,H] f32; a_th, b_th [T,H]; a_log_h, dt_bias_h [H].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where an output is not f32.
pub fn forward(
    g_th: &mut Tensor,
    beta_th: &mut Tensor,
    a_th: &Tensor,
    b_th: &Tensor,
    a_log_h: &Tensor,
    dt_bias_h: &Tensor,
) -> Result<()> {
    const OP: &str = "delta_gate::forward";
    check_inputs(OP, a_th, b_th, a_log_h, dt_bias_h)?;
    for (arg, tensor) in [("g_th", &*g_th), ("beta_th", &*beta_th)] {
        check::shape(OP, arg, tensor, a_th.shape())?;
        check::f32(OP, arg, tensor)?;
    }
    let others = [
        ("beta_th", &*beta_th),
        ("a_th", a_th),
        ("b_th", b_th),
        ("a_log_h", a_log_h),
        ("dt_bias_h", dt_bias_h),
    ];
    match check::device(OP, g_th, &others)? {
        Device::Cpu => cpu::forward(g_th, beta_th, a_th, b_th, a_log_h, dt_bias_h),
        Device::Cuda(cuda) => cuda::forward(cuda, g_th, beta_th, a_th, b_th, a_log_h, dt_bias_h)?,
    }
    Ok(())
}

/// d_a, d_b assigned; d_params = (d_a_log [H], d_dt_bias [H]) f32 added to (None: frozen). Shapes as in [`forward`].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where a parameter's gradient is not f32.
pub fn backward(
    d_a_th: &mut Tensor,
    d_b_th: &mut Tensor,
    d_params: Option<(&mut Tensor, &mut Tensor)>,
    d_g_th: &Tensor,
    d_beta_th: &Tensor,
    a_th: &Tensor,
    b_th: &Tensor,
    a_log_h: &Tensor,
    dt_bias_h: &Tensor,
) -> Result<()> {
    const OP: &str = "delta_gate::backward";
    check_inputs(OP, a_th, b_th, a_log_h, dt_bias_h)?;
    check::shape(OP, "d_a_th", d_a_th, a_th.shape())?;
    check::shape(OP, "d_b_th", d_b_th, a_th.shape())?;
    check::shape(OP, "d_g_th", d_g_th, a_th.shape())?;
    check::shape(OP, "d_beta_th", d_beta_th, a_th.shape())?;
    let mut others = vec![
        ("d_b_th", &*d_b_th),
        ("d_g_th", d_g_th),
        ("d_beta_th", d_beta_th),
        ("a_th", a_th),
        ("b_th", b_th),
        ("a_log_h", a_log_h),
        ("dt_bias_h", dt_bias_h),
    ];
    if let Some((d_a_log_h, d_dt_bias_h)) = &d_params {
        for (arg, tensor) in [("d_a_log_h", d_a_log_h), ("d_dt_bias_h", d_dt_bias_h)] {
            check::shape(OP, arg, tensor, a_log_h.shape())?;
            check::f32(OP, arg, tensor)?;
            others.push((arg, tensor));
        }
    }
    match check::device(OP, d_a_th, &others)? {
        Device::Cpu => cpu::backward(
            d_a_th, d_b_th, d_params, d_g_th, d_beta_th, a_th, b_th, a_log_h, dt_bias_h,
        ),
        Device::Cuda(cuda) => cuda::backward(
            cuda, d_a_th, d_b_th, d_params, d_g_th, d_beta_th, a_th, b_th, a_log_h, dt_bias_h,
        )?,
    }
    Ok(())
}

fn check_inputs(
    op: &'static str,
    a_th: &Tensor,
    b_th: &Tensor,
    a_log_h: &Tensor,
    dt_bias_h: &Tensor,
) -> Result<()> {
    let [t, h] = check::dims(op, "a_th", a_th, "[T,H]")?;
    check::shape(op, "b_th", b_th, &[t, h])?;
    check::shape(op, "a_log_h", a_log_h, &[h])?;
    check::shape(op, "dt_bias_h", dt_bias_h, &[h])
}

/// Bytes of scratch that [`backward`] takes on a GPU for [T,H] gates.
pub fn backward_scratch_bytes(card: Card, [t, h]: [usize; 2]) -> usize {
    Partials::bytes(cuda::backward_blocks(card, t, h).n, 2 * h)
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::{add, sigmoid, softplus};
    use crate::cpu::{In, Out, for_rows, for_rows_summing};

    pub(super) fn forward(
        g_th: &mut Tensor,
        beta_th: &mut Tensor,
        a_th: &Tensor,
        b_th: &Tensor,
        a_log_h: &Tensor,
        dt_bias_h: &Tensor,
    ) {
        let h = a_log_h.numel();
        let rate_h = rates(a_log_h);
        let dt_bias_h = dt_bias_h.to_f32_vec();
        for_rows(
            [Out::assign(g_th, h), Out::assign(beta_th, h)],
            [In::new(a_th, h), In::new(b_th, h)],
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
        d_a_th: &mut Tensor,
        d_b_th: &mut Tensor,
        d_params: Option<(&mut Tensor, &mut Tensor)>,
        d_g_th: &Tensor,
        d_beta_th: &Tensor,
        a_th: &Tensor,
        b_th: &Tensor,
        a_log_h: &Tensor,
        dt_bias_h: &Tensor,
    ) {
        let h = a_log_h.numel();
        let rate_h = rates(a_log_h);
        let dt_bias_h = dt_bias_h.to_f32_vec();
        let n_sums = if d_params.is_some() { 2 * h } else { 0 };
        let sums = for_rows_summing(
            [Out::assign(d_a_th, h), Out::assign(d_b_th, h)],
            [
                In::new(d_g_th, h),
                In::new(d_beta_th, h),
                In::new(a_th, h),
                In::new(b_th, h),
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
    use crate::cuda::sources::DELTA_GATE;
    use crate::cuda::{Args, Card, Cuda, Grid};
    use crate::ops::rows::Partials;
    use crate::{Error, Result, Tensor};

    const THREADS: usize = 256;
    const MAX_THREADS: usize = 1024;

    pub(super) fn forward(
        cuda: Cuda,
        g: &mut Tensor,
        beta: &mut Tensor,
        a: &Tensor,
        b: &Tensor,
        a_log_h: &Tensor,
        dt_bias_h: &Tensor,
    ) -> Result<()> {
        let n = a.numel();
        let args = Args::new()
            .tensor_mut(g)
            .tensor_mut(beta)
            .view(a)
            .view(b)
            .view(a_log_h)
            .view(dt_bias_h)
            .u64(n as u64)
            .u32(a_log_h.numel());
        let grid = Grid::each(n, THREADS as u32);
        cuda.launch(&DELTA_GATE, "delta_gate_forward", grid, args)
    }

    /// Blocks of backward, each with a row of partial sums.
    pub(super) struct Blocks {
        pub n: usize,
        threads: usize,
    }

    pub(super) fn backward_blocks(card: Card, n_tokens: usize, n_heads: usize) -> Blocks {
        let threads = n_heads.next_multiple_of(32).max(THREADS);
        let at_a_time = card.n_multiprocessors as usize * MAX_THREADS / threads;
        Blocks {
            n: n_tokens.div_ceil(threads / n_heads).min(at_a_time),
            threads,
        }
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_a: &mut Tensor,
        d_b: &mut Tensor,
        d_params: Option<(&mut Tensor, &mut Tensor)>,
        d_g: &Tensor,
        d_beta: &Tensor,
        a: &Tensor,
        b: &Tensor,
        a_log_h: &Tensor,
        dt_bias_h: &Tensor,
    ) -> Result<()> {
        let h = a_log_h.numel();
        if h > MAX_THREADS {
            return Err(Error::Unsupported {
                op: "delta_gate::backward",
                what: format!("{h} heads (at most {MAX_THREADS})"),
            });
        }
        if a.numel() == 0 {
            return Ok(());
        }
        let n_tokens = a.numel() / h;
        let blocks = backward_blocks(cuda.card(), n_tokens, h);
        let partials = Partials::new(cuda, d_params.is_some(), blocks.n, 2 * h)?;
        let args = Args::new()
            .view_mut(d_a)
            .view_mut(d_b)
            .pointer(partials.pointer)
            .view(d_g)
            .view(d_beta)
            .view(a)
            .view(b)
            .view(a_log_h)
            .view(dt_bias_h)
            .u32(n_tokens)
            .u32(h);
        let grid = Grid::line(blocks.n, blocks.threads as u32);
        cuda.launch(&DELTA_GATE, "delta_gate_backward", grid, args)?;
        if let Some((d_a_log_h, d_dt_bias_h)) = d_params {
            partials.add_to(cuda, d_a_log_h, 0)?;
            partials.add_to(cuda, d_dt_bias_h, h)?;
        }
        Ok(())
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

    #[test]
    fn forward_agrees_with_definition() {
        for (dtype, _) in STORAGES {
            for (t, h) in [(1, 1), (7, 3), (2100, 32)] {
                let x = inputs(t, h, dtype);
                let (mut g, mut beta) = (
                    Tensor::poison(&[t, h], DType::F32),
                    Tensor::poison(&[t, h], DType::F32),
                );
                forward(&mut g, &mut beta, &x[0], &x[1], &x[2], &x[3]).unwrap();
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
            let d_params = Some((&mut d_a_log, &mut d_dt_bias));
            backward(
                &mut d_a, &mut d_b, d_params, &d_g, &d_beta, &x[0], &x[1], &x[2], &x[3],
            )
            .unwrap();

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
            backward(
                &mut frozen_a,
                &mut frozen_b,
                None,
                &d_g,
                &d_beta,
                &x[0],
                &x[1],
                &x[2],
                &x[3],
            )
            .unwrap();
            assert_eq!((frozen_a, frozen_b), (d_a, d_b));
        }
    }

    #[test]
    fn gates_must_be_f32() {
        let x = inputs(2, 3, DType::F32);
        let mut out = Tensor::zeros(&[2, 3], DType::Bf16);
        let got = forward(&mut out.clone(), &mut out, &x[0], &x[1], &x[2], &x[3]);
        assert!(matches!(got, Err(Error::DType { arg: "g_th", .. })));
    }
}
