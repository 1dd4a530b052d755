//! Packed documents and the columns of one head: what the ops that look along the sequence share.

use std::ops::Range;

use super::{View, ViewMut};
use crate::Tensor;

/// The rows of each document; empty documents stay, as empty ranges.
pub(crate) fn documents(cu_seqlens: &[u32]) -> Vec<Range<usize>> {
    cu_seqlens
        .windows(2)
        .map(|ends| ends[0] as usize..ends[1] as usize)
        .collect()
}

/// Cuts each row of `tensor` (its first dimension) into `n_parts` equal stretches and deals them out by (range, part):
/// entry range_idx · n_parts + part holds that part's stretch of every row of the range, for a task to write.
/// `ranges` must cover the rows in order and without gaps.
pub(crate) fn split_rows<'a>(
    tensor: &'a mut Tensor,
    ranges: &[Range<usize>],
    n_parts: usize,
) -> Vec<Vec<ViewMut<'a>>> {
    let n_rows: usize = tensor.shape().first().copied().unwrap_or(0);
    let part_width = tensor.numel() / (n_rows * n_parts).max(1);
    let mut rest = ViewMut::of(tensor);
    let mut parts = Vec::with_capacity(ranges.len() * n_parts);
    for range in ranges {
        let first = parts.len();
        parts.extend((0..n_parts).map(|_| Vec::with_capacity(range.len())));
        for _ in range.clone() {
            for part in &mut parts[first..] {
                part.push(rest.take_front(part_width));
            }
        }
    }
    parts
}

/// Reads rows of `width` elements, `stride` apart from `first` on, into `out` until it is full.
#[inline(always)]
pub(crate) fn load_rows(out: &mut [f32], view: View, first: usize, stride: usize, width: usize) {
    for (i, row) in out.chunks_exact_mut(width.max(1)).enumerate() {
        let start = first + i * stride;
        view.slice(start..start + width).read_into(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_rows_deals_out_by_range_and_part() {
        let mut tensor = Tensor::zeros(&[4, 2, 3], crate::DType::F32);
        let documents = documents(&[0, 1, 1, 4]);
        for (i, rows) in split_rows(&mut tensor, &documents, 2)
            .iter_mut()
            .enumerate()
        {
            for row in rows {
                row.store(&[i as f32; 3]);
            }
        }
        let parts: Vec<f32> = tensor.f32s().iter().step_by(3).copied().collect();
        assert_eq!(parts, [0.0, 1.0, 4.0, 5.0, 4.0, 5.0, 4.0, 5.0]);
    }
}
