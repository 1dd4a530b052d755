//! y = x wᵀ and its gradients: d_x = d_y w, d_w = d_yᵀ x. Products of f32 through the `gemm` crate.
//!
//! bf16 operands are widened in panels, a large one never whole; where the processor is faster at multiplying tiles or pairs of bf16,
//! two of them are not widened at all. Up to 32 rows (decoding) go past gemm: each weight is read once
//! from memory and each result is one dot product, the same bytes for a row whether it comes alone or with others.

use super::{Write, check, copy};
use crate::cpu::{View, ViewMut};
use crate::{Device, Error, Result, Tensor};

/// y_to = x_ti w_oiᵀ. Shapes: y_to [..., O], x_ti [..., I], leading dimensions flattened to T; w_oi [O,I].
/// The last dimensions may multiply up to O or I: heads [T,H,N] count as [T,H·N].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree.
pub fn forward(y_to: &mut Tensor, x_ti: &Tensor, w_oi: &Tensor) -> Result<()> {
    forward_as("matmul::forward", y_to, x_ti, w_oi, 1.0, Write::Assign)
}

/// y_to += alpha · x_ti w_oiᵀ. Shapes as in [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn forward_accumulate(
    y_to: &mut Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
) -> Result<()> {
    const OP: &str = "matmul::forward_accumulate";
    forward_as(OP, y_to, x_ti, w_oi, alpha, Write::Accumulate)
}

/// y_to = base_to + x_ti w_oiᵀ. Shapes as in [`forward`], base_to as y_to and of its type.
///
/// # Errors
/// As [`forward`], and [`crate::Error::DType`] where base_to is of another type than y_to.
pub fn forward_onto(
    y_to: &mut Tensor,
    base_to: &Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
) -> Result<()> {
    const OP: &str = "matmul::forward_onto";
    check::shape(OP, "base_to", base_to, y_to.shape())?;
    if base_to.dtype() != y_to.dtype() {
        return Err(Error::DType {
            op: OP,
            arg: "base_to",
            expected: "the type of y_to",
            got: base_to.dtype(),
        });
    }
    let dims = Dims::new(OP, ("y_to", y_to), ("x_ti", x_ti), ("w_oi", w_oi))?;
    let others = [("base_to", base_to), ("x_ti", x_ti), ("w_oi", w_oi)];
    match check::device(OP, y_to, &others)? {
        Device::Cpu => {
            copy::forward(y_to, 0, base_to, 0, base_to.numel())?;
            let (x, w) = (View::of(x_ti), View::of(w_oi));
            cpu::forward(ViewMut::of(y_to), x, w, dims, 1.0, Write::Accumulate);
        }
        Device::Cuda(cuda) => {
            let base = Some(base_to.device_pointer());
            cuda::forward(cuda, y_to, x_ti, w_oi, dims, 1.0, base)?;
        }
    }
    Ok(())
}

/// d_x_ti = or += alpha · d_y_to w_oi. Shapes as in [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward_input(
    d_x_ti: &mut Tensor,
    d_y_to: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "matmul::backward_input";
    let dims = Dims::new(OP, ("d_y_to", d_y_to), ("d_x_ti", d_x_ti), ("w_oi", w_oi))?;
    match check::device(OP, d_x_ti, &[("d_y_to", d_y_to), ("w_oi", w_oi)])? {
        Device::Cpu => {
            let (d_x, d_y) = (ViewMut::of(d_x_ti), View::of(d_y_to));
            cpu::backward_input(d_x, d_y, View::of(w_oi), dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            let base = (write == Write::Accumulate).then(|| d_x_ti.device_pointer());
            cuda::backward_input(cuda, d_x_ti, d_y_to, w_oi, dims, alpha, base)?;
        }
    }
    Ok(())
}

