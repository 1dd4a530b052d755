//! Products on the CPU: by AMX or AVX512-BF16 where there are, for few rows by hand, else by the crate `gemm`.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{Dims, Write};
use crate::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::cpu::gemm_bf16::{self, Operand};
use crate::cpu::{View, ViewMut, par_read_into, simd, with_scratch};

/// Rows up to which a product is done as dot products: there the weights' way from memory is what costs, and gemm would
/// first copy each of them.
const FEW_ROWS: usize = 32;
/// Rows of x (or d_y) that are widened together; few in tests, so that small shapes cross a border.
const ROW_BLOCK: usize = if cfg!(test) { 64 } else { 1024 };
/// Elements of a widened panel of weights (16 MB, which a last-level cache holds); few in tests.
const PANEL_ELEMENTS: usize = if cfg!(test) { 1 << 12 } else { 4 << 20 };
/// Partial sums of a dot product, in vectors: four dot products of two fit into the registers beside their operands.
const CHAINS: usize = 2;
/// Weights that one task of a product of few rows reads.
const TASK_WEIGHTS: usize = 1 << 16;

/// y = or += alpha x wᵀ.
pub(crate) fn forward(mut y: ViewMut, x: View, w: View, dims: Dims, alpha: f32, write: Write) {
    let Dims { t, i, o } = dims;
    if t <= FEW_ROWS || i == 0 {
        return forward_few_rows(y, x, w, dims, alpha, write);
    }
    if let (View::Bf16(x), View::Bf16(w), Some(native)) = (x, w, gemm_bf16::native()) {
        let (x, w) = (Operand::row_major(x, t, i), Operand::row_major(w, o, i));
        return native.product(y, alpha, x, w, beta(write));
    }
    for_row_blocks(t, &[x, w], y.is_f32(), |rows| {
        let t = rows.len();
        with_f32(x.slice(rows.start * i..rows.end * i), |x| {
            let x = Mat::new(x, t, i);
            for_panels(w, i, y.is_f32(), |outs, w| {
                let width = outs.len();
                let w = Mat::new(w, width, i).t();
                let mut y = y.slice(rows.start * o..rows.end * o);
                if let ViewMut::F32(y) = y {
                    let y = MatMut::strided(&mut y[outs.start..], t, width, o);
                    gemm(y, alpha, x, w, beta(write), Threads::All);
                    return;
                }
                with_scratch(t * width, |product| {
                    let product_mat = MatMut::new(product, t, width);
                    gemm(product_mat, alpha, x, w, 0.0, Threads::All);
                    for (row, product) in product.chunks_exact(width).enumerate() {
                        let start = row * o + outs.start;
                        put(y.slice(start..start + width), product, write);
                    }
                });
            });
        });
    });
}

/// d_x = or += alpha d_y w.
pub(crate) fn backward_input(
    mut d_x: ViewMut,
    d_y: View,
    w: View,
    dims: Dims,
    alpha: f32,
    write: Write,
) {
    let Dims { t, i, o } = dims;
    if let (View::Bf16(d_y), View::Bf16(w), Some(native)) = (d_y, w, gemm_bf16::native()) {
        let (d_y, w) = (
            Operand::row_major(d_y, t, o),
            Operand::column_major(w, o, i),
        );
        return native.product(d_x, alpha, d_y, w, beta(write));
    }
    for_row_blocks(t, &[d_y, w], d_x.is_f32(), |rows| {
        let t = rows.len();
        with_f32(d_y.slice(rows.start * o..rows.end * o), |d_y| {
            let product = |d_x: &mut [f32], mut beta: f32| {
                if o == 0 && beta == 0.0 {
                    d_x.fill(0.0);
                }
                for_panels(w, i, true, |outs, w| {
                    let d_y = Mat::strided(&d_y[outs.start..], t, outs.len(), o);
                    let w = Mat::new(w, outs.len(), i);
                    gemm(MatMut::new(d_x, t, i), alpha, d_y, w, beta, Threads::All);
                    beta = 1.0;
                });
            };
            let mut d_x = d_x.slice(rows.start * i..rows.end * i);
            if let ViewMut::F32(d_x) = d_x {
                return product(d_x, beta(write));
            }
            with_scratch(t * i, |sum| {
                product(sum, 0.0);
                put(d_x.slice(0..t * i), sum, write);
            });
        });
    });
}

