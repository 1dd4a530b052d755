//! Head projection and cross-entropy in row chunks, so that the logits of a whole batch never exist.
//!
//! logits = x headᵀ; nll = logsumexp(logits) - logits[target]; gradient of the logits = d_nll (softmax(logits) - onehot(target)),
//! of x that times head, of head its transpose times x. Only rows with a target are projected.
//! Source: the chunking is that of arXiv 2410.10989 (Liger) and 2411.09009 (Cut Cross-Entropy); the loss PyTorch's `cross_entropy`.

use super::check;
use crate::{Error, Result, Tensor};

/// Rows of logits that exist at a time, at most; fewer where the vocabulary is large (see [`LOGIT_BYTES`]).
pub const ROW_CHUNK: usize = 1024;
/// Memory that the logits of a chunk may take, as far as one vector-sized group of rows allows.
pub const LOGIT_BYTES: usize = 256 << 20;
/// Target of a position without loss.
pub const NO_TARGET: i32 = -1;

/// nll_t[t] = logsumexp(head x_t) - (head x_t)[targets[t]] (natural log), 0 where the target is [`NO_TARGET`]; assigned.
/// Shapes: nll_t [T] f32; x_td [T,D]; head_cd [C,D]; targets_t [T].
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::DType`] where nll_t is not f32, [`Error::Index`] for a target of C or above
/// or below [`NO_TARGET`].
pub fn forward(
    nll_t: &mut Tensor,
    x_td: &Tensor,
    head_cd: &Tensor,
    targets_t: &[i32],
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward";
    let dims = Dims::new(OP, nll_t, x_td, head_cd, targets_t)?;
    cpu::forward(nll_t, x_td, head_cd, targets_t, dims);
    Ok(())
}

/// As [`forward`], and gradients of d_nll · Σ nll: d_x_td [T,D] assigned (0 in rows without a target), d_head_cd [C,D] f32
/// added to (None: frozen).
///
/// # Errors
/// As [`forward`], and [`Error::DType`] where d_head_cd is not f32.
pub fn forward_backward(
    nll_t: &mut Tensor,
    d_x_td: &mut Tensor,
    d_head_cd: Option<&mut Tensor>,
    x_td: &Tensor,
    head_cd: &Tensor,
    targets_t: &[i32],
    d_nll: f32,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward_backward";
    let dims = Dims::new(OP, nll_t, x_td, head_cd, targets_t)?;
    check::shape(OP, "d_x_td", d_x_td, x_td.shape())?;
    if let Some(d_head_cd) = &d_head_cd {
        check::shape(OP, "d_head_cd", d_head_cd, head_cd.shape())?;
        check::f32(OP, "d_head_cd", d_head_cd)?;
    }
    let gradients = cpu::Gradients {
        d_x_td,
        d_head_cd: d_head_cd.map(Tensor::f32s_mut),
        d_nll,
    };
    cpu::forward_backward(nll_t, gradients, x_td, head_cd, targets_t, dims);
    Ok(())
}

/// C vocabulary, D hidden.
#[derive(Debug, Clone, Copy)]
struct Dims {
    c: usize,
    d: usize,
}

impl Dims {
    fn new(
        op: &'static str,
        nll_t: &Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
    ) -> Result<Self> {
        let [c, d] = check::dims(op, "head_cd", head_cd, "[C,D]")?;
        check::shape(op, "x_td", x_td, &[targets_t.len(), d])?;
        check::shape(op, "nll_t", nll_t, &[targets_t.len()])?;
        check::f32(op, "nll_t", nll_t)?;
        let valid = |target: i32| target == NO_TARGET || (0..c as i64).contains(&(target as i64));
        match targets_t.iter().position(|target| !valid(*target)) {
            Some(row) => Err(Error::Index {
                op,
                arg: "targets_t",
                row,
                value: targets_t[row] as i64,
                bound: c,
            }),
            None => Ok(Dims { c, d }),
        }
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Dims, LOGIT_BYTES, NO_TARGET, ROW_CHUNK};
    use crate::Tensor;
    use crate::cpu::math::{exp_in_place, max, scale, sum_exp};
    use crate::cpu::{View, ViewMut, simd, with_scratch};
    use crate::ops::matmul::{self, Write, cpu as product};

    pub(super) struct Gradients<'a> {
        pub d_x_td: &'a mut Tensor,
        pub d_head_cd: Option<&'a mut [f32]>,
        pub d_nll: f32,
    }

    pub(super) fn forward(
        nll_t: &mut Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
    ) {
        for_chunks(nll_t, x_td, head_cd, targets_t, dims, |_| {});
    }

    pub(super) fn forward_backward(
        nll_t: &mut Tensor,
        gradients: Gradients,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
    ) {
        let Dims { c, d } = dims;
        let Gradients {
            d_x_td,
            mut d_head_cd,
            d_nll,
        } = gradients;
        let mut d_x = ViewMut::of(d_x_td);
        d_x.fill_zero();
        for_chunks(nll_t, x_td, head_cd, targets_t, dims, |chunk| {
            let Chunk {
                rows,
                x_rd,
                logits_rc,
            } = chunk;
            let n = rows.len();
            let product_dims = matmul::Dims { t: n, i: d, o: c };
            // 1. logits become their gradient
            logits_rc
                .par_chunks_mut(c)
                .zip(rows.par_iter())
                .for_each(|(logits, row)| {
                    simd(
                        #[inline(always)]
                        || {
                            let sum = exp_in_place(logits, max(logits));
                            scale(logits, d_nll / sum);
                        },
                    );
                    logits[targets_t[*row] as usize] -= d_nll;
                });
            // 2. through the head to x
            with_scratch(n * d, |d_x_rd| {
                let d_logits = View::F32(logits_rc);
                product::backward_input(
                    ViewMut::F32(d_x_rd),
                    d_logits,
                    View::of(head_cd),
                    product_dims,
                    1.0,
                    Write::Assign,
                );
                for (d_row, row) in d_x_rd.chunks_exact(d).zip(rows) {
                    d_x.slice(row * d..(row + 1) * d).store(d_row);
                }
            });
            // 3. to the head
            if let Some(d_head_cd) = &mut d_head_cd {
                let (d_logits, x) = (View::F32(logits_rc), View::F32(x_rd));
                product::backward_weight(d_head_cd, d_logits, x, product_dims, 1.0);
            }
        });
    }

    /// Rows of one chunk, gathered: which they are, their hidden states, their logits.
    struct Chunk<'a> {
        rows: &'a [usize],
        x_rd: &'a [f32],
        logits_rc: &'a mut [f32],
    }

    /// Assigns all of nll_t and shows each chunk of rows with a target to `then`.
    fn for_chunks(
        nll_t: &mut Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
        mut then: impl FnMut(Chunk),
    ) {
        let Dims { c, d } = dims;
        let nll_t = nll_t.f32s_mut();
        nll_t.fill(0.0);
        let rows: Vec<usize> = (0..targets_t.len())
            .filter(|t| targets_t[*t] != NO_TARGET)
            .collect();
        let x = View::of(x_td);
        for rows in rows.chunks(rows_per_chunk(c)) {
            let n = rows.len();
            with_scratch(n * d, |x_rd| {
                with_scratch(n * c, |logits_rc| {
                    // 1. gather  2. project  3. losses
                    for (x_d, row) in x_rd.chunks_exact_mut(d.max(1)).zip(rows) {
                        x.slice(row * d..(row + 1) * d).read_into(x_d);
                    }
                    product::forward(
                        ViewMut::F32(logits_rc),
                        View::F32(x_rd),
                        View::of(head_cd),
                        matmul::Dims { t: n, i: d, o: c },
                        1.0,
                        Write::Assign,
                    );
                    let nll_r: Vec<f32> = logits_rc
                        .par_chunks(c)
                        .zip(rows.par_iter())
                        .map(|(logits, row)| nll(logits, targets_t[*row] as usize))
                        .collect();
                    for (nll, row) in nll_r.iter().zip(rows) {
                        nll_t[*row] = *nll;
                    }
                    then(Chunk {
                        rows,
                        x_rd,
                        logits_rc,
                    });
                });
            });
        }
    }

    /// logsumexp(logits) - logits[target].
    fn nll(logits: &[f32], target: usize) -> f32 {
        simd(
            #[inline(always)]
            || {
                let top = max(logits);
                sum_exp(logits, top).ln() + (top - logits[target])
            },
        )
    }

    pub(super) fn rows_per_chunk(c: usize) -> usize {
        let fitting = LOGIT_BYTES / (4 * c.max(1));
        // A multiple of 16 rows fills gemm's tiles.
        (fitting / 16 * 16).clamp(16, ROW_CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{BF16_REL, STORAGES, assert_close, f64s, gradient, plus, tensor};

    /// (nll, gradient of the logits for d_nll = 1).
    fn define(x: &[f64], head: &[f64], targets: &[i32], d: usize) -> (Vec<f64>, Vec<f64>) {
        let c = head.len() / d;
        let (mut nll, mut d_logits) = (vec![0.0; targets.len()], vec![0.0; targets.len() * c]);
        for (t, target) in targets
            .iter()
            .enumerate()
            .filter(|(_, target)| **target != NO_TARGET)
        {
            let x = &x[t * d..(t + 1) * d];
            let logits: Vec<f64> = head
                .chunks(d)
                .map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum())
                .collect();
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            nll[t] = sum.ln() - logits[*target as usize];
            for (i, logit) in logits.iter().enumerate() {
                d_logits[t * c + i] =
                    logit.exp() / sum - if i == *target as usize { 1.0 } else { 0.0 };
            }
        }
        (nll, d_logits)
    }

    fn targets(t: usize, c: usize) -> Vec<i32> {
        (0..t)
            .map(|t| {
                if t % 3 == 1 {
                    NO_TARGET
                } else {
                    (t * 31 % c) as i32
                }
            })
            .collect()
    }

    #[test]
    fn loss_and_gradients_agree_with_f64() {
        for (dtype, _) in STORAGES {
            for (t, d, c) in [(1, 1, 1), (5, 7, 33), (23, 40, 131), (2000, 3, 65)] {
                let (x, head) = (tensor(&[t, d], 1, dtype), tensor(&[c, d], 2, dtype));
                let targets = targets(t, c);
                let d_nll = 0.125;
                let (want, d_logits) = define(&f64s(&x), &f64s(&head), &targets, d);
                let (mut want_x, mut want_head) = (vec![0.0; t * d], vec![0.0; c * d]);
                let (x_64, head_64) = (f64s(&x), f64s(&head));
                for t in 0..t {
                    for c_idx in 0..c {
                        let g = d_nll as f64 * d_logits[t * c + c_idx];
                        for i in 0..d {
                            want_x[t * d + i] += g * head_64[c_idx * d + i];
                            want_head[c_idx * d + i] += g * x_64[t * d + i];
                        }
                    }
                }

                let mut nll = Tensor::poison(&[t], DType::F32);
                forward(&mut nll, &x, &head, &targets).unwrap();
                assert_close("nll", &nll, &want, 2e-6);

                let mut again = Tensor::poison(&[t], DType::F32);
                let mut d_x = Tensor::poison(&[t, d], dtype);
                let before = tensor(&[c, d], 3, DType::F32);
                let mut d_head = before.clone();
                forward_backward(
                    &mut again,
                    &mut d_x,
                    Some(&mut d_head),
                    &x,
                    &head,
                    &targets,
                    d_nll,
                )
                .unwrap();
                assert_eq!(again, nll);
                let tolerance = if dtype == DType::F32 { 1e-5 } else { BF16_REL };
                assert_close("d_x", &d_x, &want_x, tolerance);
                assert_close("d_head", &d_head, &plus(&want_head, &before), 1e-5);

                let mut frozen = Tensor::poison(&[t, d], dtype);
                forward_backward(&mut again, &mut frozen, None, &x, &head, &targets, d_nll)
                    .unwrap();
                assert_eq!(frozen, d_x);
            }
        }
    }

    #[test]
    fn definition_agrees_with_differences() {
        let (t, d, c) = (4, 3, 6);
        let at = [
            tensor(&[t, d], 1, DType::F32),
            tensor(&[c, d], 2, DType::F32),
        ]
        .map(|x| f64s(&x));
        let targets = targets(t, c);
        let (_, d_logits) = define(&at[0], &at[1], &targets, d);
        let loss = |x: &[Vec<f64>]| define(&x[0], &x[1], &targets, d).0.iter().sum();
        let d_x = gradient(&at, 0, loss);
        for t in 0..t {
            for i in 0..d {
                let want: f64 = (0..c)
                    .map(|c_idx| d_logits[t * c + c_idx] * at[1][c_idx * d + i])
                    .sum();
                assert!((d_x[t * d + i] - want).abs() < 1e-8);
            }
        }
    }

    #[test]
    fn rows_without_a_target_are_not_read() {
        let (t, d, c) = (6, 4, 9);
        let (mut x, head) = (
            tensor(&[t, d], 1, DType::F32),
            tensor(&[c, d], 2, DType::F32),
        );
        let targets = targets(t, c);
        for (x, target) in x.f32s_mut().chunks_mut(d).zip(&targets) {
            if *target == NO_TARGET {
                x.fill(f32::NAN);
            }
        }
        let (mut nll, mut d_x) = (
            Tensor::poison(&[t], DType::F32),
            Tensor::poison(&[t, d], DType::F32),
        );
        let mut d_head = Tensor::zeros(&[c, d], DType::F32);
        forward_backward(
            &mut nll,
            &mut d_x,
            Some(&mut d_head),
            &x,
            &head,
            &targets,
            1.0,
        )
        .unwrap();
        assert!(
            nll.f32s()
                .iter()
                .chain(d_x.f32s())
                .chain(d_head.f32s())
                .all(|x| x.is_finite())
        );
        for (t, target) in targets
            .iter()
            .enumerate()
            .filter(|(_, target)| **target == NO_TARGET)
        {
            assert_eq!((nll.f32s()[t], *target), (0.0, NO_TARGET));
            assert_eq!(d_x.f32s()[t * d..(t + 1) * d], [0.0; 4]);
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let x = Tensor::from_f32(&[1, 1], vec![1.0]);
        let head = Tensor::from_f32(&[3, 1], vec![1e4, 1e4, -1e4]);
        let mut nll = Tensor::poison(&[1], DType::F32);
        forward(&mut nll, &x, &head, &[1]).unwrap();
        assert_close("nll", &nll, &[2f64.ln()], 1e-6);
        forward(&mut nll, &x, &head, &[2]).unwrap();
        assert_close("nll", &nll, &[2e4 + 2f64.ln()], 1e-6);
    }

    #[test]
    fn no_targets_leave_the_head_gradient() {
        let (x, head) = (
            tensor(&[3, 2], 1, DType::Bf16),
            tensor(&[5, 2], 2, DType::Bf16),
        );
        let (mut nll, mut d_x) = (
            Tensor::poison(&[3], DType::F32),
            Tensor::poison(&[3, 2], DType::Bf16),
        );
        let before = tensor(&[5, 2], 3, DType::F32);
        let mut d_head = before.clone();
        forward_backward(
            &mut nll,
            &mut d_x,
            Some(&mut d_head),
            &x,
            &head,
            &[NO_TARGET; 3],
            1.0,
        )
        .unwrap();
        assert_eq!(nll, Tensor::zeros(&[3], DType::F32));
        assert_eq!(d_x, Tensor::zeros(&[3, 2], DType::Bf16));
        assert_eq!(d_head, before);
    }

    #[test]
    fn logits_of_the_released_vocabulary_fit_the_budget() {
        let rows = cpu::rows_per_chunk(248_320);
        assert!(rows >= 128 && rows * 248_320 * 4 <= LOGIT_BYTES, "{rows}");
        assert_eq!(cpu::rows_per_chunk(2048), ROW_CHUNK);
    }

    #[test]
    fn target_outside_the_vocabulary_is_refused() {
        let (x, head) = (
            tensor(&[2, 2], 1, DType::F32),
            tensor(&[5, 2], 2, DType::F32),
        );
        let mut nll = Tensor::poison(&[2], DType::F32);
        for bad in [5, -100] {
            let error = forward(&mut nll, &x, &head, &[0, bad]).unwrap_err();
            let want = format!(
                "linear_cross_entropy::forward: `targets_t` holds {bad} at row 1, outside 0..5"
            );
            assert_eq!(error.to_string(), want);
        }
    }
}
