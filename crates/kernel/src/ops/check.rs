//! Shape and dtype checks that every op makes once, before it touches an element.

use crate::cuda::Cuda;
use crate::{DType, Device, Error, Result, Tensor};

/// All arguments must lie on the device of `first`, which is returned.
pub(crate) fn device(
    op: &'static str,
    first: &Tensor,
    others: &[(&'static str, &Tensor)],
) -> Result<Device> {
    let device = first.device();
    match others.iter().find(|(_, other)| other.device() != device) {
        None => Ok(device),
        Some((arg, other)) => Err(Error::Device {
            op,
            arg,
            expected: device.to_string(),
            got: other.device().to_string(),
        }),
    }
}

/// `arg` must have exactly this shape.
pub(crate) fn shape(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(shape_error(op, arg, tensor, format!("{expected:?}")))
}

/// `arg` must have this many elements, in whatever shape.
pub(crate) fn numel(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: usize,
) -> Result<()> {
    if tensor.numel() == expected {
        return Ok(());
    }
    Err(shape_error(op, arg, tensor, format!("{expected} elements")))
}

/// A slice argument must have this length.
pub(crate) fn len(op: &'static str, arg: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        arg,
        expected: format!("{expected} entries"),
        got: got.to_string(),
    })
}

/// `arg` must be stored as f32.
pub(crate) fn f32(op: &'static str, arg: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F32 => Ok(()),
        got => Err(Error::DType {
            op,
            arg,
            expected: "f32",
            got,
        }),
    }
}

/// `arg` must lie on this GPU.
pub(crate) fn on(op: &'static str, arg: &'static str, tensor: &Tensor, cuda: Cuda) -> Result<()> {
    let expected = Device::Cuda(cuda);
    if tensor.device() == expected {
        return Ok(());
    }
    Err(Error::Device {
        op,
        arg,
        expected: expected.to_string(),
        got: tensor.device().to_string(),
    })
}

/// `arg` as a matrix (rows, columns): the last dimension is the columns, all before it the rows. At least one dimension.
pub(crate) fn matrix(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
) -> Result<(usize, usize)> {
    match tensor.shape() {
        [leading @ .., cols] => Ok((leading.iter().product(), *cols)),
        [] => Err(shape_error(op, arg, tensor, "[..., D]".to_owned())),
    }
}

/// Rows of `arg` as a matrix of `cols` columns, which its last dimensions must multiply up to: heads of [T,H,N] side by side are [T,H·N].
pub(crate) fn rows(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    cols: usize,
) -> Result<usize> {
    let mut width = 1;
    for (axis, n) in tensor.shape().iter().enumerate().rev() {
        width *= n;
        if width == cols {
            return Ok(tensor.shape()[..axis].iter().product());
        }
    }
    Err(shape_error(op, arg, tensor, format!("[..., {cols}]")))
}

/// The dimensions of `arg`, which must have `N` of them; `expected` is their legend, such as "[T,H,N]".
pub(crate) fn dims<const N: usize>(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: &str,
) -> Result<[usize; N]> {
    match tensor.shape().try_into() {
        Ok(dims) => Ok(dims),
        Err(_) => Err(shape_error(op, arg, tensor, expected.to_owned())),
    }
}

/// Document boundaries: at least two offsets, from 0 to `n_tokens`, never decreasing.
pub(crate) fn cu_seqlens(op: &'static str, cu_seqlens: &[u32], n_tokens: usize) -> Result<()> {
    let ends = match cu_seqlens {
        [0, .., last] => *last as usize == n_tokens,
        _ => false,
    };
    if ends && cu_seqlens.is_sorted() {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        arg: "cu_seqlens",
        expected: format!("rising offsets from 0 to {n_tokens}"),
        got: format!("{cu_seqlens:?}"),
    })
}

/// The error of a shape that is not what `expected` says.
pub(crate) fn shape_error(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: String,
) -> Error {
    Error::Shape {
        op,
        arg,
        expected,
        got: format!("{:?}", tensor.shape()),
    }
}
