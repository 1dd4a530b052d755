//! Products against the definition in f64, for all pairs of types.

use super::*;
use crate::ops::testing::{STORAGES, assert_close, f64s, plus, pool, rows, tensor};
use crate::{DType, Error};

/// Few rows in even and odd number, many rows, several panels of weights and blocks of rows; nothing a multiple of a vector.
const SHAPES: [(usize, usize, usize); 7] = [
    (1, 1, 1),
    (3, 70, 33),
    (8, 5, 20_000),
    (32, 33, 1),
    (33, 1, 65),
    (70, 67, 211),
    (150, 40, 14),
];

/// (rows, inner, columns) product of a, b given by their element functions.
fn product(
    (m, k, n): (usize, usize, usize),
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            out.push((0..k).map(|l| a(i, l) * b(l, j)).sum());
        }
    }
    out
}

fn storages() -> impl Iterator<Item = (DType, DType, DType, f64)> {
    STORAGES.into_iter().flat_map(|(out, tolerance)| {
        let inputs = [DType::F32, DType::Bf16];
        inputs
            .map(|x| inputs.map(|w| (out, x, w, tolerance)))
            .into_iter()
            .flatten()
    })
}

#[test]
fn forward_agrees_with_f64_in_every_mixture_of_storages() {
    for (t, i, o) in SHAPES {
        for (y_dtype, x_dtype, w_dtype, tolerance) in storages() {
            let (x, w) = (tensor(&[t, i], 1, x_dtype), tensor(&[o, i], 2, w_dtype));
            let (x_64, w_64) = (f64s(&x), f64s(&w));
            let want = product((t, i, o), |t, l| x_64[t * i + l], |l, o| w_64[o * i + l]);
            let mut y = Tensor::poison(&[t, o], y_dtype);
            forward(&mut y, &x, &w).unwrap();
            assert_close("y", &y, &want, tolerance);

            let before = tensor(&[t, o], 3, y_dtype);
            let mut y = before.clone();
            let mut onto = Tensor::poison(&[t, o], y_dtype);
            forward_onto(&mut onto, &before, &x, &w).unwrap();
            assert_close("y onto a base", &onto, &plus(&want, &before), tolerance);
            forward_accumulate(&mut y, &x, &w, -0.5).unwrap();
            let want: Vec<f64> = want.iter().map(|y| -0.5 * y).collect();
            assert_close("y added to", &y, &plus(&want, &before), tolerance);
        }
    }
}

#[test]
fn backward_input_agrees_with_f64_in_every_mixture_of_storages() {
    for (t, i, o) in SHAPES {
        for (x_dtype, y_dtype, w_dtype, tolerance) in storages() {
            let (d_y, w) = (tensor(&[t, o], 1, y_dtype), tensor(&[o, i], 2, w_dtype));
            let (d_y_64, w_64) = (f64s(&d_y), f64s(&w));
            let want = product(
                (t, o, i),
                |t, l| d_y_64[t * o + l],
                |l, i_idx| 0.25 * w_64[l * i + i_idx],
            );
            let mut d_x = Tensor::poison(&[t, i], x_dtype);
            backward_input(&mut d_x, &d_y, &w, 0.25, Write::Assign).unwrap();
            assert_close("d_x", &d_x, &want, tolerance);

            let before = tensor(&[t, i], 3, x_dtype);
            let mut d_x = before.clone();
            backward_input(&mut d_x, &d_y, &w, 0.25, Write::Accumulate).unwrap();
            assert_close("d_x added to", &d_x, &plus(&want, &before), tolerance);
        }
    }
}

#[test]
fn backward_weight_assigns_or_adds_to_what_was_there() {
    for (t, i, o) in SHAPES {
        for (_, x_dtype, y_dtype, _) in storages().take(4) {
            let (d_y, x) = (tensor(&[t, o], 1, y_dtype), tensor(&[t, i], 2, x_dtype));
            let (d_y_64, x_64) = (f64s(&d_y), f64s(&x));
            let want = product(
                (o, t, i),
                |o_idx, l| 2.0 * d_y_64[l * o + o_idx],
                |l, i_idx| x_64[l * i + i_idx],
            );
            let before = tensor(&[o, i], 3, DType::F32);
            let mut d_w = before.clone();
            backward_weight(&mut d_w, &d_y, &x, 2.0, Write::Accumulate).unwrap();
            assert_close("d_w", &d_w, &plus(&want, &before), 1e-5);
            let mut d_w = Tensor::poison(&[o, i], DType::F32);
            backward_weight(&mut d_w, &d_y, &x, 2.0, Write::Assign).unwrap();
            assert_close("d_w assigned", &d_w, &want, 1e-5);
        }
    }
}

