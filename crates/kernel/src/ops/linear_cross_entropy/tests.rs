//! Losses and gradients against the definition in f64, for chunks of any number of rows.

use super::*;
use crate::DType;
use crate::ops::testing::{BF16_REL, STORAGES, assert_close, f64s, gradient, plus, tensor};

/// (nll, gradient of the logits for d_nll = 1).
fn define(x: &[f64], head: &[f64], targets: &[i32], d: usize) -> (Vec<f64>, Vec<f64>) {
    let c = head.len() / d;
    let (mut nll, mut d_logits) = (vec![0.0; targets.len()], vec![0.0; targets.len() * c]);
    for (t, target) in targets
        .iter()
        .enumerate()
        .filter(|(_, target)| **target != NO_TARGET)
    {
        let x = &x[t * d..(t + 1) * d];
        let logits: Vec<f64> = head
            .chunks(d)
            .map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum())
            .collect();
        let sum: f64 = logits.iter().map(|l| l.exp()).sum();
        nll[t] = sum.ln() - logits[*target as usize];
        for (i, logit) in logits.iter().enumerate() {
            d_logits[t * c + i] = logit.exp() / sum - if i == *target as usize { 1.0 } else { 0.0 };
        }
    }
    (nll, d_logits)
}

fn targets(t: usize, c: usize) -> Vec<i32> {
    (0..t)
        .map(|t| {
            if t % 3 == 1 {
                NO_TARGET
            } else {
                (t * 31 % c) as i32
            }
        })
        .collect()
}

#[test]
fn loss_and_gradients_agree_with_f64() {
    for (dtype, _) in STORAGES {
        for (t, d, c) in [(1, 1, 1), (5, 7, 33), (23, 40, 131), (2000, 3, 65)] {
            let (x, head) = (tensor(&[t, d], 1, dtype), tensor(&[c, d], 2, dtype));
            let targets = targets(t, c);
            let d_nll = 0.125;
            let (want, d_logits) = define(&f64s(&x), &f64s(&head), &targets, d);
            let (mut want_x, mut want_head) = (vec![0.0; t * d], vec![0.0; c * d]);
            let (x_64, head_64) = (f64s(&x), f64s(&head));
            for t in 0..t {
                for c_idx in 0..c {
                    let g = d_nll as f64 * d_logits[t * c + c_idx];
                    for i in 0..d {
                        want_x[t * d + i] += g * head_64[c_idx * d + i];
                        want_head[c_idx * d + i] += g * x_64[t * d + i];
                    }
                }
            }

            let mut nll = Tensor::poison(&[t], DType::F32);
            forward(&mut nll, &x, &head, &targets).unwrap();
            assert_close("nll", &nll, &want, 2e-6);

            let mut again = Tensor::poison(&[t], DType::F32);
            let mut d_x = Tensor::poison(&[t, d], dtype);
            let before = tensor(&[c, d], 3, DType::F32);
            let mut d_head = before.clone();
            forward_backward(
                &mut again,
                &mut d_x,
                Some(&mut d_head),
                &x,
                &head,
                &targets,
                d_nll,
            )
            .unwrap();
            assert_eq!(again, nll);
            let tolerance = if dtype == DType::F32 { 1e-5 } else { BF16_REL };
            assert_close("d_x", &d_x, &want_x, tolerance);
            // Where there are instructions for it, the gradient of the logits is bf16.
            assert_close("d_head", &d_head, &plus(&want_head, &before), tolerance);

            let mut frozen = Tensor::poison(&[t, d], dtype);
            forward_backward(&mut again, &mut frozen, None, &x, &head, &targets, d_nll).unwrap();
            assert_eq!(frozen, d_x);
        }
    }
}

#[test]
fn definition_agrees_with_differences() {
    let (t, d, c) = (4, 3, 6);
    let at = [
        tensor(&[t, d], 1, DType::F32),
        tensor(&[c, d], 2, DType::F32),
    ]
    .map(|x| f64s(&x));
    let targets = targets(t, c);
    let (_, d_logits) = define(&at[0], &at[1], &targets, d);
    let loss = |x: &[Vec<f64>]| define(&x[0], &x[1], &targets, d).0.iter().sum();
    let d_x = gradient(&at, 0, loss);
    for t in 0..t {
        for i in 0..d {
            let want: f64 = (0..c)
                .map(|c_idx| d_logits[t * c + c_idx] * at[1][c_idx * d + i])
                .sum();
            assert!((d_x[t * d + i] - want).abs() < 1e-8);
        }
    }
}

