//! The pass on the CPU, a head at a time.

//! The convolution's tiles, of which one is as wide as a head of q or k, so that its norm is taken where it is made.

use std::ops::Range;

use super::causal_conv1d::cpu::{Convolution, Output, tiles};
use super::{Dims, Inputs, Outputs, Saved};
use crate::cpu::math::{self, dot, sum_squares};
use crate::cpu::{View, documents, load_rows};
use crate::dtype::Element;
use crate::{DType, Tensor, bf16};

pub(super) fn forward(outputs: Outputs, dims: Dims, inputs: &Inputs, eps: f32) {
    let (key_width, value_width) = (dims.g * dims.k, dims.h * dims.v);
    let (dtype, q_scale) = (inputs.qkv_tc.dtype(), inputs.q_scale);
    let outs = vec![
        Output::of(outputs.q_tgk, key_width),
        Output::of(outputs.k_tgk, key_width),
        Output::of(outputs.v_thv, value_width),
        Output::of(outputs.q_rstd_tg, dims.g),
        Output::of(outputs.k_rstd_tg, dims.g),
    ];
    let convolution = Convolution {
        x_tc: inputs.qkv_tc,
        w: inputs.w,
        documents: &documents(inputs.cu_seqlens),
        tiles: &dims.tiles(),
    };
    convolution.forward(
        outs,
        None,
        #[inline(always)]
        |outs, row, channels, y| {
            round(y, dtype);
            let place = dims.place(channels);
            if let Part::Head { head, .. } = place.part {
                let r = 1.0 / (sum_squares(y) + eps).sqrt();
                outs[place.part.rstd()].row(row, head..head + 1).store(&[r]);
                let factor = place.part.scale(q_scale) * r;
                y.iter_mut().for_each(|y| *y *= factor);
            }
            outs[place.part.out()].row(row, place.columns).store(y);
        },
    );
}

pub(super) fn backward(
    d_qkv_tc: &mut Tensor,
    d_w: Option<&mut Tensor>,
    saved: &Saved,
    dims: Dims,
    inputs: &Inputs,
) {
    let (dtype, d_dtype) = (inputs.qkv_tc.dtype(), d_qkv_tc.dtype());
    let q_scale = inputs.q_scale;
    let widths = [dims.g * dims.k, dims.g * dims.k, dims.h * dims.v];
    let d_outs = [saved.d_q_tgk, saved.d_k_tgk, saved.d_v_thv];
    let rstds = [saved.q_rstd_tg, saved.k_rstd_tg].map(Tensor::f32s);
    let convolution = Convolution {
        x_tc: inputs.qkv_tc,
        w: inputs.w,
        documents: &documents(inputs.cu_seqlens),
        tiles: &dims.tiles(),
    };
    convolution.backward(
        d_qkv_tc,
        d_w,
        #[inline(always)]
        |d_y, row, channels| {
            let Place { part, columns } = dims.place(channels);
            let width = widths[part.out()];
            let first = row * width + columns.start;
            let d_out = View::of(d_outs[part.out()]);
            load_rows(d_y, d_out, first, width, columns.len());
        },
        #[inline(always)]
        |d_y, row, channels, y| {
            let part = dims.place(channels).part;
            if let Part::Head { is_query, head } = part {
                let r = rstds[usize::from(!is_query)][row * dims.g + head];
                let factor = part.scale(q_scale) * r;
                dims.with_activated(y, dtype, |x| {
                    let pull = dot(d_y, x) * (r * r);
                    for (d_y, x) in d_y.iter_mut().zip(x) {
                        *d_y = factor * (*d_y - x * pull);
                    }
                });
            }
            round(d_y, d_dtype);
        },
    );
}

/// What a tile's channels are.
#[derive(Clone, Copy)]
enum Part {
    Head { is_query: bool, head: usize },
    Values,
}

impl Part {
    /// Among q, k, v.
    fn out(self) -> usize {
        match self {
            Part::Head { is_query: true, .. } => 0,
            Part::Head { .. } => 1,
            Part::Values => 2,
        }
    }

    /// Among the outputs of the forward pass.
    fn rstd(self) -> usize {
        3 + self.out()
    }

    fn scale(self, q_scale: f32) -> f32 {
        match self {
            Part::Head { is_query: true, .. } => q_scale,
            _ => 1.0,
        }
    }
}

/// A tile's part, and its columns there.
struct Place {
    part: Part,
    columns: Range<usize>,
}

/// Widest head that is activated on the stack.
const MAX_KEY_DIM: usize = 256;

impl Dims {
    /// A head of q or k each, then the values.
    fn tiles(self) -> Vec<Range<usize>> {
        let keys = 2 * self.g * self.k;
        let heads = (0..keys).step_by(self.k.max(1));
        let mut all: Vec<_> = heads.map(|start| start..start + self.k).collect();
        all.extend(tiles(keys..keys + self.h * self.v));
        all
    }

    #[inline(always)]
    fn place(self, channels: &Range<usize>) -> Place {
        let width = self.g * self.k;
        let (part, first) = if channels.start < 2 * width {
            let either = channels.start / self.k;
            let is_query = either < self.g;
            let first = if is_query { 0 } else { width };
            let head = either - first / self.k;
            (Part::Head { is_query, head }, first)
        } else {
            (Part::Values, 2 * width)
        };
        Place {
            part,
            columns: channels.start - first..channels.end - first,
        }
    }

    /// `body` with silu(y), rounded as the forward pass stored it.
    #[inline(always)]
    fn with_activated(self, y: &[f32], dtype: DType, body: impl FnOnce(&[f32])) {
        let mut on_stack = [0.0; MAX_KEY_DIM];
        let mut on_heap = Vec::new();
        let x = match on_stack.get_mut(..y.len()) {
            Some(x) => x,
            None => {
                on_heap.resize(y.len(), 0.0);
                &mut on_heap[..]
            }
        };
        for (x, y) in x.iter_mut().zip(y) {
            *x = math::silu(*y);
        }
        round(x, dtype);
        body(x);
    }
}

/// As they would be read back after being stored.
#[inline(always)]
fn round(values: &mut [f32], dtype: DType) {
    if dtype == DType::Bf16 {
        for value in values {
            *value = <bf16 as Element>::from_f32(*value).to_f32();
        }
    }
}
