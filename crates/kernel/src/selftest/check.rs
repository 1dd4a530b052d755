//! What the comparisons share: seeded inputs, the same call on both devices, and the verdict.

use crate::cuda::Cuda;
use crate::tensor::Storage;
use crate::{DType, Device, Result, Tensor};

/// One output compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The case and the output, such as "bf16 3 documents: d_x".
    pub what: String,
    /// ‖gpu - cpu‖ / ‖cpu‖; NaN where an element was not written or is not finite.
    pub error: f64,
    pub tolerance: f64,
    /// Whether a second run gave the same bytes.
    pub repeatable: bool,
}

impl Comparison {
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance && self.repeatable
    }
}

/// Relative error allowed to outputs stored as f32 and as bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    pub f32: f64,
    pub bf16: f64,
}

impl Tolerance {
    /// Sums of some hundred terms in another order; one rounding to 8 bits where both sides round.
    pub const USUAL: Tolerance = Tolerance {
        f32: 1e-5,
        bf16: 5e-3,
    };

    fn of(self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32,
            DType::Bf16 => self.bf16,
        }
    }
}

pub(crate) struct Check {
    cuda: Cuda,
    seed: u64,
    comparisons: Vec<Comparison>,
}

impl Check {
    pub fn new(cuda: Cuda) -> Check {
        Check {
            cuda,
            seed: 0x5eed,
            comparisons: Vec::new(),
        }
    }

    pub fn into_comparisons(self) -> Vec<Comparison> {
        self.comparisons
    }

    /// Between 0 and 1.
    pub fn uniform(&mut self) -> f32 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1 << 24) as f32
    }

    /// Values between `low` and `high` on the host, rounded to `dtype`.
    pub fn range(&mut self, shape: &[usize], dtype: DType, low: f32, high: f32) -> Tensor {
        let n = shape.iter().product();
        let values = (0..n)
            .map(|_| low + (high - low) * self.uniform())
            .collect();
        Tensor::from_f32(shape, values).to_dtype(dtype)
    }

    /// Values between -1 and 1 on the host, rounded to `dtype`.
    pub fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        self.range(shape, dtype, -1.0, 1.0)
    }

    /// Runs `op(outputs, inputs)` on the CPU once and on the GPU twice, from equal tensors, and compares every output by norm.
    /// Hand in poisoned outputs where the op assigns, filled ones where it adds.
    pub fn both(
        &mut self,
        case: &str,
        tolerance: Tolerance,
        outputs: Vec<(&'static str, Tensor)>,
        inputs: &[&Tensor],
        op: impl Fn(&mut [Tensor], &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let run = |device: Device| -> Result<Vec<Tensor>> {
            let mut outs = Vec::new();
            for (_, output) in &outputs {
                outs.push(output.to_device(device)?);
            }
            let mut ins = Vec::new();
            for input in inputs {
                ins.push(input.to_device(device)?);
            }
            op(&mut outs, &ins)?;
            outs.iter().map(|out| out.to_device(Device::Cpu)).collect()
        };
        let want = run(Device::Cpu)?;
        let got = run(Device::Cuda(self.cuda))?;
        let again = run(Device::Cuda(self.cuda))?;
        for (idx, (name, _)) in outputs.iter().enumerate() {
            self.comparisons.push(Comparison {
                what: format!("{case}: {name}"),
                error: relative_error(&got[idx], &want[idx]),
                tolerance: tolerance.of(want[idx].dtype()),
                repeatable: same_bytes(&got[idx], &again[idx]),
            });
        }
        Ok(())
    }
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
