//! Causal softmax attention with grouped key:value heads, over packed documents or over a cache; memory grows with T, not T².
//!
//! out_t = Σ_{s<=t} p_ts v_s, p_ts = exp(scale q_t·k_s - lse_t), lse_t = ln Σ_{s<=t} exp(scale q_t·k_s), s and t in one document.
//! Source: arXiv 2205.14135 (tiles with a running maximum), arXiv 2307.08691 (backward from lse); transformers 5.17 (conventions).

// T tokens (packed), H query heads, G key:value heads (H a multiple of G), N head dim, S cached positions.

mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::check;
use crate::cpu::documents;
use crate::cuda::DeviceProperties;
use crate::{Device, Result, Tensor};

/// What both passes over packed documents read. Query head h reads key:value head h·G/H.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries [T,H,N].
    pub q_thn: &'a Tensor,
    /// Keys [T,G,N].
    pub k_tgn: &'a Tensor,
    /// Values [T,G,N].
    pub v_tgn: &'a Tensor,
    /// Document boundaries: n_docs + 1 offsets, from 0 to T.
    pub cu_seqlens: &'a [u32],
    /// What scores are multiplied by before the softmax.
    pub scale: f32,
}

/// What [`forward`] gave, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// [T,H,N]
    pub d_out_thn: &'a Tensor,
    /// [T,H,N]
    pub out_thn: &'a Tensor,
    /// [T,H] f32
    pub lse_th: &'a Tensor,
}

/// The gradients of [`Inputs`], all assigned.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// [T,H,N]
    pub d_q_thn: &'a mut Tensor,
    /// [T,G,N]
    pub d_k_tgn: &'a mut Tensor,
    /// [T,G,N]
    pub d_v_tgn: &'a mut Tensor,
}

/// `out` [T,H,N] and `lse` [T,H] f32 assigned; lse is the natural log that [`backward`] needs.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or `cu_seqlens` does not rise from 0 to T;
/// [`crate::Error::DType`] where lse is not f32.
pub fn forward(out_thn: &mut Tensor, lse_th: &mut Tensor, inputs: &Inputs) -> Result<()> {
    const OP: &str = "attention::forward";
    let dims = inputs.check(OP)?;
    let Dims { t, h, n, .. } = dims;
    check::shape(OP, "out_thn", out_thn, &[t, h, n])?;
    check::shape(OP, "lse_th", lse_th, &[t, h])?;
    check::f32(OP, "lse_th", lse_th)?;
    let documents = documents(inputs.cu_seqlens);
    let sequences = inputs.sequences(dims);
    match inputs.device(OP, out_thn, &[("lse_th", &*lse_th)])? {
        Device::Cpu => cpu::forward(out_thn, Some(lse_th), &sequences, &documents, 0),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thn, lse_th, &sequences, &documents)?,
    }
    Ok(())
}

/// d_q, d_k, d_v assigned; the probabilities are recomputed from `lse`.
///
/// # Errors
/// As [`forward`].
pub fn backward(gradients: Gradients, saved: &Saved, inputs: &Inputs) -> Result<()> {
    backward_within(gradients, saved, inputs, None)
}

/// Most bytes of scratch that [`backward`] takes on a GPU, whatever documents of at most `longest` tokens the `shape` [T,H,G,N] is
/// packed from.
pub fn backward_scratch_bytes(
    gpu: DeviceProperties,
    [t, h, g, n]: [usize; 4],
    longest: usize,
) -> usize {
    cuda::scratch_bytes(gpu, Dims { t, h, g, n }, longest)
}

/// [`backward`] with at most about so many bytes of score gradients kept at a time on a GPU; none: a part of its memory.
pub(crate) fn backward_within(
    gradients: Gradients,
    saved: &Saved,
    inputs: &Inputs,
    score_bytes: Option<usize>,
) -> Result<()> {
    const OP: &str = "attention::backward";
    let dims = inputs.check(OP)?;
    let others = [
        ("d_q_thn", &*gradients.d_q_thn, inputs.q_thn),
        ("d_k_tgn", &*gradients.d_k_tgn, inputs.k_tgn),
        ("d_v_tgn", &*gradients.d_v_tgn, inputs.v_tgn),
        ("d_out_thn", saved.d_out_thn, inputs.q_thn),
        ("out_thn", saved.out_thn, inputs.q_thn),
    ];
    for (arg, tensor, like) in others {
        check::shape(OP, arg, tensor, like.shape())?;
    }
    check::shape(OP, "lse_th", saved.lse_th, &[dims.t, dims.h])?;
    check::f32(OP, "lse_th", saved.lse_th)?;
    let others = others.map(|(arg, tensor, _)| (arg, tensor));
    inputs.device(OP, gradients.d_q_thn, &[("lse_th", saved.lse_th)])?;
    let device = inputs.device(OP, gradients.d_q_thn, &others)?;
    let documents = documents(inputs.cu_seqlens);
    let sequences = inputs.sequences(dims);
    match device {
        Device::Cpu => cpu::backward(gradients, saved, &sequences, &documents),
        Device::Cuda(cuda) => {
            cuda::backward(cuda, gradients, saved, &sequences, &documents, score_bytes)?;
        }
    }
    Ok(())
}