/// d_w = or += alpha d_yᵀ x.
pub(crate) fn backward_weight(
    d_w: &mut [f32],
    d_y: View,
    x: View,
    dims: Dims,
    alpha: f32,
    write: Write,
) {
    let Dims { t, i, o } = dims;
    let mut beta = beta(write);
    if t == 0 && beta == 0.0 {
        d_w.fill(0.0);
    }
    if let (View::Bf16(d_y), View::Bf16(x), Some(native)) = (d_y, x, gemm_bf16::native()) {
        let (d_y, x) = (
            Operand::column_major(d_y, t, o),
            Operand::column_major(x, t, i),
        );
        return native.product(ViewMut::F32(d_w), alpha, d_y, x, beta);
    }
    for_row_blocks(t, &[d_y, x], true, |rows| {
        let t = rows.len();
        with_f32(d_y.slice(rows.start * o..rows.end * o), |d_y| {
            with_f32(x.slice(rows.start * i..rows.end * i), |x| {
                let (d_y, x) = (Mat::new(d_y, t, o).t(), Mat::new(x, t, i));
                gemm(MatMut::new(d_w, o, i), alpha, d_y, x, beta, Threads::All);
            });
        });
        beta = 1.0;
    });
}

/// `forward` by dot products, in parallel over the outputs.
fn forward_few_rows(mut y: ViewMut, x: View, w: View, dims: Dims, alpha: f32, write: Write) {
    let Dims { t, i, o } = dims;
    if t == 0 || o == 0 {
        return;
    }
    let outs_per_task = (TASK_WEIGHTS / i.max(1)).max(1);
    with_f32(x, |x| {
        with_scratch(o * t, |product_ot| {
            let work = |task: usize, product_ot: &mut [f32]| {
                with_scratch(2 * i, |scratch| {
                    pulp::Arch::new().dispatch(DotProducts {
                        product_ot,
                        x,
                        w,
                        scratch,
                        first: task * outs_per_task,
                        t,
                        i,
                        alpha,
                    });
                });
            };
            if o <= outs_per_task {
                work(0, product_ot);
            } else {
                product_ot
                    .par_chunks_mut(outs_per_task * t)
                    .enumerate()
                    .for_each(|(task, product_ot)| work(task, product_ot));
            }
            if t == 1 {
                return put(y, product_ot, write);
            }
            with_scratch(o, |product_o| {
                for t_idx in 0..t {
                    let column = product_ot.iter().skip(t_idx).step_by(t);
                    product_o
                        .iter_mut()
                        .zip(column)
                        .for_each(|(to, from)| *to = *from);
                    put(y.slice(t_idx * o..(t_idx + 1) * o), product_o, write);
                }
            });
        });
    });
}

/// product_ot[o,t] = alpha · w[first + o] · x[t] for a task's outputs.
struct DotProducts<'a> {
    product_ot: &'a mut [f32],
    x: &'a [f32],
    w: View<'a>,
    /// 2 I elements to widen weights into.
    scratch: &'a mut [f32],
    first: usize,
    t: usize,
    i: usize,
    alpha: f32,
}

impl WithSimd for DotProducts<'_> {
    type Output = ();

    /// Two weights and two rows at a time, so that each vector read is used twice.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let DotProducts {
            product_ot,
            x,
            w,
            scratch,
            mut first,
            t,
            i,
            alpha,
        } = self;
        let mut pairs = product_ot.chunks_exact_mut(2 * t);
        for pair in &mut pairs {
            let (a, b) = as_f32(w.slice(first * i..(first + 2) * i), scratch).split_at(i);
            let (pair_a, pair_b) = pair.split_at_mut(t);
            for start in (0..t - 1).step_by(2) {
                let (c, d) = x[start * i..(start + 2) * i].split_at(i);
                let [[ac, ad], [bc, bd]] = dots(simd, [a, b], [c, d]);
                pair_a[start..start + 2].copy_from_slice(&[alpha * ac, alpha * ad]);
                pair_b[start..start + 2].copy_from_slice(&[alpha * bc, alpha * bd]);
            }
            if t % 2 == 1 {
                let [[ac], [bc]] = dots(simd, [a, b], [&x[(t - 1) * i..t * i]]);
                pair_a[t - 1] = alpha * ac;
                pair_b[t - 1] = alpha * bc;
            }
            first += 2;
        }
        let last = pairs.into_remainder();
        if !last.is_empty() {
            let a = as_f32(w.slice(first * i..(first + 1) * i), scratch);
            for (row, product) in last.iter_mut().enumerate() {
                let [[ac]] = dots(simd, [a], [&x[row * i..(row + 1) * i]]);
                *product = alpha * ac;
            }
        }
    }
}

