//! Tensors, devices and primitives: the arithmetic of Qwen3.5 and nothing that knows a layer, a file or a weight's name.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "[T,H,N] in a doc line is a shape, not a link"
)]

mod cpu;
pub mod cuda;
pub mod device;
pub mod dtype;
mod error;
pub mod example;
pub mod host;
pub mod ops;
mod peak_memory;
pub mod random;
pub mod selftest;
pub mod tensor;
pub mod timing;

pub use cpu::cpu_vectors;
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use half::bf16;
pub use peak_memory::PeakMemory;
pub use tensor::Tensor;
