//! Gated softmax attention with grouped keys and values: the mixer of every fourth layer.
// T tokens (packed), D hidden, H query heads, G key:value heads, N head dim, S cached positions, B sequences.

use kernel::ops::{Write, attention, rms_norm, rope, sigmoid_gate, split};
use kernel::{DType, Device, Tensor};

use crate::config::Config;
use crate::parameter::Gradients;
use crate::{Result, rows};

use super::arena::arena;
use super::pass::{Backward, Branch, BranchBackward, Pass};
use super::weights::weights;

weights! {
    /// The projections, and the norms of queries and keys.
    Weights(c) {
        /// [N], scales by 1 + w
        k_norm: Plain "self_attn.k_norm.weight" [c.head_dim] Zero,
        /// [G·N,D]
        k_proj: QuantizedLinear "self_attn.k_proj.weight" [c.key_width(), c.hidden_size] Normal,
        /// [D,H·N]
        o_proj: QuantizedLinear "self_attn.o_proj.weight" [c.hidden_size, c.query_width()] Normal,
        /// [N], scales by 1 + w
        q_norm: Plain "self_attn.q_norm.weight" [c.head_dim] Zero,
        /// [H·2N,D], for each head N rows of query, then N rows of output gate
        q_proj: QuantizedLinear "self_attn.q_proj.weight" [2 * c.query_width(), c.hidden_size] Normal,
        /// [G·N,D]
        v_proj: QuantizedLinear "self_attn.v_proj.weight" [c.key_width(), c.hidden_size] Normal,
    }
}

arena! {
    /// What backward needs.
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
    /// What costs no matrix product.
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
    /// Gradients of activations.
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

    /// Makes room for `n_rows` rows, keeping the first `used`.
    pub fn reserve(&mut self, used: usize, n_rows: usize) -> Result<()> {
        reserve(&mut self.k_sgn, used, n_rows)?;
        reserve(&mut self.v_sgn, used, n_rows)
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
    /// No token sees another document.
    pub fn forward(
        &self,
        branch: Branch,
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. project
        self.project(saved, scratch, branch.x_td, pass)?;
        // 2. normalise and rotate
        self.rotate(saved, scratch, pass)?;
        // 3. attend
        let inputs = attention::Inputs {
            q_thn: &scratch.q_thn,
            k_tgn: &scratch.k_tgn,
            v_tgn: &saved.v_tgn,
            cu_seqlens: pass.cu_seqlens,
            scale: softmax_scale(&scratch.q_thn),
        };
        attention::forward(&mut saved.mixed_thn, &mut saved.lse_th, &inputs)?;
        // 4. gate
        sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        // 5. project back
        self.o_proj
            .forward_onto(branch.out_td, branch.in_td, &scratch.gated_thn, pass.lora)
    }

    /// The gradient of the input assigned, those of weights added up.
    pub fn backward(
        &self,
        branch: BranchBackward,
        gradient: &mut Gradient,
        saved: &mut Saved,
        scratch: &mut Scratch,
        backward: &mut Backward,
    ) -> Result<()> {
        let BranchBackward {
            d_x_td,
            d_out_td,
            x_td,
        } = branch;
        let Backward {
            pass,
            grads,
            has_scratch,
        } = backward;
        // 5. project back
        if !*has_scratch {
            sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        }
        self.o_proj.backward(
            &mut gradient.d_gated_thn,
            grads,
            d_out_td,
            &scratch.gated_thn,
            pass.lora,
            Write::Assign,
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
        if !*has_scratch {
            self.rotate(saved, scratch, pass)?;
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
                cu_seqlens: pass.cu_seqlens,
                scale: softmax_scale(&scratch.q_thn),
            },
        )?;
        // 2. normalise and rotate
        self.rotate_backward(grads, gradient, saved, pass)?;
        // 1. project
        split::query_gate_backward(
            &mut gradient.d_qg_th2n,
            &gradient.d_raw_q_thn,
            &gradient.d_gate_thn,
        )?;
        for (linear, d_y, write) in [
            (&self.q_proj, &gradient.d_qg_th2n, Write::Assign),
            (&self.k_proj, &gradient.d_raw_k_tgn, Write::Accumulate),
            (&self.v_proj, &gradient.d_v_tgn, Write::Accumulate),
        ] {
            linear.backward(d_x_td, grads, d_y, x_td, pass.lora, write)?;
        }
        Ok(())
    }

    /// New tokens after what the caches hold: T of one sequence, or one of each of B.
    pub fn step(
        &self,
        branch: Branch,
        states: &mut [&mut State],
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. project
        self.project(saved, scratch, branch.x_td, pass)?;
        // 2. normalise and rotate
        self.rotate(saved, scratch, pass)?;
        // 3. attend
        attend_step(states, saved, scratch, pass.positions_t)?;
        // 4. gate
        sigmoid_gate::forward(&mut scratch.gated_thn, &saved.mixed_thn, &saved.gate_thn)?;
        // 5. project back
        self.o_proj
            .forward_onto(branch.out_td, branch.in_td, &scratch.gated_thn, pass.lora)
    }

    fn project(
        &self,
        saved: &mut Saved,
        scratch: &mut Scratch,
        x_td: &Tensor,
        pass: &mut Pass,
    ) -> Result<()> {
        self.q_proj.forward(&mut scratch.qg_th2n, x_td, pass.lora)?;
        split::query_gate(&mut saved.raw_q_thn, &mut saved.gate_thn, &scratch.qg_th2n)?;
        self.k_proj.forward(&mut saved.raw_k_tgn, x_td, pass.lora)?;
        self.v_proj.forward(&mut saved.v_tgn, x_td, pass.lora)
    }

    fn rotate(&self, saved: &mut Saved, scratch: &mut Scratch, pass: &Pass) -> Result<()> {
        rms_norm::forward(
            &mut scratch.q_thn,
            &mut saved.q_rstd_th,
            &saved.raw_q_thn,
            &self.q_norm.tensor,
            pass.eps,
        )?;
        rms_norm::forward(
            &mut scratch.k_tgn,
            &mut saved.k_rstd_tg,
            &saved.raw_k_tgn,
            &self.k_norm.tensor,
            pass.eps,
        )?;
        rope::forward(&mut scratch.q_thn, pass.rotation, pass.positions_t)?;
        rope::forward(&mut scratch.k_tgn, pass.rotation, pass.positions_t)?;
        Ok(())
    }

    fn rotate_backward(
        &self,
        grads: &mut Gradients,
        gradient: &mut Gradient,
        saved: &Saved,
        pass: &Pass,
    ) -> Result<()> {
        rope::backward(&mut gradient.d_k_tgn, pass.rotation, pass.positions_t)?;
        rope::backward(&mut gradient.d_q_thn, pass.rotation, pass.positions_t)?;
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

fn attend_step(
    states: &mut [&mut State],
    saved: &mut Saved,
    scratch: &Scratch,
    positions_t: &[u32],
) -> Result<()> {
    let scale = softmax_scale(&scratch.q_thn);
    let [n_tokens, n_heads, head_dim] = [0, 1, 2].map(|axis| scratch.q_thn.shape()[axis]);
    if let [state] = states {
        let past = positions_t[0] as usize;
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
        let past = positions_t[row] as usize;
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
