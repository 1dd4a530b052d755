//! Quantized checkpoint formats, written for other engines and read back by this one.

pub mod fp8_block;
