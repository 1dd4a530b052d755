//! [`adamw`](super::adamw) with moments in host memory, streamed through a ring on the GPU while the weights and gradients stay there.
//!
//! Every element gets the same operations and random bits as with moments on the GPU, so that the results are the same to the bit:
//! what is where is a matter of memory alone.

use std::ops::Range;

use super::adamw::{self, Update};
use super::check;
use crate::cuda::{Cuda, Pinned, Ring};
use crate::{DType, Result, Tensor};

/// Pieces in flight: one is filled, one worked on, one emptied, and one is spare so that none waits for a launch.
const N_SLOTS: usize = 4;
/// Bytes of m, and of v, in a piece: copies long enough for the full speed of the link.
const PIECE_BYTES: usize = 16 << 20;

/// m and v of one tensor, in pinned host memory, zero at first.
#[derive(Debug)]
pub struct HostMoments {
    shape: Vec<usize>,
    dtype: DType,
    pub m: Pinned,
    pub v: Pinned,
}

impl HostMoments {
    /// # Errors
    /// [`crate::Error::OutOfHostMemory`]
    pub fn zeros(shape: &[usize], dtype: DType, cuda: Cuda) -> Result<Self> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Ok(HostMoments {
            shape: shape.to_vec(),
            dtype,
            m: Pinned::new(cuda, bytes)?,
            v: Pinned::new(cuda, bytes)?,
        })
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn size(&self) -> (usize, usize) {
        (self.shape.iter().product(), self.dtype.size())
    }

    fn bytes_of(&self, elements: &Range<usize>) -> Range<usize> {
        elements.start * self.dtype.size()..elements.end * self.dtype.size()
    }
}

/// One tensor's update: w updated in place, m and v in host memory.
#[derive(Debug)]
pub struct HostStep<'a> {
    pub w: &'a mut Tensor,
    pub moments: &'a mut HostMoments,
    pub grad: &'a Tensor,
    pub update: Update,
}

/// Where moments pass through the GPU.
#[derive(Debug)]
pub struct Stream {
    ring: Ring,
    piece_bytes: usize,
    /// Pieces of the next step that are on their way.
    n_fetched: usize,
}

impl Stream {
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::OverLimit`].
    pub fn new(cuda: Cuda) -> Result<Self> {
        Stream::with_pieces(cuda, N_SLOTS, PIECE_BYTES)
    }

    /// As [`Stream::new`], with `n_slots` pieces of twice `piece_bytes` (a multiple of 32) in flight.
    pub(crate) fn with_pieces(cuda: Cuda, n_slots: usize, piece_bytes: usize) -> Result<Self> {
        Ok(Stream {
            ring: Ring::new(cuda, n_slots, 2, piece_bytes)?,
            piece_bytes,
            n_fetched: 0,
        })
    }

    /// Starts to fetch the moments of a step's first tensors, for as many pieces as the ring holds: while gradients are still being
    /// made. The step that follows takes the same moments in the same order.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the GPU failed.
    pub fn prefetch(&mut self, moments: &[&HostMoments]) -> Result<()> {
        let sizes: Vec<_> = moments.iter().map(|moments| moments.size()).collect();
        self.n_fetched = 0;
        for (number, piece) in pieces(&sizes, self.piece_bytes)
            .take(self.ring.n_slots())
            .enumerate()
        {
            self.fetch(number, moments[piece.tensor], &piece.elements)?;
            self.n_fetched = number + 1;
        }
        Ok(())
    }

    /// One update of every tensor; returns when all is queued.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where shapes differ; [`crate::Error::Device`] for a weight or gradient that is not on the ring's GPU;
    /// [`crate::Error::Cuda`] if the GPU failed.
    pub fn step(&mut self, steps: &mut [HostStep]) -> Result<()> {
        const OP: &str = "adamw_host::step";
        for step in &*steps {
            check::shape(OP, "grad", step.grad, step.w.shape())?;
            check::shape(OP, "w", step.w, step.moments.shape())?;
            for (arg, tensor) in [("w", &*step.w), ("grad", step.grad)] {
                check::on(OP, arg, tensor, self.ring.cuda())?;
            }
        }
        let sizes: Vec<_> = steps.iter().map(|step| step.moments.size()).collect();
        let pieces: Vec<Piece> = pieces(&sizes, self.piece_bytes).collect();
        let mut n_fetched = std::mem::take(&mut self.n_fetched);
        for (number, piece) in pieces.iter().enumerate() {
            // 1. fetch ahead
            let ahead = pieces.len().min(number + self.ring.n_slots());
            for (number, piece) in (n_fetched..ahead).zip(&pieces[n_fetched.min(ahead)..]) {
                self.fetch(number, steps[piece.tensor].moments, &piece.elements)?;
            }
            n_fetched = n_fetched.max(ahead);
            // 2. update
            let step = &mut steps[piece.tensor];
            self.ring
                .compute(number, || self.update(number, step, &piece.elements))?;
            // 3. bring back
            let bytes = step.moments.bytes_of(&piece.elements);
            let HostMoments { m, v, .. } = &mut *step.moments;
            self.ring
                .download(number, &mut [(m, bytes.clone()), (v, bytes)])?;
        }
        Ok(())
    }

    fn fetch(&self, number: usize, moments: &HostMoments, elements: &Range<usize>) -> Result<()> {
        let bytes = moments.bytes_of(elements);
        let parts = [(&moments.m, bytes.clone()), (&moments.v, bytes)];
        self.ring.upload(number, &parts)
    }

    fn update(&self, number: usize, step: &mut HostStep, elements: &Range<usize>) -> Result<()> {
        let moments = [0, 1].map(|part| (self.ring.pointer(number, part), step.moments.dtype));
        let cuda = self.ring.cuda();
        adamw::cuda::step_piece(cuda, step.w, moments, step.grad, elements, &step.update)
    }
}

/// Bytes of the ring's buffer.
pub fn stream_bytes() -> usize {
    Ring::bytes(N_SLOTS, 2, PIECE_BYTES)
}

/// Some elements of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    tensor: usize,
    elements: Range<usize>,
}

/// Tensors of (elements, bytes each) cut into pieces of at most `piece_bytes`, in order; all but a tensor's last are full.
fn pieces(sizes: &[(usize, usize)], piece_bytes: usize) -> impl Iterator<Item = Piece> {
    let tensors = sizes.iter().enumerate();
    tensors.flat_map(move |(tensor, (numel, size))| {
        let most = piece_bytes / size;
        (0..*numel).step_by(most).map(move |first| Piece {
            tensor,
            elements: first..(first + most).min(*numel),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_element_once_in_order() {
        let sizes = [(5, 2), (0, 2), (16, 2), (17, 4), (33, 2)];
        let all: Vec<Piece> = pieces(&sizes, 32).collect();
        let mut next = [0; 5];
        for piece in &all {
            let Piece { tensor, elements } = piece;
            assert!(elements.start.is_multiple_of(8) && !elements.is_empty());
            assert!(elements.len() * sizes[*tensor].1 <= 32);
            assert_eq!(elements.start, next[*tensor]);
            next[*tensor] = elements.end;
        }
        assert_eq!(next, sizes.map(|(numel, _)| numel));
        assert!(all.is_sorted_by_key(|piece| piece.tensor));
    }
}
