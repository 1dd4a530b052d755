//! Host memory that a GPU copies from and to by itself, while kernels run.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::{Cuda, check};
use crate::{Error, Result};

/// Page-locked host memory, zero at first, freed with its owner.
#[derive(Debug)]
pub struct Pinned {
    cuda: Cuda,
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory with one owner; the driver lets any thread use it.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// # Errors
    /// [`Error::OutOfHostMemory`] where the system does not lock that much.
    pub fn new(cuda: Cuda, bytes: usize) -> Result<Pinned> {
        cuda.bind()?;
        // A byte at least: the driver refuses none.
        // SAFETY: plain allocation; the pointer is freed in Drop alone.
        let allocated = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
        let pointer = match allocated {
            Ok(pointer) => pointer,
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                return Err(Error::OutOfHostMemory { bytes });
            }
            Err(error) => return check("lock host memory", Err(error)),
        };
        let mut pinned = Pinned {
            cuda,
            pointer,
            bytes,
        };
        pinned.bytes_mut()?.fill(0);
        Ok(pinned)
    }

    /// The GPU that it is pinned for.
    pub fn cuda(&self) -> Cuda {
        self.cuda
    }

    /// The contents, once all copies are done.
    ///
    /// # Errors
    /// [`Error::Cuda`] if one of them failed.
    pub fn bytes(&self) -> Result<&[u8]> {
        self.cuda.settle_copies()?;
        // SAFETY: allocated with this many bytes, zeroed in `new`; no copy writes it now, and queueing one takes `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes) })
    }

    /// As [`Pinned::bytes`], to be written.
    ///
    /// # Errors
    /// As [`Pinned::bytes`].
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        self.cuda.settle_copies()?;
        // SAFETY: as above; no copy reads it now, and there is no other borrow.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes) })
    }

    /// Queues a copy of `bytes` bytes from `first` on to `target` on the GPU.
    pub(super) fn upload(&self, first: usize, bytes: usize, target: u64) -> Result<()> {
        assert!(first + bytes <= self.bytes, "upload beyond the memory");
        // SAFETY: the range is inside the allocation, which is freed only after the copies' streams were waited for; `target` is
        // a slot of a ring that is as large.
        check("copy to the GPU", unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                target,
                self.pointer.byte_add(first),
                bytes,
                self.cuda.copies().up,
            )
            .result()
        })
    }

    /// Queues a copy of `bytes` bytes from `source` on the GPU to `first` on.
    pub(super) fn download(&mut self, first: usize, bytes: usize, source: u64) -> Result<()> {
        assert!(first + bytes <= self.bytes, "download beyond the memory");
        // SAFETY: as above.
        check("copy from the GPU", unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                self.pointer.byte_add(first),
                source,
                bytes,
                self.cuda.copies().down,
            )
            .result()
        })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A GPU that is gone copies nothing any more.
        let _ = self.cuda.settle_copies();
        // SAFETY: allocated in `new`, freed once, and no copy uses it.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}
