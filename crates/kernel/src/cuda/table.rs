//! One launch over many tensors: whose blocks are whose, and what the kernel needs of each.

use super::{Args, Cuda};
use crate::Result;

/// Tensors in the order of their blocks; a kernel finds its own with the prelude's `tensor_of_block`.
#[derive(Debug)]
pub(crate) struct Table {
    /// The first block of each.
    firsts: Vec<u32>,
    n_blocks: usize,
    parts: Part,
}

/// A struct of the kernel's, in words: fields must lie without gaps, its size a multiple of 8 bytes.
#[derive(Debug)]
pub(crate) struct Part(Vec<u32>);

impl Part {
    pub fn u32(&mut self, value: u32) -> &mut Part {
        self.0.push(value);
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Part {
        self.u32(value as u32).u32((value >> 32) as u32)
    }

    pub fn f32(&mut self, value: f32) -> &mut Part {
        self.u32(value.to_bits())
    }
}

impl Table {
    /// Of `n` tensors.
    pub fn new(n: usize) -> Table {
        Table {
            firsts: Vec::with_capacity(n),
            n_blocks: 0,
            parts: Part(Vec::new()),
        }
    }

    /// The next tensor, of `n_blocks` blocks.
    pub fn push(&mut self, n_blocks: usize, write: impl FnOnce(&mut Part)) {
        self.firsts.push(self.n_blocks as u32);
        self.n_blocks += n_blocks;
        write(&mut self.parts);
    }

    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Appends what the kernel takes: `const u32* firsts, const Part* parts, u32 n_parts`.
    pub fn upload(mut self, cuda: Cuda, args: Args) -> Result<Args> {
        let n_parts = self.firsts.len();
        // Parts begin at a multiple of 8 bytes.
        if n_parts % 2 == 1 {
            self.firsts.push(u32::MAX);
        }
        let parts_at = 4 * self.firsts.len() as u64;
        self.firsts.extend(self.parts.0);
        let firsts = cuda.upload(&self.firsts)?;
        let parts = firsts + parts_at;
        Ok(args.pointer(firsts).pointer(parts).u32(n_parts))
    }
}
