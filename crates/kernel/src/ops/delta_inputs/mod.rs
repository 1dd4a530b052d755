//! What the delta rule takes, from the projected row in one pass: q and k convolved, passed through SiLU and l2-normalised head by
//! head (q scaled too), v convolved and passed through SiLU. One pass because on a GPU the memory traffic is all it costs.
//!
//! Forward is the same as [`causal_conv1d`], [`super::split::qkv`] and [`super::l2_norm`] one after the other, on the CPU to the
//! bit; a GPU does not round to the storage type in between. Backward convolves again rather than keep what lies between.

// T tokens (packed), G key heads, K key dim, H value heads, V value dim, C = 2·G·K + H·V channels: q, then k, then v.

mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::{causal_conv1d, check};
use crate::cuda::DeviceProperties;
use crate::{Device, Result, Tensor};

/// What both passes read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, keys and values as they were projected [T,C].
    pub qkv_tc: &'a Tensor,
    /// The convolution's filter [C,1,4].
    pub w: &'a Tensor,
    /// Document boundaries: n_docs + 1 offsets, from 0 to T.
    pub cu_seqlens: &'a [u32],
    /// What q is multiplied by.
    pub q_scale: f32,
}

/// What forward gives, all assigned.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// [T,G,K]
    pub q_tgk: &'a mut Tensor,
    /// [T,G,K]
    pub k_tgk: &'a mut Tensor,
    /// [T,H,V]
    pub v_thv: &'a mut Tensor,
    /// Over the norm of q's heads [T,G] f32.
    pub q_rstd_tg: &'a mut Tensor,
    /// Over the norm of k's heads [T,G] f32.
    pub k_rstd_tg: &'a mut Tensor,
}

/// The gradients of forward's outputs, and what it gave as rstd.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// [T,G,K]
    pub d_q_tgk: &'a Tensor,
    /// [T,G,K]
    pub d_k_tgk: &'a Tensor,
    /// [T,H,V]
    pub d_v_thv: &'a Tensor,
    /// [T,G] f32
    pub q_rstd_tg: &'a Tensor,
    /// [T,G] f32
    pub k_rstd_tg: &'a Tensor,
}

/// All five outputs assigned. `eps` is added to the sums of squares.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree or `cu_seqlens` does not rise from 0 to T, [`crate::Error::DType`] where an rstd
/// is not f32, [`crate::Error::Unsupported`] on a GPU for K above 256.
pub fn forward(outputs: Outputs, inputs: &Inputs, eps: f32) -> Result<()> {
    const OP: &str = "delta_inputs::forward";
    let heads = Heads {
        q_tgk: outputs.q_tgk,
        k_tgk: outputs.k_tgk,
        v_thv: outputs.v_thv,
        q_rstd_tg: outputs.q_rstd_tg,
        k_rstd_tg: outputs.k_rstd_tg,
    };
    let dims = Dims::new(OP, &heads, inputs)?;
    match heads.device(OP, outputs.q_tgk, &inputs.tensors())? {
        Device::Cpu => cpu::forward(outputs, dims, inputs, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, outputs, dims, inputs, eps)?,
    }
    Ok(())
}

/// d_qkv_tc assigned, d_w [C,1,4] f32 added to (None: frozen).
///
/// # Errors
/// As [`forward`]; [`crate::Error::DType`] where d_w is not f32.
pub fn backward(
    d_qkv_tc: &mut Tensor,
    d_w: Option<&mut Tensor>,
    saved: &Saved,
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "delta_inputs::backward";
    let heads = Heads {
        q_tgk: saved.d_q_tgk,
        k_tgk: saved.d_k_tgk,
        v_thv: saved.d_v_thv,
        q_rstd_tg: saved.q_rstd_tg,
        k_rstd_tg: saved.k_rstd_tg,
    };
    let dims = Dims::new(OP, &heads, inputs)?;
    check::shape(OP, "d_qkv_tc", d_qkv_tc, inputs.qkv_tc.shape())?;
    let mut others = inputs.tensors().to_vec();
    if let Some(d_w) = d_w.as_deref() {
        check::shape(OP, "d_w", d_w, inputs.w.shape())?;
        check::f32(OP, "d_w", d_w)?;
        others.push(("d_w", d_w));
    }
    match heads.device(OP, d_qkv_tc, &others)? {
        Device::Cpu => cpu::backward(d_qkv_tc, d_w, saved, dims, inputs),
        Device::Cuda(cuda) => cuda::backward(cuda, d_qkv_tc, d_w, saved, dims, inputs)?,
    }
    Ok(())
}

/// Forward's outputs, or their gradients with the rstd: what has the shapes of heads.
struct Heads<'a> {
    q_tgk: &'a Tensor,
    k_tgk: &'a Tensor,
    v_thv: &'a Tensor,
    q_rstd_tg: &'a Tensor,
    k_rstd_tg: &'a Tensor,
}

impl Heads<'_> {
    /// Where `first`, these and `others` all lie.
    fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        let heads = [
            ("q_tgk", self.q_tgk),
            ("k_tgk", self.k_tgk),
            ("v_thv", self.v_thv),
            ("q_rstd_tg", self.q_rstd_tg),
            ("k_rstd_tg", self.k_rstd_tg),
        ];
        check::device(op, first, &heads)?;
        check::device(op, first, others)
    }
}

impl<'a> Inputs<'a> {
    fn tensors(&self) -> [(&'static str, &'a Tensor); 2] {
        [("qkv_tc", self.qkv_tc), ("w", self.w)]
    }
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    t: usize,
    /// Key heads, and their width.
    g: usize,
    k: usize,
    /// Value heads, and their width.
    h: usize,
    v: usize,
}

impl Dims {
    fn new(op: &'static str, heads: &Heads, inputs: &Inputs) -> Result<Dims> {
        let [t, g, k] = check::dims(op, "q_tgk", heads.q_tgk, "[T,G,K]")?;
        let [v_t, h, v] = check::dims(op, "v_thv", heads.v_thv, "[T,H,V]")?;
        let c = 2 * g * k + h * v;
        check::shape(op, "k_tgk", heads.k_tgk, &[t, g, k])?;
        check::len(op, "v_thv", v_t, t)?;
        for (arg, rstd) in [
            ("q_rstd_tg", heads.q_rstd_tg),
            ("k_rstd_tg", heads.k_rstd_tg),
        ] {
            check::shape(op, arg, rstd, &[t, g])?;
            check::f32(op, arg, rstd)?;
        }
        check::shape(op, "qkv_tc", inputs.qkv_tc, &[t, c])?;
        check::shape(op, "w", inputs.w, &[c, 1, 4])?;
        check::cu_seqlens(op, inputs.cu_seqlens, t)?;
        Ok(Dims { t, g, k, h, v })
    }
}

/// Bytes of scratch that [`backward`] takes on a GPU for the shape [T,H,G,K,V].
pub fn backward_scratch_bytes(gpu: DeviceProperties, [t, h, g, k, v]: [usize; 5]) -> usize {
    cuda::scratch_bytes(gpu, Dims { t, g, k, h, v })
}
