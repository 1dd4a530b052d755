//! Small tables (token ids, targets, boundaries) on the GPU: uploaded once, found again by their contents.

use cudarc::driver::result;

use super::{Buffer, Cuda, check, footprint};
use crate::Result;

/// More than the distinct tables of one pass.
const KEPT: usize = 64;
/// Most numbers for each token in a table: the items of attention's backward where every document is one token.
const NUMBERS_PER_TOKEN: usize = 8;

/// More than a table of all tensors that one launch works on.
const LAUNCH_BYTES: usize = 64 << 10;

/// Most bytes that the tables of passes over `n_tokens` take together.
pub fn table_bytes(n_tokens: usize) -> usize {
    KEPT * footprint(capacity(
        (4 * NUMBERS_PER_TOKEN * n_tokens).max(LAUNCH_BYTES),
    ))
}

fn capacity(bytes: usize) -> usize {
    bytes.next_power_of_two().max(1 << 10)
}

#[derive(Default)]
pub(super) struct Uploads {
    /// Latest use last.
    tables: Vec<Table>,
}

struct Table {
    contents: Vec<u32>,
    buffer: Buffer,
}

impl Uploads {
    /// Pointer to the contents on the GPU. A table out of use is overwritten in stream order, after the ops that read it.
    pub fn get(&mut self, cuda: Cuda, contents: &[u32]) -> Result<u64> {
        if let Some(idx) = self
            .tables
            .iter()
            .position(|table| table.contents == contents)
        {
            let table = self.tables.remove(idx);
            let pointer = table.buffer.pointer();
            self.tables.push(table);
            return Ok(pointer);
        }
        let bytes = std::mem::size_of_val(contents).max(4);
        let reusable = (self.tables.len() >= KEPT)
            .then(|| {
                let fits = |table: &Table| table.buffer.bytes() >= bytes;
                self.tables.iter().position(fits)
            })
            .flatten();
        let buffer = match reusable {
            Some(idx) => self.tables.remove(idx).buffer,
            None => {
                // The oldest goes, so that a longer row does not leave the tables of shorter ones behind for good.
                if self.tables.len() >= KEPT {
                    self.tables.remove(0);
                }
                Buffer::new(cuda, capacity(bytes))?
            }
        };
        // SAFETY: the range is inside the allocation; pageable memory is staged before the call returns.
        check("copy a table to the GPU", unsafe {
            result::memcpy_htod_async(buffer.pointer(), contents, cuda.stream())
        })?;
        let pointer = buffer.pointer();
        self.tables.push(Table {
            contents: contents.to_vec(),
            buffer,
        });
        Ok(pointer)
    }
}
