//! Both steps against the definition in f64, with dropout and without.

use super::*;
use crate::Error;
use crate::ops::matmul;
use crate::ops::testing::{STORAGES, assert_close, f64s, plus, tensor};

/// Fewer rows than a block of them, several blocks, nothing a multiple of a vector.
const SHAPES: [(usize, usize, usize, usize); 3] = [(1, 5, 3, 1), (9, 40, 7, 3), (50, 33, 64, 16)];
const SCALE: f32 = 2.5;

fn dropouts() -> [Option<Dropout>; 2] {
    let some = Dropout {
        rate: 0.3,
        seed: 4,
        stream: 9,
    };
    [None, Some(some)]
}

fn dropped(x: &Tensor, drops: Option<&Dropout>) -> Tensor {
    let mut dropped = x.to_dtype(DType::F32);
    if let Some(drops) = drops {
        drops.apply(dropped.f32s_mut(), 0);
    }
    dropped
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32)
}

#[test]
fn forward_agrees_with_dropout_and_products() {
    for (dtype, tolerance) in STORAGES {
        for (t, i, o, r) in SHAPES {
            for drops in dropouts() {
                let x = tensor(&[t, i], 1, dtype);
                let a = tensor(&[r, i], 2, DType::F32);
                let b = tensor(&[o, r], 3, DType::F32);
                let mut want = zeros(&[t, r]);
                matmul::forward(&mut want, &dropped(&x, drops.as_ref()), &a).unwrap();
                let mut u = Tensor::poison(&[t, r], dtype);
                down_forward(&mut u, &x, &a, drops.as_ref()).unwrap();
                assert_close("u", &u, &f64s(&want), tolerance);

                let mut want = zeros(&[t, o]);
                matmul::forward_accumulate(&mut want, &u, &b, SCALE).unwrap();
                let mut y = Tensor::poison(&[t, o], dtype);
                up_forward(&mut y, &u, &b, SCALE, Write::Assign).unwrap();
                assert_close("y", &y, &f64s(&want), tolerance);
                let before = tensor(&[t, o], 4, dtype);
                let mut y = before.clone();
                up_forward(&mut y, &u, &b, SCALE, Write::Accumulate).unwrap();
                assert_close("y added to", &y, &plus(&f64s(&want), &before), tolerance);
            }
        }
    }
}

#[test]
fn backward_agrees_with_dropout_and_products() {
    for (dtype, tolerance) in STORAGES {
        for (t, i, o, r) in SHAPES {
            for drops in dropouts() {
                let drops = drops.as_ref();
                let x = tensor(&[t, i], 1, dtype);
                let a = tensor(&[r, i], 2, DType::F32);
                let b = tensor(&[o, r], 3, DType::F32);
                let u = tensor(&[t, r], 4, dtype);
                let d_y = tensor(&[t, o], 5, dtype);

                let mut want_u = zeros(&[t, r]);
                matmul::backward_input(&mut want_u, &d_y, &b, SCALE, Write::Assign).unwrap();
                let before = tensor(&[o, r], 6, DType::F32);
                let mut want_b = before.clone();
                matmul::backward_weight(&mut want_b, &d_y, &u, SCALE, Write::Accumulate).unwrap();
                let (mut d_u, mut d_b) = (Tensor::poison(&[t, r], dtype), before.clone());
                up_backward(&mut d_u, Some(&mut d_b), &d_y, &u, &b, SCALE).unwrap();
                assert_close("d_u", &d_u, &f64s(&want_u), tolerance);
                assert_close("d_b", &d_b, &f64s(&want_b), 1e-5);

                let mut product = zeros(&[t, i]);
                matmul::backward_input(&mut product, &d_u, &a, 1.0, Write::Assign).unwrap();
                let want_x = f64s(&dropped(&product, drops));
                let before = tensor(&[r, i], 7, DType::F32);
                let mut want_a = before.clone();
                let x_dropped = dropped(&x, drops);
                matmul::backward_weight(&mut want_a, &d_u, &x_dropped, 1.0, Write::Accumulate)
                    .unwrap();
                let (mut d_x, mut d_a) = (Tensor::poison(&[t, i], dtype), before.clone());
                down_backward(&mut d_x, Some(&mut d_a), &d_u, &x, &a, drops, Write::Assign)
                    .unwrap();
                assert_close("d_x", &d_x, &want_x, tolerance);
                assert_close("d_a", &d_a, &f64s(&want_a), 1e-5);
                let before = tensor(&[t, i], 8, dtype);
                let mut d_x = before.clone();
                down_backward(&mut d_x, None, &d_u, &x, &a, drops, Write::Accumulate).unwrap();
                assert_close("d_x added to", &d_x, &plus(&want_x, &before), tolerance);
            }
        }
    }
}

/// As the kernels lay out what blocks add up apart, an H100's at the shapes of a released size.
#[test]
fn scratch_holds_the_partial_sums_of_every_slice() {
    let gpu = DeviceProperties {
        compute: 90,
        n_multiprocessors: 132,
        memory_bytes: 80 << 30,
    };
    let bytes = |dims, dtype| backward_scratch_bytes(gpu, dims, dtype);
    // 18 blocks across, so 14 of 592 rows each down.
    let want = 4 * 16 * (18 * 8192 + 14 * 9216);
    assert_eq!(bytes([8192, 9216, 16], DType::Bf16), want);
    // Ranks 64 and 16: 36 across and 7 down at the larger.
    let want = 4 * 64 * (36 * 8192 + 7 * 9216);
    assert_eq!(bytes([8192, 9216, 80], DType::Bf16), want);
    assert_eq!(bytes([8192, 9216, 16], DType::F32), 0);
    assert_eq!(bytes([8192, 9216, 3], DType::Bf16), 0);
    assert_eq!(bytes([0, 9216, 16], DType::Bf16), 0);
}

#[test]
fn factors_in_bf16_are_refused() {
    let a = tensor(&[2, 8], 1, DType::Bf16);
    let mut u = zeros(&[3, 2]);
    let refused = down_forward(&mut u, &zeros(&[3, 8]), &a, None);
    assert!(matches!(refused, Err(Error::DType { arg: "a_ri", .. })));
}
