//! SwiGLU feed-forward: down(silu(gate x) · up x).
// T tokens, D hidden, F feed-forward.

use kernel::Tensor;
use kernel::ops::{Write, swiglu};

use crate::Result;

use super::arena::arena;
use super::pass::{Backward, Branch, BranchBackward, Pass};
use super::weights::weights;

weights! {
    /// The feed-forward's matrices.
    Weights(c) {
        /// [D,F]
        down_proj: QuantizedLinear "mlp.down_proj.weight" [c.hidden_size, c.intermediate_size] Normal,
        /// [F,D]
        gate_proj: QuantizedLinear "mlp.gate_proj.weight" [c.intermediate_size, c.hidden_size] Normal,
        /// [F,D]
        up_proj: QuantizedLinear "mlp.up_proj.weight" [c.intermediate_size, c.hidden_size] Normal,
    }
}

arena! {
    /// What backward needs.
    Saved(c, t) {
        /// [T,F]
        gate_tf: act [t, c.intermediate_size],
        /// [T,F]
        up_tf: act [t, c.intermediate_size],
    }
}

arena! {
    /// What costs no matrix product.
    Scratch(c, t) {
        /// silu(gate) · up [T,F]
        product_tf: act [t, c.intermediate_size],
    }
}

arena! {
    /// Gradients of activations.
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
    /// Serves generation as well: tokens do not see each other here.
    pub fn forward(
        &self,
        branch: Branch,
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. project
        self.project(saved, branch.x_td, pass)?;
        // 2. gate
        swiglu::forward(&mut scratch.product_tf, &saved.gate_tf, &saved.up_tf)?;
        // 3. project back
        self.down_proj
            .forward_onto(branch.out_td, branch.in_td, &scratch.product_tf, pass.lora)
    }

    /// Step 1 of `forward` alone, for a backward pass that kept nothing of it.
    pub fn project(&self, saved: &mut Saved, x_td: &Tensor, pass: &mut Pass) -> Result<()> {
        self.gate_proj
            .forward(&mut saved.gate_tf, x_td, pass.lora)?;
        self.up_proj.forward(&mut saved.up_tf, x_td, pass.lora)
    }

    /// The gradient of the input assigned, those of weights added up.
    pub fn backward(
        &self,
        branch: BranchBackward,
        gradient: &mut Gradient,
        saved: &Saved,
        scratch: &mut Scratch,
        backward: &mut Backward,
    ) -> Result<()> {
        let BranchBackward {
            d_x_td,
            d_out_td,
            x_td,
        } = branch;
        // 3. project back
        if !backward.has_scratch {
            swiglu::forward(&mut scratch.product_tf, &saved.gate_tf, &saved.up_tf)?;
        }
        let Backward { pass, grads, .. } = backward;
        self.down_proj.backward(
            &mut gradient.d_product_tf,
            grads,
            d_out_td,
            &scratch.product_tf,
            pass.lora,
            Write::Assign,
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
        for (linear, d_y, write) in [
            (&self.up_proj, &gradient.d_up_tf, Write::Assign),
            (&self.gate_proj, &gradient.d_gate_tf, Write::Accumulate),
        ] {
            linear.backward(d_x_td, grads, d_y, x_td, pass.lora, write)?;
        }
        Ok(())
    }
}
