//! y = x wᵀ and its gradients: d_x = d_y w, d_w = d_yᵀ x. Products of f32 through the `gemm` crate.
//!
//! bf16 operands are widened in panels, a large one never whole; where the processor is faster at multiplying tiles or pairs of bf16,
//! two of them are not widened at all. Up to 32 rows (decoding) go past gemm: each weight is read once
//! from memory and each result is one dot product, the same bytes for a row whether it comes alone or with others.

pub(super) mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::{Write, check, copy};
use crate::cpu::{View, ViewMut};
use crate::{Device, Error, Result, Tensor};

/// y_to = x_ti w_oiᵀ. Shapes: y_to [..., O], x_ti [..., I], leading dimensions flattened to T; w_oi [O,I].
/// The last dimensions may multiply up to O or I: heads [T,H,N] count as [T,H·N].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree.
pub fn forward(y_to: &mut Tensor, x_ti: &Tensor, w_oi: &Tensor) -> Result<()> {
    forward_as("matmul::forward", y_to, x_ti, w_oi, 1.0, Write::Assign)
}

/// y_to += alpha · x_ti w_oiᵀ. Shapes as in [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn forward_accumulate(
    y_to: &mut Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
) -> Result<()> {
    const OP: &str = "matmul::forward_accumulate";
    forward_as(OP, y_to, x_ti, w_oi, alpha, Write::Accumulate)
}

/// y_to = base_to + x_ti w_oiᵀ. Shapes as in [`forward`], base_to as y_to and of its type.
///
/// # Errors
/// As [`forward`], and [`crate::Error::DType`] where base_to is of another type than y_to.
pub fn forward_onto(
    y_to: &mut Tensor,
    base_to: &Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
) -> Result<()> {
    const OP: &str = "matmul::forward_onto";
    check::shape(OP, "base_to", base_to, y_to.shape())?;
    if base_to.dtype() != y_to.dtype() {
        return Err(Error::DType {
            op: OP,
            arg: "base_to",
            expected: "the type of y_to",
            got: base_to.dtype(),
        });
    }
    let dims = Dims::new(OP, ("y_to", y_to), ("x_ti", x_ti), ("w_oi", w_oi))?;
    let others = [("base_to", base_to), ("x_ti", x_ti), ("w_oi", w_oi)];
    match check::device(OP, y_to, &others)? {
        Device::Cpu => {
            copy::forward(y_to, 0, base_to, 0, base_to.numel())?;
            let (x, w) = (View::of(x_ti), View::of(w_oi));
            cpu::forward(ViewMut::of(y_to), x, w, dims, 1.0, Write::Accumulate);
        }
        Device::Cuda(cuda) => {
            let base = Some(base_to.device_pointer());
            cuda::forward(cuda, y_to, x_ti, w_oi, dims, 1.0, base)?;
        }
    }
    Ok(())
}

/// d_x_ti = or += alpha · d_y_to w_oi. Shapes as in [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward_input(
    d_x_ti: &mut Tensor,
    d_y_to: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "matmul::backward_input";
    let dims = Dims::new(OP, ("d_y_to", d_y_to), ("d_x_ti", d_x_ti), ("w_oi", w_oi))?;
    match check::device(OP, d_x_ti, &[("d_y_to", d_y_to), ("w_oi", w_oi)])? {
        Device::Cpu => {
            let (d_x, d_y) = (ViewMut::of(d_x_ti), View::of(d_y_to));
            cpu::backward_input(d_x, d_y, View::of(w_oi), dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            let base = (write == Write::Accumulate).then(|| d_x_ti.device_pointer());
            cuda::backward_input(cuda, d_x_ti, d_y_to, w_oi, dims, alpha, base)?;
        }
    }
    Ok(())
}

/// d_w_oi = or += alpha · d_y_toᵀ x_ti; assigned by the first product of a sum, which need not read what was there.
/// Shapes as in [`forward`], d_w_oi f32.
///
/// # Errors
/// As [`forward`], and [`crate::Error::DType`] where d_w_oi is not f32.
pub fn backward_weight(
    d_w_oi: &mut Tensor,
    d_y_to: &Tensor,
    x_ti: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "matmul::backward_weight";
    let dims = Dims::new(OP, ("d_y_to", d_y_to), ("x_ti", x_ti), ("d_w_oi", d_w_oi))?;
    check::f32(OP, "d_w_oi", d_w_oi)?;
    let device = check::device(OP, d_w_oi, &[("d_y_to", d_y_to), ("x_ti", x_ti)])?;
    match device {
        Device::Cpu => {
            let (d_y, x) = (View::of(d_y_to), View::of(x_ti));
            cpu::backward_weight(d_w_oi.f32s_mut(), d_y, x, dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            // A product over no rows writes nothing.
            if write == Write::Assign && dims.t == 0 {
                d_w_oi.fill_zero()?;
            }
            let accumulates = write == Write::Accumulate || dims.t == 0;
            let base = accumulates.then(|| d_w_oi.device_pointer());
            cuda::backward_weight(cuda, d_w_oi, d_y_to, x_ti, dims, alpha, base)?;
        }
    }
    Ok(())
}

fn forward_as(
    op: &'static str,
    y_to: &mut Tensor,
    x_ti: &Tensor,
    w_oi: &Tensor,
    alpha: f32,
    write: Write,
) -> Result<()> {
    let dims = Dims::new(op, ("y_to", y_to), ("x_ti", x_ti), ("w_oi", w_oi))?;
    match check::device(op, y_to, &[("x_ti", x_ti), ("w_oi", w_oi)])? {
        Device::Cpu => {
            let (x, w) = (View::of(x_ti), View::of(w_oi));
            cpu::forward(ViewMut::of(y_to), x, w, dims, alpha, write);
        }
        Device::Cuda(cuda) => {
            let base = (write == Write::Accumulate).then(|| y_to.device_pointer());
            cuda::forward(cuda, y_to, x_ti, w_oi, dims, alpha, base)?;
        }
    }
    Ok(())
}

/// T rows, I inputs, O outputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dims {
    pub t: usize,
    pub i: usize,
    pub o: usize,
}

impl Dims {
    /// From tensors (with their argument names) that lie as y_to, x_ti and w_oi do.
    fn new(
        op: &'static str,
        (y_arg, y_to): (&'static str, &Tensor),
        (x_arg, x_ti): (&'static str, &Tensor),
        (w_arg, w_oi): (&'static str, &Tensor),
    ) -> Result<Self> {
        let [o, i] = check::dims(op, w_arg, w_oi, "[O,I]")?;
        let t = check::rows(op, x_arg, x_ti, i)?;
        if check::rows(op, y_arg, y_to, o)? != t {
            return Err(check::shape_error(
                op,
                y_arg,
                y_to,
                format!("{t} rows of {o}"),
            ));
        }
        Ok(Dims { t, i, o })
    }
}
