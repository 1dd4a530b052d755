//! What a run tells while it runs, and how long it will take: the binary draws it.

use std::path::Path;

use crate::checkpoint::SetAside;
use crate::data::Account;
use crate::memory::MemoryPlan;
use crate::metrics::{AlertLine, TrainLine, ValidationLine};

/// Listener to a run. Every method does nothing by default.
pub trait Progress {
    /// Once, before the first step.
    fn started(&mut self, _start: &Start) {}
    /// After every optimizer step.
    fn step(&mut self, _report: &StepReport) {}
    /// While the held-out loss is measured.
    fn validating(&mut self, _step: u64, _tokens_done: u64, _tokens: u64) {}
    /// After it: of each set `all` first, then by language; the first set is the one that decides which weights are best.
    fn validation(&mut self, _lines: &[ValidationLine]) {}
    /// Something to look at.
    fn alert(&mut self, _alert: &AlertLine) {}
    /// A checkpoint was damaged, and an older one is gone on from.
    fn set_aside(&mut self, _damaged: &SetAside) {}
    /// After a checkpoint was written.
    fn checkpoint(&mut self, _folder: &Path) {}
}

/// Listens to nothing.
pub struct Silent;

impl Progress for Silent {}

/// What is about to happen.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps that a checkpoint already holds; 0 for a fresh run.
    pub resumed_step: u64,
    /// Steps that warm up.
    pub warmup_steps: u64,
    /// Where the documents and tokens are.
    pub account: Account,
    /// Tokens of one packed row at most.
    pub row_tokens: usize,
    /// How the steps are done on a GPU; None on a CPU.
    pub memory: Option<MemoryPlan>,
    /// Micro-batches of a whole step, which the ranks compute in turn.
    pub micro_batches: usize,
    /// How many processes train together.
    pub n_ranks: usize,
    /// Values that are trained.
    pub trainable: u64,
}

/// One step, with what is left.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// What is recorded of it.
    pub line: TrainLine,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Seconds until the result lies there: steps, validations and checkpoints still to come;
    /// a third of a training token's time is taken for a held-out one until
    /// the first validation was timed.
    pub eta_s: f64,
}

/// Times of a run's parts so far, for the estimate of what is left.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    train: Span,
    validate: Span,
    save: Span,
}

#[derive(Debug, Default)]
struct Span {
    seconds: f64,
    amount: f64,
}

impl Span {
    fn add(&mut self, seconds: f64, amount: u64) {
        self.seconds += seconds;
        self.amount += amount as f64;
    }

    fn seconds_each(&self) -> Option<f64> {
        (self.amount > 0.0).then(|| self.seconds / self.amount)
    }
}

/// Work that is still to come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remaining {
    /// Tokens that are still to be trained.
    pub train_tokens: u64,
    /// Held-out tokens that are still to be measured.
    pub validate_tokens: u64,
    /// Seconds between checkpoints; 0 if none by the clock.
    pub save_every_s: f64,
}

/// A forward pass costs a third of a forward and backward pass: the guess before the first measurement.
const FORWARD_SHARE: f64 = 1.0 / 3.0;

impl Clock {
    pub(crate) fn trained(&mut self, seconds: f64, tokens: u64) {
        self.train.add(seconds, tokens);
    }

    pub(crate) fn validated(&mut self, seconds: f64, tokens: u64) {
        self.validate.add(seconds, tokens);
    }

    pub(crate) fn saved(&mut self, seconds: f64) {
        self.save.add(seconds, 1);
    }

    /// Seconds that `remaining` will take at the speed seen so far; 0 before the first step.
    pub(crate) fn eta_s(&self, remaining: Remaining) -> f64 {
        let train_s = self.train.seconds_each().unwrap_or_default();
        let validate_s = self
            .validate
            .seconds_each()
            .unwrap_or(train_s * FORWARD_SHARE);
        let work_s =
            remaining.train_tokens as f64 * train_s + remaining.validate_tokens as f64 * validate_s;
        let saves = match remaining.save_every_s > 0.0 {
            true => 1.0 + (work_s / remaining.save_every_s).floor(),
            false => 1.0,
        };
        work_s + saves * self.save.seconds_each().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eta_counts_validation_and_checkpoints() {
        let mut clock = Clock::default();
        let remaining = Remaining {
            train_tokens: 1000,
            validate_tokens: 300,
            save_every_s: 60.0,
        };
        assert_eq!(clock.eta_s(remaining), 0.0);
        clock.trained(10.0, 100);
        // Not measured yet: a third of a trained token's time.
        assert!((clock.eta_s(remaining) - 110.0).abs() < 1e-9);
        clock.validated(5.0, 100);
        assert!((clock.eta_s(remaining) - 115.0).abs() < 1e-9);
        clock.saved(2.0);
        assert!((clock.eta_s(remaining) - 119.0).abs() < 1e-9);
    }
}
