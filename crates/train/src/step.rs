//! One optimizer step: gradients of all micro-batches, clipping, update.

use kernel::Device;
use model::{Gradients, Model, Saved};
use text::pack::Row;

use crate::data::as_batch;
use crate::error::{Error, Result};
use crate::job::OptimizerConfig;
use crate::memory::{MemoryPlan, StepRows};
use crate::optimizer::{AdamW, clip_factor, global_norm};
use crate::seed::{Purpose, derive};

/// A model with what training it needs: moments, gradients, activations.
#[derive(Debug)]
pub struct Trainer {
    pub model: Model,
    pub optimizer: AdamW,
    pub saved: Saved,
    /// None on a CPU, which keeps all and takes the rows as they come.
    pub memory: Option<MemoryPlan>,
    gradients: Gradients,
    grad_clip: f64,
    seed: u64,
}

/// What one step measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Nats a trained token, over all micro-batches.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f32,
}

impl Trainer {
    /// Fresh moments for the model's trainable tensors, and on a GPU everything else that steps of `rows` need, by the plan that fits;
    /// `seed` is that of dropout.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] with what is missing, before anything is allocated.
    pub fn new(model: Model, config: &OptimizerConfig, seed: u64, rows: StepRows) -> Result<Self> {
        let memory = MemoryPlan::for_model(&model, rows)?;
        let names = model.trainable_names();
        let tensors = model.trainable();
        let named = names.iter().map(String::as_str).zip(tensors);
        let offloaded = memory.as_ref().map_or(&[][..], |memory| &memory.offloaded);
        let mut trainer = Trainer {
            optimizer: AdamW::new(config, named, offloaded)?,
            saved: Saved::default(),
            gradients: model.gradients()?,
            grad_clip: config.grad_clip,
            seed,
            memory,
            model,
        };
        trainer.reserve(rows)?;
        Ok(trainer)
    }

    /// Takes activations and scratch as the plan has counted them, so that a plan that is wrong fails before the first step. Tables and
    /// cuBLASLt's workspace come with their first use.
    fn reserve(&mut self, rows: StepRows) -> Result<()> {
        let (Some(memory), Device::Cuda(cuda)) = (&self.memory, self.model.device()) else {
            return Ok(());
        };
        self.saved = Saved::keeping(memory.keeps.clone());
        self.saved
            .reserve(&self.model, memory.rows * rows.row_tokens)?;
        Ok(cuda.reserve_scratch(memory.op_scratch_bytes)?)
    }

    /// Loss = Σ nll over all micro-batches / `n_targets`, the targets of all micro-batches together; one update at learning rate `lr`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the loss or the gradient is NaN or infinite: the weights are then as they were.
    pub fn step(
        &mut self,
        micro_batches: impl Iterator<Item = Row>,
        n_targets: u64,
        lr: f64,
    ) -> Result<StepOutcome> {
        let step = self.optimizer.steps + 1;
        let d_nll = (1.0 / n_targets as f64) as f32;
        // 1. gradients, summed over micro-batches
        self.optimizer.prefetch()?;
        self.gradients.clear()?;
        let mut nll_sum = 0.0;
        for (batch_idx, batch) in micro_batches.enumerate() {
            let dropout_seed = derive(self.seed, Purpose::Dropout, step, batch_idx as u64);
            let nll_t = self.model.forward_backward(
                &mut self.saved,
                &mut self.gradients,
                &as_batch(&batch),
                d_nll,
                dropout_seed,
            )?;
            nll_sum += nll_t.iter().map(|nll| f64::from(*nll)).sum::<f64>();
            require_finite("the loss", nll_sum as f32, step)?;
        }
        self.gradients.settle()?;
        // 2. clip
        let grad_norm = global_norm(&self.gradients.tensors)?;
        require_finite("the gradient norm", grad_norm, step)?;
        let grad_scale = clip_factor(grad_norm, self.grad_clip);
        // 3. update
        self.optimizer.step(
            self.model.trainable_mut(),
            &self.gradients.tensors,
            lr,
            grad_scale,
        )?;
        Ok(StepOutcome {
            loss: nll_sum / n_targets as f64,
            grad_norm,
        })
    }
}

fn require_finite(what: &'static str, value: f32, step: u64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::NotFinite {
        what,
        value,
        step,
        last_checkpoint: None,
    })
}
