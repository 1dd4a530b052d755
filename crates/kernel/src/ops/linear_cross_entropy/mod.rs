//! Head projection and cross-entropy in row chunks, so that the logits of a whole batch never exist.
//!
//! logits = x headᵀ; nll = logsumexp(logits) - logits[target]; gradient of the logits = d_nll (softmax(logits) - onehot(target)),
//! of x that times head, of head its transpose times x. Only rows with a target are projected.
//! Where a CPU has instructions for products of bf16, and x and head are bf16, the logits' gradient is rounded to it for these two,
//! as on a GPU; the logits themselves and what is made of them stay f32.
//! Source: the chunking is that of arXiv 2410.10989 (Liger) and 2411.09009 (Cut Cross-Entropy); the loss PyTorch's `cross_entropy`.

mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::check;
use crate::cuda::DeviceProperties;
use crate::{DType, Device, Error, Result, Tensor};

/// Rows of logits that exist at a time, at most; fewer where the vocabulary is large (see [`LOGIT_BYTES`]).
pub const ROW_CHUNK: usize = 1024;
/// Memory that the logits of a chunk may take, as far as one vector-sized group of rows allows.
pub const LOGIT_BYTES: usize = 256 << 20;
/// As [`ROW_CHUNK`], on a GPU: every chunk reads the whole head twice and its f32 gradient once and writes that, which 4,096 rows
/// of products outweigh.
pub const GPU_ROW_CHUNK: usize = 4096;
/// As [`LOGIT_BYTES`], on a GPU: room for 4,096 rows of 248,320 bf16 logits (2.03 GB). A GPU gives no more than its
/// [`GPU_LOGIT_SHARE`]th part.
pub const GPU_LOGIT_BYTES: usize = 2 << 30;
/// See [`GPU_LOGIT_BYTES`].
pub const GPU_LOGIT_SHARE: usize = 24;
/// Target of a position without loss.
pub const NO_TARGET: i32 = -1;

/// nll_t[t] = logsumexp(head x_t) - (head x_t)[targets[t]] (natural log), 0 where the target is [`NO_TARGET`]; assigned.
/// Shapes: nll_t [T] f32; x_td [T,D]; head_cd [C,D]; targets_t [T]. On a GPU x, logits and their gradient have the head's type, on a
/// CPU with instructions for bf16 the gradient has, if x does.
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
    match check::device(OP, nll_t, &[("x_td", x_td), ("head_cd", head_cd)])? {
        Device::Cpu => cpu::forward(nll_t, x_td, head_cd, targets_t, dims),
        Device::Cuda(cuda) => cuda::run(cuda, nll_t, None, x_td, head_cd, targets_t, dims)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`forward`] and [`forward_backward`] take on a GPU for the shape [T,D,C] of x and head, whatever rows
/// carry a target. `d_x_dtype` is that of the gradient of x.
pub fn scratch_bytes(
    gpu: DeviceProperties,
    [t, d, c]: [usize; 3],
    dtype: DType,
    d_x_dtype: DType,
) -> usize {
    cuda::scratch_bytes(gpu, t, Dims { d, c }, dtype, d_x_dtype)
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
    let mut others = vec![("d_x_td", &*d_x_td), ("x_td", x_td), ("head_cd", head_cd)];
    others.extend(
        d_head_cd
            .as_deref()
            .map(|d_head_cd| ("d_head_cd", d_head_cd)),
    );
    let device = check::device(OP, nll_t, &others)?;
    let gradients = Gradients {
        d_x_td,
        d_head_cd,
        d_nll,
    };
    match device {
        Device::Cpu => cpu::forward_backward(nll_t, gradients, x_td, head_cd, targets_t, dims),
        Device::Cuda(cuda) => {
            let gradients = Some(gradients);
            cuda::run(cuda, nll_t, gradients, x_td, head_cd, targets_t, dims)?;
        }
    }
    Ok(())
}

struct Gradients<'a> {
    d_x_td: &'a mut Tensor,
    d_head_cd: Option<&'a mut Tensor>,
    d_nll: f32,
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
