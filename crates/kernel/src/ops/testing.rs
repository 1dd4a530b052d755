//! What the tests of the sequence ops share: seeded tensors and comparison with f64 definitions.

use crate::example::Example;
pub(crate) use crate::example::offsets;
use crate::{DType, Device, Tensor, random};

/// Relative error (of norms) that bf16 storage of an output may add.
pub(crate) const BF16_REL: f64 = 1e-2;

/// A seeded stream of numbers: those of [`random`] in turn.
pub(crate) struct Random {
    seed: u64,
    n_drawn: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random { seed, n_drawn: 0 }
    }

    fn next(&mut self) -> u64 {
        self.n_drawn += 1;
        random::bits_of(self.seed, self.n_drawn - 1)
    }

    pub(crate) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], low: f64, high: f64) -> Tensor {
        let n = shape.iter().product();
        let data = (0..n).map(|_| self.uniform(low, high) as f32).collect();
        Tensor::from_f32(shape, data)
    }
}

pub(crate) fn f64s(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32_vec().into_iter().map(f64::from).collect()
}

/// ‖got - want‖ / ‖want‖.
pub(crate) fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    difference / norm(&mut want.iter().copied()).max(f64::MIN_POSITIVE)
}

#[track_caller]
pub(crate) fn assert_close(name: &str, got: &Tensor, want: &[f64], tolerance: f64) {
    let error = relative_error(&f64s(got), want);
    assert!(error <= tolerance, "{name}: relative error {error:e}");
}

/// Calls an example on the CPU and holds each output against `define`, which gets the inputs in their order. Where the op adds to an
/// output, what it held before is added to the definition.
#[track_caller]
pub(crate) fn assert_agrees(example: &Example, define: impl FnOnce(&[Vec<f64>]) -> Vec<Vec<f64>>) {
    let (mut outs, ins) = example.tensors(Device::Cpu).unwrap();
    let before = outs.clone();
    example.call(&mut outs, &ins).unwrap();
    let want = define(&ins.iter().map(f64s).collect::<Vec<_>>());
    assert_eq!(want.len(), outs.len(), "{}", example.what());
    for (i, (name, _)) in example.outputs().enumerate() {
        let is_assigned = f64s(&before[i]).iter().any(|x| x.is_nan());
        let want = match is_assigned {
            true => want[i].clone(),
            false => plus(&want[i], &before[i]),
        };
        let (_, tolerance) = STORAGES[usize::from(outs[i].dtype() == DType::Bf16)];
        let name = format!("{}: {name}", example.what());
        assert_close(&name, &outs[i], &want, tolerance);
    }
}

/// The rows of these tensors from `first` on, as bits.
pub(crate) fn bits_from_row(tensors: &[Tensor], first: usize) -> Vec<Vec<u32>> {
    tensors
        .iter()
        .map(|tensor| {
            let width = tensor.numel() / tensor.shape()[0];
            let values = tensor.to_f32_vec();
            values[first * width..]
                .iter()
                .map(|x| x.to_bits())
                .collect()
        })
        .collect()
}

/// A poisoned tensor of the shape of `like`.
pub(crate) fn poison_like(like: &Tensor, dtype: DType) -> Tensor {
    Tensor::poison(like.shape(), dtype)
}

/// A pool of so many threads, to see that their number changes nothing.
pub(crate) fn pool(n_threads: usize) -> rayon::ThreadPool {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
    pool.build().unwrap()
}

/// Rows `range` of the first dimension.
pub(crate) fn rows(tensor: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let width = tensor.numel() / tensor.shape()[0];
    let mut shape = tensor.shape().to_vec();
    shape[0] = range.len();
    let data = tensor.to_f32_vec()[range.start * width..range.end * width].to_vec();
    Tensor::from_f32(&shape, data).to_dtype(tensor.dtype())
}

/// Storage types with the relative error (of norms) allowed for what is stored in them: f32 sums of some hundred terms, and
/// one rounding to 8 bits on top.
pub(crate) const STORAGES: [(DType, f64); 2] = [(DType::F32, 1e-5), (DType::Bf16, BF16_REL)];

/// Values between -1.5 and 1.5, rounded to `dtype`.
pub(crate) fn tensor(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    Random::new(seed << 32)
        .tensor(shape, -1.5, 1.5)
        .to_dtype(dtype)
}

/// Gradient of `loss` at `at` with respect to input `which`, by central differences.
pub(crate) fn gradient(
    at: &[Vec<f64>],
    which: usize,
    loss: impl Fn(&[Vec<f64>]) -> f64,
) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = at.to_vec();
    (0..at[which].len())
        .map(|i| {
            let x = at[which][i];
            at[which][i] = x + STEP;
            let above = loss(&at);
            at[which][i] = x - STEP;
            let below = loss(&at);
            at[which][i] = x;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Σ a b, the loss whose gradient with respect to b is a.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `want` plus what the accumulator held before.
pub(crate) fn plus(want: &[f64], before: &Tensor) -> Vec<f64> {
    want.iter().zip(f64s(before)).map(|(w, b)| w + b).collect()
}
