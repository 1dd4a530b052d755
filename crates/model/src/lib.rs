//! Qwen3.5 as a function with saved state: configuration, checkpoints, forward and backward, LoRA, quantized formats.
//!

//! The only crate that knows Hugging Face tensor names. It knows no optimizer, no data set, no request and no text.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "a shape such as [T,D] is no link"
)]

mod batch;
pub mod checkpoint;
mod config;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod linear;
mod lora;
mod parameter;
mod peft;
pub mod quant;
mod qwen3_5;
mod random;
mod rows;
pub mod sizes;

pub use batch::Batch;
pub use checkpoint::SaveOptions;
pub use config::{Config, LayerType};
pub use error::{Error, Result};
pub use lora::LoraConfig;
pub use parameter::Gradients;
pub use qwen3_5::memory::TrainPass;
pub use qwen3_5::recompute::Recompute;
pub use qwen3_5::saved::Saved;
pub use qwen3_5::state::SequenceState;
pub use qwen3_5::table::TensorSpec;
pub use qwen3_5::{Decoder, Model};
