//! A weight with its place on disk and the place of its gradient.

use kernel::{DType, Device, Tensor};

use crate::Result;

/// Gradients of the trainable tensors, f32, in the order of `Model::trainable_names`.
#[derive(Debug)]
pub struct Gradients {
    /// One a trainable tensor, of its shape.
    pub tensors: Vec<Tensor>,
    /// Whether a tensor is the weight of a linear layer, which a first product may assign.
    linear: Vec<bool>,
    /// Whether a tensor still holds numbers of an earlier step, which the next product replaces.
    stale: Vec<bool>,
}

impl Gradients {
    /// Of tensors that hold zeros; `linear` says of each whether it is the weight of a linear layer.
    pub(crate) fn new(tensors: Vec<Tensor>, linear: Vec<bool>) -> Self {
        Gradients {
            stale: vec![false; tensors.len()],
            tensors,
            linear,
        }
    }

    /// Begins the next optimizer step: what has been added up counts no more. Linear layers' gradients are not cleared but replaced by
    /// the first product of the step; until [`Gradients::settle`] their numbers mean nothing.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU failed.
    pub fn clear(&mut self) -> Result<()> {
        for (tensor, linear) in self.tensors.iter_mut().zip(&self.linear) {
            if !linear {
                tensor.fill_zero()?;
            }
        }
        self.stale.clone_from(&self.linear);
        Ok(())
    }

    /// Ends the sums of a step: a tensor that nothing was added to since [`Gradients::clear`] is zero.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU failed.
    pub fn settle(&mut self) -> Result<()> {
        for (tensor, stale) in self.tensors.iter_mut().zip(&mut self.stale) {
            if std::mem::take(stale) {
                tensor.fill_zero()?;
            }
        }
        Ok(())
    }

    /// Where the gradient of a linear layer's weight is added up, and whether it must be assigned this time; None while it is frozen.
    pub(crate) fn of_linear(&mut self, weight: &Parameter) -> Option<(&mut Tensor, bool)> {
        let slot = weight.slot?;
        let assign = std::mem::take(&mut self.stale[slot]);
        Some((&mut self.tensors[slot], assign))
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

    /// A frozen f32 weight of these values.
    pub fn of(tensor: Tensor) -> Self {
        Parameter {
            disk: DType::F32,
            tensor,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_replaces_a_linear_gradient_once_and_settles_what_it_did_not_touch() {
        let mut weight = Parameter::zeros(&[2], DType::F32);
        weight.slot = Some(0);
        let of = |values: [f32; 2]| Tensor::from_f32(&[2], values.to_vec());
        let tensors = vec![of([1.0, 2.0]), of([3.0, 4.0]), of([5.0, 6.0])];
        let mut grads = Gradients::new(tensors, vec![true, true, false]);
        let assigned = |grads: &mut Gradients| grads.of_linear(&weight).map(|(_, assign)| assign);
        assert_eq!(assigned(&mut grads), Some(false));
        grads.clear().unwrap();
        assert_eq!(grads.tensors[2], of([0.0; 2]));
        assert_eq!(assigned(&mut grads), Some(true));
        assert_eq!(assigned(&mut grads), Some(false));
        grads.settle().unwrap();
        assert_eq!(grads.tensors[0], of([1.0, 2.0]));
        assert_eq!(grads.tensors[1], of([0.0; 2]));
    }
}
