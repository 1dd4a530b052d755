//! Whether weights that train as bf16 lose small updates: the same steps from the same weights with f32 weights, with bf16 weights rounded
//! stochastically, as training does it, and with bf16 weights rounded to the nearest.

use std::path::Path;
use std::time::Instant;

use kernel::ops::adamw::Rounding;
use kernel::{DType, Device, Tensor};
use model::Model;

use crate::data::Plan;
use crate::error::Result;
use crate::job::Job;
use crate::memory::{MemoryPlan, StepRows};
use crate::schedule::Schedule;
use crate::step::Trainer;

/// One of the three trainings.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Of weights and activations.
    pub dtype: DType,
    /// Of a weight after a step; says nothing of f32.
    pub rounding: Rounding,
}

/// f32 first: the others are held against it.
pub const CASES: [Case; 3] = [
    Case {
        dtype: DType::F32,
        rounding: Rounding::Stochastic,
    },
    Case {
        dtype: DType::Bf16,
        rounding: Rounding::Stochastic,
    },
    Case {
        dtype: DType::Bf16,
        rounding: Rounding::Nearest,
    },
];

impl Case {
    /// Number type of the weights.
    pub fn weights(self) -> &'static str {
        match self.dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }

    /// How weights are rounded; None where nothing is.
    pub fn rounding(self) -> Option<&'static str> {
        match (self.dtype, self.rounding) {
            (DType::F32, _) => None,
            (DType::Bf16, Rounding::Stochastic) => Some("stochastic"),
            (DType::Bf16, Rounding::Nearest) => Some("nearest"),
        }
    }

    /// Both, for people: `bf16, nearest`.
    pub fn name(self) -> String {
        match self.rounding() {
            None => self.weights().to_owned(),
            Some(rounding) => format!("{}, {rounding}", self.weights()),
        }
    }
}

/// A checkpoint rounded to bf16, with weights of `dtype`: the same numbers whatever it is.
///
/// # Errors
/// A checkpoint that cannot be read.
pub fn start(base: &Path, dtype: DType) -> Result<Model> {
    let rounded = Model::load(base, DType::Bf16)?;
    if dtype == DType::Bf16 {
        return Ok(rounded);
    }
    let mut model = Model::load(base, dtype)?;
    for (to, from) in model.trainable_mut().into_iter().zip(rounded.trainable()) {
        to.copy_from(&from.to_dtype(dtype))?;
    }
    Ok(model)
}

/// One of the trainings, about to begin.
pub struct Training {
    plan: Plan,
    schedule: Schedule,
    trainer: Trainer,
}

/// What came of one.
pub struct Trained {
    /// On the host.
    pub model: Model,
    /// Tokens that it processed.
    pub n_tokens: u64,
    /// Nats a trained token, mean over all steps.
    pub loss: f64,
    /// Of the steps.
    pub seconds: f64,
}

impl Training {
    /// Plans the job's steps for a model that [`start`] gave.
    ///
    /// # Errors
    /// As [`Plan::new`] and [`Trainer::new`].
    pub fn new(case: Case, model: Model, job: &Job) -> Result<Training> {
        let mut plan = Plan::new(job, model.config().vocab_size)?;
        let schedule = Schedule::new(&job.optimizer, plan.total_steps());
        let mut trainer = Trainer::new(model, &job.optimizer, job.seed, StepRows::of(job))?;
        trainer.optimizer.rounding = case.rounding;
        plan.rows_per_batch = trainer.rows_per_batch;
        Ok(Training {
            plan,
            schedule,
            trainer,
        })
    }

    /// How the steps are done on a GPU; None on a CPU.
    pub fn memory(&self) -> Option<&MemoryPlan> {
        self.trainer.memory.as_ref()
    }

    /// Steps of the whole job.
    pub fn total_steps(&self) -> u64 {
        self.plan.total_steps()
    }

    /// Takes all steps; `said` is told of each: its number from 1, and its loss.
    ///
    /// # Errors
    /// As [`Trainer::step`]; a device that fails.
    pub fn run(self, mut said: impl FnMut(u64, f64)) -> Result<Trained> {
        let Training {
            plan,
            schedule,
            mut trainer,
        } = self;
        let device = trainer.model.device();
        let started = Instant::now();
        let mut sum = 0.0;
        for step_idx in 0..plan.total_steps() {
            let step = plan.step(step_idx).clone();
            let micro_batches = plan.micro_batches(&step);
            let outcome = trainer.step(micro_batches, step.n_targets, schedule.lr_at(step_idx))?;
            sum += outcome.loss;
            said(step_idx + 1, outcome.loss);
        }
        device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        let Trainer { model, .. } = trainer;
        Ok(Trained {
            model: model.to_device(Device::Cpu)?,
            n_tokens: plan.tokens_from(0),
            loss: sum / plan.total_steps() as f64,
            seconds,
        })
    }
}

/// Gives `model`, the f32 model that [`start`] gives, the weights of `trained`; returns the share of them that are not the same as bf16.
///
/// # Errors
/// Models of different shapes.
pub fn take(model: &mut Model, trained: &Model) -> Result<f64> {
    let as_bf16 = |tensor: &Tensor| tensor.to_dtype(DType::Bf16).to_f32_vec();
    let (mut moved, mut all) = (0, 0);
    for (to, from) in model.trainable_mut().into_iter().zip(trained.trainable()) {
        let (old, new) = (as_bf16(to), as_bf16(from));
        moved += old.iter().zip(&new).filter(|(old, new)| old != new).count();
        all += old.len();
        to.copy_from(&from.to_dtype(DType::F32))?;
    }
    Ok(moved as f64 / all as f64)
}
