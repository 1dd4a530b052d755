//! The gated delta net: the mixer of three layers in four, with a state of fixed size instead of a cache.
// T tokens (packed), D hidden, G key heads, K key dim, H value heads, V value dim, C conv channels = 2·G·K + H·V, B sequences.

use kernel::ops::{
    Write, causal_conv1d, delta_gate, delta_inputs, gated_delta_rule, gated_delta_step,
    gated_rms_norm, l2_norm, split,
};
use kernel::{DType, Device, Tensor};

use crate::config::{CONV_WIDTH, Config};
use crate::{Result, rows};

use super::arena::arena;
use super::pass::{Backward, Branch, BranchBackward, Pass};
use super::weights::weights;

/// Added to the sum of squares of each query and key head, as upstream has it.
pub(super) const L2_EPS: f32 = 1e-6;

weights! {
    /// The projections, the convolution, the decay and the gated norm.
    Weights(c) {
        /// [H] f32
        a_log: PlainF32 "linear_attn.A_log" [c.linear_num_value_heads] ALog,
        /// [C,1,4]
        conv1d: Plain "linear_attn.conv1d.weight" [c.conv_channels(), 1, CONV_WIDTH] Convolution,
        /// [H]
        dt_bias: Plain "linear_attn.dt_bias" [c.linear_num_value_heads] One,
        /// [H,D], the decay
        in_proj_a: Linear "linear_attn.in_proj_a.weight" [c.linear_num_value_heads, c.hidden_size] Normal,
        /// [H,D], the strength of writing
        in_proj_b: Linear "linear_attn.in_proj_b.weight" [c.linear_num_value_heads, c.hidden_size] Normal,
        /// [C,D], rows: queries, keys, values
        in_proj_qkv: Linear "linear_attn.in_proj_qkv.weight" [c.conv_channels(), c.hidden_size] Normal,
        /// [H·V,D], the output gate
        in_proj_z: Linear "linear_attn.in_proj_z.weight" [c.value_width(), c.hidden_size] Normal,
        /// [V] f32, multiplies as it is
        norm: PlainF32 "linear_attn.norm.weight" [c.linear_value_head_dim] One,
        /// [D,H·V]
        out_proj: Linear "linear_attn.out_proj.weight" [c.hidden_size, c.value_width()] Normal,
    }
}

arena! {
    /// What backward needs.
    Saved(c, t) {
        /// [T,C], before the convolution
        qkv_tc: act [t, c.conv_channels()],
        /// [T,H,V]
        z_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,H]
        a_th: act [t, c.linear_num_value_heads],
        /// [T,H]
        b_th: act [t, c.linear_num_value_heads],
        /// Logarithm of the decay [T,H].
        g_th: f32 [t, c.linear_num_value_heads],
        /// [T,H]
        beta_th: f32 [t, c.linear_num_value_heads],
        /// Output of the delta rule [T,H,V].
        mixed_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// Its reciprocal norm [T,H].
        mixed_rstd_th: f32 [t, c.linear_num_value_heads],
    }
}

arena! {
    /// What costs no matrix product.
    Scratch(c, t) {
        /// Normalised, times K^-1/2 [T,G,K].
        q_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
        /// [T,G,K]
        k_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
        /// [T,H,V]
        v_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,G]
        q_rstd_tg: f32 [t, c.linear_num_key_heads],
        /// [T,G]
        k_rstd_tg: f32 [t, c.linear_num_key_heads],
        /// Normalised and gated [T,H,V].
        gated_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
    }
}

arena! {
    /// What a step of generation needs besides: there the convolution reads its state.
    StepScratch(c, t) {
        /// silu(conv(qkv)) [T,C]
        conv_tc: act [t, c.conv_channels()],
        /// Queries before the l2 norm [T,G,K].
        raw_q_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
        /// [T,G,K]
        raw_k_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
    }
}

