//! Embedding, head and loss: ids and targets at the ends of the released vocabulary, absent, and repeated.

use super::{Check, Tolerance};
use crate::ops::linear_cross_entropy::NO_TARGET;
use crate::ops::{embedding, linear_cross_entropy};
use crate::{DType, Result, Tensor};

/// Rows of the released embedding and head.
const VOCABULARY: usize = 248_320;

pub(super) fn embedding(check: &mut Check) -> Result<()> {
    let last = VOCABULARY as u32 - 1;
    let spread = |t: u32, c: usize| t.wrapping_mul(2_654_435_761) % c as u32;
    // An id that occurs often beside ids that occur once; widths that are and are no multiple of 8.
    let often = |t: u32, c: usize| if t.is_multiple_of(3) { spread(t, c) } else { 5 };
    let cases: [(&str, [usize; 2], Vec<u32>); 7] = [
        ("one row", [10, 40], vec![9]),
        (
            "distinct ids",
            [4000, 64],
            (0..300).map(|t| spread(t, 4000)).collect(),
        ),
        (
            "narrow rows",
            [50, 33],
            (0..700).map(|t| spread(t, 50)).collect(),
        ),
        ("one id", [7, 72], vec![6; 5000]),
        (
            "ids often and once",
            [900, 2560],
            (0..600).map(|t| often(t, 900)).collect(),
        ),
        (
            "ids often and once, odd width",
            [90, 129],
            (0..601).map(|t| often(t, 90)).collect(),
        ),
        (
            "248,320 rows",
            [VOCABULARY, 16],
            vec![last, 0, last, 5, last - 1],
        ),
    ];
    for (name, [c, d], tokens) in &cases {
        for (from, to) in [
            (DType::F32, DType::F32),
            (DType::Bf16, DType::Bf16),
            (DType::F32, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            let shape = [tokens.len(), *d];
            let case = format!("{from} to {to}, {name}");
            let table = check.tensor(&[*c, *d], from);
            // A copy: both round to nearest even, nothing may differ.
            let exact = Tolerance {
                f32: 0.0,
                bf16: 0.0,
            };
            check.both(
                &case,
                exact,
                vec![("out", Tensor::poison(&shape, to))],
                &[&table],
                |out, ins| embedding::forward(&mut out[0], &ins[0], tokens),
            )?;
            if from == to {
                let d_out = check.tensor(&shape, from);
                let d_table = check.tensor(&[*c, *d], DType::F32);
                check.both(
                    &case,
                    Tolerance::USUAL,
                    vec![("d_table", d_table)],
                    &[&d_out],
                    |out, ins| embedding::backward(&mut out[0], &ins[0], tokens),
                )?;
            }
        }
    }
    Ok(())
}

pub(super) fn linear_cross_entropy(check: &mut Check) -> Result<()> {
    let some = |t: usize, c: usize| -> Vec<i32> {
        (0..t)
            .map(|t| match t % 3 {
                1 => NO_TARGET,
                _ => (t * 31 % c) as i32,
            })
            .collect()
    };
    let last = VOCABULARY as i32 - 1;
    let cases: [(&str, [usize; 2], Vec<i32>); 8] = [
        ("one row", [96, 64], vec![95]),
        ("no target", [96, 64], vec![NO_TARGET; 9]),
        (
            "one target",
            [136, 40],
            [vec![NO_TARGET; 8], vec![3]].concat(),
        ),
        ("odd sizes", [131, 36], some(77, 131)),
        ("every row, one class", [520, 128], vec![519; 200]),
        ("several chunks", [72, 24], some(6300, 72)),
        ("hidden 2560", [1000, 2560], some(150, 1000)),
        (
            "248,320 classes",
            [VOCABULARY, 32],
            vec![last, NO_TARGET, 0, last - 1, 7],
        ),
    ];
    // x, head
    let kinds = [
        [DType::F32, DType::F32],
        [DType::Bf16, DType::Bf16],
        [DType::F32, DType::Bf16],
        [DType::Bf16, DType::F32],
    ];
    for (name, [c, d], targets) in &cases {
        for [x_type, head_type] in kinds {
            // With a bf16 head the GPU rounds x, the logits and their gradient to 8 bits; the CPU none of them.
            let tolerance = Tolerance {
                f32: if head_type == DType::F32 { 1e-5 } else { 5e-3 },
                bf16: 1e-2,
            };
            let t = targets.len();
            let case = format!("{x_type} x {head_type}, {name}");
            // Logits of some units, as a model's are.
            let width = 6.0 / (*d as f32).sqrt();
            let x = check.tensor(&[t, *d], x_type);
            let head = check.range(&[*c, *d], head_type, -width, width);
            check.both(
                &case,
                tolerance,
                vec![("nll", Tensor::poison(&[t], DType::F32))],
                &[&x, &head],
                |out, ins| linear_cross_entropy::forward(&mut out[0], &ins[0], &ins[1], targets),
            )?;
            let outputs = |d_head| {
                vec![
                    ("nll", Tensor::poison(&[t], DType::F32)),
                    ("d_x", Tensor::poison(&[t, *d], x_type)),
                    ("d_head", d_head),
                ]
            };
            // Small before, so that what is added shows.
            let d_head = check.range(&[*c, *d], DType::F32, -1e-3, 1e-3);
            check.both(
                &case,
                tolerance,
                outputs(d_head),
                &[&x, &head],
                |out, ins| {
                    let [nll, d_x, d_head] = out else {
                        unreachable!("three outputs were handed in")
                    };
                    let (x, head) = (&ins[0], &ins[1]);
                    linear_cross_entropy::forward_backward(
                        nll,
                        d_x,
                        Some(d_head),
                        x,
                        head,
                        targets,
                        0.125,
                    )
                },
            )?;
            if *name == "odd sizes" {
                let case = format!("{case}, frozen head");
                let frozen = outputs(Tensor::zeros(&[1], DType::F32));
                check.both(&case, tolerance, frozen, &[&x, &head], |out, ins| {
                    let (nll, rest) = out.split_at_mut(1);
                    let (nll, d_x) = (&mut nll[0], &mut rest[0]);
                    let (x, head) = (&ins[0], &ins[1]);
                    linear_cross_entropy::forward_backward(nll, d_x, None, x, head, targets, 1.0)
                })?;
            }
        }
    }
    Ok(())
}
