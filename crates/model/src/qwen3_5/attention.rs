//! Gated softmax attention with grouped keys and values: the mixer of every fourth layer.
// T tokens (packed), D hidden, H query heads, G key:value heads, N head dim, S cached positions, B sequences.

use kernel::ops::rope::Rotation;
use kernel::ops::{attention, rms_norm, rope, sigmoid_gate, split};
use kernel::{DType, Device, Tensor};

use crate::config::Config;
use crate::linear::Linear;
use crate::parameter::{Gradients, Parameter};
use crate::{Result, lora, rows};

use super::saved::arena;

#[derive(Debug)]
pub(crate) struct Weights {
    /// [H·2N,D], for each head N rows of query, then N rows of output gate
    pub q_proj: Linear,
    /// [G·N,D]
    pub k_proj: Linear,
    /// [G·N,D]
    pub v_proj: Linear,
    /// [N], scales by 1 + w
    pub q_norm: Parameter,
    /// [N], scales by 1 + w
    pub k_norm: Parameter,
    /// [D,H·N]
    pub o_proj: Linear,
}

arena! {
    Saved(c, t) {
        /// Queries before norm and rotation [T,H,N].
        raw_q_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,H,N]
        gate_thn: act [t, c.num_attention_heads, c.head_dim],
        /// Keys before norm and rotation [T,G,N].
        raw_k_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// [T,G,N]
        v_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// [T,H]
        q_rstd_th: f32 [t, c.num_attention_heads],
        /// [T,G]
        k_rstd_tg: f32 [t, c.num_key_value_heads],
        /// Output of attention [T,H,N].
        mixed_thn: act [t, c.num_attention_heads, c.head_dim],
        /// Its log-sum-exp [T,H].
        lse_th: f32 [t, c.num_attention_heads],
    }
}

arena! {
    Scratch(c, t) {
        /// [T,H,2N]
        qg_th2n: act [t, c.num_attention_heads, 2 * c.head_dim],
        /// Normalised and rotated [T,H,N].
        q_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,G,N]
        k_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// mixed · sigmoid(gate) [T,H,N]
        gated_thn: act [t, c.num_attention_heads, c.head_dim],
    }
}

arena! {
    Gradient(c, t) {
        /// [T,H,N]
        d_gated_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,H,N]
        d_mixed_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,H,N]
        d_gate_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,H,N]
        d_q_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,G,N]
        d_k_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// [T,G,N]
        d_v_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// [T,H,N]
        d_raw_q_thn: act [t, c.num_attention_heads, c.head_dim],
        /// [T,G,N]
        d_raw_k_tgn: act [t, c.num_key_value_heads, c.head_dim],
        /// [T,H,2N]
        d_qg_th2n: act [t, c.num_attention_heads, 2 * c.head_dim],
    }
}

/// Keys and values of one sequence's tokens so far.
#[derive(Debug)]
pub(crate) struct State {
    /// Rotated keys [S,G,N]; rows beyond the sequence's position are spare.
    pub k_sgn: Tensor,
    /// [S,G,N]
    pub v_sgn: Tensor,
}

impl State {
    pub fn new(config: &Config, dtype: DType, device: Device) -> Self {
        let empty = || {
            let mut cache = Tensor::empty_on(device, dtype);
            cache.reshape(&[0, config.num_key_value_heads, config.head_dim]);
            cache
        };
        State {
            k_sgn: empty(),
            v_sgn: empty(),
        }
    }

    pub fn snapshot(&self) -> Result<Self> {
        Ok(State {
            k_sgn: self.k_sgn.to_device(self.k_sgn.device())?,
            v_sgn: self.v_sgn.to_device(self.v_sgn.device())?,
        })
    }

    pub fn bytes(&self) -> usize {
        self.k_sgn.bytes() + self.v_sgn.bytes()
    }

    /// Writes rows `past..past + n` from rows `first..` of the new keys and values.
    fn append(
        &mut self,
        past: usize,
        k_tgn: &Tensor,
        v_tgn: &Tensor,
        first: usize,
        n: usize,
    ) -> Result<()> {
        let row = k_tgn.shape()[1] * k_tgn.shape()[2];
        for (cache, new) in [(&mut self.k_sgn, k_tgn), (&mut self.v_sgn, v_tgn)] {
            reserve(cache, past, past + n)?;
            rows::copy_rows(cache, past, new, first, n, row)?;
        }
        Ok(())
    }
}

