//! Both products on the CPU, dropped elements made again from the seed.

use rayon::prelude::*;

use super::{Down, Up, Write};
use crate::Tensor;
use crate::cpu::{View, ViewMut, simd, with_scratch};
use crate::ops::matmul::{self, cpu as products};

/// Rows whose dropped inputs are held together; few in tests, so that small shapes cross a border.
const ROW_BLOCK: usize = if cfg!(test) { 16 } else { 256 };

pub(super) fn down_forward(u: &mut Tensor, down: &Down) {
    let (mut u, a) = (ViewMut::of(u), View::of(down.a_ri));
    let (wide, rank) = (down.dims.wide, down.dims.rank);
    down.for_dropped(|rows, x| {
        let u = u.slice(rows.start * rank..rows.end * rank);
        let dims = product(rows.len(), wide, rank);
        products::forward(u, x, a, dims, 1.0, Write::Assign);
    });
}

pub(super) fn up_forward(y: &mut Tensor, up: &Up, write: Write) {
    let (y, u, b) = (ViewMut::of(y), View::of(up.u_tr), View::of(up.b_or));
    let dims = product(up.dims.t, up.dims.rank, up.dims.wide);
    products::forward(y, u, b, dims, up.scale, write);
}

pub(super) fn up_backward(d_u: &mut Tensor, d_b: Option<&mut Tensor>, d_y: &Tensor, up: &Up) {
    let (d_y, u, b) = (View::of(d_y), View::of(up.u_tr), View::of(up.b_or));
    let dims = product(up.dims.t, up.dims.rank, up.dims.wide);
    if let Some(d_b) = d_b {
        let write = Write::Accumulate;
        products::backward_weight(d_b.f32s_mut(), d_y, u, dims, up.scale, write);
    }
    let d_u = ViewMut::of(d_u);
    products::backward_input(d_u, d_y, b, dims, up.scale, Write::Assign);
}

pub(super) fn down_backward(
    d_x: &mut Tensor,
    d_a: Option<&mut Tensor>,
    d_u: &Tensor,
    down: &Down,
    write: Write,
) {
    let (mut d_x, d_u, a) = (ViewMut::of(d_x), View::of(d_u), View::of(down.a_ri));
    let (t, wide, rank) = (down.dims.t, down.dims.wide, down.dims.rank);
    if let Some(d_a) = d_a {
        down.for_dropped(|rows, x| {
            let d_u = d_u.slice(rows.start * rank..rows.end * rank);
            let dims = product(rows.len(), wide, rank);
            let write = Write::Accumulate;
            products::backward_weight(d_a.f32s_mut(), d_u, x, dims, 1.0, write);
        });
    }
    let Some(dropout) = down.dropout else {
        let dims = product(t, wide, rank);
        return products::backward_input(d_x, d_u, a, dims, 1.0, write);
    };
    for start in (0..t).step_by(ROW_BLOCK) {
        let rows = start..(start + ROW_BLOCK).min(t);
        let d_u = d_u.slice(rows.start * rank..rows.end * rank);
        let n = rows.len() * wide;
        with_scratch(n, |d_dropped| {
            let dims = product(rows.len(), wide, rank);
            let whole = ViewMut::F32(d_dropped);
            products::backward_input(whole, d_u, a, dims, 1.0, Write::Assign);
            let first = rows.start * wide;
            d_x.slice(first..first + n)
                .chunks(wide)
                .into_par_iter()
                .zip(d_dropped.par_chunks_mut(wide))
                .enumerate()
                .for_each(|(row, (mut d_x, d_dropped))| {
                    simd(
                        #[inline(always)]
                        || {
                            let first = (first + row * wide) as u64;
                            dropout.apply(d_dropped, first);
                            match write {
                                Write::Accumulate => d_x.add(d_dropped),
                                Write::Assign => d_x.store(d_dropped),
                            }
                        },
                    );
                });
        });
    }
}

impl Down<'_> {
    /// Blocks of rows of dropout(x), all of x at once where nothing is dropped.
    fn for_dropped(&self, mut body: impl FnMut(std::ops::Range<usize>, View)) {
        let (t, wide, x) = (self.dims.t, self.dims.wide, View::of(self.x_ti));
        let Some(dropout) = self.dropout else {
            return body(0..t, x);
        };
        for start in (0..t).step_by(ROW_BLOCK) {
            let rows = start..(start + ROW_BLOCK).min(t);
            with_scratch(rows.len() * wide, |dropped| {
                let chunks = dropped.par_chunks_mut(wide).zip(rows.clone());
                chunks.for_each(|(dropped, row)| {
                    let row = row * wide..(row + 1) * wide;
                    simd(
                        #[inline(always)]
                        || {
                            x.slice(row.clone()).read_into(dropped);
                            dropout.apply(dropped, row.start as u64);
                        },
                    );
                });
                body(rows, View::F32(dropped));
            });
        }
    }
}

fn product(t: usize, i: usize, o: usize) -> matmul::Dims {
    matmul::Dims { t, i, o }
}
