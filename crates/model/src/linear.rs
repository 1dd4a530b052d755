//! A linear layer without bias, with an optional low-rank adapter beside it.
// T tokens, I in features, O out features.

use kernel::ops::{Write, matmul};
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
    /// Of shape [O,I].
    pub fn zeros(shape: &[usize], dtype: DType) -> Self {
        Linear {
            weight: Parameter::zeros(shape, dtype),
            adapter: None,
        }
    }

    /// y_to assigned. The adapter's part comes first: the large product adds to it for less than a narrow one adds to the large one.
    pub fn forward(
        &self,
        y_to: &mut Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        match &self.adapter {
            Some(adapter) => {
                adapter.forward(y_to, x_ti, lora, Write::Assign)?;
                matmul::forward_accumulate(y_to, x_ti, &self.weight.tensor, 1.0)?;
            }
            None => matmul::forward(y_to, x_ti, &self.weight.tensor)?,
        }
        Ok(())
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
        match &self.adapter {
            Some(adapter) => adapter.forward(y_to, x_ti, lora, Write::Accumulate),
            None => Ok(()),
        }
    }

    /// d_x_ti assigned, or added to where several layers read the same x; gradients of the weights that train are added up in `grads`. The
    /// adapter comes first, as in `forward`.
    pub fn backward(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        lora: &mut lora::Scratch,
        write: Write,
    ) -> Result<()> {
        self.weight_backward(grads, d_y_to, x_ti)?;
        let write = match &self.adapter {
            Some(adapter) => {
                adapter.backward(d_x_ti, grads, d_y_to, x_ti, lora, write)?;
                Write::Accumulate
            }
            None => write,
        };
        matmul::backward_input(d_x_ti, d_y_to, &self.weight.tensor, 1.0, write)?;
        Ok(())
    }

    fn weight_backward(&self, grads: &mut Gradients, d_y_to: &Tensor, x_ti: &Tensor) -> Result<()> {
        if let Some((d_weight, is_first)) = grads.of_linear(&self.weight) {
            let write = if is_first {
                Write::Assign
            } else {
                Write::Accumulate
            };
            matmul::backward_weight(d_weight, d_y_to, x_ti, 1.0, write)?;
        }
        Ok(())
    }
}
