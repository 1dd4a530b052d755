//! Gated delta rule over packed documents, in chunks, so that nearly all work is matrix products; the recurrence it equals:
//! S_t = exp(g_t) S_{t-1} + k_t d_tᵀ, d_t = beta_t (v_t - exp(g_t) S_{t-1}ᵀ k_t), out_t = S_tᵀ q_t, S = 0 at each document's start.
//!
//! Source: arXiv 2412.06464 (rule), arXiv 2406.06484 (chunked form), transformers 5.17 `torch_chunk_gated_delta_rule` (conventions).
//! Derivation of both passes, and of how the gradient of g keeps its relative precision: docs/gated_delta_rule.md.

// T tokens (packed), H value heads, G key heads (H a multiple of G), K key dim, V value dim, C tokens of a chunk (64, fewer at a document's end).

mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::check;
use crate::cpu::documents;
use crate::{DType, Device, Result, Tensor};

/// Tokens handled together; states exist at chunk borders only.
pub const CHUNK: usize = 64;

/// What both passes read. Value head h reads key head h·G/H; q and k come normalised and q scaled; g <= 0 is the log of the decay.
/// Any storage, arithmetic f32.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries [T,G,K].
    pub q_tgk: &'a Tensor,
    /// Keys [T,G,K].
    pub k_tgk: &'a Tensor,
    /// Values [T,H,V].
    pub v_thv: &'a Tensor,
    /// Natural log of the decay [T,H] f32.
    pub g_th: &'a Tensor,
    /// How much of a value is written [T,H] f32.
    pub beta_th: &'a Tensor,
}

/// The gradients of [`Inputs`], all assigned.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// [T,G,K]
    pub d_q_tgk: &'a mut Tensor,
    /// [T,G,K]
    pub d_k_tgk: &'a mut Tensor,
    /// [T,H,V]
    pub d_v_thv: &'a mut Tensor,
    /// [T,H] f32
    pub d_g_th: &'a mut Tensor,
    /// [T,H] f32
    pub d_beta_th: &'a mut Tensor,
}

/// `out` [T,H,V] assigned.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or `cu_seqlens` does not rise from 0 to T;
/// [`crate::Error::DType`] where g or beta is not f32.
pub fn forward(out_thv: &mut Tensor, inputs: &Inputs, cu_seqlens: &[u32]) -> Result<()> {
    const OP: &str = "gated_delta_rule::forward";
    let dims = inputs.check(OP)?;
    check::shape(OP, "out_thv", out_thv, inputs.v_thv.shape())?;
    check::cu_seqlens(OP, cu_seqlens, dims.t)?;
    match inputs.device(OP, out_thv, &[])? {
        Device::Cpu => cpu::forward(out_thv, None, inputs, &documents(cu_seqlens)),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, None, inputs, cu_seqlens)?,
    }
    Ok(())
}