impl Weights {
    pub fn zeros(config: &Config, dtype: DType) -> Self {
        let hidden = config.hidden_size;
        let query_width = config.num_attention_heads * config.head_dim;
        let key_width = config.num_key_value_heads * config.head_dim;
        Weights {
            q_proj: Linear::zeros(2 * query_width, hidden, dtype),
            k_proj: Linear::zeros(key_width, hidden, dtype),
            v_proj: Linear::zeros(key_width, hidden, dtype),
            q_norm: Parameter::zeros(&[config.head_dim], dtype),
            k_norm: Parameter::zeros(&[config.head_dim], dtype),
            o_proj: Linear::zeros(hidden, query_width, dtype),
        }
    }

    /// out_td = in_td + what this gives; no token sees another document.
    pub fn forward(
        &self,
        out_td: &mut Tensor,
        in_td: &Tensor,
        saved: &mut Saved,
        scratch: &mut Scratch,
        x_td: &Tensor,
        cu_seqlens: &[u32],
        place: &Place,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 1. project
        self.project(saved, scratch, x_td, lora)?;
        // 2. normalise and rotate
        self.rotate(saved, scratch, place)?;
        // 3. attend
        let inputs = attention::Inputs {
            q_thn: &scratch.q_thn,
            k_tgn: &scratch.k_tgn,
            v_tgn: &saved.v_tgn,
            cu_seqlens,
            scale: softmax_scale(&scratch.q_thn),
        };
        attention::forward(&mut saved.mixed_thn, &mut saved.lse_th, &inputs)?;
        // 4. gate
        sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        // 5. project back
        self.o_proj
            .forward_onto(out_td, in_td, &scratch.gated_thn, lora)
    }

    /// d_x_td assigned. `kept`: the scratch is as the forward pass left it.
    pub fn backward(
        &self,
        d_x_td: &mut Tensor,
        grads: &mut Gradients,
        gradient: &mut Gradient,
        d_out_td: &Tensor,
        saved: &mut Saved,
        scratch: &mut Scratch,
        kept: bool,
        x_td: &Tensor,
        cu_seqlens: &[u32],
        place: &Place,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 5. project back
        if !kept {
            sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        }
        self.o_proj.backward(
            &mut gradient.d_gated_thn,
            grads,
            d_out_td,
            &scratch.gated_thn,
            lora,
        )?;
        // 4. gate
        sigmoid_gate::backward(
            &mut gradient.d_mixed_thn,
            &mut gradient.d_gate_thn,
            &gradient.d_gated_thn,
            &saved.mixed_thn,
            &saved.gate_thn,
        )?;
        // 3. attend
        if !kept {
            self.rotate(saved, scratch, place)?;
        }
        attention::backward(
            attention::Gradients {
                d_q_thn: &mut gradient.d_q_thn,
                d_k_tgn: &mut gradient.d_k_tgn,
                d_v_tgn: &mut gradient.d_v_tgn,
            },
            &attention::Saved {
                d_out_thn: &gradient.d_mixed_thn,
                out_thn: &saved.mixed_thn,
                lse_th: &saved.lse_th,
            },
            &attention::Inputs {
                q_thn: &scratch.q_thn,
                k_tgn: &scratch.k_tgn,
                v_tgn: &saved.v_tgn,
                cu_seqlens,
                scale: softmax_scale(&scratch.q_thn),
            },
        )?;
        // 2. normalise and rotate
        self.rotate_backward(grads, gradient, saved, place)?;
        // 1. project
        split::query_gate_backward(
            &mut gradient.d_qg_th2n,
            &gradient.d_raw_q_thn,
            &gradient.d_gate_thn,
        )?;
        self.q_proj
            .backward(d_x_td, grads, &gradient.d_qg_th2n, x_td, lora)?;
        self.k_proj
            .backward_residual(d_x_td, grads, &gradient.d_raw_k_tgn, x_td, lora)?;
        self.v_proj
            .backward_residual(d_x_td, grads, &gradient.d_v_tgn, x_td, lora)
    }

    /// New tokens after what the caches hold: T of one sequence, or one of each of B. out_td = in_td + what this gives.
    pub fn step(
        &self,
        out_td: &mut Tensor,
        in_td: &Tensor,
        states: &mut [&mut State],
        saved: &mut Saved,
        scratch: &mut Scratch,
        x_td: &Tensor,
        place: &Place,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 1. project
        self.project(saved, scratch, x_td, lora)?;
        // 2. normalise and rotate
        self.rotate(saved, scratch, place)?;
        // 3. attend
        attend_step(states, saved, scratch, place)?;
        // 4. gate
        sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        // 5. project back
        self.o_proj
            .forward_onto(out_td, in_td, &scratch.gated_thn, lora)
    }

    fn project(
        &self,
        saved: &mut Saved,
        scratch: &mut Scratch,
        x_td: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        self.q_proj.forward(&mut scratch.qg_th2n, x_td, lora)?;
        split::query_gate(&mut saved.raw_q_thn, &mut saved.gate_thn, &scratch.qg_th2n)?;
        self.k_proj.forward(&mut saved.raw_k_tgn, x_td, lora)?;
        self.v_proj.forward(&mut saved.v_tgn, x_td, lora)
    }

