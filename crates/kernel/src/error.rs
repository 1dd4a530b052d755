//! What can go wrong in the arithmetic: a shape, a dtype, a device.

use crate::DType;

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `kernel`; every variant carries the data to find the call.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum Error {
    #[error("{op}: expected {expected} for `{arg}`, got {got}")]
    Shape {
        op: &'static str,
        arg: &'static str,
        expected: String,
        got: String,
    },
    #[error("{op}: `{arg}` must be {expected}, got {got}")]
    DType {
        op: &'static str,
        arg: &'static str,
        expected: &'static str,
        got: DType,
    },
    #[error("{op}: `{arg}` holds {value} at row {row}, outside 0..{bound}")]
    Index {
        op: &'static str,
        arg: &'static str,
        row: usize,
        value: i64,
        bound: usize,
    },
    #[error(
        "{op}: `{arg}` lies on {got}, the first argument on {expected}; all must lie on one device"
    )]
    Device {
        op: &'static str,
        arg: &'static str,
        expected: String,
        got: String,
    },
    #[error("{op} on a GPU: {what}; use --device cpu")]
    Unsupported { op: &'static str, what: String },
    #[error("device `{asked}` is not there: no NVIDIA driver shows it; use --device cpu")]
    NoDevice { asked: String },
    #[error(
        "{name} has compute capability {compute_major}.{compute_minor}, and the kernels need 8.0 (RTX 30 series, A100) or newer; use --device cpu"
    )]
    TooOld {
        name: String,
        compute_major: i32,
        compute_minor: i32,
    },
    #[error(
        "{device} has no room for {bytes} bytes more ({free} are free); use fewer rows a batch, shorter rows, or LoRA, and close other programs on the GPU"
    )]
    OutOfMemory {
        device: String,
        bytes: usize,
        free: usize,
    },
    #[error(
        "{device} has no room for {bytes} bytes more: buffers have {in_use} of the {limit} bytes that --memory leaves them; give it more, or use fewer rows a batch, shorter rows, or LoRA"
    )]
    OverLimit {
        device: String,
        bytes: usize,
        in_use: usize,
        limit: usize,
    },
    #[error(
        "the system does not lock {bytes} bytes of memory for moments that do not fit on the GPU; close other programs, or use LoRA, shorter rows or a GPU with more memory"
    )]
    OutOfHostMemory { bytes: usize },
    #[error(
        "the GPU failed in {call}: {code} ({what}); if it happens again, `cyrene selftest` says which primitive is wrong, and --device cpu does without it"
    )]
    Cuda {
        call: &'static str,
        code: String,
        what: String,
    },
    #[error("{file}.cu does not compile for compute capability {compute}: {log}")]
    Compile {
        file: &'static str,
        compute: u32,
        log: String,
    },
    #[error(
        "the library NVRTC was not found; install it (pip install nvidia-cuda-nvrtc, or a CUDA toolkit) and put its folder on the library path, or use --device cpu"
    )]
    NoNvrtc,
    #[error(
        "the library cuBLASLt was not found; install it (pip install nvidia-cublas, or a CUDA toolkit) and put its folder on the library path, or use --device cpu"
    )]
    NoCublasLt,
    #[error(
        "cuBLASLt refused {product}: {status}; update the driver and cuBLASLt, or use --device cpu"
    )]
    CublasLt { status: String, product: String },
    #[error(
        "the library NCCL (libnccl.so.2, version 2.18 or later), which several GPUs need, was not found; install it (pip install nvidia-nccl-cu13, or the system's libnccl2) and put its folder on LD_LIBRARY_PATH, or start a single process without RANK and WORLD_SIZE"
    )]
    NoNccl,
    #[error(
        "NCCL failed in {call}: {what}; NCCL_DEBUG=INFO shows more, NCCL_SOCKET_IFNAME chooses the network interface"
    )]
    Nccl { call: &'static str, what: String },
}
