//! Copies between tensors by rows: the plumbing between batched projections and per-sequence states.

use kernel::Tensor;
use kernel::bf16;
use kernel::tensor::Storage;

/// dst = src; element counts must agree, dtypes may differ.
pub(crate) fn copy(dst: &mut Tensor, src: &Tensor) {
    assert_eq!(dst.numel(), src.numel(), "copy between unequal sizes");
    copy_elements(dst, 0, src, 0, src.numel());
}

/// Copies `n` rows of `row` elements each, from row `src_row` of `src` to row `dst_row` of `dst`.
pub(crate) fn copy_rows(
    dst: &mut Tensor,
    dst_row: usize,
    src: &Tensor,
    src_row: usize,
    n: usize,
    row: usize,
) {
    copy_elements(dst, dst_row * row, src, src_row * row, n * row);
}

fn copy_elements(dst: &mut Tensor, dst_from: usize, src: &Tensor, src_from: usize, n: usize) {
    let to = dst_from..dst_from + n;
    let from = src_from..src_from + n;
    match (dst.storage_mut(), src.storage()) {
        (Storage::F32(dst), Storage::F32(src)) => dst[to].copy_from_slice(&src[from]),
        (Storage::Bf16(dst), Storage::Bf16(src)) => dst[to].copy_from_slice(&src[from]),
        (Storage::F32(dst), Storage::Bf16(src)) => {
            for (d, s) in dst[to].iter_mut().zip(&src[from]) {
                *d = s.to_f32();
            }
        }
        (Storage::Bf16(dst), Storage::F32(src)) => {
            for (d, s) in dst[to].iter_mut().zip(&src[from]) {
                *d = bf16::from_f32(*s);
            }
        }
    }
}
