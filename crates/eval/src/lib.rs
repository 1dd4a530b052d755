//! Evaluation: pure functions of texts and token losses, and the report that shows them.
//!
//! Nothing here calls a device but [`score`], which asks the model for token losses, and [`speak`], which has it answer; every metric is a

//! function of numbers and strings. [`evaluate`] puts them together.

mod baselines;
mod error;
mod evaluate;
pub mod metric;
mod progress;
mod replies;
pub mod report;
pub mod sample;
mod samples;
pub mod score;
pub mod speak;
mod trained_rows;

pub use error::{Error, Result};
pub use evaluate::{Evaluation, Losses, Measurement};
pub use progress::Progress;
pub use sample::Sample;
pub use samples::sample;
pub use trained_rows::TrainedRows;