/// T new tokens of one sequence against its cache, which already holds their keys and values: query t sees cache rows
/// 0..=past+t. `out` assigned. Shapes: out_thn, q_thn [T,H,N]; k_sgn, v_sgn [S,G,N] with S >= past + T (later rows are ignored).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or the cache is too short.
pub fn forward_cached(
    out_thn: &mut Tensor,
    q_thn: &Tensor,
    k_sgn: &Tensor,
    v_sgn: &Tensor,
    past: usize,
    scale: f32,
) -> Result<()> {
    const OP: &str = "attention::forward_cached";
    let dims = Dims::new(OP, q_thn, "k_sgn", k_sgn)?;
    let Dims { t, h, g, n } = dims;
    check::shape(OP, "out_thn", out_thn, &[t, h, n])?;
    let s = k_sgn.shape()[0];
    if s < past + t {
        let expected = format!("[S,{g},{n}] with S >= {past} + {t}");
        return Err(check::shape_error(OP, "k_sgn", k_sgn, expected));
    }
    check::shape(OP, "k_sgn", k_sgn, &[s, g, n])?;
    check::shape(OP, "v_sgn", v_sgn, &[s, g, n])?;
    let sequences = Sequences {
        q_thn,
        k_sgn,
        v_sgn,
        dims,
        scale,
    };
    let others = [("q_thn", q_thn), ("k_sgn", k_sgn), ("v_sgn", v_sgn)];
    match check::device(OP, out_thn, &others)? {
        Device::Cpu => cpu::forward(out_thn, None, &sequences, &documents(&[0, t as u32]), past),
        Device::Cuda(cuda) => cuda::forward_cached(cuda, out_thn, &sequences, past)?,
    }
    Ok(())
}

/// Queries with the keys and values they meet, checked: those of the same rows, or those of a cache.
#[derive(Clone, Copy)]
struct Sequences<'a> {
    q_thn: &'a Tensor,
    k_sgn: &'a Tensor,
    v_sgn: &'a Tensor,
    dims: Dims,
    scale: f32,
}

impl<'a> Inputs<'a> {
    /// The dims, once the shapes are known to agree.
    fn check(&self, op: &'static str) -> Result<Dims> {
        let dims = Dims::new(op, self.q_thn, "k_tgn", self.k_tgn)?;
        let Dims { t, g, n, .. } = dims;
        check::shape(op, "k_tgn", self.k_tgn, &[t, g, n])?;
        check::shape(op, "v_tgn", self.v_tgn, &[t, g, n])?;
        check::cu_seqlens(op, self.cu_seqlens, t)?;
        Ok(dims)
    }

    /// Where `first`, the inputs and `others` all lie.
    fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        check::device(op, first, others)?;
        let inputs = [
            ("q_thn", self.q_thn),
            ("k_tgn", self.k_tgn),
            ("v_tgn", self.v_tgn),
        ];
        check::device(op, first, &inputs)
    }

    fn sequences(&self, dims: Dims) -> Sequences<'a> {
        Sequences {
            q_thn: self.q_thn,
            k_sgn: self.k_tgn,
            v_sgn: self.v_tgn,
            dims,
            scale: self.scale,
        }
    }
}

#[derive(Clone, Copy)]
struct Dims {
    t: usize,
    /// Query heads.
    h: usize,
    /// Key:value heads.
    g: usize,
    n: usize,
}

impl Dims {
    fn new(op: &'static str, q_thn: &Tensor, arg: &'static str, keys: &Tensor) -> Result<Self> {
        let [t, h, n] = check::dims(op, "q_thn", q_thn, "[T,H,N]")?;
        let [_, g, _] = check::dims(op, arg, keys, "[tokens,G,N]")?;
        if h * g * n == 0 || h % g != 0 {
            let expected = format!("[T,H,N] with H, N > 0 and H a multiple of {g} key:value heads");
            return Err(check::shape_error(op, "q_thn", q_thn, expected));
        }
        Ok(Dims { t, h, g, n })
    }

    /// Query heads that read one key:value head.
    fn ratio(&self) -> usize {
        self.h / self.g
    }
}
