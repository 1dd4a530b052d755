//! The loop of almost every op: the same rows of several tensors, in parallel tasks, handed to a kernel as f32.

use rayon::prelude::*;

use super::{View, ViewMut, math, scratch, simd};
use crate::Tensor;

/// Elements of the widest tensor that one parallel task covers (at least one row). Fixed, so that partial sums do not
/// depend on the number of cores.
const TASK_ELEMENTS: usize = 1 << 15;
/// Elements of the widest tensor that a kernel gets at a time (at least one row): what bf16 is widened into stays in the L1 cache.
const BLOCK_ELEMENTS: usize = 1 << 11;

/// A tensor that the kernel reads, `width` elements a row.
#[derive(Clone, Copy)]
pub(crate) struct In<'a> {
    data: View<'a>,
    width: usize,
}

impl<'a> In<'a> {
    pub(crate) fn new(tensor: &'a Tensor, width: usize) -> Self {
        In {
            data: View::of(tensor),
            width,
        }
    }
}

/// A tensor that the kernel writes, `width` elements a row.
pub(crate) struct Out<'a> {
    data: ViewMut<'a>,
    width: usize,
    keep: bool,
}

impl<'a> Out<'a> {
    /// The kernel writes every element and reads none: what it finds there is unspecified.
    pub(crate) fn assign(tensor: &'a mut Tensor, width: usize) -> Self {
        Out {
            data: ViewMut::of(tensor),
            width,
            keep: false,
        }
    }

    /// The kernel finds the present values and may change them.
    pub(crate) fn update(tensor: &'a mut Tensor, width: usize) -> Self {
        Out {
            data: ViewMut::of(tensor),
            width,
            keep: true,
        }
    }
}

/// Runs `kernel(first_row, outs, ins)` over blocks of consecutive rows, in parallel. The slices hold whole rows, as many in each.
/// All tensors must have as many rows as the first output; the kernel is compiled for the machine's vectors if it is `#[inline(always)]`.
pub(crate) fn for_rows<const O: usize, const I: usize>(
    outs: [Out; O],
    ins: [In; I],
    kernel: impl Fn(usize, [&mut [f32]; O], [&[f32]; I]) + Sync,
) {
    run(
        outs,
        ins,
        0,
        #[inline(always)]
        |row, outs, ins, _| kernel(row, outs, ins),
    );
}

/// As [`for_rows`], and the kernel adds into a last argument of `n_sums` zeros: its share of sums over all rows.
/// Returns the sums, added in row order over fixed tasks. `n_sums` may be 0: the kernel then gets an empty slice.
pub(crate) fn for_rows_summing<const O: usize, const I: usize>(
    outs: [Out; O],
    ins: [In; I],
    n_sums: usize,
    kernel: impl Fn(usize, [&mut [f32]; O], [&[f32]; I], &mut [f32]) + Sync,
) -> Vec<f32> {
    run(outs, ins, n_sums, kernel)
}

/// Adds rows of `x` (each of y's length) to y, in order.
#[inline(always)]
pub(crate) fn add_rows(y: &mut [f32], x: &[f32]) {
    if !y.is_empty() {
        for row in x.chunks_exact(y.len()) {
            math::add(y, row);
        }
    }
}

fn run<const O: usize, const I: usize>(
    mut outs: [Out; O],
    ins: [In; I],
    n_sums: usize,
    kernel: impl Fn(usize, [&mut [f32]; O], [&[f32]; I], &mut [f32]) + Sync,
) -> Vec<f32> {
    let n_rows = check_rows(&outs, &ins);
    let widths = outs.iter().map(|out| out.width);
    let widest = widths
        .chain(ins.iter().map(|input| input.width))
        .fold(1, usize::max);
    let rows_per_task = (TASK_ELEMENTS / widest).max(1);
    let rows_per_block = (BLOCK_ELEMENTS / widest).max(1);
    let mut partial = vec![0.0; n_rows.div_ceil(rows_per_task) * n_sums];
    let mut tasks = Vec::with_capacity(n_rows.div_ceil(rows_per_task));
    let mut rest = partial.as_mut_slice();
    for first_row in (0..n_rows).step_by(rows_per_task) {
        let n_rows = rows_per_task.min(n_rows - first_row);
        let (sums, after) = rest.split_at_mut(n_sums);
        rest = after;
        tasks.push(Task {
            first_row,
            n_rows,
            outs: outs.each_mut().map(|out| Out {
                data: out.data.take_front(n_rows * out.width),
                width: out.width,
                keep: out.keep,
            }),
            sums,
        });
    }
    let work = |task: Task<O>| task.run(ins, rows_per_block, &kernel);
    if tasks.len() <= 1 {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().for_each(work);
    }
    let mut total = vec![0.0; n_sums];
    add_rows(&mut total, &partial);
    total
}

/// The number of rows, which all must have.
fn check_rows<const O: usize, const I: usize>(outs: &[Out; O], ins: &[In; I]) -> usize {
    let n_rows = match outs.first() {
        Some(out) if out.width > 0 => out.data.len() / out.width,
        _ => 0,
    };
    for out in outs {
        assert_eq!(out.data.len(), n_rows * out.width, "rows of an output");
    }
    for input in ins {
        assert_eq!(input.data.len(), n_rows * input.width, "rows of an input");
    }
    n_rows
}

