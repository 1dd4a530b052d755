//! Chunks of rows on the CPU.

use half::bf16;
use rayon::prelude::*;

use super::{Dims, Gradients, LOGIT_BYTES, NO_TARGET, ROW_CHUNK};
use crate::Tensor;
use crate::cpu::gemm_bf16;
use crate::cpu::math::{exp_in_place, max, scale, sum_exp};
use crate::cpu::{View, ViewMut, simd, with_scratch};
use crate::ops::Write;
use crate::ops::matmul::{self, cpu as product};

/// Elements that a task rounds.
const NARROW_PIECE: usize = 1 << 16;

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
        d_head_cd,
        d_nll,
    } = gradients;
    let mut d_head_cd = d_head_cd.map(Tensor::f32s_mut);
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
        let head = View::of(head_cd);
        with_products_type(logits_rc, x_rd, head, |d_logits| {
            // 2. through the head to x
            with_scratch(n * d, |d_x_rd| {
                let d_x_view = ViewMut::F32(d_x_rd);
                let write = Write::Assign;
                product::backward_input(d_x_view, d_logits, head, product_dims, 1.0, write);
                for (d_row, row) in d_x_rd.chunks_exact(d).zip(rows) {
                    d_x.slice(row * d..(row + 1) * d).store(d_row);
                }
            });
            // 3. to the head
            if let Some(d_head_cd) = &mut d_head_cd {
                let write = Write::Accumulate;
                product::backward_weight(d_head_cd, d_logits, x_rd, product_dims, 1.0, write);
            }
        });
    });
}

/// Lends the gradient of the logits as bf16 where both that it is multiplied by are, and there are instructions for that.
fn with_products_type(d_logits: &[f32], x: View, head: View, body: impl FnOnce(View)) {
    if x.is_f32() || head.is_f32() || gemm_bf16::native().is_none() {
        return body(View::F32(d_logits));
    }
    with_bf16_scratch(d_logits.len(), |narrow| {
        narrow
            .par_chunks_mut(NARROW_PIECE)
            .zip(d_logits.par_chunks(NARROW_PIECE))
            .for_each(|(narrow, d_logits)| {
                simd(
                    #[inline(always)]
                    || ViewMut::Bf16(narrow).store(d_logits),
                );
            });
        body(View::Bf16(narrow));
    });
}

/// As [`with_scratch`].
fn with_bf16_scratch<R>(n: usize, body: impl FnOnce(&mut [bf16]) -> R) -> R {
    with_scratch(n.div_ceil(2), |scratch| {
        body(&mut bytemuck::cast_slice_mut(scratch)[..n])
    })
}

/// Lends the rows of x that are listed, one behind the other, in their own type.
fn with_rows(x: View, rows: &[usize], d: usize, body: impl FnOnce(View)) {
    let at = |row: &usize| row * d..(row + 1) * d;
    let n = rows.len() * d;
    match x {
        View::F32(x) => with_scratch(n, |x_rd| {
            for (x_d, row) in x_rd.chunks_exact_mut(d.max(1)).zip(rows) {
                x_d.copy_from_slice(&x[at(row)]);
            }
            body(View::F32(x_rd));
        }),
        View::Bf16(x) => with_bf16_scratch(n, |x_rd| {
            for (x_d, row) in x_rd.chunks_exact_mut(d.max(1)).zip(rows) {
                x_d.copy_from_slice(&x[at(row)]);
            }
            body(View::Bf16(x_rd));
        }),
    }
}

/// Rows of one chunk, gathered: which they are, their hidden states, their logits.
struct Chunk<'a> {
    rows: &'a [usize],
    x_rd: View<'a>,
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
        // 1. gather  2. project  3. losses
        with_rows(x, rows, d, |x_rd| {
            with_scratch(n * c, |logits_rc| {
                product::forward(
                    ViewMut::F32(logits_rc),
                    x_rd,
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
