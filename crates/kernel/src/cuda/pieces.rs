//! Scratch in pieces, laid out by the same rule for a launch and for the plan of memory.

use super::Cuda;
use crate::Result;

/// What a piece's address is a multiple of.
const ALIGNMENT: usize = 256;

/// Pieces of an op's scratch, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pieces<const N: usize>([usize; N]);

impl<const N: usize> Pieces<N> {
    /// Of so many bytes each.
    pub fn new(bytes: [usize; N]) -> Self {
        Pieces(bytes.map(|bytes| bytes.next_multiple_of(ALIGNMENT)))
    }

    /// Bytes of all.
    pub fn bytes(self) -> usize {
        self.0.iter().sum()
    }

    /// The address of each, in the scratch that all ops share.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::OverLimit`].
    pub fn take(self, cuda: Cuda) -> Result<[u64; N]> {
        let mut next = cuda.scratch(self.bytes())?;
        Ok(self.0.map(|bytes| {
            let address = next;
            next += bytes as u64;
            address
        }))
    }
}