/// d_w_oi = or += alpha · d_y_toᵀ x_ti; assigned by the first product of a sum, which need not read what was there.
/// Shapes as in [`forward`], d_w_oi f32.
///
/// # Errors
/// As [`forward`], and [`crate::Error::DType`] where d_w_oi is not f32.
pub fn backward_weight(
    d_w_oi: &mut Tensor,
    d_y_to: &Tensor,
    x_ti: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "matmul::backward_weight";
    let dims = Dims::new(OP, ("d_y_to", d_y_to), ("x_ti", x_ti), ("d_w_oi", d_w_oi))?;
    check::f32(OP, "d_w_oi", d_w_oi)?;
    let device = check::device(OP, d_w_oi, &[("d_y_to", d_y_to), ("x_ti", x_ti)])?;
    match device {
        Device::Cpu => {
            let (d_y, x) = (View::of(d_y_to), View::of(x_ti));
            cpu::backward_weight(d_w_oi.f32s_mut(), d_y, x, dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            // A product over no rows writes nothing.
            if write == Write::Assign && dims.t == 0 {
                d_w_oi.fill_zero()?;
            }
            let accumulates = write == Write::Accumulate || dims.t == 0;
            let base = accumulates.then(|| d_w_oi.device_pointer());
            cuda::backward_weight(cuda, d_w_oi, d_y_to, x_ti, dims, alpha, base)?;
        }
    }
    Ok(())
}

fn forward_as(
    op: &'static str,
    y_to: &mut Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    let dims = Dims::new(op, ("y_to", y_to), ("x_ti", x_ti), ("w_oi", w_oi))?;
    match check::device(op, y_to, &[("x_ti", x_ti), ("w_oi", w_oi)])? {
        Device::Cpu => {
            let (x, w) = (View::of(x_ti), View::of(w_oi));
            cpu::forward(ViewMut::of(y_to), x, w, dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            let base = (write == Write::Accumulate).then(|| y_to.device_pointer());
            cuda::forward(cuda, y_to, x_ti, w_oi, dims, alpha, base)?;
        }
    }
    Ok(())
}

/// T rows, I inputs, O outputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dims {
    pub t: usize,
    pub i: usize,
    pub o: usize,
}

impl Dims {
    /// From tensors (with their argument names) that lie as y_to, x_ti and w_oi do.
    fn new(
        op: &'static str,
        (y_arg, y_to): (&'static str, &Tensor),
        (x_arg, x_ti): (&'static str, &Tensor),
        (w_arg, w_oi): (&'static str, &Tensor),
    ) -> Result<Self> {
        let [o, i] = check::dims(op, w_arg, w_oi, "[O,I]")?;
        let t = check::rows(op, x_arg, x_ti, i)?;
        if check::rows(op, y_arg, y_to, o)? != t {
            return Err(check::shape_error(
                op,
                y_arg,
                y_to,
                format!("{t} rows of {o}"),
            ));
        }
        Ok(Dims { t, i, o })
    }
}

pub(super) mod cpu {
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
}

/// Through cuBLASLt. Two f32 operands are multiplied in f32; where one is bf16, or the result is, all are rounded to bf16 first.
mod cuda {
    use super::Dims;
    use crate::cuda::{Cuda, Gemm, Operand, Pieces};
    use crate::ops::copy;
    use crate::{DType, Result, Tensor};

    pub(super) fn forward(
        cuda: Cuda,
        y: &mut Tensor,
        x: &Tensor,
        w: &Tensor,
        dims: Dims,
        alpha: f32,
        base: Option<u64>,
    ) -> Result<()> {
        let Dims { t, i, o } = dims;
        let (x, w, in_dtype) = operands(cuda, x, w, y.dtype())?;
        cuda.gemm(&Gemm {
            a: Operand {
                pointer: x,
                transposed: false,
                stride: i,
            },
            b: Operand {
                pointer: w,
                transposed: true,
                stride: i,
            },
            d: y.device_pointer(),
            d_stride: o,
            m: t,
            n: o,
            k: i,
            alpha,
            base,
            in_dtype,
            out_dtype: y.dtype(),
        })
    }

    pub(super) fn backward_input(
        cuda: Cuda,
        d_x: &mut Tensor,
        d_y: &Tensor,
        w: &Tensor,
        dims: Dims,
        alpha: f32,
        base: Option<u64>,
    ) -> Result<()> {
        let Dims { t, i, o } = dims;
        let (d_y, w, in_dtype) = operands(cuda, d_y, w, d_x.dtype())?;
        cuda.gemm(&Gemm {
            a: Operand {
                pointer: d_y,
                transposed: false,
                stride: o,
            },
            b: Operand {
                pointer: w,
                transposed: false,
                stride: i,
            },
            d: d_x.device_pointer(),
            d_stride: i,
            m: t,
            n: i,
            k: o,
            alpha,
            base,
            in_dtype,
            out_dtype: d_x.dtype(),
        })
    }

    pub(super) fn backward_weight(
        cuda: Cuda,
        d_w: &mut Tensor,
        d_y: &Tensor,
        x: &Tensor,
        dims: Dims,
        alpha: f32,
        base: Option<u64>,
    ) -> Result<()> {
        let Dims { t, i, o } = dims;
        let (d_y, x, in_dtype) = operands(cuda, d_y, x, DType::F32)?;
        cuda.gemm(&Gemm {
            a: Operand {
                pointer: d_y,
                transposed: true,
                stride: o,
            },
            b: Operand {
                pointer: x,
                transposed: false,
                stride: i,
            },
            d: d_w.device_pointer(),
            d_stride: i,
            m: o,
            n: i,
            k: t,
            alpha,
            base,
            in_dtype,
            out_dtype: DType::F32,
        })
    }

    /// Which operands are rounded to bf16 first. cuBLASLt has no product of two types, and none of f32 that ends in bf16; the
    /// result is as coarse as the operands then are.
    fn rounded(dtypes: [DType; 2], out_dtype: DType) -> [bool; 2] {
        let all_f32 = dtypes == [DType::F32; 2] && out_dtype == DType::F32;
        dtypes.map(|dtype| dtype == DType::F32 && !all_f32)
    }

    /// Addresses of both operands in one dtype.
    fn operands(cuda: Cuda, a: &Tensor, b: &Tensor, out_dtype: DType) -> Result<(u64, u64, DType)> {
        let both = [a, b];
        let rounded = rounded(both.map(Tensor::dtype), out_dtype);
        let mut pointers = both.map(Tensor::device_pointer);
        if rounded == [false; 2] {
            return Ok((pointers[0], pointers[1], a.dtype()));
        }
        let numels = [0, 1].map(|i| if rounded[i] { both[i].numel() } else { 0 });
        let places = Pieces::new(numels.map(|numel| numel * DType::Bf16.size())).take(cuda)?;
        for i in 0..2 {
            if rounded[i] {
                copy::cuda::to_bf16(cuda, places[i], both[i])?;
                pointers[i] = places[i];
            }
        }
        Ok((pointers[0], pointers[1], DType::Bf16))
    }
}

pub(crate) mod examples {
    use super::Write;
    use crate::DType::{self, Bf16, F32};
    use crate::example::{Example, Sizes, Tolerance};

    /// Of x, w and y.
    const KINDS: [[DType; 3]; 6] = [
        [F32, F32, F32],
        [Bf16, Bf16, Bf16],
        [Bf16, Bf16, F32],
        // A gradient in f32 against bf16 weights; an f32 adapter under bf16 activations.
        [F32, Bf16, Bf16],
        [Bf16, F32, Bf16],
        // An adapter's gradient from the f32 residual stream.
        [F32, F32, Bf16],
    ];

    const WRITES: [Write; 2] = [Write::Assign, Write::Accumulate];

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for shape in [[64, 128, 96], [37, 72, 40], [1, 256, 128], [129, 16, 520]] {
            for kind in KINDS {
                all.push(forward(shape, kind));
                all.push(forward_accumulate(shape, kind));
                all.push(forward_onto(shape, kind));
                for write in WRITES {
                    all.push(backward_input(shape, kind, 2.0, write));
                }
            }
            for dtype in [F32, Bf16] {
                for write in WRITES {
                    all.push(backward_weight(shape, dtype, write));
                }
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let shape = [sizes.n_tokens, sizes.hidden, sizes.feed_forward];
        let kind = [sizes.dtype; 3];
        vec![
            forward(shape, kind),
            backward_input(shape, kind, 1.0, Write::Assign),
            backward_weight(shape, sizes.dtype, Write::Accumulate),
        ]
    }

    fn example(name: &'static str, [t, i, o]: [usize; 3], kind: [DType; 3]) -> Example {
        let [x_type, w_type, y_type] = kind;
        // Where one operand is bf16 the GPU rounds the other to bf16 as well.
        let mixed = x_type != w_type || (x_type == F32 && y_type == Bf16);
        Example::new(name, format!("t{t}_i{i}_o{o}"))
            .tolerance(Tolerance {
                f32: if mixed { 5e-3 } else { 2e-6 },
                bf16: 5e-3,
            })
            .operations_at_least(2.0 * (t * i) as f64 * o as f64)
    }

    fn forward(shape: [usize; 3], kind: [DType; 3]) -> Example {
        let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
        example("matmul/forward", shape, kind)
            .out("y", &[t, o], y_type)
            .input("x", &[t, i], x_type)
            .input("w", &[o, i], w_type)
            .run(|[y], [x, w]| super::forward(y, x, w))
    }

    fn forward_accumulate(shape: [usize; 3], kind: [DType; 3]) -> Example {
        let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
        example("matmul/forward_accumulate", shape, kind)
            .updated("y", &[t, o], y_type)
            .input("x", &[t, i], x_type)
            .input("w", &[o, i], w_type)
            .run(|[y], [x, w]| super::forward_accumulate(y, x, w, 0.5))
    }

    fn forward_onto(shape: [usize; 3], kind: [DType; 3]) -> Example {
        let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
        example("matmul/forward_onto", shape, kind)
            .out("y", &[t, o], y_type)
            .input("base", &[t, o], y_type)
            .input("x", &[t, i], x_type)
            .input("w", &[o, i], w_type)
            .run(|[y], [base, x, w]| super::forward_onto(y, base, x, w))
    }

    fn backward_input(shape: [usize; 3], kind: [DType; 3], alpha: f32, write: Write) -> Example {
        let ([t, i, o], [d_y_type, w_type, d_x_type]) = (shape, kind);
        let example = example("matmul/backward_input", shape, kind);
        let example = match write {
            Write::Assign => example.out("d_x", &[t, i], d_x_type),
            Write::Accumulate => example.updated("d_x added", &[t, i], d_x_type),
        };
        example
            .input("d_y", &[t, o], d_y_type)
            .input("w", &[o, i], w_type)
            .run(move |[d_x], [d_y, w]| super::backward_input(d_x, d_y, w, alpha, write))
    }

    fn backward_weight(shape: [usize; 3], x_type: DType, write: Write) -> Example {
        let [t, i, o] = shape;
        let example = example("matmul/backward_weight", shape, [x_type; 3]);
        let example = match write {
            Write::Assign => example.out("d_w", &[o, i], F32),
            Write::Accumulate => example.updated("d_w added", &[o, i], F32),
        };
        example
            .input("d_y", &[t, o], x_type)
            .input("x", &[t, i], x_type)
            .run(move |[d_w], [d_y, x]| super::backward_weight(d_w, d_y, x, 1.0, write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, assert_close, f64s, plus, pool, rows, tensor};
    use crate::{DType, Error};

    /// Few rows in even and odd number, many rows, several panels of weights and blocks of rows; nothing a multiple of a vector.
    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (3, 70, 33),
        (8, 5, 20_000),
        (32, 33, 1),
        (33, 1, 65),
        (70, 67, 211),
        (150, 40, 14),
    ];

    /// (rows, inner, columns) product of a, b given by their element functions.
    fn product(
        (m, k, n): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        let mut out = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                out.push((0..k).map(|l| a(i, l) * b(l, j)).sum());
            }
        }
        out
    }

    fn storages() -> impl Iterator<Item = (DType, DType, DType, f64)> {
        STORAGES.into_iter().flat_map(|(out, tolerance)| {
            let inputs = [DType::F32, DType::Bf16];
            inputs
                .map(|x| inputs.map(|w| (out, x, w, tolerance)))
                .into_iter()
                .flatten()
        })
    }

    #[test]
    fn forward_agrees_with_f64_in_every_mixture_of_storages() {
        for (t, i, o) in SHAPES {
            for (y_dtype, x_dtype, w_dtype, tolerance) in storages() {
                let (x, w) = (tensor(&[t, i], 1, x_dtype), tensor(&[o, i], 2, w_dtype));
                let (x_64, w_64) = (f64s(&x), f64s(&w));
                let want = product((t, i, o), |t, l| x_64[t * i + l], |l, o| w_64[o * i + l]);
                let mut y = Tensor::poison(&[t, o], y_dtype);
                forward(&mut y, &x, &w).unwrap();
                assert_close("y", &y, &want, tolerance);

                let before = tensor(&[t, o], 3, y_dtype);
                let mut y = before.clone();
                let mut onto = Tensor::poison(&[t, o], y_dtype);
                forward_onto(&mut onto, &before, &x, &w).unwrap();
                assert_close("y onto a base", &onto, &plus(&want, &before), tolerance);
                forward_accumulate(&mut y, &x, &w, -0.5).unwrap();
                let want: Vec<f64> = want.iter().map(|y| -0.5 * y).collect();
                assert_close("y added to", &y, &plus(&want, &before), tolerance);
            }
        }
    }

    #[test]
    fn backward_input_agrees_with_f64_in_every_mixture_of_storages() {
        for (t, i, o) in SHAPES {
            for (x_dtype, y_dtype, w_dtype, tolerance) in storages() {
                let (d_y, w) = (tensor(&[t, o], 1, y_dtype), tensor(&[o, i], 2, w_dtype));
                let (d_y_64, w_64) = (f64s(&d_y), f64s(&w));
                let want = product(
                    (t, o, i),
                    |t, l| d_y_64[t * o + l],
                    |l, i_idx| 0.25 * w_64[l * i + i_idx],
                );
                let mut d_x = Tensor::poison(&[t, i], x_dtype);
                backward_input(&mut d_x, &d_y, &w, 0.25, Write::Assign).unwrap();
                assert_close("d_x", &d_x, &want, tolerance);

                let before = tensor(&[t, i], 3, x_dtype);
                let mut d_x = before.clone();
                backward_input(&mut d_x, &d_y, &w, 0.25, Write::Accumulate).unwrap();
                assert_close("d_x added to", &d_x, &plus(&want, &before), tolerance);
            }
        }
    }

    #[test]
    fn backward_weight_assigns_or_adds_to_what_was_there() {
        for (t, i, o) in SHAPES {
            for (_, x_dtype, y_dtype, _) in storages().take(4) {
                let (d_y, x) = (tensor(&[t, o], 1, y_dtype), tensor(&[t, i], 2, x_dtype));
                let (d_y_64, x_64) = (f64s(&d_y), f64s(&x));
                let want = product(
                    (o, t, i),
                    |o_idx, l| 2.0 * d_y_64[l * o + o_idx],
                    |l, i_idx| x_64[l * i + i_idx],
                );
                let before = tensor(&[o, i], 3, DType::F32);
                let mut d_w = before.clone();
                backward_weight(&mut d_w, &d_y, &x, 2.0, Write::Accumulate).unwrap();
                assert_close("d_w", &d_w, &plus(&want, &before), 1e-5);
                let mut d_w = Tensor::poison(&[o, i], DType::F32);
                backward_weight(&mut d_w, &d_y, &x, 2.0, Write::Assign).unwrap();
                assert_close("d_w assigned", &d_w, &want, 1e-5);
            }
        }
    }

    #[test]
    fn row_of_a_small_batch_has_the_bytes_it_has_alone() {
        for (dtype, _) in STORAGES {
            let (x, w) = (tensor(&[32, 203], 1, dtype), tensor(&[1001, 203], 2, dtype));
            let mut y = Tensor::poison(&[32, 1001], DType::F32);
            forward(&mut y, &x, &w).unwrap();
            for t in 0..32 {
                let mut alone = Tensor::poison(&[1, 1001], DType::F32);
                forward(&mut alone, &rows(&x, t..t + 1), &w).unwrap();
                assert_eq!(alone.f32s(), &y.f32s()[t * 1001..][..1001]);
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for (t, i, o) in [(8, 300, 700), (150, 700, 260)] {
            let (x, w) = (
                tensor(&[t, i], 1, DType::Bf16),
                tensor(&[o, i], 2, DType::F32),
            );
            let run = |n_threads: usize| {
                pool(n_threads).install(|| {
                    let mut y = Tensor::poison(&[t, o], DType::F32);
                    let mut d_x = Tensor::poison(&[t, i], DType::F32);
                    let mut d_w = Tensor::zeros(&[o, i], DType::F32);
                    forward(&mut y, &x, &w).unwrap();
                    backward_input(&mut d_x, &y, &w, 1.0, Write::Assign).unwrap();
                    backward_weight(&mut d_w, &y, &x, 1.0, Write::Accumulate).unwrap();
                    [y, d_x, d_w]
                })
            };
            assert_eq!(run(1), run(2));
            assert_eq!(run(1), run(5));
        }
    }

    #[test]
    fn nan_stays_in_its_row() {
        for t in [4, 60] {
            let (mut x, w) = (
                tensor(&[t, 40], 1, DType::F32),
                tensor(&[30, 40], 2, DType::Bf16),
            );
            x.f32s_mut()[40..80].fill(f32::NAN);
            let mut y = Tensor::poison(&[t, 30], DType::F32);
            forward(&mut y, &x, &w).unwrap();
            for (row, y) in y.f32s().chunks(30).enumerate() {
                assert!(y.iter().all(|y| y.is_nan() == (row == 1)), "row {row}");
            }
        }
    }

    #[test]
    fn empty_dimensions_give_zeros() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32);
        for t in [2, 40] {
            let mut y = Tensor::poison(&[t, 3], DType::F32);
            forward(&mut y, &zeros(&[t, 0]), &zeros(&[3, 0])).unwrap();
            assert_eq!(y, zeros(&[t, 3]));
            let mut d_x = Tensor::poison(&[t, 3], DType::F32);
            let (d_y, w) = (zeros(&[t, 0]), zeros(&[0, 3]));
            backward_input(&mut d_x, &d_y, &w, 1.0, Write::Assign).unwrap();
            assert_eq!(d_x, zeros(&[t, 3]));
        }
        forward(&mut zeros(&[0, 3]), &zeros(&[0, 4]), &zeros(&[3, 4])).unwrap();
        let mut d_w = tensor(&[3, 4], 1, DType::F32);
        let before = d_w.clone();
        let (d_y, x) = (zeros(&[0, 3]), zeros(&[0, 4]));
        backward_weight(&mut d_w, &d_y, &x, 1.0, Write::Accumulate).unwrap();
        assert_eq!(d_w, before);
    }

    #[test]
    fn leading_dimensions_are_rows() {
        let (x, w) = (
            tensor(&[2, 3, 5], 1, DType::F32),
            tensor(&[4, 5], 2, DType::F32),
        );
        let mut heads = Tensor::poison(&[2, 3, 4], DType::F32);
        forward(&mut heads, &x, &w).unwrap();
        let mut flat = x.clone();
        flat.reshape(&[6, 5]);
        let mut y = Tensor::poison(&[6, 4], DType::F32);
        forward(&mut y, &flat, &w).unwrap();
        assert_eq!(heads.f32s(), y.f32s());
    }

    #[test]
    fn heads_side_by_side_are_columns() {
        let (x, w) = (
            tensor(&[7, 3, 5], 1, DType::F32),
            tensor(&[8, 15], 2, DType::F32),
        );
        let mut heads = Tensor::poison(&[7, 2, 4], DType::F32);
        forward(&mut heads, &x, &w).unwrap();
        let mut flat = x.clone();
        flat.reshape(&[7, 15]);
        let mut y = Tensor::poison(&[7, 8], DType::F32);
        forward(&mut y, &flat, &w).unwrap();
        assert_eq!(heads.f32s(), y.f32s());
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let (x, w) = (
            tensor(&[6, 5], 1, DType::F32),
            tensor(&[4, 5], 2, DType::F32),
        );
        let error = forward(&mut Tensor::zeros(&[6, 3], DType::F32), &x, &w).unwrap_err();
        assert_eq!(
            error.to_string(),
            "matmul::forward: expected [..., 4] for `y_to`, got [6, 3]"
        );
        let got = forward(&mut Tensor::zeros(&[7, 4], DType::F32), &x, &w);
        assert!(matches!(got, Err(Error::Shape { arg: "y_to", .. })));
        let got = forward(
            &mut Tensor::zeros(&[6, 4], DType::F32),
            &x,
            &tensor(&[4, 6], 2, DType::F32),
        );
        assert!(matches!(got, Err(Error::Shape { arg: "x_ti", .. })));
        let d_y = tensor(&[6, 4], 3, DType::F32);
        let mut d_w = Tensor::zeros(&[4, 5], DType::Bf16);
        let got = backward_weight(&mut d_w, &d_y, &x, 1.0, Write::Accumulate);
        assert!(matches!(got, Err(Error::DType { arg: "d_w_oi", .. })));
    }
}
