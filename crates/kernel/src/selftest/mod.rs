//! Every primitive on a GPU against the same primitive on the CPU, for the user's own card: outputs poisoned with NaN, ragged
//! documents, both storage types, and the same bytes twice.

mod adamw_host;
mod attention;
mod check;
mod copy;
mod delta;
mod loss;
mod low_rank;
mod matmul;
mod rows;

use std::time::{Duration, Instant};

use crate::cuda::Cuda;
use crate::{Error, Result};

pub use check::Comparison;
pub(crate) use check::{Check, Tolerance};

/// One primitive's comparisons.
#[derive(Debug)]
pub struct Outcome {
    pub primitive: &'static str,
    pub comparisons: Vec<Comparison>,
    /// The primitive failed before it could be compared.
    pub error: Option<Error>,
    pub took: Duration,
}

impl Outcome {
    pub fn passed(&self) -> bool {
        self.error.is_none() && self.comparisons.iter().all(Comparison::passed)
    }
}

type Case = (&'static str, fn(&mut Check) -> Result<()>);

const CASES: &[Case] = &[
    ("copy", copy::run),
    ("matmul", matmul::run),
    ("rms_norm", rows::rms_norm),
    ("gated_rms_norm", rows::gated_rms_norm),
    ("l2_norm", rows::l2_norm),
    ("rope", rows::rope),
    ("sigmoid_gate", rows::sigmoid_gate),
    ("split", rows::split),
    ("swiglu", rows::swiglu),
    ("delta_gate", rows::delta_gate),
    ("causal_conv1d", rows::causal_conv1d),
    ("delta_inputs", rows::delta_inputs),
    ("embedding", loss::embedding),
    ("linear_cross_entropy", loss::linear_cross_entropy),
    ("grad_norm", loss::grad_norm),
    ("adamw", loss::adamw),
    ("adamw_host", adamw_host::run),
    ("low_rank", low_rank::run),
    ("attention", attention::run),
    ("gated_delta_rule", delta::rule),
    ("gated_delta_step", delta::step),
];

/// Runs every comparison on `cuda`, calling `done` after each primitive. Goes on after a failure: all of them are wanted.
pub fn run(cuda: Cuda, mut done: impl FnMut(&Outcome)) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (primitive, case) in CASES {
        let start = Instant::now();
        let mut check = Check::new(cuda);
        let error = case(&mut check).err();
        let outcome = Outcome {
            primitive,
            comparisons: check.into_comparisons(),
            error,
            took: start.elapsed(),
        };
        done(&outcome);
        outcomes.push(outcome);
    }
    outcomes
}
