//! Copies with and without rounding, at multiples of eight and not.

use super::{Check, Tolerance};
use crate::ops::copy;
use crate::{DType, Result, Tensor};

pub(super) fn run(check: &mut Check) -> Result<()> {
    for (from, to) in [
        (DType::F32, DType::F32),
        (DType::F32, DType::Bf16),
        (DType::Bf16, DType::F32),
        (DType::Bf16, DType::Bf16),
    ] {
        for (n, offset) in [(1024, 0), (1021, 3)] {
            let x = check.tensor(&[n], from);
            let out = Tensor::poison(&[n - offset], to);
            // Both round to nearest even: nothing may differ.
            let exact = Tolerance {
                f32: 0.0,
                bf16: 0.0,
            };
            check.both(
                &format!("{from} to {to}, {n} from {offset}"),
                exact,
                vec![("dst", out)],
                &[&x],
                |out, ins| copy::forward(&mut out[0], 0, &ins[0], offset, n - offset),
            )?;
        }
    }
    Ok(())
}
