//! Memory on a GPU.

use cudarc::driver::{result, sys};

use super::{Cuda, check};
use crate::{Error, Result};

/// An allocation on a GPU, freed with its owner.
#[derive(Debug)]
pub struct Buffer {
    cuda: Cuda,
    pointer: u64,
    bytes: usize,
}

impl Buffer {
    /// No memory yet.
    pub(crate) fn empty(cuda: Cuda) -> Buffer {
        Buffer {
            cuda,
            pointer: 0,
            bytes: 0,
        }
    }

    /// Uninitialised memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with what was asked and what is free; [`Error::OverLimit`] beyond a limit.
    pub(crate) fn new(cuda: Cuda, bytes: usize) -> Result<Buffer> {
        if bytes == 0 {
            return Ok(Buffer {
                cuda,
                pointer: 0,
                bytes,
            });
        }
        cuda.bind()?;
        cuda.meter()
            .take(bytes)
            .map_err(|(in_use, limit)| Error::OverLimit {
                device: format!("{cuda:?}"),
                bytes,
                in_use,
                limit,
            })?;
        // SAFETY: plain allocation; the pointer is freed in Drop alone.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(pointer) => Ok(Buffer {
                cuda,
                pointer,
                bytes,
            }),
            Err(error) => {
                cuda.meter().give_back(bytes);
                if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    return Err(Error::OutOfMemory {
                        device: format!("{cuda:?}"),
                        bytes,
                        free: cuda.free_bytes().unwrap_or(0),
                    });
                }
                check("allocate", Err(error))
            }
        }
    }

    pub(crate) fn cuda(&self) -> Cuda {
        self.cuda
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets the first `bytes` bytes to `value`.
    pub(crate) fn fill(&mut self, value: u8, bytes: usize) -> Result<()> {
        assert!(bytes <= self.bytes, "fill beyond the buffer");
        if bytes == 0 {
            return Ok(());
        }
        self.cuda.bind()?;
        // SAFETY: the range is inside the allocation.
        check("fill", unsafe {
            result::memset_d8_async(self.pointer, value, bytes, self.cuda.stream())
        })
    }

    /// Copies from the host.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "write beyond the buffer");
        if bytes.is_empty() {
            return Ok(());
        }
        self.cuda.bind()?;
        // SAFETY: the range is inside the allocation; pageable memory is staged before the call returns.
        check("copy to the GPU", unsafe {
            result::memcpy_htod_async(self.pointer, bytes, self.cuda.stream())
        })?;
        self.cuda.synchronize()
    }

    /// Copies to the host, after all work before it.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "read beyond the buffer");
        if bytes.is_empty() {
            return Ok(());
        }
        self.cuda.bind()?;
        // SAFETY: the range is inside the allocation, and the host slice outlives the wait below.
        check("copy from the GPU", unsafe {
            result::memcpy_dtoh_async(bytes, self.pointer, self.cuda.stream())
        })?;
        self.cuda.synchronize()
    }

    /// Copies `bytes` bytes from another buffer of the same GPU.
    pub(crate) fn copy_from(&mut self, source: &Buffer, bytes: usize) -> Result<()> {
        assert!(
            bytes <= self.bytes && bytes <= source.bytes,
            "copy beyond a buffer"
        );
        // The copy waits for this GPU's stream alone.
        assert_eq!(self.cuda, source.cuda, "copy between two GPUs");
        if bytes == 0 {
            return Ok(());
        }
        self.cuda.bind()?;
        // SAFETY: both ranges are inside their allocations.
        check("copy on the GPU", unsafe {
            result::memcpy_dtod_async(self.pointer, source.pointer, bytes, self.cuda.stream())
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.pointer == 0 || self.cuda.bind().is_err() {
            return;
        }
        // SAFETY: allocated in `new`, freed once; the driver waits for work that uses it. A GPU that is gone has no memory to free.
        let _ = unsafe { result::free_sync(self.pointer) };
        self.cuda.meter().give_back(self.bytes);
    }
}
