//! Norms, gates, splits, rotation and convolution: heads and hidden states of the models' widths, widths that no vector divides,
//! every mix of storage types that training has, and packed documents shorter than the filter.

use super::{Check, Tolerance};
use crate::ops::rope::Rotation;
use crate::ops::{
    causal_conv1d, delta_gate, delta_inputs, gated_rms_norm, l2_norm, rms_norm, rope, sigmoid_gate,
    split, swiglu,
};
use crate::{DType, Result, Tensor};

const EPS: f32 = 1e-6;
const NO_ERROR: Tolerance = Tolerance {
    f32: 0.0,
    bf16: 0.0,
};
const F32: DType = DType::F32;
const BF16: DType = DType::Bf16;
/// Of activations, their gradients, and weights.
const TYPES: [[DType; 3]; 4] = [
    [F32, F32, F32],
    [BF16, BF16, BF16],
    [BF16, BF16, F32],
    [BF16, F32, BF16],
];
/// Lengths of packed documents: none, shorter than the filter, borders in and at the ends of runs of tokens.
const DOCUMENTS: [&[usize]; 6] = [
    &[1],
    &[2],
    &[5, 1, 2],
    &[1, 2, 0, 3, 122, 1, 63, 64, 65, 130, 4],
    &[0, 16, 16, 0, 0, 17, 15, 0],
    &[700],
];

fn offsets(lengths: &[usize]) -> Vec<u32> {
    let mut end = 0;
    let ends = lengths.iter().map(|length| {
        end += *length as u32;
        end
    });
    [0].into_iter().chain(ends).collect()
}

