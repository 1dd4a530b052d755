//! What changes from step to step of a recorded sequence of ops: tokens, positions and the addresses of states, in one table that stays
//! at its place on the GPU and is copied there by one call.

use cudarc::driver::result;

use super::{Buffer, Cuda, check};
use crate::{Device, Result, Tensor};

/// Numbers and addresses of one step. Pushed in the same order with the same lengths, they get the same places again.
#[derive(Debug)]
pub struct StepTable {
    words: Vec<u32>,
    /// None on a CPU, whose ops read the words themselves.
    buffer: Option<Buffer>,
}

/// Where a push put its words.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    first: usize,
    n_words: usize,
}

/// Words of a table, and where the GPU has them.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    pub(crate) words: &'a [u32],
    /// 0 on a CPU.
    pub(crate) pointer: u64,
}

impl StepTable {
    /// With room for `n_words` words of 32 bits.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]
    pub fn new(device: Device, n_words: usize) -> Result<StepTable> {
        let buffer = match device {
            Device::Cpu => None,
            Device::Cuda(cuda) => Some(Buffer::new(cuda, 4 * n_words.max(1))?),
        };
        Ok(StepTable {
            words: Vec::with_capacity(n_words),
            buffer,
        })
    }

    /// Words that fit.
    pub fn capacity(&self) -> usize {
        self.words.capacity()
    }

    /// Begins the next step.
    pub fn clear(&mut self) {
        self.words.clear();
    }

    /// Appends numbers, one a sequence.
    pub fn push(&mut self, numbers: impl IntoIterator<Item = u32>) -> Slot {
        // Addresses behind them begin at multiples of 8 bytes.
        if self.words.len() % 2 == 1 {
            self.words.push(0);
        }
        let first = self.words.len();
        self.words.extend(numbers);
        let n_words = self.words.len() - first;
        Slot { first, n_words }
    }

    /// Appends the addresses of tensors, one a sequence.
    pub fn push_tensors<'t>(&mut self, tensors: impl IntoIterator<Item = &'t Tensor>) -> Slot {
        self.push(tensors.into_iter().flat_map(address_words))
    }

    /// Copies the table to the GPU, after all work that reads the one before. Panics beyond the room: its owner counted.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the GPU failed.
    pub fn upload(&mut self) -> Result<()> {
        let Some(buffer) = &mut self.buffer else {
            return Ok(());
        };
        let bytes = 4 * self.words.len();
        assert!(bytes <= buffer.bytes(), "a table beyond its room");
        let cuda: Cuda = buffer.cuda();
        cuda.bind()?;
        // SAFETY: the range is inside the allocation; pageable memory is staged before the call returns.
        check("copy a table to the GPU", unsafe {
            result::memcpy_htod_async(buffer.pointer(), &self.words, cuda.stream())
        })
    }

    /// Words pushed since [`StepTable::clear`].
    pub fn at(&self, slot: Slot) -> Placed<'_> {
        let pointer = self.buffer.as_ref().map_or(0, Buffer::pointer);
        Placed {
            words: &self.words[slot.first..slot.first + slot.n_words],
            pointer: pointer + 4 * slot.first as u64 * u64::from(self.buffer.is_some()),
        }
    }
}

impl Placed<'_> {
    /// Whether these are the addresses of `tensors`; on a CPU there is nothing to say.
    pub(crate) fn are_of<'t>(self, tensors: impl IntoIterator<Item = &'t Tensor>) -> bool {
        let words: Vec<u32> = tensors.into_iter().flat_map(address_words).collect();
        words == self.words
    }
}

/// Little-endian words; zeros for a tensor on the host.
fn address_words(tensor: &Tensor) -> [u32; 2] {
    let address = match tensor.device() {
        Device::Cpu => 0,
        Device::Cuda(_) => tensor.device_pointer(),
    };
    [address as u32, (address >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_pushes_get_the_same_places() {
        let mut table = StepTable::new(Device::Cpu, 16).unwrap();
        let mut places = Vec::new();
        for step in 0..2 {
            table.clear();
            let numbers = table.push([step, 5, 7]);
            let addresses = table.push_tensors([&Tensor::zeros(&[1], crate::DType::F32)]);
            assert_eq!(table.at(numbers).words, [step, 5, 7]);
            assert_eq!(table.at(addresses).words, [0, 0]);
            places.push((numbers.first, addresses.first));
        }
        assert_eq!(places, [(0, 4), (0, 4)]);
    }
}
