//! What can go wrong in the arithmetic: a shape, a dtype, a device.

use crate::DType;

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `kernel`; every variant carries the data to find the call.
#[derive(Debug, thiserror::Error, PartialEq)]
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
    #[error("device `{asked}` is not available in this build; use --device cpu")]
    NoDevice { asked: String },
}
