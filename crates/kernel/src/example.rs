//! Calls of ops with tensors of their own: `selftest` holds them against the CPU, `bench ops` times them, and the tests of the ops
//! that need no cases of their own hold them against f64, so that an op says once what it takes and gives.

use rayon::prelude::*;

use crate::{DType, Device, Result, Tensor, random};

/// An op's examples.
#[derive(Debug, Clone, Copy)]
pub struct Examples {
    /// Name of the op.
    pub op: &'static str,
    /// Calls of every kind and awkward size, small enough to be compared.
    pub(crate) compared: fn() -> Vec<Example>,
    /// Calls of a training step at these sizes; none of an op that is not part of one.
    pub timed: fn(&Sizes) -> Vec<Example>,
}

/// A model's sizes and a row of tokens, at which ops are timed.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Of activations.
    pub dtype: DType,
    /// T, tokens of the row.
    pub n_tokens: usize,
    /// Document boundaries of the row: n_docs + 1 offsets, from 0 to T.
    pub cu_seqlens: Vec<u32>,
    /// D
    pub hidden: usize,
    /// F
    pub feed_forward: usize,
    /// C
    pub vocabulary: usize,
    /// Of attention: query heads H, key:value heads G, head dim N.
    pub attention: [usize; 3],
    /// Dims of a head that turn.
    pub rotary_dims: usize,
    /// Base of the rotation.
    pub rope_theta: f64,
    /// Of the delta rule: key heads G, value heads H, key dim K, value dim V.
    pub delta: [usize; 4],
    /// Rank R of adapters.
    pub rank: usize,
}

impl Sizes {
    /// Tokens of the longest document.
    pub(crate) fn longest(&self) -> usize {
        let lengths = self.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]);
        lengths.max().unwrap_or(0) as usize
    }

    /// Σ over all pairs of a token and one up to it in its document.
    pub fn pairs(&self) -> f64 {
        self.cu_seqlens
            .windows(2)
            .map(|ends| f64::from(ends[1] - ends[0]))
            .map(|len| len * (len + 1.0) / 2.0)
            .sum()
    }

    /// Ids or targets, spread over the vocabulary.
    pub(crate) fn spread(&self) -> impl Iterator<Item = usize> {
        let c = self.vocabulary;
        (0..self.n_tokens).map(move |t| t * 7919 % c)
    }
}

/// Relative errors (of norms) that are allowed to outputs stored as f32 and as bf16.
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
    /// Where every operation is rounded alike: not a bit apart.
    pub const EXACT: Tolerance = Tolerance {
        f32: 0.0,
        bf16: 0.0,
    };

    pub fn of(self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32,
            DType::Bf16 => self.bf16,
        }
    }
}

type Run = Box<dyn Fn(&mut [Tensor], &[Tensor]) -> Result<()>>;
type Prepare = Box<dyn Fn(&mut [Tensor]) -> Result<()>>;
type Change = Box<dyn Fn(&mut [f32])>;

/// A tensor of an example before it is made.
struct Argument {
    name: &'static str,
    shape: Vec<usize>,
    dtype: DType,
    /// Values between these; None: NaN, since every element is going to be written.
    range: Option<[f32; 2]>,
    change: Option<Change>,
}

impl Argument {
    fn bytes(&self) -> f64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as f64
    }

    /// `number`: among all of an example, so that no two are alike.
    fn make(&self, number: u64) -> Tensor {
        let Some([low, high]) = self.range else {
            return Tensor::poison(&self.shape, self.dtype);
        };
        let n: u64 = self.shape.iter().product::<usize>() as u64;
        let value = |i: u64| low + (high - low) * random::uniform(1, number, i) as f32;
        let mut values: Vec<f32> = (0..n).into_par_iter().map(value).collect();
        if let Some(change) = &self.change {
            change(&mut values);
        }
        Tensor::from_f32(&self.shape, values).to_dtype(self.dtype)
    }
}

/// One call of an op.
pub struct Example {
    name: &'static str,
    shape: String,
    outs: Vec<Argument>,
    ins: Vec<Argument>,
    prepare: Option<Prepare>,
    run: Run,
    tolerance: Tolerance,
    operations: f64,
    bytes: Option<f64>,
}

impl Example {
    /// Of a verb of an op, such as `swiglu/backward`, at a shape such as `t5120_f9216`. Arguments follow in their order.
    pub(crate) fn new(name: &'static str, shape: String) -> Self {
        Example {
            name,
            shape,
            outs: Vec::new(),
            ins: Vec::new(),
            prepare: None,
            run: Box::new(|_, _| Ok(())),
            tolerance: Tolerance::USUAL,
            operations: 0.0,
            bytes: None,
        }
    }

    /// An output that is assigned.
    pub(crate) fn out(mut self, name: &'static str, shape: &[usize], dtype: DType) -> Self {
        self.outs.push(argument(name, shape, dtype, None));
        self
    }

