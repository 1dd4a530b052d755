//! Small tables (token ids, targets, boundaries) on the GPU: uploaded once, found again by their contents.

use cudarc::driver::result;

use super::{Cuda, check};
use crate::Result;

/// More than the distinct tables of one pass.
const KEPT: usize = 64;

#[derive(Default)]
pub(super) struct Uploads {
    /// Latest use last.
    tables: Vec<Table>,
}

struct Table {
    contents: Vec<u32>,
    pointer: u64,
    capacity: usize,
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
            let pointer = table.pointer;
            self.tables.push(table);
            return Ok(pointer);
        }
        let bytes = std::mem::size_of_val(contents).max(4);
        let reusable = (self.tables.len() >= KEPT)
            .then(|| self.tables.iter().position(|table| table.capacity >= bytes))
            .flatten();
        let (pointer, capacity) = match reusable {
            Some(idx) => {
                let table = self.tables.remove(idx);
                (table.pointer, table.capacity)
            }
            None => {
                let capacity = bytes.next_power_of_two().max(1 << 10);
                // SAFETY: plain allocation, kept until the process ends.
                let pointer = check("allocate a table", unsafe { result::malloc_sync(capacity) })?;
                (pointer, capacity)
            }
        };
        // SAFETY: the range is inside the allocation; pageable memory is staged before the call returns.
        check("copy a table to the GPU", unsafe {
            result::memcpy_htod_async(pointer, contents, cuda.stream())
        })?;
        self.tables.push(Table {
            contents: contents.to_vec(),
            pointer,
            capacity,
        });
        Ok(pointer)
    }
}
