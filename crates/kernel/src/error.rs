//! What can go wrong in the arithmetic: a shape, a dtype, a device.

use crate::DType;

/// What everything here gives that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `kernel`; every variant carries the data to find the call.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A shape or length that does not fit.
    #[error("{op}: expected {expected} for `{arg}`, got {got}")]
    Shape {
        /// Op and verb.
        op: &'static str,
        /// Name of the argument.
        arg: &'static str,
        /// What would fit.
        expected: String,
        /// What came.
        got: String,
    },
    /// A storage type that the op does not take there.
    #[error("{op}: `{arg}` must be {expected}, got {got}")]
    DType {
        /// Op and verb.
        op: &'static str,
        /// Name of the argument.
        arg: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What came.
        got: DType,
    },
    /// An id or target outside of its table.
    #[error("{op}: `{arg}` holds {value} at row {row}, outside 0..{bound}")]
    Index {
        /// Op and verb.
        op: &'static str,
        /// Name of the argument.
        arg: &'static str,
        /// Where in the argument.
        row: usize,
        /// What stands there.
        value: i64,
        /// Entries of the table.
        bound: usize,
    },
    /// Arguments on different devices.
    #[error(
        "{op}: `{arg}` lies on {got}, the first argument on {expected}; all must lie on one device"
    )]
    Device {
        /// Op and verb.
        op: &'static str,
        /// Name of the argument.
        arg: &'static str,
        /// Where the first argument lies.
        expected: String,
        /// Where this one lies.
        got: String,
    },
    /// Sizes that an op's kernels do not take.
    #[error("{op} on a GPU: {what}; use --device cpu")]
    Unsupported {
        /// Op and verb.
        op: &'static str,
        /// Which, and what they take.
        what: String,
    },
    /// No such device.
    #[error("device `{asked}` is not there: no NVIDIA driver shows it; use --device cpu")]
    NoDevice {
        /// What was asked for.
        asked: String,
    },
    /// A GPU older than the kernels.
    #[error(
        "{name} has compute capability {compute_major}.{compute_minor}, and the kernels need 8.0 (RTX 30 series, A100) or newer; use --device cpu"
    )]
    TooOld {
        /// As the driver calls it.
        name: String,
        /// Of its compute capability.
        compute_major: i32,
        /// Of its compute capability.
        compute_minor: i32,
    },
    /// A GPU without room.
    #[error(
        "{device} has no room for {bytes} bytes more ({free} are free); use fewer rows a batch, shorter rows, or LoRA, and close other programs on the GPU"
    )]
    OutOfMemory {
        /// Which.
        device: String,
        /// Asked for.
        bytes: usize,
        /// Left.
        free: usize,
    },
    /// A limit on memory without room.
    #[error(
        "{device} has no room for {bytes} bytes more: buffers have {in_use} of the {limit} bytes that --memory leaves them; give it more, or use fewer rows a batch, shorter rows, or LoRA"
    )]
    OverLimit {
        /// Which.
        device: String,
        /// Asked for.
        bytes: usize,
        /// Taken by buffers.
        in_use: usize,
        /// What buffers may take.
        limit: usize,
    },
    /// No page-locked memory.
    #[error(
        "the system does not lock {bytes} bytes of memory for moments that do not fit on the GPU; close other programs, or use LoRA, shorter rows or a GPU with more memory"
    )]
    OutOfHostMemory {
        /// Asked for.
        bytes: usize,
    },
    /// A call of the driver that failed.
    #[error(
        "the GPU failed in {call}: {code} ({what}); if it happens again, `cyrene selftest` says which primitive is wrong, and --device cpu does without it"
    )]
    Cuda {
        /// Which.
        call: &'static str,
        /// The driver's name of the error.
        code: String,
        /// The driver's description.
        what: String,
    },
    /// A kernel file that does not compile.
    #[error("{file}.cu does not compile for compute capability {compute}: {log}")]
    Compile {
        /// Its name, without `.cu`.
        file: &'static str,
        /// Compute capability as 10 · major + minor.
        compute: u32,
        /// What the compiler said.
        log: String,
    },
    /// No compiler of kernels.
    #[error(
        "the library NVRTC was not found; install it (pip install nvidia-cuda-nvrtc, or a CUDA toolkit) and put its folder on the library path, or use --device cpu"
    )]
    NoNvrtc,
    /// No library of products.
    #[error(
        "the library cuBLASLt was not found; install it (pip install nvidia-cublas, or a CUDA toolkit) and put its folder on the library path, or use --device cpu"
    )]
    NoCublasLt,
    /// A product that cuBLASLt failed at.
    #[error(
        "cuBLASLt refused {product}: {status}; update the driver and cuBLASLt, or use --device cpu"
    )]
    CublasLt {
        /// What it gave.
        status: String,
        /// Of which sizes and types.
        product: String,
    },
    /// No library for several GPUs.
    #[error(
        "the library NCCL (libnccl.so.2, version 2.18 or later), which several GPUs need, was not found; install it (pip install nvidia-nccl-cu13, or the system's libnccl2) and put its folder on LD_LIBRARY_PATH, or start a single process without RANK and WORLD_SIZE"
    )]
    NoNccl,
    /// A call of NCCL that failed.
    #[error(
        "NCCL failed in {call}: {what}; NCCL_DEBUG=INFO shows more, NCCL_SOCKET_IFNAME chooses the network interface"
    )]
    Nccl {
        /// Which.
        call: &'static str,
        /// NCCL's description.
        what: String,
    },
}
