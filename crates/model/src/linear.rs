//! A linear layer without bias, with an optional low-rank adapter beside it.
// T tokens, I in features, O out features.

use kernel::ops::matmul;
use kernel::{DType, Tensor};

use crate::Result;
use crate::lora::{self, Adapter};
use crate::parameter::{Gradients, Parameter};

/// y = x Wᵀ (+ scale · dropout(x) Aᵀ Bᵀ).
#[derive(Debug)]
pub(crate) struct Linear {
    /// [O,I]
    pub weight: Parameter,
    pub adapter: Option<Adapter>,
}

impl Linear {
    pub fn zeros(n_out: usize, n_in: usize, dtype: DType) -> Self {
        Linear {
            weight: Parameter::zeros(&[n_out, n_in], dtype),
            adapter: None,
        }
    }

    /// y_to assigned.
    pub fn forward(
        &self,
        y_to: &mut Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        matmul::forward(y_to, x_ti, &self.weight.tensor)?;
        self.adapter_forward(y_to, x_ti, lora)
    }

    /// y_to = base_to + what this gives.
    pub fn forward_onto(
        &self,
        y_to: &mut Tensor,
        base_to: &Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        matmul::forward_onto(y_to, base_to, x_ti, &self.weight.tensor)?;
        self.adapter_forward(y_to, x_ti, lora)
    }

    /// d_x_ti assigned; gradients of the weights that train are added up in `grads`.
    pub fn backward(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        matmul::backward_input(d_x_ti, d_y_to, &self.weight.tensor, 1.0)?;
        self.weights_backward(d_x_ti, grads, d_y_to, x_ti, lora)
    }

    /// As `backward`, with d_x_ti added to: several layers read the same x.
    pub fn backward_residual(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        matmul::backward_input_residual(d_x_ti, d_y_to, &self.weight.tensor, 1.0)?;
        self.weights_backward(d_x_ti, grads, d_y_to, x_ti, lora)
    }

    fn adapter_forward(
        &self,
        y_to: &mut Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapter.forward_residual(y_to, x_ti, lora),
            None => Ok(()),
        }
    }

    fn weights_backward(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        match grads.of_linear(&self.weight) {
            Some((d_weight, true)) => matmul::backward_weight_assign(d_weight, d_y_to, x_ti, 1.0)?,
            Some((d_weight, false)) => matmul::backward_weight(d_weight, d_y_to, x_ti, 1.0)?,
            None => (),
        }
        match &self.adapter {
            Some(adapter) => adapter.backward_residual(d_x_ti, grads, d_y_to, x_ti, lora),
            None => Ok(()),
        }
    }
}