arena! {
    /// Gradients of activations.
    Gradient(c, t) {
        /// [T,H,V]
        d_gated_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,H,V]
        d_mixed_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,H,V]
        d_z_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,G,K]
        d_q_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
        /// [T,G,K]
        d_k_tgk: act [t, c.linear_num_key_heads, c.linear_key_head_dim],
        /// [T,H,V]
        d_v_thv: act [t, c.linear_num_value_heads, c.linear_value_head_dim],
        /// [T,C]
        d_qkv_tc: act [t, c.conv_channels()],
        /// [T,H]
        d_g_th: f32 [t, c.linear_num_value_heads],
        /// [T,H]
        d_beta_th: f32 [t, c.linear_num_value_heads],
        /// [T,H]
        d_a_th: act [t, c.linear_num_value_heads],
        /// [T,H]
        d_b_th: act [t, c.linear_num_value_heads],
    }
}

/// What one sequence carries from token to token, whatever its length.
#[derive(Debug)]
pub(crate) struct State {
    /// The last three inputs of the convolution, oldest first [3,C] f32.
    pub conv_3c: Tensor,
    /// Where a decoder leaves the convolution's inputs after a token, before both change places; no elements before its first one.
    pub next_conv_3c: Tensor,
    /// [H,K,V] f32
    pub state_hkv: Tensor,
}

impl State {
    pub fn new(config: &Config, device: Device) -> Result<Self> {
        let state_shape = [
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        ];
        let conv_shape = [CONV_WIDTH - 1, config.conv_channels()];
        Ok(State {
            conv_3c: Tensor::zeros_on(&conv_shape, DType::F32, device)?,
            next_conv_3c: Tensor::empty_on(device, DType::F32),
            state_hkv: Tensor::zeros_on(&state_shape, DType::F32, device)?,
        })
    }

    pub fn snapshot(&self) -> Result<Self> {
        Ok(State {
            conv_3c: self.conv_3c.to_device(self.conv_3c.device())?,
            next_conv_3c: Tensor::empty_on(self.conv_3c.device(), DType::F32),
            state_hkv: self.state_hkv.to_device(self.state_hkv.device())?,
        })
    }

    pub fn bytes(&self) -> usize {
        self.conv_3c.bytes() + self.next_conv_3c.bytes() + self.state_hkv.bytes()
    }
}

impl Weights {
    /// Nothing crosses a border of documents.
    pub fn forward(
        &self,
        branch: Branch,
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. project
        self.project(saved, branch.x_td, pass)?;
        // 2. convolve
        // 3. split and normalise
        self.inputs(scratch, saved, pass.cu_seqlens)?;
        // 4. gates
        self.gates(saved)?;
        // 5. delta rule
        let inputs = rule_inputs(&saved.g_th, &saved.beta_th, scratch);
        gated_delta_rule::forward(&mut saved.mixed_thv, &inputs, pass.cu_seqlens)?;
        // 6. normalise and gate
        self.gate(saved, scratch, pass.eps)?;
        // 7. project back
        self.out_proj
            .forward_onto(branch.out_td, branch.in_td, &scratch.gated_thv, pass.lora)
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
        // 7. project back
        if !*has_scratch {
            self.gate(saved, scratch, pass.eps)?;
        }
        self.out_proj.backward(
            &mut gradient.d_gated_thv,
            grads,
            d_out_td,
            &scratch.gated_thv,
            pass.lora,
            Write::Assign,
        )?;
        // 6. normalise and gate
        gated_rms_norm::backward(
            gated_rms_norm::Gradients {
                d_x_thv: &mut gradient.d_mixed_thv,
                d_z_thv: &mut gradient.d_z_thv,
                d_w_v: grads.of(&self.norm),
            },
            &gradient.d_gated_thv,
            &gated_rms_norm::Inputs {
                x_thv: &saved.mixed_thv,
                z_thv: &saved.z_thv,
                w_v: &self.norm.tensor,
            },
            &saved.mixed_rstd_th,
        )?;
        // 5. delta rule
        if !*has_scratch {
            self.inputs(scratch, saved, pass.cu_seqlens)?;
        }
        gated_delta_rule::backward(
            gated_delta_rule::Gradients {
                d_q_tgk: &mut gradient.d_q_tgk,
                d_k_tgk: &mut gradient.d_k_tgk,
                d_v_thv: &mut gradient.d_v_thv,
                d_g_th: &mut gradient.d_g_th,
                d_beta_th: &mut gradient.d_beta_th,
            },
            &gradient.d_mixed_thv,
            &rule_inputs(&saved.g_th, &saved.beta_th, scratch),
            pass.cu_seqlens,
        )?;
        // 4. gates
        delta_gate::backward(
            delta_gate::Gradients {
                d_a_th: &mut gradient.d_a_th,
                d_b_th: &mut gradient.d_b_th,
                d_params: grads.of_pair(&self.a_log, &self.dt_bias),
            },
            &gradient.d_g_th,
            &gradient.d_beta_th,
            &delta_gate::Inputs {
                a_th: &saved.a_th,
                b_th: &saved.b_th,
                a_log_h: &self.a_log.tensor,
                dt_bias_h: &self.dt_bias.tensor,
            },
        )?;
        // 3. split and normalise
        // 2. convolve
        delta_inputs::backward(
            &mut gradient.d_qkv_tc,
            grads.of(&self.conv1d),
            &delta_inputs::Saved {
                d_q_tgk: &gradient.d_q_tgk,
                d_k_tgk: &gradient.d_k_tgk,
                d_v_thv: &gradient.d_v_thv,
                q_rstd_tg: &scratch.q_rstd_tg,
                k_rstd_tg: &scratch.k_rstd_tg,
            },
            &delta_inputs::Inputs {
                qkv_tc: &saved.qkv_tc,
                w: &self.conv1d.tensor,
                cu_seqlens: pass.cu_seqlens,
                q_scale: query_scale(&scratch.q_tgk),
            },
        )?;
        // 1. project
        for (linear, d_y, write) in [
            (&self.in_proj_qkv, &gradient.d_qkv_tc, Write::Assign),
            (&self.in_proj_z, &gradient.d_z_thv, Write::Accumulate),
            (&self.in_proj_b, &gradient.d_b_th, Write::Accumulate),
            (&self.in_proj_a, &gradient.d_a_th, Write::Accumulate),
        ] {
            linear.backward(d_x_td, grads, d_y, x_td, pass.lora, write)?;
        }
        Ok(())
    }