/// All five gradients assigned, from d_out_thv [T,H,V]. Chunk states are recomputed, not saved by the forward pass.
///
/// Scratch per thread: one f32 state and one [C,V] block for each chunk of a document and each value head of a key head.
///
/// # Errors
/// As [`forward`]; [`crate::Error::DType`] where d_g or d_beta is not f32.
pub fn backward(
    gradients: Gradients,
    d_out_thv: &Tensor,
    inputs: &Inputs,
    cu_seqlens: &[u32],
) -> Result<()> {
    const OP: &str = "gated_delta_rule::backward";
    let dims = inputs.check(OP)?;
    let others = [
        ("d_q_tgk", &*gradients.d_q_tgk, inputs.q_tgk),
        ("d_k_tgk", &*gradients.d_k_tgk, inputs.k_tgk),
        ("d_v_thv", &*gradients.d_v_thv, inputs.v_thv),
        ("d_out_thv", d_out_thv, inputs.v_thv),
        ("d_g_th", &*gradients.d_g_th, inputs.g_th),
        ("d_beta_th", &*gradients.d_beta_th, inputs.g_th),
    ];
    for (arg, tensor, like) in others {
        check::shape(OP, arg, tensor, like.shape())?;
    }
    check::f32(OP, "d_g_th", gradients.d_g_th)?;
    check::f32(OP, "d_beta_th", gradients.d_beta_th)?;
    check::cu_seqlens(OP, cu_seqlens, dims.t)?;
    let others = others.map(|(arg, tensor, _)| (arg, tensor));
    match inputs.device(OP, gradients.d_q_tgk, &others)? {
        Device::Cpu => cpu::backward(gradients, d_out_thv, inputs, &documents(cu_seqlens)),
        Device::Cuda(cuda) => cuda::backward(cuda, gradients, d_out_thv, inputs, cu_seqlens)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`forward`] and [`backward`] take on a GPU, whatever documents the `shape` [T,H,G,K,V] is packed from.
pub fn scratch_bytes([t, h, g, k, v]: [usize; 5], dtype: DType) -> usize {
    cuda::scratch_bytes(Dims { t, h, g, k, v }, dtype)
}

/// T tokens of one sequence from `state_hkv` [H,K,V] f32, which is updated to the state after them; `out` [T,H,V] assigned.
/// Feeding a sequence in pieces gives the outputs of the whole up to f32 rounding.
///
/// # Errors
/// As [`forward`]; also where `state_hkv` is not [H,K,V] f32.
pub fn forward_with_state(
    out_thv: &mut Tensor,
    state_hkv: &mut Tensor,
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "gated_delta_rule::forward_with_state";
    let Dims { t, h, k, v, .. } = inputs.check(OP)?;
    check::shape(OP, "out_thv", out_thv, inputs.v_thv.shape())?;
    check::shape(OP, "state_hkv", state_hkv, &[h, k, v])?;
    check::f32(OP, "state_hkv", state_hkv)?;
    let cu_seqlens = [0, t as u32];
    match inputs.device(OP, out_thv, &[("state_hkv", &*state_hkv)])? {
        Device::Cpu => cpu::forward(out_thv, Some(state_hkv), inputs, &documents(&cu_seqlens)),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, Some(state_hkv), inputs, &cu_seqlens)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub t: usize,
    /// Value heads.
    pub h: usize,
    /// Key heads.
    pub g: usize,
    pub k: usize,
    pub v: usize,
}

impl Dims {
    /// Value heads that read one key head.
    fn ratio(&self) -> usize {
        self.h / self.g
    }
}

impl Inputs<'_> {
    /// The dims, once the shapes are known to agree.
    pub(super) fn check(&self, op: &'static str) -> Result<Dims> {
        let [t, h, v] = check::dims(op, "v_thv", self.v_thv, "[T,H,V]")?;
        let [_, g, k] = check::dims(op, "q_tgk", self.q_tgk, "[T,G,K]")?;
        if h * g * k * v == 0 || h % g != 0 {
            let expected = format!("[T,H,V] with H, V > 0 and H a multiple of {g} key heads");
            return Err(check::shape_error(op, "v_thv", self.v_thv, expected));
        }
        check::shape(op, "q_tgk", self.q_tgk, &[t, g, k])?;
        check::shape(op, "k_tgk", self.k_tgk, &[t, g, k])?;
        check::shape(op, "g_th", self.g_th, &[t, h])?;
        check::shape(op, "beta_th", self.beta_th, &[t, h])?;
        check::f32(op, "g_th", self.g_th)?;
        check::f32(op, "beta_th", self.beta_th)?;
        Ok(Dims { t, h, g, k, v })
    }

    /// Of shapes that were checked.
    pub(super) fn dims(&self) -> Dims {
        let (keys, values) = (self.q_tgk.shape(), self.v_thv.shape());
        Dims {
            t: values[0],
            h: values[1],
            g: keys[1],
            k: keys[2],
            v: values[2],
        }
    }

    /// Where `first`, the inputs and `others` all lie.
    pub(super) fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        check::device(op, first, others)?;
        let inputs = [
            ("q_tgk", self.q_tgk),
            ("k_tgk", self.k_tgk),
            ("v_thv", self.v_thv),
            ("g_th", self.g_th),
            ("beta_th", self.beta_th),
        ];
        check::device(op, first, &inputs)
    }
}
