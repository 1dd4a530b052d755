//! Token ids in, token ids out: sampling, scheduling and sequence states; no text, no HTTP.
//! The engine is synchronous, on a thread of its own, and is spoken to through bounded queues.

mod channel;
mod error;
mod handle;
mod request;
mod runner;
pub mod sampling;
mod scheduler;
mod snapshots;
mod stats;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;

pub use channel::EventReceiver;
pub use error::{Error, Result};
pub use handle::{Engine, EngineConfig, EngineHandle};
pub use request::{Event, FinishReason, MAX_TOP_LOGPROBS, Request, Usage};
pub use sampling::Sampling;
pub use stats::Stats;
