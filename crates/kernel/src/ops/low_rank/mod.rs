//! A low-rank update beside a linear layer: y = scale · dropout(x) Aᵀ Bᵀ, in two steps with u = dropout(x) Aᵀ between them.
//!
//! d_u = scale · d_y B, d_b += scale · d_yᵀ u; d_a += d_uᵀ dropout(x), d_x = dropout(d_u A) with the same elements dropped.
//! dropout(x) is never stored: it is made again from the seed where it is needed.
//! On a GPU the update costs one reading of x and d_y and one writing of y and d_x where x and u are bf16 and all widths fit
//! (features a multiple of 8, an even rank); A and B are rounded to bf16 then, and products are summed in f32.
// T tokens, I in features, O out features, R rank.

mod cpu;
mod cuda;
pub(crate) mod examples;
#[cfg(test)]
mod tests;

use super::dropout::Dropout;
use super::{Write, check};
use crate::cuda::DeviceProperties;
use crate::{DType, Device, Result, Tensor};

/// u_tr = dropout(x_ti) a_riᵀ, assigned. Shapes: u_tr [T,R], x_ti [..., I], leading dimensions flattened to T; a_ri [R,I] f32.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where a_ri is not f32.
pub fn down_forward(
    u_tr: &mut Tensor,
    x_ti: &Tensor,
    a_ri: &Tensor,
    dropout: Option<&Dropout>,
) -> Result<()> {
    const OP: &str = "low_rank::down_forward";
    let down = Down::new(OP, ("u_tr", u_tr), x_ti, a_ri, dropout)?;
    match check::device(OP, u_tr, &[("x_ti", x_ti), ("a_ri", a_ri)])? {
        Device::Cpu => cpu::down_forward(u_tr, &down),
        Device::Cuda(cuda) => cuda::down_forward(cuda, u_tr, &down)?,
    }
    Ok(())
}

/// y_to = or += scale · u_tr b_orᵀ. Shapes: y_to [..., O], u_tr [T,R], b_or [O,R] f32.
///
/// # Errors
/// As [`down_forward`].
pub fn up_forward(
    y_to: &mut Tensor,
    u_tr: &Tensor,
    b_or: &Tensor,
    scale: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "low_rank::up_forward";
    let up = Up::new(OP, ("y_to", y_to), u_tr, b_or, scale)?;
    match check::device(OP, y_to, &[("u_tr", u_tr), ("b_or", b_or)])? {
        Device::Cpu => cpu::up_forward(y_to, &up, write),
        Device::Cuda(cuda) => cuda::up_forward(cuda, y_to, &up, write)?,
    }
    Ok(())
}

/// d_u_tr = scale · d_y_to b_or, assigned; d_b_or += scale · d_y_toᵀ u_tr. Shapes as in [`up_forward`], d_b_or f32.
///
/// # Errors
/// As [`down_forward`].
pub fn up_backward(
    d_u_tr: &mut Tensor,
    d_b_or: Option<&mut Tensor>,
    d_y_to: &Tensor,
    u_tr: &Tensor,
    b_or: &Tensor,
    scale: f32,
) -> Result<()> {
    const OP: &str = "low_rank::up_backward";
    let up = Up::new(OP, ("d_y_to", d_y_to), u_tr, b_or, scale)?;
    check::shape(OP, "d_u_tr", d_u_tr, u_tr.shape())?;
    let mut others = vec![("d_y_to", d_y_to), ("u_tr", u_tr), ("b_or", b_or)];
    if let Some(d_b_or) = &d_b_or {
        check::shape(OP, "d_b_or", d_b_or, b_or.shape())?;
        check::f32(OP, "d_b_or", d_b_or)?;
        others.push(("d_b_or", d_b_or));
    }
    match check::device(OP, d_u_tr, &others)? {
        Device::Cpu => cpu::up_backward(d_u_tr, d_b_or, d_y_to, &up),
        Device::Cuda(cuda) => cuda::up_backward(cuda, d_u_tr, d_b_or, d_y_to, &up)?,
    }
    Ok(())
}

