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
    /// First moment.
    pub m: Pinned,
    /// Second moment.
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

    /// Shape of either.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Storage type of either.
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
    /// Weights, on the GPU.
    pub w: &'a mut Tensor,
    /// Moments, in host memory.
    pub moments: &'a mut HostMoments,
    /// Gradient, on the GPU.
    pub grad: &'a Tensor,
    /// What the step does.
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

pub(crate) mod examples {
    //! The bytes of moments on the CPU, through a ring far smaller than they are.

    use super::{HostMoments, HostStep, Stream};
    use crate::DType::{Bf16, F32};
    use crate::cuda::Cuda;
    use crate::example::{Example, Tolerance};
    use crate::ops::adamw::{self, Update, examples};
    use crate::tensor::Storage;
    use crate::{Device, Result, Tensor};

    const N_STEPS: u64 = 3;
    /// Full pieces, a piece cut short, a tensor within one, an odd end.
    const SIZES: [usize; 5] = [4096, 1000, 24, 3001, 8];

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for dtype in [Bf16, F32] {
            for (n_slots, piece_bytes) in [(4, 512), (2, 4096), (3, 1 << 20)] {
                let label = format!("{n_slots} pieces of {piece_bytes} bytes");
                let example = Example::new("adamw_host/step", label).tolerance(Tolerance::EXACT);
                let example = SIZES.iter().fold(example, |example, n| {
                    example
                        .updated("w", &[*n], dtype)
                        .updated_in("m", &[*n], dtype, examples::M)
                        .updated_in("v", &[*n], dtype, examples::V)
                        .input("grad", &[*n], F32)
                });
                all.push(example.run_all(move |outs, grads| match outs[0].device() {
                    Device::Cpu => steps(outs, grads),
                    Device::Cuda(cuda) => {
                        let stream = Stream::with_pieces(cuda, n_slots, piece_bytes)?;
                        steps_from_host(cuda, stream, outs, grads)
                    }
                }));
            }
        }
        all
    }

    fn update(step: u64, seed: usize) -> Update {
        Update {
            step,
            seed: seed as u64,
            ..examples::UPDATE
        }
    }

    /// Steps over (w, m, v) of every tensor, the moments where the weights are.
    fn steps(outs: &mut [Tensor], grads: &[Tensor]) -> Result<()> {
        for step in 1..=N_STEPS {
            for (seed, (tensors, grad)) in outs.chunks_mut(3).zip(grads).enumerate() {
                let [w, m, v] = tensors else {
                    unreachable!("three outputs for each gradient")
                };
                adamw::step(w, m, v, grad, &update(step, seed))?;
            }
        }
        Ok(())
    }

    /// The same with all moments in host memory.
    fn steps_from_host(
        cuda: Cuda,
        mut stream: Stream,
        outs: &mut [Tensor],
        grads: &[Tensor],
    ) -> Result<()> {
        let mut moments = Vec::new();
        for tensors in outs.chunks(3) {
            let (m, v) = (&tensors[1], &tensors[2]);
            let mut host = HostMoments::zeros(m.shape(), m.dtype(), cuda)?;
            host.m.bytes_mut()?.copy_from_slice(&bytes(m)?);
            host.v.bytes_mut()?.copy_from_slice(&bytes(v)?);
            moments.push(host);
        }
        for step in 1..=N_STEPS {
            // The second step goes without fetching ahead.
            if step != 2 {
                stream.prefetch(&moments.iter().collect::<Vec<_>>())?;
            }
            let mut host_steps: Vec<HostStep> = outs
                .chunks_mut(3)
                .zip(&mut moments)
                .zip(grads)
                .enumerate()
                .map(|(seed, ((tensors, moments), grad))| HostStep {
                    w: &mut tensors[0],
                    moments,
                    grad,
                    update: update(step, seed),
                })
                .collect();
            stream.step(&mut host_steps)?;
        }
        for (tensors, host) in outs.chunks_mut(3).zip(&moments) {
            for (tensor, pinned) in tensors[1..].iter_mut().zip([&host.m, &host.v]) {
                let mut copy = Tensor::zeros(tensor.shape(), tensor.dtype());
                host_bytes(&mut copy).copy_from_slice(pinned.bytes()?);
                tensor.copy_from(&copy)?;
            }
        }
        Ok(())
    }

    fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
        Ok(host_bytes(&mut tensor.to_device(Device::Cpu)?).to_vec())
    }

    fn host_bytes(tensor: &mut Tensor) -> &mut [u8] {
        match tensor.storage_mut() {
            Storage::F32(data) => bytemuck::cast_slice_mut(data),
            Storage::Bf16(data) => bytemuck::cast_slice_mut(data),
            Storage::Cuda(..) => unreachable!("a tensor on the host"),
        }
    }
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
