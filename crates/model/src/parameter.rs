//! A weight with its place on disk and the place of its gradient.

use kernel::{DType, Device, Tensor};

use crate::Result;

/// Gradients of the trainable tensors, f32, in the order of `Model::trainable_names`.
#[derive(Debug)]
pub struct Gradients {
    pub tensors: Vec<Tensor>,
}

impl Gradients {
    /// Sets every gradient to zero, for the next optimizer step.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU failed.
    pub fn fill_zero(&mut self) -> Result<()> {
        for tensor in &mut self.tensors {
            tensor.fill_zero()?;
        }
        Ok(())
    }

    /// Where the gradient of `parameter` is added up; None while it is frozen.
    pub(crate) fn of(&mut self, parameter: &Parameter) -> Option<&mut Tensor> {
        parameter.slot.map(|slot| &mut self.tensors[slot])
    }

    /// As `of`, for two parameters of one op; None unless both train.
    pub(crate) fn of_pair(
        &mut self,
        first: &Parameter,
        second: &Parameter,
    ) -> Option<(&mut Tensor, &mut Tensor)> {
        let slots = [first.slot?, second.slot?];
        let [first, second] = self.tensors.get_disjoint_mut(slots).ok()?;
        Some((first, second))
    }
}

/// One weight.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub tensor: Tensor,
    /// The type that a checkpoint stores it in.
    pub disk: DType,
    /// Index of its gradient; None while frozen.
    pub slot: Option<usize>,
}

impl Parameter {
    pub fn zeros(shape: &[usize], dtype: DType) -> Self {
        Parameter {
            tensor: Tensor::zeros(shape, dtype),
            disk: dtype,
            slot: None,
        }
    }

    /// Moves the weight; the old copy is freed.
    pub fn move_to(&mut self, device: Device) -> Result<()> {
        if self.tensor.device() != device {
            self.tensor = self.tensor.to_device(device)?;
        }
        Ok(())
    }
}