/// d_x_ti = or += dropout(d_u_tr a_ri); d_a_ri += d_u_trᵀ dropout(x_ti). Shapes as in [`down_forward`], d_a_ri f32; the same
/// `dropout` drops the same elements.
///
/// # Errors
/// As [`down_forward`].
pub fn down_backward(
    d_x_ti: &mut Tensor,
    d_a_ri: Option<&mut Tensor>,
    d_u_tr: &Tensor,
    x_ti: &Tensor,
    a_ri: &Tensor,
    dropout: Option<&Dropout>,
    write: Write,
) -> Result<()> {
    const OP: &str = "low_rank::down_backward";
    let down = Down::new(OP, ("d_u_tr", d_u_tr), x_ti, a_ri, dropout)?;
    check::numel(OP, "d_x_ti", d_x_ti, x_ti.numel())?;
    let mut others = vec![("d_u_tr", d_u_tr), ("x_ti", x_ti), ("a_ri", a_ri)];
    if let Some(d_a_ri) = &d_a_ri {
        check::shape(OP, "d_a_ri", d_a_ri, a_ri.shape())?;
        check::f32(OP, "d_a_ri", d_a_ri)?;
        others.push(("d_a_ri", d_a_ri));
    }
    match check::device(OP, d_x_ti, &others)? {
        Device::Cpu => cpu::down_backward(d_x_ti, d_a_ri, d_u_tr, &down, write),
        Device::Cuda(cuda) => cuda::down_backward(cuda, d_x_ti, d_a_ri, d_u_tr, &down, write)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`up_backward`] and [`down_backward`] take on a GPU for `t` rows between `rank` and a side of `wide`
/// features, where u is of type `dtype`.
pub fn backward_scratch_bytes(
    gpu: DeviceProperties,
    [t, wide, rank]: [usize; 3],
    dtype: DType,
) -> usize {
    cuda::scratch_bytes(gpu, Dims { t, wide, rank }, dtype)
}

/// T rows between a wide side (I or O features) and a narrow one of rank R.
#[derive(Debug, Clone, Copy)]
struct Dims {
    t: usize,
    wide: usize,
    rank: usize,
}

/// What the step from the features to the rank reads, checked.
struct Down<'a> {
    x_ti: &'a Tensor,
    a_ri: &'a Tensor,
    dropout: Option<&'a Dropout>,
    dims: Dims,
}

impl<'a> Down<'a> {
    /// `u_tr`: the output, or its gradient, with its argument's name.
    fn new(
        op: &'static str,
        (u_arg, u_tr): (&'static str, &Tensor),
        x_ti: &'a Tensor,
        a_ri: &'a Tensor,
        dropout: Option<&'a Dropout>,
    ) -> Result<Self> {
        let [rank, wide] = check::dims(op, "a_ri", a_ri, "[R,I]")?;
        check::f32(op, "a_ri", a_ri)?;
        let t = check::rows(op, "x_ti", x_ti, wide)?;
        check::shape(op, u_arg, u_tr, &[t, rank])?;
        Ok(Down {
            x_ti,
            a_ri,
            dropout,
            dims: Dims { t, wide, rank },
        })
    }
}

/// What the step from the rank to the features reads, checked.
struct Up<'a> {
    u_tr: &'a Tensor,
    b_or: &'a Tensor,
    scale: f32,
    dims: Dims,
}

impl<'a> Up<'a> {
    /// `y_to`: the output, or its gradient, with its argument's name.
    fn new(
        op: &'static str,
        (y_arg, y_to): (&'static str, &Tensor),
        u_tr: &'a Tensor,
        b_or: &'a Tensor,
        scale: f32,
    ) -> Result<Self> {
        let [wide, rank] = check::dims(op, "b_or", b_or, "[O,R]")?;
        check::f32(op, "b_or", b_or)?;
        let t = check::rows(op, y_arg, y_to, wide)?;
        check::shape(op, "u_tr", u_tr, &[t, rank])?;
        Ok(Up {
            u_tr,
            b_or,
            scale,
            dims: Dims { t, wide, rank },
        })
    }
}