    /// New tokens after what the states hold: T of one sequence, or one of each of B.
    pub fn step(
        &self,
        branch: Branch,
        states: &mut [&mut State],
        saved: &mut Saved,
        scratch: &mut Scratch,
        step_scratch: &mut StepScratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. project
        self.project(saved, branch.x_td, pass)?;
        // 2. convolve
        self.convolve_step(states, saved, step_scratch)?;
        // 3. split and normalise
        normalise(scratch, step_scratch)?;
        // 4. gates
        self.gates(saved)?;
        // 5. delta rule
        delta_rule_step(states, saved, scratch)?;
        // 6. normalise and gate
        self.gate(saved, scratch, pass.eps)?;
        // 7. project back
        self.out_proj
            .forward_onto(branch.out_td, branch.in_td, &scratch.gated_thv, pass.lora)
    }

    fn project(&self, saved: &mut Saved, x_td: &Tensor, pass: &mut Pass) -> Result<()> {
        self.in_proj_qkv
            .forward(&mut saved.qkv_tc, x_td, pass.lora)?;
        self.in_proj_z.forward(&mut saved.z_thv, x_td, pass.lora)?;
        self.in_proj_b.forward(&mut saved.b_th, x_td, pass.lora)?;
        self.in_proj_a.forward(&mut saved.a_th, x_td, pass.lora)
    }

    fn convolve_step(
        &self,
        states: &mut [&mut State],
        saved: &Saved,
        scratch: &mut StepScratch,
    ) -> Result<()> {
        if let [state] = states {
            causal_conv1d::forward_with_state(
                &mut scratch.conv_tc,
                &mut state.conv_3c,
                &saved.qkv_tc,
                &self.conv1d.tensor,
            )?;
            return Ok(());
        }
        let n_channels = self.conv1d.tensor.shape()[0];
        let device = saved.qkv_tc.device();
        let mut x_1c = Tensor::zeros_on(&[1, n_channels], saved.qkv_tc.dtype(), device)?;
        let mut out_1c = Tensor::zeros_on(&[1, n_channels], scratch.conv_tc.dtype(), device)?;
        for (row, state) in states.iter_mut().enumerate() {
            rows::copy_rows(&mut x_1c, 0, &saved.qkv_tc, row, 1, n_channels)?;
            causal_conv1d::forward_with_state(
                &mut out_1c,
                &mut state.conv_3c,
                &x_1c,
                &self.conv1d.tensor,
            )?;
            rows::copy_rows(&mut scratch.conv_tc, row, &out_1c, 0, 1, n_channels)?;
        }
        Ok(())
    }

