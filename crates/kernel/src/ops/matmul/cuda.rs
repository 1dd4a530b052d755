//! Products on a GPU: cuBLASLt, with plans that are timed once.

use super::Dims;
use crate::cuda::{Cuda, Gemm, Operand, Pieces};
use crate::ops::copy;
use crate::{DType, Result, Tensor};

pub(super) fn forward(
    cuda: Cuda,
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    dims: Dims,
    alpha: f32,
    base: Option<u64>,
) -> Result<()> {
    let Dims { t, i, o } = dims;
    let (x, w, in_dtype) = operands(cuda, x, w, y.dtype())?;
    cuda.gemm(&Gemm {
        a: Operand {
            pointer: x,
            transposed: false,
            stride: i,
        },
        b: Operand {
            pointer: w,
            transposed: true,
            stride: i,
        },
        d: y.device_pointer(),
        d_stride: o,
        m: t,
        n: o,
        k: i,
        alpha,
        base,
        in_dtype,
        out_dtype: y.dtype(),
    })
}

pub(super) fn backward_input(
    cuda: Cuda,
    d_x: &mut Tensor,
    d_y: &Tensor,
    w: &Tensor,
    dims: Dims,
    alpha: f32,
    base: Option<u64>,
) -> Result<()> {
    let Dims { t, i, o } = dims;
    let (d_y, w, in_dtype) = operands(cuda, d_y, w, d_x.dtype())?;
    cuda.gemm(&Gemm {
        a: Operand {
            pointer: d_y,
            transposed: false,
            stride: o,
        },
        b: Operand {
            pointer: w,
            transposed: false,
            stride: i,
        },
        d: d_x.device_pointer(),
        d_stride: i,
        m: t,
        n: i,
        k: o,
        alpha,
        base,
        in_dtype,
        out_dtype: d_x.dtype(),
    })
}

pub(super) fn backward_weight(
    cuda: Cuda,
    d_w: &mut Tensor,
    d_y: &Tensor,
    x: &Tensor,
    dims: Dims,
    alpha: f32,
    base: Option<u64>,
) -> Result<()> {
    let Dims { t, i, o } = dims;
    let (d_y, x, in_dtype) = operands(cuda, d_y, x, DType::F32)?;
    cuda.gemm(&Gemm {
        a: Operand {
            pointer: d_y,
            transposed: true,
            stride: o,
        },
        b: Operand {
            pointer: x,
            transposed: false,
            stride: i,
        },
        d: d_w.device_pointer(),
        d_stride: i,
        m: o,
        n: i,
        k: t,
        alpha,
        base,
        in_dtype,
        out_dtype: DType::F32,
    })
}

/// Which operands are rounded to bf16 first. cuBLASLt has no product of two types, and none of f32 that ends in bf16; the
/// result is as coarse as the operands then are.
fn rounded(dtypes: [DType; 2], out_dtype: DType) -> [bool; 2] {
    let all_f32 = dtypes == [DType::F32; 2] && out_dtype == DType::F32;
    dtypes.map(|dtype| dtype == DType::F32 && !all_f32)
}

/// Addresses of both operands in one dtype.
fn operands(cuda: Cuda, a: &Tensor, b: &Tensor, out_dtype: DType) -> Result<(u64, u64, DType)> {
    let both = [a, b];
    let rounded = rounded(both.map(Tensor::dtype), out_dtype);
    let mut pointers = both.map(Tensor::device_pointer);
    if rounded == [false; 2] {
        return Ok((pointers[0], pointers[1], a.dtype()));
    }
    let numels = [0, 1].map(|i| if rounded[i] { both[i].numel() } else { 0 });
    let places = Pieces::new(numels.map(|numel| numel * DType::Bf16.size())).take(cuda)?;
    for i in 0..2 {
        if rounded[i] {
            copy::cuda::to_bf16(cuda, places[i], both[i])?;
            pointers[i] = places[i];
        }
    }
    Ok((pointers[0], pointers[1], DType::Bf16))
}