    fn rotate(&self, saved: &mut Saved, scratch: &mut Scratch, place: &Place) -> Result<()> {
        rms_norm::forward(
            &mut scratch.q_thn,
            &mut saved.q_rstd_th,
            &saved.raw_q_thn,
            &self.q_norm.tensor,
            place.eps,
        )?;
        rms_norm::forward(
            &mut scratch.k_tgn,
            &mut saved.k_rstd_tg,
            &saved.raw_k_tgn,
            &self.k_norm.tensor,
            place.eps,
        )?;
        rope::forward(&mut scratch.q_thn, place.rotation, place.positions_t)?;
        rope::forward(&mut scratch.k_tgn, place.rotation, place.positions_t)?;
        Ok(())
    }

    fn rotate_backward(
        &self,
        grads: &mut Gradients,
        gradient: &mut Gradient,
        saved: &Saved,
        place: &Place,
    ) -> Result<()> {
        rope::backward(&mut gradient.d_k_tgn, place.rotation, place.positions_t)?;
        rope::backward(&mut gradient.d_q_thn, place.rotation, place.positions_t)?;
        rms_norm::backward(
            &mut gradient.d_raw_k_tgn,
            grads.of(&self.k_norm),
            &gradient.d_k_tgn,
            &saved.raw_k_tgn,
            &self.k_norm.tensor,
            &saved.k_rstd_tg,
        )?;
        rms_norm::backward(
            &mut gradient.d_raw_q_thn,
            grads.of(&self.q_norm),
            &gradient.d_q_thn,
            &saved.raw_q_thn,
            &self.q_norm.tensor,
            &saved.q_rstd_th,
        )?;
        Ok(())
    }
}

/// Where the tokens stand, and how a position turns a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub positions_t: &'a [u32],
    pub rotation: &'a Rotation,
    pub eps: f32,
}

fn attend_step(
    states: &mut [&mut State],
    saved: &mut Saved,
    scratch: &Scratch,
    place: &Place,
) -> Result<()> {
    let scale = softmax_scale(&scratch.q_thn);
    let [n_tokens, n_heads, head_dim] = [0, 1, 2].map(|axis| scratch.q_thn.shape()[axis]);
    if let [state] = states {
        let past = place.positions_t[0] as usize;
        state.append(past, &scratch.k_tgn, &saved.v_tgn, 0, n_tokens)?;
        attention::forward_cached(
            &mut saved.mixed_thn,
            &scratch.q_thn,
            &state.k_sgn,
            &state.v_sgn,
            past,
            scale,
        )?;
        return Ok(());
    }
    let device = scratch.q_thn.device();
    let shape = [1, n_heads, head_dim];
    let mut q_1hn = Tensor::zeros_on(&shape, scratch.q_thn.dtype(), device)?;
    let mut out_1hn = Tensor::zeros_on(&shape, saved.mixed_thn.dtype(), device)?;
    let row_len = n_heads * head_dim;
    for (row, state) in states.iter_mut().enumerate() {
        let past = place.positions_t[row] as usize;
        state.append(past, &scratch.k_tgn, &saved.v_tgn, row, 1)?;
        rows::copy_rows(&mut q_1hn, 0, &scratch.q_thn, row, 1, row_len)?;
        attention::forward_cached(
            &mut out_1hn,
            &q_1hn,
            &state.k_sgn,
            &state.v_sgn,
            past,
            scale,
        )?;
        rows::copy_rows(&mut saved.mixed_thn, row, &out_1hn, 0, 1, row_len)?;
    }
    Ok(())
}

/// Makes room for `needed` rows, doubling, and keeps the first `used`.
fn reserve(cache_sgn: &mut Tensor, used: usize, needed: usize) -> Result<()> {
    const FIRST_ROWS: usize = 64;
    let [n_rows, n_heads, head_dim] = [0, 1, 2].map(|axis| cache_sgn.shape()[axis]);
    if needed <= n_rows {
        return Ok(());
    }
    let n_rows = needed.max(2 * n_rows).max(FIRST_ROWS);
    let shape = [n_rows, n_heads, head_dim];
    let mut larger = Tensor::zeros_on(&shape, cache_sgn.dtype(), cache_sgn.device())?;
    rows::copy_rows(&mut larger, 0, cache_sgn, 0, used, n_heads * head_dim)?;
    *cache_sgn = larger;
    Ok(())
}

/// N^-1/2
fn softmax_scale(q_thn: &Tensor) -> f32 {
    1.0 / (q_thn.shape()[2] as f32).sqrt()
}
