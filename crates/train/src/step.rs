//! One optimizer step: gradients of all micro-batches, clipping, update.

use kernel::Device;
use model::{Gradients, Model, Saved};
use text::pack::PackedRow;

use crate::data::as_batch;
use crate::error::{Error, Result};
use crate::job::OptimizerConfig;
use crate::memory::{MemoryPlan, StepRows};
use crate::optimizer::{AdamW, clip_factor, global_norm};
use crate::ranks::{Owners, Ranks};
use crate::seed::{Purpose, derive};

/// A model with what training it needs: moments, gradients, activations.
#[derive(Debug)]
pub struct Trainer {
    /// The weights that train.
    pub model: Model,
    /// Its moments.
    pub optimizer: AdamW,
    /// Activations, reused from row to row.
    pub saved: Saved,
    /// None on a CPU, which needs none.
    pub memory: Option<MemoryPlan>,
    /// Rows of a micro-batch, the same on all ranks.
    pub rows_per_batch: usize,
    gradients: Gradients,
    grad_clip: f64,
    seed: u64,
    ranks: Ranks,
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
        Trainer::among(model, config, seed, rows, Ranks::alone())
    }

    /// As [`Trainer::new`], one of several that train together: moments for the tensors that this rank owns, and as many rows at a time
    /// as fit on every rank, so that all cut a step into the same micro-batches.
    ///
    /// # Errors
    /// As [`Trainer::new`]; [`Error::TooFewMicroBatches`], on all ranks, if some would have nothing to do; [`Error::Rank`] if a rank is gone.
    pub fn among(
        model: Model,
        config: &OptimizerConfig,
        seed: u64,
        rows: StepRows,
        ranks: Ranks,
    ) -> Result<Self> {
        let (rows_per_batch, memory) = MemoryPlan::among(&model, rows, &ranks)?;
        check_ranks(rows.micro_batches(rows_per_batch), rows_per_batch, &ranks)?;
        let names = model.trainable_names();
        let tensors = model.trainable();
        let sizes: Vec<usize> = tensors.iter().map(|tensor| tensor.numel()).collect();
        let owners = Owners::assign(&sizes, ranks.rank(), ranks.n_ranks());
        let named = names.iter().map(String::as_str).zip(tensors);
        let offloaded = memory.as_ref().map_or(&[][..], |memory| &memory.offloaded);
        let mut trainer = Trainer {
            optimizer: AdamW::new(config, named, owners, offloaded)?,
            ranks,
            rows_per_batch,
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
        self.saved = Saved::with_policy(memory.policy.clone());
        let n_tokens = memory.rows * rows.row_tokens;
        self.model.reserve(&mut self.saved, n_tokens)?;
        Ok(cuda.reserve_scratch(memory.op_scratch_bytes)?)
    }

    /// Loss = Σ nll over all micro-batches / `n_targets`, the targets of all micro-batches together; one update at learning rate `lr`.
    /// Every rank is given all micro-batches and computes its own.
    ///
    /// # Errors
    /// [`Error::NotFinite`], on all ranks, if the loss or the gradient is NaN or infinite: the weights are then as they were.
    /// [`Error::Rank`] if a rank is gone.
    pub fn step(
        &mut self,
        micro_batches: impl Iterator<Item = PackedRow>,
        n_targets: u64,
        lr: f64,
    ) -> Result<StepOutcome> {
        let step = self.optimizer.steps + 1;
        let d_nll = (1.0 / n_targets as f64) as f32;
        // 1. gradients, summed over this rank's micro-batches
        self.optimizer.prefetch()?;
        self.gradients.clear()?;
        let mut nll_sum = 0.0;
        let batches = micro_batches.enumerate();
        for (batch_idx, batch) in batches.filter(|(idx, _)| self.ranks.has_batch(*idx)) {
            let dropout_seed = derive(self.seed, Purpose::Dropout, step, batch_idx as u64);
            let nll_t = self.model.forward_backward(
                &mut self.saved,
                &mut self.gradients,
                &as_batch(&batch),
                d_nll,
                dropout_seed,
            )?;
            nll_sum += nll_t.iter().map(|nll| f64::from(*nll)).sum::<f64>();
            if !nll_sum.is_finite() {
                break;
            }
        }
        self.gradients.settle()?;
        // 2. over all ranks: the loss everywhere, each gradient where it is used
        let mut sums = [nll_sum];
        self.ranks.sum(&mut sums)?;
        let [nll_sum] = sums;
        require_finite("the loss", nll_sum as f32, step)?;
        let owners = &self.optimizer.owners;
        self.ranks
            .reduce_to_owners(&mut self.gradients.tensors, owners)?;
        // 3. clip
        let grad_norm = global_norm(&self.gradients.tensors, owners, &self.ranks)?;
        require_finite("the gradient norm", grad_norm, step)?;
        let grad_scale = clip_factor(grad_norm, self.grad_clip);
        // 4. update what is owned here, and take the rest from its owners
        self.optimizer.step(
            self.model.trainable_mut(),
            &self.gradients.tensors,
            lr,
            grad_scale,
        )?;
        let owners = &self.optimizer.owners;
        self.ranks
            .copy_from_owners(self.model.trainable_mut(), owners)?;
        Ok(StepOutcome {
            loss: nll_sum / n_targets as f64,
            grad_norm,
        })
    }
}

/// Every rank computes whole micro-batches, so that there must be one for each.
fn check_ranks(micro_batches: usize, rows: usize, ranks: &Ranks) -> Result<()> {
    match micro_batches >= ranks.n_ranks() {
        true => Ok(()),
        false => Err(Error::TooFewMicroBatches {
            micro_batches,
            rows,
            n_ranks: ranks.n_ranks(),
        }),
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
