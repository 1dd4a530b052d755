//! The pass on a GPU, and the scratch of its backward pass.

use super::causal_conv1d::WIDTH;
use super::causal_conv1d::cuda::Walk;
use super::{Dims, Inputs, Outputs, Saved};
use crate::cuda::sources::CAUSAL_CONV1D;
use crate::cuda::{Args, Cuda, DeviceProperties};
use crate::ops::rows::{self, Partials};
use crate::{Error, Result, Tensor};

/// Widest head of q and k: eight channels for each lane of a warp.
const MAX_KEY_DIM: usize = 256;
const CHANNELS: usize = 8;

pub(super) fn forward(
    cuda: Cuda,
    outputs: Outputs,
    dims: Dims,
    inputs: &Inputs,
    eps: f32,
) -> Result<()> {
    let (qkv, w) = (inputs.qkv_tc, inputs.w);
    let (q, k, v) = (outputs.q_tgk, outputs.k_tgk, outputs.v_thv);
    let shape = Shape::new("delta_inputs::forward", dims)?;
    let walk = Walk::forward(cuda.properties(), dims.t, shape.threads_of_row);
    let names = ["delta_inputs_forward_bf16", "delta_inputs_forward_any"];
    let kernel = rows::instance(names, &[q, k, v, qkv], &[dims.k, shape.value_width]);
    let args = Args::new()
        .view_mut(q)
        .view_mut(k)
        .view_mut(v)
        .tensor_mut(outputs.q_rstd_tg)
        .tensor_mut(outputs.k_rstd_tg)
        .view(qkv)
        .view(w);
    let args = shape
        .put(cuda, args, dims, inputs.cu_seqlens, walk)?
        .f32(inputs.q_scale)
        .f32(eps);
    cuda.launch(&CAUSAL_CONV1D, kernel, walk.grid(), args)
}

pub(super) fn scratch_bytes(gpu: DeviceProperties, dims: Dims) -> usize {
    let n_runs = Shape::new("delta_inputs::backward", dims).map_or(0, |shape| {
        Walk::backward(gpu, dims.t, shape.threads_of_row).n_runs
    });
    Partials::bytes(n_runs, WIDTH * (2 * dims.g * dims.k + dims.h * dims.v))
}

pub(super) fn backward(
    cuda: Cuda,
    d_qkv: &mut Tensor,
    d_w: Option<&mut Tensor>,
    saved: &Saved,
    dims: Dims,
    inputs: &Inputs,
) -> Result<()> {
    let (qkv, w) = (inputs.qkv_tc, inputs.w);
    let (d_q, d_k, d_v) = (saved.d_q_tgk, saved.d_k_tgk, saved.d_v_thv);
    let shape = Shape::new("delta_inputs::backward", dims)?;
    let walk = Walk::backward(cuda.properties(), dims.t, shape.threads_of_row);
    let partials = Partials::new(cuda, d_w.is_some(), walk.n_runs, WIDTH * qkv.shape()[1])?;
    let names = ["delta_inputs_backward_bf16", "delta_inputs_backward_any"];
    let tensors = [d_qkv, d_q, d_k, d_v, qkv];
    let kernel = rows::instance(names, &tensors, &[dims.k, shape.value_width]);
    let args = Args::new()
        .view_mut(d_qkv)
        .pointer(partials.pointer)
        .view(d_q)
        .view(d_k)
        .view(d_v)
        .view(qkv)
        .view(w)
        .tensor(saved.q_rstd_tg)
        .tensor(saved.k_rstd_tg);
    let args = shape
        .put(cuda, args, dims, inputs.cu_seqlens, walk)?
        .f32(inputs.q_scale);
    cuda.launch(&CAUSAL_CONV1D, kernel, walk.grid(), args)?;
    match d_w {
        Some(d_w) => partials.add_to(cuda, d_w, 0),
        None => Ok(()),
    }
}

/// What the threads of a row do, as `Role` in causal_conv1d.cu has it.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Threads of a head of q or k.
    group: usize,
    value_width: usize,
    threads_of_row: usize,
}

impl Shape {
    fn new(op: &'static str, dims: Dims) -> Result<Shape> {
        if dims.k > MAX_KEY_DIM {
            let what = format!("heads of {} (at most {MAX_KEY_DIM})", dims.k);
            return Err(Error::Unsupported { op, what });
        }
        let group = dims.k.div_ceil(CHANNELS).next_power_of_two();
        let value_width = dims.h * dims.v;
        let threads_of_heads = (2 * dims.g * group).next_multiple_of(32);
        Ok(Shape {
            group,
            value_width,
            threads_of_row: threads_of_heads + value_width.div_ceil(CHANNELS),
        })
    }

    /// The arguments that both kernels take after their tensors.
    fn put(
        self,
        cuda: Cuda,
        args: Args,
        dims: Dims,
        cu_seqlens: &[u32],
        walk: Walk,
    ) -> Result<Args> {
        Ok(args
            .pointer(cuda.upload(cu_seqlens)?)
            .u32(cu_seqlens.len() - 1)
            .u32(dims.t)
            .u32(dims.g)
            .u32(dims.k)
            .u32(self.value_width)
            .u32(self.group)
            .u32(walk.run))
    }
}
