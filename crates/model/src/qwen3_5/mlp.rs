//! SwiGLU feed-forward: down(silu(gate x) · up x).
// T tokens, D hidden, F feed-forward.

use kernel::ops::swiglu;
use kernel::{DType, Tensor};

use crate::config::Config;
use crate::linear::Linear;
use crate::parameter::Gradients;
use crate::{Result, lora};

use super::saved::arena;

#[derive(Debug)]
pub(crate) struct Weights {
    /// [F,D]
    pub gate_proj: Linear,
    /// [F,D]
    pub up_proj: Linear,
    /// [D,F]
    pub down_proj: Linear,
}

arena! {
    Saved(c, t) {
        /// [T,F]
        gate_tf: act [t, c.intermediate_size],
        /// [T,F]
        up_tf: act [t, c.intermediate_size],
    }
}

arena! {
    Scratch(c, t) {
        /// silu(gate) · up [T,F]
        product_tf: act [t, c.intermediate_size],
    }
}

arena! {
    Gradient(c, t) {
        /// [T,F]
        d_product_tf: act [t, c.intermediate_size],
        /// [T,F]
        d_gate_tf: act [t, c.intermediate_size],
        /// [T,F]
        d_up_tf: act [t, c.intermediate_size],
    }
}

impl Weights {
    pub fn zeros(config: &Config, dtype: DType) -> Self {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        Weights {
            gate_proj: Linear::zeros(wide, hidden, dtype),
            up_proj: Linear::zeros(wide, hidden, dtype),
            down_proj: Linear::zeros(hidden, wide, dtype),
        }
    }

    /// out_td = in_td + what this gives. Serves generation as well: tokens do not see each other here.
    pub fn forward(
        &self,
        out_td: &mut Tensor,
        in_td: &Tensor,
        saved: &mut Saved,
        scratch: &mut Scratch,
        x_td: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 1. project
        self.project(saved, x_td, lora)?;
        // 2. gate
        swiglu::forward(&mut scratch.product_tf, &saved.gate_tf, &saved.up_tf)?;
        // 3. project back
        self.down_proj
            .forward_onto(out_td, in_td, &scratch.product_tf, lora)
    }

    /// Step 1 of `forward` alone, for a backward pass that kept nothing of it.
    pub fn project(
        &self,
        saved: &mut Saved,
        x_td: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        self.gate_proj.forward(&mut saved.gate_tf, x_td, lora)?;
        self.up_proj.forward(&mut saved.up_tf, x_td, lora)
    }

    /// d_x_td assigned. `kept`: the scratch is as the forward pass left it.
    pub fn backward(
        &self,
        d_x_td: &mut Tensor,
        grads: &mut Gradients,
        gradient: &mut Gradient,
        d_out_td: &Tensor,
        saved: &Saved,
        scratch: &mut Scratch,
        kept: bool,
        x_td: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 3. project back
        if !kept {
            swiglu::forward(&mut scratch.product_tf, &saved.gate_tf, &saved.up_tf)?;
        }
        self.down_proj.backward(
            &mut gradient.d_product_tf,
            grads,
            d_out_td,
            &scratch.product_tf,
            lora,
        )?;
        // 2. gate
        swiglu::backward(
            &mut gradient.d_gate_tf,
            &mut gradient.d_up_tf,
            &gradient.d_product_tf,
            &saved.gate_tf,
            &saved.up_tf,
        )?;
        // 1. project
        self.up_proj
            .backward(d_x_td, grads, &gradient.d_up_tf, x_td, lora)?;
        self.gate_proj
            .backward_residual(d_x_td, grads, &gradient.d_gate_tf, x_td, lora)
    }
}