/// Rows that one thread computes.
struct Task<'a, const O: usize> {
    first_row: usize,
    n_rows: usize,
    outs: [Out<'a>; O],
    sums: &'a mut [f32],
}

impl<const O: usize> Task<'_, O> {
    fn run<const I: usize>(
        mut self,
        ins: [In; I],
        rows_per_block: usize,
        kernel: &impl Fn(usize, [&mut [f32]; O], [&[f32]; I], &mut [f32]),
    ) {
        let keeps = self.outs.each_ref().map(|out| out.keep);
        let mut out_scratch: [Vec<f32>; O] = std::array::from_fn(|_| scratch::take());
        let mut in_scratch: [Vec<f32>; I] = std::array::from_fn(|_| scratch::take());
        for start in (0..self.n_rows).step_by(rows_per_block) {
            let end = (start + rows_per_block).min(self.n_rows);
            let first_row = self.first_row + start;
            let mut blocks = self
                .outs
                .each_mut()
                .map(|out| out.data.slice(start * out.width..end * out.width));
            let sources = ins.map(|input| {
                let rows = first_row * input.width..(first_row + end - start) * input.width;
                input.data.slice(rows)
            });
            // 1. widen  2. compute  3. narrow; apart, because each must inline whole into its vector code.
            widen(&sources, &mut in_scratch);
            widen_kept(&mut blocks, &mut out_scratch, keeps);
            let mut scratches = in_scratch.iter();
            let inputs = sources.map(|source| match (source, scratches.next()) {
                (View::F32(data), _) => data,
                (View::Bf16(data), Some(scratch)) => &scratch[..data.len()],
                (View::Bf16(_), None) => &[],
            });
            let mut scratches = out_scratch.iter_mut();
            let mut outputs = blocks
                .each_mut()
                .map(|block| match (block, scratches.next()) {
                    (ViewMut::F32(data), _) => &mut **data,
                    (ViewMut::Bf16(data), Some(scratch)) => &mut scratch[..data.len()],
                    (ViewMut::Bf16(_), None) => &mut [],
                });
            let sums = &mut *self.sums;
            simd(
                #[inline(always)]
                || {
                    let outputs = outputs.each_mut().map(|out| &mut **out);
                    kernel(first_row, outputs, inputs, sums);
                },
            );
            narrow(&mut blocks, &out_scratch);
        }
        out_scratch
            .into_iter()
            .chain(in_scratch)
            .for_each(scratch::put);
    }
}

/// Inputs that are bf16, as f32 into their scratch.
fn widen(sources: &[View], scratches: &mut [Vec<f32>]) {
    simd(
        #[inline(always)]
        || {
            for (source, scratch) in sources.iter().zip(&mut *scratches) {
                if !source.is_f32() {
                    source.load(scratch);
                }
            }
        },
    );
}

/// Outputs that are bf16, as f32 into their scratch where they keep what they hold; else room for them.
fn widen_kept<const O: usize>(
    blocks: &mut [ViewMut; O],
    scratches: &mut [Vec<f32>; O],
    keeps: [bool; O],
) {
    simd(
        #[inline(always)]
        || {
            for (i, block) in blocks.iter_mut().enumerate() {
                if let ViewMut::Bf16(data) = block {
                    let scratch = &mut scratches[i];
                    if keeps[i] {
                        View::Bf16(data).load(scratch);
                    } else if scratch.len() < data.len() {
                        scratch.resize(data.len(), 0.0);
                    }
                }
            }
        },
    );
}

/// Outputs that are bf16, out of their scratch.
fn narrow(blocks: &mut [ViewMut], scratches: &[Vec<f32>]) {
    simd(
        #[inline(always)]
        || {
            for (block, scratch) in blocks.iter_mut().zip(scratches) {
                if let ViewMut::Bf16(data) = block {
                    let n = data.len();
                    block.store(&scratch[..n]);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn for_rows_visits_every_row_once_in_either_storage() {
        for dtype in [DType::F32, DType::Bf16] {
            for n_rows in [0, 1, 7, 5000] {
                let x = Tensor::from_f32(
                    &[n_rows, 3],
                    (0..n_rows * 3).map(|i| (i % 64) as f32).collect(),
                );
                let mut y = Tensor::poison(&[n_rows, 3], dtype);
                let mut z = Tensor::zeros(&[n_rows], dtype);
                let sums = for_rows_summing(
                    [Out::assign(&mut y, 3), Out::update(&mut z, 1)],
                    [In::new(&x, 3)],
                    1,
                    |row, [y, z], [x], sums| {
                        y.copy_from_slice(x);
                        for (i, z) in z.iter_mut().enumerate() {
                            *z += ((row + i) % 16) as f32;
                        }
                        sums[0] += z.len() as f32;
                    },
                );
                assert_eq!(y.to_f32_vec(), x.f32s());
                let rows: Vec<f32> = (0..n_rows).map(|i| (i % 16) as f32).collect();
                assert_eq!(z.to_f32_vec(), rows);
                assert_eq!(sums, [n_rows as f32]);
            }
        }
    }
}