#[test]
fn rows_without_a_target_are_not_read() {
    let (t, d, c) = (6, 4, 9);
    let (mut x, head) = (
        tensor(&[t, d], 1, DType::F32),
        tensor(&[c, d], 2, DType::F32),
    );
    let targets = targets(t, c);
    for (x, target) in x.f32s_mut().chunks_mut(d).zip(&targets) {
        if *target == NO_TARGET {
            x.fill(f32::NAN);
        }
    }
    let (mut nll, mut d_x) = (
        Tensor::poison(&[t], DType::F32),
        Tensor::poison(&[t, d], DType::F32),
    );
    let mut d_head = Tensor::zeros(&[c, d], DType::F32);
    forward_backward(
        &mut nll,
        &mut d_x,
        Some(&mut d_head),
        &x,
        &head,
        &targets,
        1.0,
    )
    .unwrap();
    assert!(
        nll.f32s()
            .iter()
            .chain(d_x.f32s())
            .chain(d_head.f32s())
            .all(|x| x.is_finite())
    );
    for (t, target) in targets
        .iter()
        .enumerate()
        .filter(|(_, target)| **target == NO_TARGET)
    {
        assert_eq!((nll.f32s()[t], *target), (0.0, NO_TARGET));
        assert_eq!(d_x.f32s()[t * d..(t + 1) * d], [0.0; 4]);
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let x = Tensor::from_f32(&[1, 1], vec![1.0]);
    let head = Tensor::from_f32(&[3, 1], vec![1e4, 1e4, -1e4]);
    let mut nll = Tensor::poison(&[1], DType::F32);
    forward(&mut nll, &x, &head, &[1]).unwrap();
    assert_close("nll", &nll, &[2f64.ln()], 1e-6);
    forward(&mut nll, &x, &head, &[2]).unwrap();
    assert_close("nll", &nll, &[2e4 + 2f64.ln()], 1e-6);
}

#[test]
fn no_targets_leave_the_head_gradient() {
    let (x, head) = (
        tensor(&[3, 2], 1, DType::Bf16),
        tensor(&[5, 2], 2, DType::Bf16),
    );
    let (mut nll, mut d_x) = (
        Tensor::poison(&[3], DType::F32),
        Tensor::poison(&[3, 2], DType::Bf16),
    );
    let before = tensor(&[5, 2], 3, DType::F32);
    let mut d_head = before.clone();
    forward_backward(
        &mut nll,
        &mut d_x,
        Some(&mut d_head),
        &x,
        &head,
        &[NO_TARGET; 3],
        1.0,
    )
    .unwrap();
    assert_eq!(nll, Tensor::zeros(&[3], DType::F32));
    assert_eq!(d_x, Tensor::zeros(&[3, 2], DType::Bf16));
    assert_eq!(d_head, before);
}

#[test]
fn logits_of_the_released_vocabulary_fit_the_budget() {
    let rows = cpu::rows_per_chunk(248_320);
    assert!(rows >= 128 && rows * 248_320 * 4 <= LOGIT_BYTES, "{rows}");
    assert_eq!(cpu::rows_per_chunk(2048), ROW_CHUNK);
}

#[test]
fn gpu_chunks_fit_the_budget_and_balance() {
    let rows = |n, c, dtype, gib: usize| {
        cuda::rows_per_chunk(n, c, dtype, DeviceProperties::with_memory(gib << 30))
    };
    assert_eq!(rows(15_360, 248_320, DType::Bf16, 80), 3840);
    assert_eq!(rows(4096, 248_320, DType::Bf16, 80), 4096);
    assert_eq!(rows(4097, 248_320, DType::Bf16, 80), 2176);
    assert_eq!(rows(4096, 248_320, DType::F32, 80), 2048);
    assert_eq!(rows(4096, 248_320, DType::Bf16, 12), 1024);
    assert_eq!(rows(1, 248_320, DType::Bf16, 80), cuda::ROW_GROUP);
    assert_eq!(rows(5000, 65, DType::F32, 80), 2560);
}

#[test]
fn no_share_of_targets_takes_more_scratch_than_is_said() {
    for dtype in [DType::F32, DType::Bf16] {
        for memory_bytes in [4 << 30, 30 << 30, 80 << 30] {
            let gpu = DeviceProperties::with_memory(memory_bytes);
            let dims = Dims {
                c: 248_320,
                d: 2560,
            };
            let said = scratch_bytes(gpu, [5120, dims.d, dims.c], dtype, DType::F32);
            for n_targets in (1..=5120).step_by(13) {
                let rows = cuda::rows_per_chunk(n_targets, dims.c, dtype, gpu);
                let taken = cuda::chunk_bytes(rows, dims, dtype, DType::F32);
                assert!(taken <= said, "{taken} of {said}, {n_targets} targets");
            }
        }
    }
}

#[test]
fn gpu_row_table_is_filled_up_to_whole_groups() {
    assert_eq!(cuda::row_table(&[NO_TARGET; 5]), None);
    let table = cuda::row_table(&[NO_TARGET, 7, NO_TARGET, 0]).unwrap();
    assert_eq!(table.len(), 2 * cuda::ROW_GROUP);
    assert_eq!(table[..3], [1, 3, u32::MAX]);
    assert_eq!(table[cuda::ROW_GROUP..][..3], [7, 0, 0]);
}

#[test]
fn target_outside_the_vocabulary_is_refused() {
    let (x, head) = (
        tensor(&[2, 2], 1, DType::F32),
        tensor(&[5, 2], 2, DType::F32),
    );
    let mut nll = Tensor::poison(&[2], DType::F32);
    for bad in [5, -100] {
        let error = forward(&mut nll, &x, &head, &[0, bad]).unwrap_err();
        let want = format!(
            "linear_cross_entropy::forward: `targets_t` holds {bad} at row 1, outside 0..5"
        );
        assert_eq!(error.to_string(), want);
    }
}
