//! Calls with targets and without, in both storage types.

use super::NO_TARGET;
use crate::DType::{self, Bf16, F32};
use crate::example::{Example, Sizes, Tolerance};

/// Rows of the released head.
const VOCABULARY: usize = 248_320;

/// Shape of the head, and targets: one, none, few, some, one class for all, several chunks, the ends of the vocabulary.
fn heads() -> [([usize; 2], Vec<i32>); 8] {
    let some = |t: usize, c: usize| -> Vec<i32> {
        let target = |t: usize| match t % 3 {
            1 => NO_TARGET,
            _ => (t * 31 % c) as i32,
        };
        (0..t).map(target).collect()
    };
    let last = VOCABULARY as i32 - 1;
    [
        ([96, 64], vec![95]),
        ([96, 64], vec![NO_TARGET; 9]),
        ([136, 40], [vec![NO_TARGET; 8], vec![3]].concat()),
        ([131, 36], some(77, 131)),
        ([520, 128], vec![519; 200]),
        ([72, 24], some(6300, 72)),
        ([1000, 2560], some(150, 1000)),
        ([VOCABULARY, 32], vec![last, NO_TARGET, 0, last - 1, 7]),
    ]
}

pub(crate) fn compared() -> Vec<Example> {
    let mut all = Vec::new();
    for (shape, targets) in heads() {
        // x, head
        for types in [[F32, F32], [Bf16, Bf16], [F32, Bf16], [Bf16, F32]] {
            all.push(forward(shape, targets.clone(), types));
            all.push(forward_backward(shape, targets.clone(), types, 0.125));
            if shape == [131, 36] {
                all.push(frozen(shape, targets.clone(), types));
            }
        }
    }
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let (t, d, c) = (sizes.n_tokens, sizes.hidden, sizes.vocabulary);
    let targets = sizes.spread().map(|id| id as i32).collect();
    let example = forward_backward([c, d], targets, [sizes.dtype; 2], 1.0 / t as f32);
    vec![example.operations_at_least(3.0 * 2.0 * (t * d) as f64 * c as f64)]
}

fn example(name: &'static str, [c, d]: [usize; 2], t: usize, head_type: DType) -> Example {
    // With a bf16 head the GPU rounds x, the logits and their gradient to 8 bits; the CPU none of them.
    let f32 = if head_type == F32 { 1e-5 } else { 5e-3 };
    Example::new(name, format!("t{t}_d{d}_c{c}")).tolerance(Tolerance { f32, bf16: 1e-2 })
}

fn inputs(
    example: Example,
    [c, d]: [usize; 2],
    t: usize,
    [x_type, head_type]: [DType; 2],
) -> Example {
    // Logits of some units, as a model's are.
    let width = 6.0 / (d as f32).sqrt();
    example
        .input("x", &[t, d], x_type)
        .input_in("head", &[c, d], head_type, [-width, width])
}

fn forward(shape: [usize; 2], targets: Vec<i32>, types: [DType; 2]) -> Example {
    let t = targets.len();
    let example = example("linear_cross_entropy/forward", shape, t, types[1]);
    inputs(example.out("nll", &[t], F32), shape, t, types)
        .run(move |[nll], [x, head]| super::forward(nll, x, head, &targets))
}

fn forward_backward(
    shape: [usize; 2],
    targets: Vec<i32>,
    types: [DType; 2],
    d_nll: f32,
) -> Example {
    let t = targets.len();
    let name = "linear_cross_entropy/forward_backward";
    let example = example(name, shape, t, types[1])
        .out("nll", &[t], F32)
        .out("d_x", &[t, shape[1]], types[0])
        // Small before, so that what is added shows.
        .updated_in("d_head", &shape, F32, [-1e-3, 1e-3]);
    inputs(example, shape, t, types).run(move |[nll, d_x, d_head], [x, head]| {
        super::forward_backward(nll, d_x, Some(d_head), x, head, &targets, d_nll)
    })
}

fn frozen(shape: [usize; 2], targets: Vec<i32>, types: [DType; 2]) -> Example {
    let t = targets.len();
    let name = "linear_cross_entropy/forward_backward";
    let example = example(name, shape, t, types[1])
        .out("nll, frozen", &[t], F32)
        .out("d_x, frozen", &[t, shape[1]], types[0]);
    inputs(example, shape, t, types).run(move |[nll, d_x], [x, head]| {
        super::forward_backward(nll, d_x, None, x, head, &targets, 1.0)
    })
}
