//! Products of every kind, in both storage types and mixed.

use super::{Check, Tolerance};
use crate::ops::matmul;
use crate::{DType, Result, Tensor};

const KINDS: [[DType; 3]; 6] = [
    // x, w, y
    [DType::F32, DType::F32, DType::F32],
    [DType::Bf16, DType::Bf16, DType::Bf16],
    [DType::Bf16, DType::Bf16, DType::F32],
    // A gradient in f32 against bf16 weights; an f32 adapter under bf16 activations.
    [DType::F32, DType::Bf16, DType::Bf16],
    [DType::Bf16, DType::F32, DType::Bf16],
    // An adapter's gradient from the f32 residual stream.
    [DType::F32, DType::F32, DType::Bf16],
];

pub(super) fn run(check: &mut Check) -> Result<()> {
    for [x_type, w_type, y_type] in KINDS {
        // Where one operand is bf16 the GPU rounds the other to bf16 as well.
        let mixed = x_type != w_type || (x_type == DType::F32 && y_type == DType::Bf16);
        let tolerance = Tolerance {
            f32: if mixed { 5e-3 } else { 2e-6 },
            bf16: 5e-3,
        };
        for (t, i, o) in [(64, 128, 96), (37, 72, 40), (1, 256, 128), (129, 16, 520)] {
            let case = format!("{x_type} x {w_type} to {y_type}, [{t},{o}] over {i}");
            let x = check.tensor(&[t, i], x_type);
            let w = check.tensor(&[o, i], w_type);
            let y = check.tensor(&[t, o], y_type);
            let d_y = check.tensor(&[t, o], x_type);
            let d_x = check.tensor(&[t, i], y_type);
            let d_w = check.tensor(&[o, i], DType::F32);
            let poison_y = Tensor::poison(&[t, o], y_type);
            let poison_x = Tensor::poison(&[t, i], y_type);
            check.both(
                &case,
                tolerance,
                vec![("y", poison_y)],
                &[&x, &w],
                |out, ins| matmul::forward(&mut out[0], &ins[0], &ins[1]),
            )?;
            check.both(
                &case,
                tolerance,
                vec![("y added", y)],
                &[&x, &w],
                |out, ins| matmul::forward_residual(&mut out[0], &ins[0], &ins[1], 0.5),
            )?;
            let base = check.tensor(&[t, o], y_type);
            let poison_y = Tensor::poison(&[t, o], y_type);
            check.both(
                &case,
                tolerance,
                vec![("y onto a base", poison_y)],
                &[&base, &x, &w],
                |out, ins| matmul::forward_onto(&mut out[0], &ins[0], &ins[1], &ins[2]),
            )?;
            check.both(
                &case,
                tolerance,
                vec![("d_x", poison_x)],
                &[&d_y, &w],
                |out, ins| matmul::backward_input(&mut out[0], &ins[0], &ins[1], 2.0),
            )?;
            check.both(
                &case,
                tolerance,
                vec![("d_x added", d_x)],
                &[&d_y, &w],
                |out, ins| matmul::backward_input_residual(&mut out[0], &ins[0], &ins[1], 1.0),
            )?;
            let poison_w = Tensor::poison(&[o, i], DType::F32);
            check.both(
                &case,
                tolerance,
                vec![("d_w assigned", poison_w)],
                &[&d_y, &x],
                |out, ins| matmul::backward_weight_assign(&mut out[0], &ins[0], &ins[1], 1.0),
            )?;
            check.both(
                &case,
                tolerance,
                vec![("d_w", d_w)],
                &[&d_y, &x],
                |out, ins| matmul::backward_weight(&mut out[0], &ins[0], &ins[1], 1.0),
            )?;
        }
    }
    Ok(())
}