    /// An output that is read too: added to, or changed in place. It holds values between -1 and 1 before.
    pub(crate) fn updated(self, name: &'static str, shape: &[usize], dtype: DType) -> Self {
        self.updated_in(name, shape, dtype, [-1.0, 1.0])
    }

    /// As [`Example::updated`], of other values.
    pub(crate) fn updated_in(
        mut self,
        name: &'static str,
        shape: &[usize],
        dtype: DType,
        range: [f32; 2],
    ) -> Self {
        self.outs.push(argument(name, shape, dtype, Some(range)));
        self
    }

    /// An input of values between -1 and 1.
    pub(crate) fn input(self, name: &'static str, shape: &[usize], dtype: DType) -> Self {
        self.input_in(name, shape, dtype, [-1.0, 1.0])
    }

    /// As [`Example::input`], of other values.
    pub(crate) fn input_in(
        mut self,
        name: &'static str,
        shape: &[usize],
        dtype: DType,
        range: [f32; 2],
    ) -> Self {
        self.ins.push(argument(name, shape, dtype, Some(range)));
        self
    }

    /// Changes the values of the input before, which are between -1 and 1 and not yet rounded.
    pub(crate) fn changed(mut self, change: impl Fn(&mut [f32]) + 'static) -> Self {
        if let Some(input) = self.ins.last_mut() {
            input.change = Some(Box::new(change));
        }
        self
    }

    /// An input that [`Example::prepared`] writes: what another pass gives.
    pub(crate) fn saved(mut self, name: &'static str, shape: &[usize], dtype: DType) -> Self {
        self.ins.push(argument(name, shape, dtype, None));
        self
    }

    /// Writes the inputs that other passes give.
    pub(crate) fn prepared<const I: usize>(
        mut self,
        prepare: impl Fn([&mut Tensor; I]) -> Result<()> + 'static,
    ) -> Self {
        self.prepare = Some(Box::new(move |ins| prepare(all_mut(ins))));
        self
    }

    /// The call, by outputs and inputs in their order.
    pub(crate) fn run<const O: usize, const I: usize>(
        self,
        run: impl Fn([&mut Tensor; O], [&Tensor; I]) -> Result<()> + 'static,
    ) -> Self {
        self.run_all(move |outs, ins| {
            let ins: Vec<&Tensor> = ins.iter().collect();
            let ins: [&Tensor; I] = match ins.try_into() {
                Ok(ins) => ins,
                Err(_) => unreachable!("an example names every input of its call"),
            };
            run(all_mut(outs), ins)
        })
    }

    /// As [`Example::run`], of numbers of tensors that are not fixed.
    pub(crate) fn run_all(
        mut self,
        run: impl Fn(&mut [Tensor], &[Tensor]) -> Result<()> + 'static,
    ) -> Self {
        self.run = Box::new(run);
        self
    }

    pub(crate) fn tolerance(mut self, tolerance: Tolerance) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// Operations of products at the least.
    pub(crate) fn operations_at_least(mut self, operations: f64) -> Self {
        self.operations = operations;
        self
    }

    /// Bytes at the least, where not all of every tensor is touched.
    pub(crate) fn bytes_at_least(mut self, bytes: f64) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// Op and verb, such as `swiglu/backward`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Such as `t5120_f9216`.
    pub fn shape(&self) -> &str {
        &self.shape
    }

    /// Operations of products at the least.
    pub fn operations(&self) -> f64 {
        self.operations
    }

    /// Bytes of all of its tensors together.
    pub fn memory_bytes(&self) -> f64 {
        let tensors = self.outs.iter().chain(&self.ins);
        tensors.map(Argument::bytes).sum()
    }

    /// Bytes that are read or written at the least: each input once, each output once, and twice where it is read too.
    pub fn bytes(&self) -> f64 {
        self.bytes.unwrap_or_else(|| {
            let outs = self.outs.iter().map(|out| match out.range {
                None => out.bytes(),
                Some(_) => 2.0 * out.bytes(),
            });
            outs.chain(self.ins.iter().map(Argument::bytes)).sum()
        })
    }

    /// Outputs and inputs on `device`, as they are before the call.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] and what a call of the op can give, which makes what another pass saves.
    pub fn tensors(&self, device: Device) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let make = |arguments: &[Argument], first: usize| -> Result<Vec<Tensor>> {
            let numbered = arguments.iter().zip(first as u64..);
            let made = numbered.map(|(argument, number)| argument.make(number));
            match device {
                Device::Cpu => Ok(made.collect()),
                Device::Cuda(_) => made.map(|tensor| tensor.to_device(device)).collect(),
            }
        };
        let outs = make(&self.outs, 0)?;
        let mut ins = make(&self.ins, self.outs.len())?;
        if let Some(prepare) = &self.prepare {
            prepare(&mut ins)?;
        }
        Ok((outs, ins))
    }

    /// The call, with tensors as [`Example::tensors`] gives them.
    ///
    /// # Errors
    /// Those of the op.
    pub fn call(&self, outs: &mut [Tensor], ins: &[Tensor]) -> Result<()> {
        (self.run)(outs, ins)
    }

    /// Name and allowed error of each output.
    pub(crate) fn outputs(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let tolerance = self.tolerance;
        self.outs
            .iter()
            .map(move |out| (out.name, tolerance.of(out.dtype)))
    }

    /// Verb, shape and storage types, as comparisons are called.
    pub(crate) fn what(&self) -> String {
        let types = |arguments: &[Argument]| {
            let types = arguments.iter().map(|argument| argument.dtype.to_string());
            types.collect::<Vec<_>>().join(" ")
        };
        let verb = self.name.rsplit('/').next().unwrap_or(self.name);
        let (ins, outs) = (types(&self.ins), types(&self.outs));
        format!("{verb} {}, {ins} to {outs}", self.shape)
    }
}

