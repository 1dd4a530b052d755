//! Borrowed elements of either storage type, and their passage to f32 and back.

use std::ops::Range;

use half::bf16;

use super::simd;
use crate::dtype::Element;
use crate::tensor::{Storage, Tensor};

/// Elements to read.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> View<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        match tensor.storage() {
            Storage::F32(data) => View::F32(data),
            Storage::Bf16(data) => View::Bf16(data),
            Storage::Cuda(..) => unreachable!("ops compare devices before they touch elements"),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            View::F32(data) => data.len(),
            View::Bf16(data) => data.len(),
        }
    }

    pub(crate) fn is_f32(&self) -> bool {
        matches!(self, View::F32(_))
    }

    #[inline(always)]
    pub(crate) fn slice(self, range: Range<usize>) -> View<'a> {
        match self {
            View::F32(data) => View::F32(&data[range]),
            View::Bf16(data) => View::Bf16(&data[range]),
        }
    }

    /// The elements as f32: borrowed where they are f32, else widened into `scratch`, which grows as needed.
    #[inline(always)]
    pub(crate) fn load<'s>(self, scratch: &'s mut Vec<f32>) -> &'s [f32]
    where
        'a: 's,
    {
        match self {
            View::F32(data) => data,
            View::Bf16(data) => {
                if scratch.len() < data.len() {
                    scratch.resize(data.len(), 0.0);
                }
                let scratch = &mut scratch[..data.len()];
                widen(scratch, data);
                scratch
            }
        }
    }

    /// Copies the elements as f32 into `out` of the same length.
    #[inline(always)]
    pub(crate) fn read_into(self, out: &mut [f32]) {
        match self {
            View::F32(data) => out.copy_from_slice(data),
            View::Bf16(data) => widen(out, data),
        }
    }
}

/// Elements to write.
pub(crate) enum ViewMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> ViewMut<'a> {
    pub(crate) fn fill_zero(&mut self) {
        match self {
            ViewMut::F32(data) => data.fill(0.0),
            ViewMut::Bf16(data) => data.fill(bf16::ZERO),
        }
    }

    pub(crate) fn of(tensor: &'a mut Tensor) -> Self {
        match tensor.storage_mut() {
            Storage::F32(data) => ViewMut::F32(data),
            Storage::Bf16(data) => ViewMut::Bf16(data),
            Storage::Cuda(..) => unreachable!("ops compare devices before they touch elements"),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            ViewMut::F32(data) => data.len(),
            ViewMut::Bf16(data) => data.len(),
        }
    }

    pub(crate) fn is_f32(&self) -> bool {
        matches!(self, ViewMut::F32(_))
    }

    #[inline(always)]
    pub(crate) fn slice(&mut self, range: Range<usize>) -> ViewMut<'_> {
        match self {
            ViewMut::F32(data) => ViewMut::F32(&mut data[range]),
            ViewMut::Bf16(data) => ViewMut::Bf16(&mut data[range]),
        }
    }

    /// Cuts the first `n` elements off and returns them.
    pub(crate) fn take_front(&mut self, n: usize) -> ViewMut<'a> {
        match std::mem::replace(self, ViewMut::F32(&mut [])) {
            ViewMut::F32(data) => {
                let (front, rest) = data.split_at_mut(n);
                *self = ViewMut::F32(rest);
                ViewMut::F32(front)
            }
            ViewMut::Bf16(data) => {
                let (front, rest) = data.split_at_mut(n);
                *self = ViewMut::Bf16(rest);
                ViewMut::Bf16(front)
            }
        }
    }

    /// The view cut into pieces of `n` elements (the last may be shorter), for parallel tasks.
    pub(crate) fn chunks(mut self, n: usize) -> Vec<ViewMut<'a>> {
        let mut chunks = Vec::with_capacity(self.len().div_ceil(n.max(1)));
        while self.len() > 0 {
            let len = self.len().min(n);
            chunks.push(self.take_front(len));
        }
        chunks
    }

    /// Stores f32 values of the same length, rounded where the storage is narrower.
    #[inline(always)]
    pub(crate) fn store(&mut self, values: &[f32]) {
        match self {
            ViewMut::F32(data) => data.copy_from_slice(values),
            ViewMut::Bf16(data) => narrow(data, values),
        }
    }

    /// Adds f32 values of the same length to the elements, in f32.
    #[inline(always)]
    pub(crate) fn add(&mut self, values: &[f32]) {
        match self {
            ViewMut::F32(data) => data.iter_mut().zip(values).for_each(|(y, x)| *y += x),
            ViewMut::Bf16(data) => data
                .iter_mut()
                .zip(values)
                .for_each(|(y, x)| *y = bf16::from_f32(y.to_f32() + x)),
        }
    }
}

/// bf16 to f32, exact.
#[inline(always)]
fn widen(out: &mut [f32], data: &[bf16]) {
    assert_eq!(out.len(), data.len(), "widen: one output an element");
    for (out, x) in out.iter_mut().zip(data) {
        *out = Element::to_f32(*x);
    }
}

/// f32 to bf16, to nearest even.
#[inline(always)]
fn narrow(out: &mut [bf16], values: &[f32]) {
    assert_eq!(out.len(), values.len(), "narrow: one output an element");
    for (out, x) in out.iter_mut().zip(values) {
        *out = Element::from_f32(*x);
    }
}

/// Widens a large stretch with all cores.
pub(crate) fn par_read_into(view: View, out: &mut [f32]) {
    use rayon::prelude::*;
    const PIECE: usize = 1 << 16;
    if out.len() <= PIECE {
        return simd(
            #[inline(always)]
            || view.read_into(out),
        );
    }
    out.par_chunks_mut(PIECE).enumerate().for_each(|(i, out)| {
        let start = i * PIECE;
        simd(
            #[inline(always)]
            || view.slice(start..start + out.len()).read_into(out),
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rounds_as_half_does() {
        let mut values: Vec<f32> = (0..=u16::MAX as u32)
            .flat_map(|high| {
                [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff]
                    .map(|low| f32::from_bits(high << 16 | low))
            })
            .collect();
        values.push(f32::NAN);
        let mut out = vec![bf16::ZERO; values.len()];
        narrow(&mut out, &values);
        for (got, x) in out.iter().zip(&values) {
            assert_eq!(got.to_bits(), bf16::from_f32(*x).to_bits(), "{x:e}");
        }
    }

    #[test]
    fn widen_is_exact_for_every_bf16() {
        let data: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut out = vec![0.0; data.len()];
        par_read_into(View::Bf16(&data), &mut out);
        for (got, x) in out.iter().zip(&data) {
            assert_eq!(got.to_bits(), (x.to_bits() as u32) << 16);
        }
    }
}
