//! Small tables (token ids, targets, boundaries) on the GPU: uploaded once, found again by their contents.

use cudarc::driver::result;

use super::{Buffer, Cuda, check, footprint};
use crate::Result;

/// More than the distinct tables of one pass.
const KEPT: usize = 64;
/// The latest tables are never overwritten: a launch may take several.
const FRESH: usize = KEPT / 2;
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

/// Which of the tables, latest last, gives its place to one of `bytes`: the oldest that has room, once as many as are kept are there.
fn reusable(capacities: impl ExactSizeIterator<Item = usize>, bytes: usize) -> Option<usize> {
    if capacities.len() < KEPT {
        return None;
    }
    let n_old = capacities.len() - FRESH;
    let mut old = capacities.take(n_old);
    old.position(|capacity| capacity >= bytes)
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
        let capacities = self.tables.iter().map(|table| table.buffer.bytes());
        let buffer = match reusable(capacities, bytes) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_gives_its_place_only_when_it_is_old_and_large_enough() {
        let large_at = |n: usize, at: usize| (0..n).map(move |i| if i == at { 4096 } else { 1024 });
        assert_eq!(reusable(large_at(KEPT - 1, 0), 1), None);
        assert_eq!(reusable(large_at(KEPT, 0), 1), Some(0));
        assert_eq!(reusable(large_at(KEPT, 9), 4000), Some(9));
        // The first of two tables of one launch has the only large buffer: the second needs another.
        assert_eq!(reusable(large_at(KEPT, KEPT - 1), 4000), None);
        assert_eq!(reusable(large_at(KEPT, 0), 5000), None);
    }
}