/// Rows by columns: heads, hidden states, and what fits neither.
const ROWS: [[usize; 2]; 12] = [
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

pub(super) fn rms_norm(check: &mut Check) -> Result<()> {
    for [x_type, d_type, w_type] in TYPES {
        for [rows, d] in ROWS {
            let case = format!("{x_type} {d_type} {w_type} [{rows},{d}]");
            let x = check.tensor(&[rows, d], x_type);
            let w = check.tensor(&[d], w_type);
            let d_out = check.tensor(&[rows, d], d_type);
            let d_x = check.tensor(&[rows, d], d_type);
            let d_w = check.tensor(&[d], F32);
            let mut rstd = Tensor::poison(&[rows], F32);
            rms_norm::forward(&mut x.clone(), &mut rstd, &x, &w, EPS)?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("out", Tensor::poison(&[rows, d], d_type)),
                    ("rstd", Tensor::poison(&[rows], F32)),
                ],
                &[&x, &w],
                |out, ins| {
                    let [out, rstd] = out else { unreachable!() };
                    rms_norm::forward(out, rstd, &ins[0], &ins[1], EPS)
                },
            )?;
            let ins = [&d_out, &x, &w, &rstd];
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("d_x", Tensor::poison(&[rows, d], d_type)),
                    ("d_w", d_w.clone()),
                ],
                &ins,
                |out, ins| {
                    let [d_x, d_w] = out else { unreachable!() };
                    rms_norm::backward(d_x, Some(d_w), &ins[0], &ins[1], &ins[2], &ins[3])
                },
            )?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("d_x added", d_x.clone()),
                    ("d_branch", Tensor::poison(&[rows, d], x_type)),
                    ("d_w of added", d_w),
                ],
                &ins,
                |out, ins| {
                    let [d_x, d_branch, d_w] = out else {
                        unreachable!()
                    };
                    let [d_out, x, w, rstd] = ins else {
                        unreachable!()
                    };
                    rms_norm::backward_residual(d_x, d_branch, Some(d_w), d_out, x, w, rstd)
                },
            )?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("d_x, frozen", d_x),
                    ("d_branch, frozen", Tensor::poison(&[rows, d], d_type)),
                ],
                &ins,
                |out, ins| {
                    let [d_x, d_branch] = out else { unreachable!() };
                    let [d_out, x, w, rstd] = ins else {
                        unreachable!()
                    };
                    rms_norm::backward_residual(d_x, d_branch, None, d_out, x, w, rstd)
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn gated_rms_norm(check: &mut Check) -> Result<()> {
    for [x_type, d_type, w_type] in TYPES {
        for [t, h, v] in [
            [1, 16, 128],
            [150, 32, 128],
            [13, 3, 64],
            [5, 2, 256],
            [6, 1, 300],
            [9, 5, 20],
        ] {
            let case = format!("{x_type} {d_type} {w_type} [{t},{h},{v}]");
            let shape = [t, h, v];
            let x = check.tensor(&shape, x_type);
            let z = check.range(&shape, x_type, -6.0, 6.0);
            let w = check.tensor(&[v], w_type);
            let d_out = check.tensor(&shape, d_type);
            let d_w = check.tensor(&[v], F32);
            let mut rstd = Tensor::poison(&[t, h], F32);
            gated_rms_norm::forward(&mut x.clone(), &mut rstd, &x, &z, &w, EPS)?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("out", Tensor::poison(&shape, d_type)),
                    ("rstd", Tensor::poison(&[t, h], F32)),
                ],
                &[&x, &z, &w],
                |out, ins| {
                    let [out, rstd] = out else { unreachable!() };
                    gated_rms_norm::forward(out, rstd, &ins[0], &ins[1], &ins[2], EPS)
                },
            )?;
            let ins = [&d_out, &x, &z, &w, &rstd];
            let poison = || Tensor::poison(&shape, d_type);
            check.both(
                &case,
                Tolerance::USUAL,
                vec![("d_x", poison()), ("d_z", poison()), ("d_w", d_w)],
                &ins,
                |out, ins| {
                    let [d_x, d_z, d_w] = out else { unreachable!() };
                    let [d_out, x, z, w, rstd] = ins else {
                        unreachable!()
                    };
                    gated_rms_norm::backward(d_x, d_z, Some(d_w), d_out, x, z, w, rstd)
                },
            )?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![("d_x, frozen", poison()), ("d_z, frozen", poison())],
                &ins,
                |out, ins| {
                    let [d_x, d_z] = out else { unreachable!() };
                    let [d_out, x, z, w, rstd] = ins else {
                        unreachable!()
                    };
                    gated_rms_norm::backward(d_x, d_z, None, d_out, x, z, w, rstd)
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn l2_norm(check: &mut Check) -> Result<()> {
    for [x_type, d_type, _] in TYPES {
        for [rows, k] in ROWS {
            let case = format!("{x_type} {d_type} [{rows},{k}]");
            let scale = 1.0 / (k as f32).sqrt();
            let x = check.tensor(&[rows, k], x_type);
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("out", Tensor::poison(&[rows, k], d_type)),
                    ("rstd", Tensor::poison(&[rows], F32)),
                ],
                &[&x],
                |out, ins| {
                    let [out, rstd] = out else { unreachable!() };
                    l2_norm::forward(out, rstd, &ins[0], scale, EPS)
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn rope(check: &mut Check) -> Result<()> {
    for dtype in [F32, BF16] {
        for ([t, h, n], rotary_dims) in [
            ([1, 16, 256], 64),
            ([70, 4, 256], 64),
            ([33, 24, 256], 64),
            ([9, 2, 128], 128),
            ([7, 3, 64], 16),
            ([5, 1, 10], 6),
            ([4, 5, 24], 10),
        ] {
            let case = format!("{dtype} [{t},{h},{n}], {rotary_dims} turned");
            let rotation = Rotation::new(1e7, rotary_dims);
            // Two documents, the second far into its text.
            let positions: Vec<u32> = (0..t as u32)
                .map(|i| if i < 3 { i } else { 977 * (i - 3) })
                .collect();
            let x = check.tensor(&[t, h, n], dtype);
            check.both(
                &case,
                Tolerance::USUAL,
                vec![("x", x.clone())],
                &[],
                |out, _| rope::forward(&mut out[0], &rotation, &positions),
            )?;
            check.both(&case, Tolerance::USUAL, vec![("d_x", x)], &[], |out, _| {
                rope::backward(&mut out[0], &rotation, &positions)
            })?;
        }
    }
    Ok(())
}

const ELEMENTS: [usize; 5] = [1, 8, 1003, 4096, 70_001];

pub(super) fn sigmoid_gate(check: &mut Check) -> Result<()> {
    let backward = |out: &mut [Tensor], ins: &[Tensor]| {
        let [d_x, d_gate] = out else { unreachable!() };
        sigmoid_gate::backward(d_x, d_gate, &ins[0], &ins[1], &ins[2])
    };
    gate(
        check,
        [("x", 1.0), ("gate", 4.0)],
        ["d_x", "d_gate"],
        |out, ins| sigmoid_gate::forward(&mut out[0], &ins[0], &ins[1]),
        backward,
    )
}

pub(super) fn swiglu(check: &mut Check) -> Result<()> {
    let backward = |out: &mut [Tensor], ins: &[Tensor]| {
        let [d_gate, d_up] = out else { unreachable!() };
        swiglu::backward(d_gate, d_up, &ins[0], &ins[1], &ins[2])
    };
    gate(
        check,
        [("gate", 4.0), ("up", 1.0)],
        ["d_gate", "d_up"],
        |out, ins| swiglu::forward(&mut out[0], &ins[0], &ins[1]),
        backward,
    )
}

/// An op of two inputs of one shape: each with its name and its largest value.
fn gate(
    check: &mut Check,
    inputs: [(&'static str, f32); 2],
    gradients: [&'static str; 2],
    forward: impl Fn(&mut [Tensor], &[Tensor]) -> Result<()>,
    backward: impl Fn(&mut [Tensor], &[Tensor]) -> Result<()>,
) -> Result<()> {
    for [x_type, d_type, _] in TYPES {
        for n in ELEMENTS {
            let [(first, a_most), (second, b_most)] = inputs;
            let case = format!("{first} {second} {x_type} {d_type} [{n}]");
            let a = check.range(&[n], x_type, -a_most, a_most);
            let b = check.range(&[n], x_type, -b_most, b_most);
            let d_out = check.tensor(&[n], d_type);
            let poison = |name| (name, Tensor::poison(&[n], d_type));
            check.both(
                &case,
                Tolerance::USUAL,
                vec![poison("out")],
                &[&a, &b],
                &forward,
            )?;
            check.both(
                &case,
                Tolerance::USUAL,
                gradients.map(poison).into(),
                &[&d_out, &a, &b],
                &backward,
            )?;
        }
    }
    Ok(())
}

pub(super) fn split(check: &mut Check) -> Result<()> {
    for [whole_type, part_type, _] in TYPES {
        for [t, h, n] in [[1, 8, 256], [37, 24, 256], [9, 3, 20]] {
            let case = format!("{whole_type} {part_type} query and gate [{t},{h},2 {n}]");
            let whole = check.tensor(&[t, h, 2 * n], whole_type);
            let parts = [0, 1].map(|_| check.tensor(&[t, h, n], part_type));
            let poison = || Tensor::poison(&[t, h, n], part_type);
            check.both(
                &case,
                NO_ERROR,
                vec![("q", poison()), ("gate", poison())],
                &[&whole],
                |out, ins| {
                    let [q, gate] = out else { unreachable!() };
                    split::query_gate(q, gate, &ins[0])
                },
            )?;
            check.both(
                &case,
                NO_ERROR,
                vec![("d_qg", Tensor::poison(&[t, h, 2 * n], whole_type))],
                &[&parts[0], &parts[1]],
                |out, ins| split::query_gate_backward(&mut out[0], &ins[0], &ins[1]),
            )?;
        }
        for [t, g, k, h, v] in [
            [1, 16, 128, 16, 128],
            [41, 16, 128, 48, 128],
            [7, 2, 12, 6, 10],
        ] {
            let case = format!("{whole_type} {part_type} qkv [{t}, 2 {g} {k} + {h} {v}]");
            let width = 2 * g * k + h * v;
            let whole = check.tensor(&[t, width], whole_type);
            let poison = || Tensor::poison(&[t, g, k], part_type);
            check.both(
                &case,
                NO_ERROR,
                vec![
                    ("q", poison()),
                    ("k", poison()),
                    ("v", Tensor::poison(&[t, h, v], part_type)),
                ],
                &[&whole],
                |out, ins| {
                    let [q, k, v] = out else { unreachable!() };
                    split::qkv(q, k, v, &ins[0])
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn delta_gate(check: &mut Check) -> Result<()> {
    for [x_type, d_type, w_type] in TYPES {
        for [t, h] in [[1, 16], [700, 32], [123, 48], [5, 3], [4, 300]] {
            let case = format!("{x_type} {d_type} {w_type} [{t},{h}]");
            let shape = [t, h];
            // Both sides of the threshold of softplus.
            let a = check.range(&shape, x_type, -8.0, 30.0);
            let b = check.range(&shape, x_type, -4.0, 4.0);
            let a_log = check.range(&[h], F32, -2.0, 3.0);
            let dt_bias = check.tensor(&[h], w_type);
            let [d_g, d_beta] = [0, 1].map(|_| check.tensor(&shape, F32));
            let d_params = [0, 1].map(|_| check.tensor(&[h], F32));
            let poison = |dtype| Tensor::poison(&shape, dtype);
            check.both(
                &case,
                Tolerance::USUAL,
                vec![("g", poison(F32)), ("beta", poison(F32))],
                &[&a, &b, &a_log, &dt_bias],
                |out, ins| {
                    let [g, beta] = out else { unreachable!() };
                    delta_gate::forward(g, beta, &ins[0], &ins[1], &ins[2], &ins[3])
                },
            )?;
            let ins = [&d_g, &d_beta, &a, &b, &a_log, &dt_bias];
            let [d_a_log, d_dt_bias] = d_params;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("d_a", poison(d_type)),
                    ("d_b", poison(d_type)),
                    ("d_a_log", d_a_log),
                    ("d_dt_bias", d_dt_bias),
                ],
                &ins,
                |out, ins| {
                    let [d_a, d_b, d_a_log, d_dt_bias] = out else {
                        unreachable!()
                    };
                    let [d_g, d_beta, a, b, a_log, dt_bias] = ins else {
                        unreachable!()
                    };
                    let d_params = Some((d_a_log, d_dt_bias));
                    delta_gate::backward(d_a, d_b, d_params, d_g, d_beta, a, b, a_log, dt_bias)
                },
            )?;
            check.both(
                &case,
                Tolerance::USUAL,
                vec![
                    ("d_a, frozen", poison(d_type)),
                    ("d_b, frozen", poison(d_type)),
                ],
                &ins,
                |out, ins| {
                    let [d_a, d_b] = out else { unreachable!() };
                    let [d_g, d_beta, a, b, a_log, dt_bias] = ins else {
                        unreachable!()
                    };
                    delta_gate::backward(d_a, d_b, None, d_g, d_beta, a, b, a_log, dt_bias)
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn causal_conv1d(check: &mut Check) -> Result<()> {
    for [x_type, d_type, w_type] in TYPES {
        for [t, c] in [[1, 8192], [2, 8192], [3, 30], [16, 24], [17, 24], [700, 30]] {
            let case = format!("{x_type} {d_type} {w_type} [{t},{c}] with state");
            let x = check.range(&[t, c], x_type, -2.0, 2.0);
            let w = check.tensor(&[c, 1, 4], w_type);
            let state = check.tensor(&[3, c], F32);
            check.both(
                &case,
                Tolerance::USUAL,
                vec![("out", Tensor::poison(&[t, c], d_type)), ("state", state)],
                &[&x, &w],
                |out, ins| {
                    let [out, state] = out else { unreachable!() };
                    causal_conv1d::forward_with_state(out, state, &ins[0], &ins[1])
                },
            )?;
        }
    }
    Ok(())
}

pub(super) fn delta_inputs(check: &mut Check) -> Result<()> {
    for [x_type, d_type, w_type] in TYPES {
        // In f32, a head's norm near zero is divided by. In bf16 the CPU rounds what lies between to the type of its input, the
        // GPU does not, and f32 outputs show it.
        let tolerance = Tolerance {
            f32: if x_type == F32 { 2e-5 } else { 1e-2 },
            bf16: 1e-2,
        };
        for lengths in DOCUMENTS {
            for [g, k, h, v] in [
                [2, 128, 2, 128],
                [2, 128, 4, 128],
                [1, 64, 3, 64],
                [1, 256, 1, 256],
                [3, 12, 3, 10],
                [2, 24, 2, 40],
            ] {
                let t: usize = lengths.iter().sum();
                let cu_seqlens = offsets(lengths);
                let case =
                    format!("{x_type} {d_type} {w_type} [{t}, 2 {g} {k} + {h} {v}] {lengths:?}");
                let c = 2 * g * k + h * v;
                let scale = 1.0 / (k as f32).sqrt();
                let x = check.range(&[t, c], x_type, -2.0, 2.0);
                let w = check.tensor(&[c, 1, 4], w_type);
                let [d_q, d_k] = [0, 1].map(|_| check.tensor(&[t, g, k], d_type));
                let d_v = check.tensor(&[t, h, v], d_type);
                let d_w = check.tensor(&[c, 1, 4], F32);
                let outs = [[t, g, k], [t, g, k], [t, h, v]].map(|s| Tensor::poison(&s, d_type));
                let rstds = [0, 1].map(|_| Tensor::poison(&[t, g], F32));
                let ([q, k_out, v_out], [q_rstd, k_rstd]) = (outs.clone(), rstds.clone());
                check.both(
                    &case,
                    tolerance,
                    vec![
                        ("q", q),
                        ("k", k_out),
                        ("v", v_out),
                        ("q_rstd", q_rstd),
                        ("k_rstd", k_rstd),
                    ],
                    &[&x, &w],
                    |out, ins| {
                        let [q, k, v, q_rstd, k_rstd] = out else {
                            unreachable!()
                        };
                        let [x, w] = ins else { unreachable!() };
                        delta_inputs::forward(
                            q,
                            k,
                            v,
                            q_rstd,
                            k_rstd,
                            x,
                            w,
                            &cu_seqlens,
                            scale,
                            EPS,
                        )
                    },
                )?;
                let ([mut q, mut k_out, mut v_out], [mut q_rstd, mut k_rstd]) = (outs, rstds);
                delta_inputs::forward(
                    &mut q,
                    &mut k_out,
                    &mut v_out,
                    &mut q_rstd,
                    &mut k_rstd,
                    &x,
                    &w,
                    &cu_seqlens,
                    scale,
                    EPS,
                )?;
                let ins = [&d_q, &d_k, &d_v, &x, &w, &q_rstd, &k_rstd];
                let poison = || Tensor::poison(&[t, c], d_type);
                check.both(
                    &case,
                    tolerance,
                    vec![("d_qkv", poison()), ("d_w", d_w)],
                    &ins,
                    |out, ins| {
                        let [d_x, d_w] = out else { unreachable!() };
                        let [d_q, d_k, d_v, x, w, q_rstd, k_rstd] = ins else {
                            unreachable!()
                        };
                        let d_w = Some(d_w);
                        delta_inputs::backward(
                            d_x,
                            d_w,
                            d_q,
                            d_k,
                            d_v,
                            x,
                            w,
                            q_rstd,
                            k_rstd,
                            &cu_seqlens,
                            scale,
                        )
                    },
                )?;
                check.both(
                    &case,
                    tolerance,
                    vec![("d_qkv, frozen", poison())],
                    &ins,
                    |out, ins| {
                        let [d_q, d_k, d_v, x, w, q_rstd, k_rstd] = ins else {
                            unreachable!()
                        };
                        let d_x = &mut out[0];
                        delta_inputs::backward(
                            d_x,
                            None,
                            d_q,
                            d_k,
                            d_v,
                            x,
                            w,
                            q_rstd,
                            k_rstd,
                            &cu_seqlens,
                            scale,
                        )
                    },
                )?;
            }
        }
    }
    Ok(())
}
