//! What stands around the layers: embedding, head and loss (ids and targets at the ends of the released vocabulary, absent, and
//! repeated), the gradients' norm, the optimizer's step.

use super::{Check, Tolerance};
use crate::ops::adamw::Rounding;
use crate::ops::linear_cross_entropy::NO_TARGET;
use crate::ops::{adamw, embedding, grad_norm, linear_cross_entropy};
use crate::{DType, Result, Tensor};

/// Rows of the released embedding and head.
const VOCABULARY: usize = 248_320;

/// Where both devices round every operation alike.
const EXACT: Tolerance = Tolerance {
    f32: 0.0,
    bf16: 0.0,
};

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
            check.both(
                &case,
                EXACT,
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

pub(super) fn grad_norm(check: &mut Check) -> Result<()> {
    for dtype in [DType::F32, DType::Bf16] {
        let sizes: [&[usize]; 4] = [
            &[1],
            &[16_384, 0, 16_385],
            &[8, 3, 100_003, 7],
            &[2_000_000],
        ];
        for sizes in sizes {
            let grads: Vec<Tensor> = sizes.iter().map(|n| check.tensor(&[*n], dtype)).collect();
            let grads: Vec<&Tensor> = grads.iter().collect();
            check.both(
                &format!("{dtype}, sizes {sizes:?}"),
                Tolerance::USUAL,
                vec![("norm", Tensor::poison(&[1], DType::F32))],
                &grads,
                |out, ins| {
                    let norm = grad_norm::forward(&ins.iter().collect::<Vec<_>>())?;
                    out[0].copy_from(&Tensor::from_f32(&[1], vec![norm]))
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn adamw(check: &mut Check) -> Result<()> {
    use DType::{Bf16, F32};
    let kinds = [
        // w, m, v, grad
        [F32, F32, F32, F32],
        [Bf16, F32, F32, F32],
        [Bf16, Bf16, Bf16, F32],
        [Bf16, Bf16, Bf16, Bf16],
        [F32, Bf16, Bf16, F32],
    ];
    for rounding in [Rounding::Stochastic, Rounding::Nearest] {
        for kind in kinds {
            for (n, step) in [(1, 1), (1021, 3), (8, 2), (100_000, 12_345)] {
                adamw_step(check, kind, n, step, rounding)?;
            }
            adamw_step_all(check, kind, rounding)?;
        }
    }
    Ok(())
}

const UPDATE: adamw::Update = adamw::Update {
    lr: 1e-4,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    step: 17,
    grad_scale: 0.37,
    seed: 5,
    rounding: Rounding::Stochastic,
};

fn adamw_step(
    check: &mut Check,
    [w_type, m_type, v_type, grad_type]: [DType; 4],
    n: usize,
    step: u64,
    rounding: Rounding,
) -> Result<()> {
    let w = check.tensor(&[n], w_type);
    let m = check.range(&[n], m_type, -0.1, 0.1);
    let v = check.range(&[n], v_type, 0.0, 0.01);
    let grad = check.tensor(&[n], grad_type);
    let update = adamw::Update {
        step,
        rounding,
        ..UPDATE
    };
    check.both(
        &format!(
            "w {w_type}, m {m_type}, v {v_type}, gradient {grad_type}, {n} elements, {rounding:?}"
        ),
        EXACT,
        vec![("w", w), ("m", m), ("v", v)],
        &[&grad],
        |out, ins| {
            let [w, m, v] = out else {
                unreachable!("three outputs were handed in")
            };
            adamw::step(w, m, v, &ins[0], &update)
        },
    )
}

/// Many tensors at once: of no elements, of less than a block, of several.
fn adamw_step_all(check: &mut Check, kind: [DType; 4], rounding: Rounding) -> Result<()> {
    let sizes = [1, 8, 0, 1021, 8192, 20_000, 0];
    let tensors =
        |check: &mut Check, dtype, low, high| sizes.map(|n| check.range(&[n], dtype, low, high));
    let w = tensors(check, kind[0], -1.0, 1.0);
    let m = tensors(check, kind[1], -0.1, 0.1);
    let v = tensors(check, kind[2], 0.0, 0.01);
    let grads = tensors(check, kind[3], -1.0, 1.0);
    let of = |name, tensors: [Tensor; 7]| tensors.map(|tensor| (name, tensor));
    let outputs = [of("w", w), of("m", m), of("v", v)];
    let [w_type, m_type, v_type, grad_type] = kind;
    check.both(
        &format!(
            "all at once, w {w_type}, m {m_type}, v {v_type}, gradient {grad_type}, {rounding:?}"
        ),
        EXACT,
        outputs.into_iter().flatten().collect(),
        &grads.each_ref(),
        |out, ins| {
            let (w, rest) = out.split_at_mut(sizes.len());
            let (m, v) = rest.split_at_mut(sizes.len());
            let moments = w.iter_mut().zip(m.iter_mut().zip(v));
            let parts = moments.zip(ins.iter().zip(0..));
            let mut parts: Vec<adamw::Part> = parts
                .map(|((w, (m, v)), (grad, seed))| adamw::Part {
                    w,
                    m,
                    v,
                    grad,
                    weight_decay: 0.1 * (seed % 2) as f32,
                    seed,
                })
                .collect();
            let update = adamw::Update { rounding, ..UPDATE };
            adamw::step_all(&mut parts, &update)
        },
    )
}
