//! A GPU as far as memory plans go: opened, or only talked about.

/// What the context of a process takes before any buffer, and what of it shows as used: 0.46 to 0.55 GiB on an H100, kernels included.
pub const CONTEXT_BYTES: usize = 512 << 20;
/// What kernels take once all have run: their code and cuBLASLt's, and the local memory of those that spill.
pub const KERNEL_BYTES: usize = 256 << 20;
/// What a desktop on the same GPU may come to want while training runs.
pub const DISPLAY_BYTES: usize = 512 << 20;

/// What sizes scratch and plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Compute capability as 10 · major + minor.
    pub compute: u32,
    /// Multiprocessors: what grids are sized by.
    pub n_multiprocessors: u32,
    /// All memory, or as much of it as a limit allows.
    pub memory_bytes: usize,
}

impl DeviceProperties {
    /// A GPU of today that nobody has asked for its properties (an RTX 5090), with this much memory.
    pub fn with_memory(memory_bytes: usize) -> DeviceProperties {
        DeviceProperties {
            compute: 120,
            n_multiprocessors: 170,
            memory_bytes,
        }
    }

    /// Bytes that buffers may take where nothing else runs.
    pub fn buffer_bytes(self) -> usize {
        DeviceProperties::buffers_of_memory(self.memory_bytes)
    }

    /// What `memory` leaves for buffers.
    pub(super) fn buffers_of_memory(memory: usize) -> usize {
        memory.saturating_sub(CONTEXT_BYTES + KERNEL_BYTES)
    }

    /// The memory that leaves `buffers`.
    pub(super) fn memory_for_buffers(buffers: usize) -> usize {
        buffers + CONTEXT_BYTES + KERNEL_BYTES
    }
}
