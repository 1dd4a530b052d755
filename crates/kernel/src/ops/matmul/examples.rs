//! Calls in all pairs of types, of few rows and many.

use super::Write;
use crate::DType::{self, Bf16, F32};
use crate::example::{Example, Sizes, Tolerance};

/// Of x, w and y.
const KINDS: [[DType; 3]; 6] = [
    [F32, F32, F32],
    [Bf16, Bf16, Bf16],
    [Bf16, Bf16, F32],
    // A gradient in f32 against bf16 weights; an f32 adapter under bf16 activations.
    [F32, Bf16, Bf16],
    [Bf16, F32, Bf16],
    // An adapter's gradient from the f32 residual stream.
    [F32, F32, Bf16],
];

const WRITES: [Write; 2] = [Write::Assign, Write::Accumulate];

pub(crate) fn compared() -> Vec<Example> {
    let mut all = Vec::new();
    for shape in [[64, 128, 96], [37, 72, 40], [1, 256, 128], [129, 16, 520]] {
        for kind in KINDS {
            all.push(forward(shape, kind));
            all.push(forward_accumulate(shape, kind));
            all.push(forward_onto(shape, kind));
            for write in WRITES {
                all.push(backward_input(shape, kind, 2.0, write));
            }
        }
        for dtype in [F32, Bf16] {
            for write in WRITES {
                all.push(backward_weight(shape, dtype, write));
            }
        }
    }
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let shape = [sizes.n_tokens, sizes.hidden, sizes.feed_forward];
    let kind = [sizes.dtype; 3];
    vec![
        forward(shape, kind),
        backward_input(shape, kind, 1.0, Write::Assign),
        backward_weight(shape, sizes.dtype, Write::Accumulate),
    ]
}

fn example(name: &'static str, [t, i, o]: [usize; 3], kind: [DType; 3]) -> Example {
    let [x_type, w_type, y_type] = kind;
    // Where one operand is bf16 the GPU rounds the other to bf16 as well.
    let mixed = x_type != w_type || (x_type == F32 && y_type == Bf16);
    Example::new(name, format!("t{t}_i{i}_o{o}"))
        .tolerance(Tolerance {
            f32: if mixed { 5e-3 } else { 2e-6 },
            bf16: 5e-3,
        })
        .operations_at_least(2.0 * (t * i) as f64 * o as f64)
}

fn forward(shape: [usize; 3], kind: [DType; 3]) -> Example {
    let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
    example("matmul/forward", shape, kind)
        .out("y", &[t, o], y_type)
        .input("x", &[t, i], x_type)
        .input("w", &[o, i], w_type)
        .run(|[y], [x, w]| super::forward(y, x, w))
}

fn forward_accumulate(shape: [usize; 3], kind: [DType; 3]) -> Example {
    let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
    example("matmul/forward_accumulate", shape, kind)
        .updated("y", &[t, o], y_type)
        .input("x", &[t, i], x_type)
        .input("w", &[o, i], w_type)
        .run(|[y], [x, w]| super::forward_accumulate(y, x, w, 0.5))
}

fn forward_onto(shape: [usize; 3], kind: [DType; 3]) -> Example {
    let ([t, i, o], [x_type, w_type, y_type]) = (shape, kind);
    example("matmul/forward_onto", shape, kind)
        .out("y", &[t, o], y_type)
        .input("base", &[t, o], y_type)
        .input("x", &[t, i], x_type)
        .input("w", &[o, i], w_type)
        .run(|[y], [base, x, w]| super::forward_onto(y, base, x, w))
}

fn backward_input(shape: [usize; 3], kind: [DType; 3], alpha: f32, write: Write) -> Example {
    let ([t, i, o], [d_y_type, w_type, d_x_type]) = (shape, kind);
    let example = example("matmul/backward_input", shape, kind);
    let example = match write {
        Write::Assign => example.out("d_x", &[t, i], d_x_type),
        Write::Accumulate => example.updated("d_x added", &[t, i], d_x_type),
    };
    example
        .input("d_y", &[t, o], d_y_type)
        .input("w", &[o, i], w_type)
        .run(move |[d_x], [d_y, w]| super::backward_input(d_x, d_y, w, alpha, write))
}

fn backward_weight(shape: [usize; 3], x_type: DType, write: Write) -> Example {
    let [t, i, o] = shape;
    let example = example("matmul/backward_weight", shape, [x_type; 3]);
    let example = match write {
        Write::Assign => example.out("d_w", &[o, i], F32),
        Write::Accumulate => example.updated("d_w added", &[o, i], F32),
    };
    example
        .input("d_y", &[t, o], x_type)
        .input("x", &[t, i], x_type)
        .run(move |[d_w], [d_y, x]| super::backward_weight(d_w, d_y, x, 1.0, write))
}
