//! Token ids in, token ids out: sampling, scheduling and sequence states; no text, no HTTP.

mod error;
pub mod sampling;

pub use error::{Error, Result};
pub use sampling::Sampling;