fn argument(
    name: &'static str,
    shape: &[usize],
    dtype: DType,
    range: Option<[f32; 2]>,
) -> Argument {
    Argument {
        name,
        shape: shape.to_vec(),
        dtype,
        range,
        change: None,
    }
}

fn all_mut<const N: usize>(tensors: &mut [Tensor]) -> [&mut Tensor; N] {
    let tensors: Vec<&mut Tensor> = tensors.iter_mut().collect();
    let tensors: [&mut Tensor; N] = match tensors.try_into() {
        Ok(tensors) => tensors,
        Err(_) => unreachable!("an example names every tensor of its call"),
    };
    tensors
}

/// Storage types of activations, their gradients and weights: every mix that training has.
pub(crate) const TYPES: [[DType; 3]; 4] = [
    [DType::F32, DType::F32, DType::F32],
    [DType::Bf16, DType::Bf16, DType::Bf16],
    [DType::Bf16, DType::Bf16, DType::F32],
    [DType::Bf16, DType::F32, DType::Bf16],
];

/// The mixes of [`TYPES`] for a call that has two of them: activations, and their gradients or weights.
pub(crate) const PAIRS: [[DType; 2]; 3] = [
    [DType::F32, DType::F32],
    [DType::Bf16, DType::Bf16],
    [DType::Bf16, DType::F32],
];

/// Rows by columns: heads, hidden states, and what fits neither.
pub(crate) const ROWS: [[usize; 2]; 12] = [
    [1, 1024],
    [37, 64],
    [301, 128],
    [70, 256],
    [5000, 128],
    [33, 1024],
    [9, 2048],
    [300, 2560],
    [3, 4096],
    [5, 5120],
    [11, 37],
    [7, 300],
];

/// Numbers of elements, multiples of a vector and not.
pub(crate) const ELEMENTS: [usize; 5] = [1, 8, 1003, 4096, 70_001];

/// Offsets of documents of these lengths.
pub(crate) fn offsets(lengths: &[usize]) -> Vec<u32> {
    let mut end = 0;
    let ends = lengths.iter().map(|length| {
        end += *length as u32;
        end
    });
    std::iter::once(0).chain(ends).collect()
}

/// Zeros of the shape and type of `tensor`, where it lies.
pub(crate) fn zeros_like(tensor: &Tensor) -> Result<Tensor> {
    Tensor::zeros_on(tensor.shape(), tensor.dtype(), tensor.device())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::ops::EXAMPLES;
    use crate::{DType, Device};

    /// A line of `selftest` says which call is wrong, and no call is compared twice.
    #[test]
    fn no_two_calls_have_an_output_of_one_name() {
        for examples in EXAMPLES {
            let mut seen = BTreeSet::new();
            for example in (examples.compared)() {
                // A call may have many tensors of one name.
                let names: BTreeSet<&str> = example.outputs().map(|(name, _)| name).collect();
                for name in names {
                    let what = format!("{} {}: {name}", examples.op, example.what());
                    assert!(seen.insert(what.clone()), "{what}");
                }
            }
        }
    }

    #[test]
    fn every_call_that_is_compared_writes_all_of_its_outputs() {
        for examples in EXAMPLES {
            for example in (examples.compared)() {
                assert!(
                    example.name().starts_with(examples.op),
                    "{}",
                    example.name()
                );
                let (mut outs, ins) = example.tensors(Device::Cpu).unwrap();
                example.call(&mut outs, &ins).unwrap();
                for ((name, _), out) in example.outputs().zip(&outs) {
                    let is_finite = match out.dtype() {
                        DType::F32 => out.f32s().iter().all(|x| x.is_finite()),
                        DType::Bf16 => out.to_f32_vec().iter().all(|x| x.is_finite()),
                    };
                    assert!(is_finite, "{} {}: {name}", examples.op, example.what());
                }
            }
        }
    }

    #[test]
    fn every_op_with_kernels_is_compared() {
        for source in crate::cuda::SOURCES {
            // What rows share belongs to no op; the rule has kernels of its own for bf16.
            let op = source.name.trim_end_matches("_bf16");
            let is_listed = EXAMPLES.iter().any(|examples| examples.op == op);
            assert!(is_listed || op == "rows", "{op}");
        }
    }
}