#[inline(always)]
fn as_f32<'s>(w: View<'s>, scratch: &'s mut [f32]) -> &'s [f32] {
    match w {
        View::F32(w) => w,
        narrow => {
            let widened = &mut scratch[..narrow.len()];
            narrow.read_into(widened);
            widened
        }
    }
}

/// Every a · b, each summed in the same order whatever R and Q are. All vectors of one length.
#[inline(always)]
fn dots<S: Simd, const R: usize, const Q: usize>(
    simd: S,
    a: [&[f32]; R],
    b: [&[f32]; Q],
) -> [[f32; Q]; R] {
    let zero = simd.splat_f32s(0.0);
    let mut acc = [[[zero; CHAINS]; Q]; R];
    let mut a_vectors: [&[S::f32s]; R] = [&[]; R];
    let mut b_vectors: [&[S::f32s]; Q] = [&[]; Q];
    let mut a_rest = [zero; R];
    let mut b_rest = [zero; Q];
    for r in 0..R {
        let (vectors, rest) = S::as_simd_f32s(a[r]);
        a_vectors[r] = vectors;
        a_rest[r] = simd.partial_load_f32s(rest);
    }
    for q in 0..Q {
        let (vectors, rest) = S::as_simd_f32s(b[q]);
        b_vectors[q] = &vectors[..a_vectors[0].len()];
        b_rest[q] = simd.partial_load_f32s(rest);
    }
    let n = a_vectors[0].len();
    for vectors in &mut a_vectors {
        *vectors = &vectors[..n];
    }
    let mut at = 0;
    while at + CHAINS <= n {
        for chain in 0..CHAINS {
            for r in 0..R {
                for q in 0..Q {
                    let sum = &mut acc[r][q][chain];
                    *sum = simd.mul_add_e_f32s(
                        a_vectors[r][at + chain],
                        b_vectors[q][at + chain],
                        *sum,
                    );
                }
            }
        }
        at += CHAINS;
    }
    let mut sums = [[0.0; Q]; R];
    for r in 0..R {
        for q in 0..Q {
            let [mut even, mut odd] = acc[r][q];
            if at < n {
                even = simd.mul_add_e_f32s(a_vectors[r][at], b_vectors[q][at], even);
            }
            odd = simd.mul_add_e_f32s(a_rest[r], b_rest[q], odd);
            sums[r][q] = simd.reduce_sum_f32s(simd.add_f32s(even, odd));
        }
    }
    sums
}

/// Ranges of rows that cover 0..t: all at once where nothing needs scratch, since gemm does its own blocking.
fn for_row_blocks(
    t: usize,
    inputs: &[View],
    output_is_f32: bool,
    mut body: impl FnMut(std::ops::Range<usize>),
) {
    let all_f32 = output_is_f32 && inputs.iter().all(View::is_f32);
    let block = if all_f32 { t.max(1) } else { ROW_BLOCK };
    for start in (0..t).step_by(block) {
        body(start..(start + block).min(t));
    }
}

/// Ranges of w's rows that cover them all, with those rows as f32: one where neither w nor the output needs scratch.
fn for_panels(
    w: View,
    i: usize,
    output_is_f32: bool,
    mut body: impl FnMut(std::ops::Range<usize>, &[f32]),
) {
    let n_rows = w.len().checked_div(i).unwrap_or(0);
    let panel = match w {
        View::F32(_) if output_is_f32 => n_rows.max(1),
        // Whole cache lines of outputs.
        _ => (PANEL_ELEMENTS / i.max(1) / 64 * 64).max(64),
    };
    for start in (0..n_rows).step_by(panel) {
        let rows = start..(start + panel).min(n_rows);
        with_f32(w.slice(rows.start * i..rows.end * i), |w| body(rows, w));
    }
}

/// Lends `view` as f32, widened into scratch if it is not.
fn with_f32<R>(view: View, body: impl FnOnce(&[f32]) -> R) -> R {
    match view {
        View::F32(data) => body(data),
        narrow => with_scratch(narrow.len(), |scratch| {
            par_read_into(narrow, scratch);
            body(scratch)
        }),
    }
}

fn put(mut y: ViewMut, values: &[f32], write: Write) {
    simd(
        #[inline(always)]
        || match write {
            Write::Assign => y.store(values),
            Write::Accumulate => y.add(values),
        },
    );
}

fn beta(write: Write) -> f32 {
    match write {
        Write::Assign => 0.0,
        Write::Accumulate => 1.0,
    }
}
