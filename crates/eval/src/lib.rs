//! Evaluation: pure functions of texts and token losses, and the report that shows them.
//!
//! Nothing here calls a device but [`score`], which asks the model for token losses; every metric is a function of numbers and strings.

mod error;
pub mod metric;
pub mod report;
pub mod sample;
pub mod score;

pub use error::{Error, Result};
pub use sample::{Sample, Side};
