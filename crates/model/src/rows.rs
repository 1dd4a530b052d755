//! Copies between tensors by rows: the plumbing between batched projections and per-sequence states.

use kernel::Tensor;
use kernel::ops::copy;

use crate::Result;

/// dst = src; element counts must agree, dtypes may differ.
pub(crate) fn copy(dst: &mut Tensor, src: &Tensor) -> Result<()> {
    assert_eq!(dst.numel(), src.numel(), "copy between unequal sizes");
    copy::forward(dst, 0, src, 0, src.numel())?;
    Ok(())
}

/// Copies `n` rows of `row` elements each, from row `src_row` of `src` to row `dst_row` of `dst`.
pub(crate) fn copy_rows(
    dst: &mut Tensor,
    dst_row: usize,
    src: &Tensor,
    src_row: usize,
    n: usize,
    row: usize,
) -> Result<()> {
    copy::forward(dst, dst_row * row, src, src_row * row, n * row)?;
    Ok(())
}
