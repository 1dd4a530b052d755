//! Calls in all types, with dropout and without, and widths on either side of what tensor cores take.

use super::{Dropout, Write};
use crate::DType::{self, Bf16, F32};
use crate::example::{Example, PAIRS, Sizes, Tolerance};

/// T, I, O, R: ranks and widths of the fast kernels, in slices too, and odd ones.
const SHAPES: [[usize; 4]; 10] = [
    [70, 128, 96, 16],
    [37, 72, 40, 8],
    [1, 256, 128, 64],
    [129, 520, 1032, 32],
    [200, 64, 136, 48],
    [16, 32, 32, 4],
    [600, 1208, 1096, 16],
    [90, 104, 80, 130],
    [33, 40, 24, 3],
    [50, 33, 47, 16],
];

const SCALE: f32 = 2.5;
/// Of dropout.
const RATES: [f32; 2] = [0.0, 0.1];
const WRITES: [Write; 2] = [Write::Assign, Write::Accumulate];

pub(crate) fn compared() -> Vec<Example> {
    let mut all = Vec::new();
    for shape in SHAPES {
        for dtype in [F32, Bf16] {
            all.extend(RATES.map(|rate| down_forward(shape, dtype, rate)));
            all.extend(WRITES.map(|write| up_forward(shape, dtype, write)));
        }
        // Gradients of the residual stream are f32.
        for types in PAIRS {
            all.push(up_backward(shape, types));
            for rate in RATES {
                all.extend(WRITES.map(|write| down_backward(shape, types, rate, write)));
                all.push(down_backward_frozen(shape, types, rate));
            }
        }
    }
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let (d, f) = (sizes.hidden, sizes.feed_forward);
    let shape = [sizes.n_tokens, d, f, sizes.rank];
    let types = [sizes.dtype; 2];
    let rate = 0.01;
    vec![
        down_forward(shape, sizes.dtype, rate),
        up_forward(shape, sizes.dtype, Write::Assign),
        up_backward(shape, types),
        down_backward(shape, types, rate, Write::Assign),
    ]
}

/// `x_type`: of x, u and y. A shape with dropout ends in its rate.
fn example(name: &'static str, shape: [usize; 4], x_type: DType, rate: f32) -> Example {
    let [t, i, o, r] = shape;
    let drops = match rate > 0.0 {
        true => format!("_dropout{rate}"),
        false => String::new(),
    };
    // Beside bf16 a GPU rounds A, B and d_y to bf16.
    let f32 = if x_type == F32 { 1e-5 } else { 6e-3 };
    Example::new(name, format!("t{t}_i{i}_o{o}_r{r}{drops}"))
        .tolerance(Tolerance { f32, bf16: 6e-3 })
}

fn product(t: usize, wide: usize, rank: usize) -> f64 {
    2.0 * (t * wide * rank) as f64
}

fn dropout(rate: f32) -> Option<Dropout> {
    (rate > 0.0).then_some(Dropout {
        rate,
        seed: 77,
        stream: 3,
    })
}

fn down_forward(shape: [usize; 4], dtype: DType, rate: f32) -> Example {
    let [t, i, _, r] = shape;
    let drops = dropout(rate);
    example("low_rank/down_forward", shape, dtype, rate)
        .out("u", &[t, r], dtype)
        .input("x", &[t, i], dtype)
        .input("a", &[r, i], F32)
        .operations_at_least(product(t, i, r))
        .run(move |[u], [x, a]| super::down_forward(u, x, a, drops.as_ref()))
}

fn up_forward(shape: [usize; 4], dtype: DType, write: Write) -> Example {
    let [t, _, o, r] = shape;
    let example = example("low_rank/up_forward", shape, dtype, 0.0);
    let example = match write {
        Write::Assign => example.out("y", &[t, o], dtype),
        Write::Accumulate => example.updated("y added", &[t, o], dtype),
    };
    example
        .input("u", &[t, r], dtype)
        .input("b", &[o, r], F32)
        .operations_at_least(product(t, o, r))
        .run(move |[y], [u, b]| super::up_forward(y, u, b, SCALE, write))
}

fn up_backward(shape: [usize; 4], [x_type, d_y_type]: [DType; 2]) -> Example {
    let [t, _, o, r] = shape;
    example("low_rank/up_backward", shape, x_type, 0.0)
        .out("d_u", &[t, r], x_type)
        .updated("d_b", &[o, r], F32)
        .input("d_y", &[t, o], d_y_type)
        .input("u", &[t, r], x_type)
        .input("b", &[o, r], F32)
        .operations_at_least(2.0 * product(t, o, r))
        .run(|[d_u, d_b], [d_y, u, b]| super::up_backward(d_u, Some(d_b), d_y, u, b, SCALE))
}

fn down_backward(
    shape: [usize; 4],
    [x_type, d_x_type]: [DType; 2],
    rate: f32,
    write: Write,
) -> Example {
    let [t, i, _, r] = shape;
    let drops = dropout(rate);
    let example = example("low_rank/down_backward", shape, x_type, rate);
    let example = match write {
        Write::Assign => example
            .out("d_x", &[t, i], d_x_type)
            .updated("d_a", &[r, i], F32),
        Write::Accumulate => example.updated("d_x added", &[t, i], d_x_type).updated(
            "d_a where d_x is added",
            &[r, i],
            F32,
        ),
    };
    example
        .input("d_u", &[t, r], x_type)
        .input("x", &[t, i], x_type)
        .input("a", &[r, i], F32)
        .operations_at_least(2.0 * product(t, i, r))
        .run(move |[d_x, d_a], [d_u, x, a]| {
            super::down_backward(d_x, Some(d_a), d_u, x, a, drops.as_ref(), write)
        })
}

fn down_backward_frozen(shape: [usize; 4], [x_type, d_x_type]: [DType; 2], rate: f32) -> Example {
    let [t, i, _, r] = shape;
    let drops = dropout(rate);
    example("low_rank/down_backward", shape, x_type, rate)
        .updated("d_x added, frozen", &[t, i], d_x_type)
        .input("d_u", &[t, r], x_type)
        .input("x", &[t, i], x_type)
        .input("a", &[r, i], F32)
        .run(move |[d_x], [d_u, x, a]| {
            super::down_backward(d_x, None, d_u, x, a, drops.as_ref(), Write::Accumulate)
        })
}