#[test]
fn row_of_a_small_batch_has_the_bytes_it_has_alone() {
    for (dtype, _) in STORAGES {
        let (x, w) = (tensor(&[32, 203], 1, dtype), tensor(&[1001, 203], 2, dtype));
        let mut y = Tensor::poison(&[32, 1001], DType::F32);
        forward(&mut y, &x, &w).unwrap();
        for t in 0..32 {
            let mut alone = Tensor::poison(&[1, 1001], DType::F32);
            forward(&mut alone, &rows(&x, t..t + 1), &w).unwrap();
            assert_eq!(alone.f32s(), &y.f32s()[t * 1001..][..1001]);
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (t, i, o) in [(8, 300, 700), (150, 700, 260)] {
        let (x, w) = (
            tensor(&[t, i], 1, DType::Bf16),
            tensor(&[o, i], 2, DType::F32),
        );
        let run = |n_threads: usize| {
            pool(n_threads).install(|| {
                let mut y = Tensor::poison(&[t, o], DType::F32);
                let mut d_x = Tensor::poison(&[t, i], DType::F32);
                let mut d_w = Tensor::zeros(&[o, i], DType::F32);
                forward(&mut y, &x, &w).unwrap();
                backward_input(&mut d_x, &y, &w, 1.0, Write::Assign).unwrap();
                backward_weight(&mut d_w, &y, &x, 1.0, Write::Accumulate).unwrap();
                [y, d_x, d_w]
            })
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(5));
    }
}

#[test]
fn nan_stays_in_its_row() {
    for t in [4, 60] {
        let (mut x, w) = (
            tensor(&[t, 40], 1, DType::F32),
            tensor(&[30, 40], 2, DType::Bf16),
        );
        x.f32s_mut()[40..80].fill(f32::NAN);
        let mut y = Tensor::poison(&[t, 30], DType::F32);
        forward(&mut y, &x, &w).unwrap();
        for (row, y) in y.f32s().chunks(30).enumerate() {
            assert!(y.iter().all(|y| y.is_nan() == (row == 1)), "row {row}");
        }
    }
}

#[test]
fn empty_dimensions_give_zeros() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32);
    for t in [2, 40] {
        let mut y = Tensor::poison(&[t, 3], DType::F32);
        forward(&mut y, &zeros(&[t, 0]), &zeros(&[3, 0])).unwrap();
        assert_eq!(y, zeros(&[t, 3]));
        let mut d_x = Tensor::poison(&[t, 3], DType::F32);
        let (d_y, w) = (zeros(&[t, 0]), zeros(&[0, 3]));
        backward_input(&mut d_x, &d_y, &w, 1.0, Write::Assign).unwrap();
        assert_eq!(d_x, zeros(&[t, 3]));
    }
    forward(&mut zeros(&[0, 3]), &zeros(&[0, 4]), &zeros(&[3, 4])).unwrap();
    let mut d_w = tensor(&[3, 4], 1, DType::F32);
    let before = d_w.clone();
    let (d_y, x) = (zeros(&[0, 3]), zeros(&[0, 4]));
    backward_weight(&mut d_w, &d_y, &x, 1.0, Write::Accumulate).unwrap();
    assert_eq!(d_w, before);
}

#[test]
fn leading_dimensions_are_rows() {
    let (x, w) = (
        tensor(&[2, 3, 5], 1, DType::F32),
        tensor(&[4, 5], 2, DType::F32),
    );
    let mut heads = Tensor::poison(&[2, 3, 4], DType::F32);
    forward(&mut heads, &x, &w).unwrap();
    let mut flat = x.clone();
    flat.reshape(&[6, 5]);
    let mut y = Tensor::poison(&[6, 4], DType::F32);
    forward(&mut y, &flat, &w).unwrap();
    assert_eq!(heads.f32s(), y.f32s());
}

#[test]
fn heads_side_by_side_are_columns() {
    let (x, w) = (
        tensor(&[7, 3, 5], 1, DType::F32),
        tensor(&[8, 15], 2, DType::F32),
    );
    let mut heads = Tensor::poison(&[7, 2, 4], DType::F32);
    forward(&mut heads, &x, &w).unwrap();
    let mut flat = x.clone();
    flat.reshape(&[7, 15]);
    let mut y = Tensor::poison(&[7, 8], DType::F32);
    forward(&mut y, &flat, &w).unwrap();
    assert_eq!(heads.f32s(), y.f32s());
}

#[test]
fn wrong_arguments_are_refused() {
    let (x, w) = (
        tensor(&[6, 5], 1, DType::F32),
        tensor(&[4, 5], 2, DType::F32),
    );
    let error = forward(&mut Tensor::zeros(&[6, 3], DType::F32), &x, &w).unwrap_err();
    assert_eq!(
        error.to_string(),
        "matmul::forward: expected [..., 4] for `y_to`, got [6, 3]"
    );
    let got = forward(&mut Tensor::zeros(&[7, 4], DType::F32), &x, &w);
    assert!(matches!(got, Err(Error::Shape { arg: "y_to", .. })));
    let got = forward(
        &mut Tensor::zeros(&[6, 4], DType::F32),
        &x,
        &tensor(&[4, 6], 2, DType::F32),
    );
    assert!(matches!(got, Err(Error::Shape { arg: "x_ti", .. })));
    let d_y = tensor(&[6, 4], 3, DType::F32);
    let mut d_w = Tensor::zeros(&[4, 5], DType::Bf16);
    let got = backward_weight(&mut d_w, &d_y, &x, 1.0, Write::Accumulate);
    assert!(matches!(got, Err(Error::DType { arg: "d_w_oi", .. })));
}
