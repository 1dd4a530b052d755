//! Low-rank updates: ranks and widths of the fast kernels, in slices too, and odd ones; with and without dropout.

use super::{Check, Tolerance};
use crate::ops::dropout::Dropout;
use crate::ops::low_rank;
use crate::{DType, Result, Tensor};

/// T, I, O, R.
const SHAPES: [[usize; 4]; 10] = [
    [70, 128, 96, 16],
    [37, 72, 40, 8],
    [1, 256, 128, 64],
    [129, 520, 1032, 32],
    [200, 64, 136, 48],
    [16, 32, 32, 4],
    [600, 1208, 1096, 16],
    [90, 104, 80, 130],
    // Odd ranks and widths.
    [33, 40, 24, 3],
    [50, 33, 47, 16],
];

const KINDS: [[DType; 3]; 4] = [
    // x, u and y; d_y; d_x
    [DType::F32, DType::F32, DType::F32],
    [DType::Bf16, DType::Bf16, DType::Bf16],
    // Gradients of the residual stream are f32.
    [DType::Bf16, DType::F32, DType::Bf16],
    [DType::Bf16, DType::Bf16, DType::F32],
];

const SCALE: f32 = 2.5;

pub(super) fn run(check: &mut Check) -> Result<()> {
    for kind in KINDS {
        for shape in SHAPES {
            for rate in [0.0, 0.1] {
                case(check, kind, shape, rate)?;
            }
        }
    }
    Ok(())
}

fn case(
    check: &mut Check,
    [dtype, d_y_type, d_x_type]: [DType; 3],
    [t, i, o, r]: [usize; 4],
    rate: f32,
) -> Result<()> {
    let drops = Dropout {
        rate,
        seed: 77,
        stream: 3,
    };
    let drops = (rate > 0.0).then_some(&drops);
    let case = format!("{dtype}, d_y {d_y_type}, [{t},{i}] to {o} by {r} at {rate}");
    // Beside bf16 a GPU rounds the factors and d_y to bf16.
    let tolerance = Tolerance {
        f32: if dtype == DType::F32 { 1e-5 } else { 6e-3 },
        bf16: 6e-3,
    };
    let x = check.tensor(&[t, i], dtype);
    let a = check.tensor(&[r, i], DType::F32);
    let b = check.tensor(&[o, r], DType::F32);
    let u = check.tensor(&[t, r], dtype);
    let y = check.tensor(&[t, o], dtype);
    let d_y = check.tensor(&[t, o], d_y_type);
    let d_x = check.tensor(&[t, i], d_x_type);
    let d_a = check.tensor(&[r, i], DType::F32);
    let d_b = check.tensor(&[o, r], DType::F32);
    let poison = |shape: &[usize], dtype| Tensor::poison(shape, dtype);
    check.both(
        &case,
        tolerance,
        vec![("u", poison(&[t, r], dtype))],
        &[&x, &a],
        |out, ins| low_rank::down_forward(&mut out[0], &ins[0], &ins[1], drops),
    )?;
    check.both(
        &case,
        tolerance,
        vec![("y", poison(&[t, o], dtype)), ("y added", y)],
        &[&u, &b],
        |out, ins| {
            low_rank::up_forward(&mut out[0], &ins[0], &ins[1], SCALE)?;
            low_rank::up_forward_residual(&mut out[1], &ins[0], &ins[1], SCALE)
        },
    )?;
    check.both(
        &case,
        tolerance,
        vec![("d_u", poison(&[t, r], dtype)), ("d_b", d_b)],
        &[&d_y, &u, &b],
        |out, ins| {
            let (d_u, d_b) = out.split_at_mut(1);
            let d_b = Some(&mut d_b[0]);
            low_rank::up_backward(&mut d_u[0], d_b, &ins[0], &ins[1], &ins[2], SCALE)
        },
    )?;
    check.both(
        &case,
        tolerance,
        vec![
            ("d_a", d_a),
            ("d_x", poison(&[t, i], d_x_type)),
            ("d_x added", d_x),
        ],
        &[&u, &x, &a],
        |out, ins| {
            let (d_a, d_x) = out.split_at_mut(1);
            let d_a = Some(&mut d_a[0]);
            low_rank::down_backward(&mut d_x[0], d_a, &ins[0], &ins[1], &ins[2], drops)?;
            low_rank::down_backward_residual(&mut d_x[1], None, &ins[0], &ins[1], &ins[2], drops)
        },
    )
}
