//! Every primitive on a GPU against the same primitive on the CPU, for the user's own GPU: outputs poisoned with NaN, ragged
//! documents, both storage types, and the same bytes twice.

use std::time::{Duration, Instant};

use crate::cuda::Cuda;
use crate::example::Example;
use crate::ops::EXAMPLES;
use crate::tensor::Storage;
use crate::{Device, Error, Result, Tensor};

/// One primitive's comparisons.
#[derive(Debug)]
pub struct Outcome {
    /// Name of the op.
    pub primitive: &'static str,
    /// One for each output of each call, up to the first call that failed.
    pub comparisons: Vec<Comparison>,
    /// The primitive failed before it could be compared.
    pub error: Option<Error>,
    /// From the first call to the last.
    pub took: Duration,
}

impl Outcome {
    /// Whether all was compared and found alike.
    pub fn passed(&self) -> bool {
        self.error.is_none() && self.comparisons.iter().all(Comparison::passed)
    }
}

/// One output compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The call and the output, such as "backward t37_d64, bf16 bf16 f32 to bf16 f32: d_x".
    pub what: String,
    /// ‖gpu - cpu‖ / ‖cpu‖; NaN where an element was not written or is not finite.
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
    /// Whether a second run gave the same bytes.
    pub repeatable: bool,
}

impl Comparison {
    /// Whether the error is allowed and the bytes were the same.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance && self.repeatable
    }
}

/// Runs every comparison on `cuda`, calling `done` after each primitive. Goes on after a failure: all of them are wanted.
pub fn run(cuda: Cuda, mut done: impl FnMut(&Outcome)) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for examples in EXAMPLES {
        let start = Instant::now();
        let mut comparisons = Vec::new();
        let error = (examples.compared)()
            .iter()
            .find_map(|example| compare(&mut comparisons, example, cuda).err());
        let outcome = Outcome {
            primitive: examples.op,
            comparisons,
            error,
            took: start.elapsed(),
        };
        done(&outcome);
        outcomes.push(outcome);
    }
    outcomes
}

/// Calls the op on the CPU once and on the GPU twice, from equal tensors, and compares every output by norm.
fn compare(comparisons: &mut Vec<Comparison>, example: &Example, cuda: Cuda) -> Result<()> {
    let (outs, ins) = example.tensors(Device::Cpu)?;
    let call = |device: Device| -> Result<Vec<Tensor>> {
        let copies = |tensors: &[Tensor]| -> Result<Vec<Tensor>> {
            let copies = tensors.iter().map(|tensor| tensor.to_device(device));
            copies.collect()
        };
        let (mut outs, ins) = (copies(&outs)?, copies(&ins)?);
        example.call(&mut outs, &ins)?;
        outs.iter().map(|out| out.to_device(Device::Cpu)).collect()
    };
    let want = call(Device::Cpu)?;
    let got = call(Device::Cuda(cuda))?;
    let again = call(Device::Cuda(cuda))?;
    for (idx, (name, tolerance)) in example.outputs().enumerate() {
        comparisons.push(Comparison {
            what: format!("{}: {name}", example.what()),
            error: relative_error(&got[idx], &want[idx]),
            tolerance,
            repeatable: same_bytes(&got[idx], &again[idx]),
        });
    }
    Ok(())
}

/// ‖got - want‖ / ‖want‖; absolute where `want` is all zero.
fn relative_error(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (got.to_f32_vec(), want.to_f32_vec());
    let (mut difference, mut norm) = (0.0, 0.0);
    for (g, w) in got.iter().zip(&want) {
        difference += (f64::from(*g) - f64::from(*w)).powi(2);
        norm += f64::from(*w).powi(2);
    }
    if norm == 0.0 {
        return difference.sqrt();
    }
    (difference / norm).sqrt()
}

fn same_bytes(a: &Tensor, b: &Tensor) -> bool {
    match (a.storage(), b.storage()) {
        (Storage::F32(a), Storage::F32(b)) => {
            a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        }
        (Storage::Bf16(a), Storage::Bf16(b)) => {
            a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
        }
        _ => false,
    }
}