    /// Queries, keys and values of the delta rule from the projected row.
    fn inputs(&self, scratch: &mut Scratch, saved: &Saved, cu_seqlens: &[u32]) -> Result<()> {
        let inputs = delta_inputs::Inputs {
            qkv_tc: &saved.qkv_tc,
            w: &self.conv1d.tensor,
            cu_seqlens,
            q_scale: query_scale(&scratch.q_tgk),
        };
        let outputs = delta_inputs::Outputs {
            q_tgk: &mut scratch.q_tgk,
            k_tgk: &mut scratch.k_tgk,
            v_thv: &mut scratch.v_thv,
            q_rstd_tg: &mut scratch.q_rstd_tg,
            k_rstd_tg: &mut scratch.k_rstd_tg,
        };
        delta_inputs::forward(outputs, &inputs, L2_EPS)?;
        Ok(())
    }

    fn gates(&self, saved: &mut Saved) -> Result<()> {
        let inputs = delta_gate::Inputs {
            a_th: &saved.a_th,
            b_th: &saved.b_th,
            a_log_h: &self.a_log.tensor,
            dt_bias_h: &self.dt_bias.tensor,
        };
        delta_gate::forward(&mut saved.g_th, &mut saved.beta_th, &inputs)?;
        Ok(())
    }

    fn gate(&self, saved: &mut Saved, scratch: &mut Scratch, eps: f32) -> Result<()> {
        let inputs = gated_rms_norm::Inputs {
            x_thv: &saved.mixed_thv,
            z_thv: &saved.z_thv,
            w_v: &self.norm.tensor,
        };
        let rstd_th = &mut saved.mixed_rstd_th;
        gated_rms_norm::forward(&mut scratch.gated_thv, rstd_th, &inputs, eps)?;
        Ok(())
    }
}

/// conv -> q, k (normalised), v.
fn normalise(scratch: &mut Scratch, step_scratch: &mut StepScratch) -> Result<()> {
    let scale = query_scale(&scratch.q_tgk);
    split::qkv(
        &mut step_scratch.raw_q_tgk,
        &mut step_scratch.raw_k_tgk,
        &mut scratch.v_thv,
        &step_scratch.conv_tc,
    )?;
    l2_norm::forward(
        &mut scratch.q_tgk,
        &mut scratch.q_rstd_tg,
        &step_scratch.raw_q_tgk,
        scale,
        L2_EPS,
    )?;
    l2_norm::forward(
        &mut scratch.k_tgk,
        &mut scratch.k_rstd_tg,
        &step_scratch.raw_k_tgk,
        1.0,
        L2_EPS,
    )?;
    Ok(())
}

/// K^-1/2
fn query_scale(q_tgk: &Tensor) -> f32 {
    1.0 / (q_tgk.shape()[2] as f32).sqrt()
}

fn delta_rule_step(states: &mut [&mut State], saved: &mut Saved, scratch: &Scratch) -> Result<()> {
    let n_tokens = scratch.q_tgk.shape()[0];
    let mut states_hkv: Vec<&mut Tensor> = states
        .iter_mut()
        .map(|state| &mut state.state_hkv)
        .collect();
    let inputs = rule_inputs(&saved.g_th, &saved.beta_th, scratch);
    let out_thv = &mut saved.mixed_thv;
    match states_hkv.as_mut_slice() {
        [state_hkv] if n_tokens > 1 => {
            gated_delta_rule::forward_with_state(out_thv, state_hkv, &inputs)?;
        }
        states_hkv => gated_delta_step::forward(out_thv, states_hkv, &inputs)?,
    }
    Ok(())
}

fn rule_inputs<'a>(
    g_th: &'a Tensor,
    beta_th: &'a Tensor,
    scratch: &'a Scratch,
) -> gated_delta_rule::Inputs<'a> {
    gated_delta_rule::Inputs {
        q_tgk: &scratch.q_tgk,
        k_tgk: &scratch.k_tgk,
        v_thv: &scratch.v_thv,
        g_th,
        beta_th,
    }
}
