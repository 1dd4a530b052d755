//! Token ids in, token ids out: sampling, scheduling and sequence states; no text, no HTTP.

//! The engine is synchronous, on a thread of its own, and is spoken to through bounded queues.

mod channel;
mod config;
mod error;
mod handle;
mod queue;
mod request;
mod runner;
pub mod sampling;
mod scheduler;
mod sequence;
mod snapshots;
mod stats;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;

pub use channel::EventReceiver;
pub use config::EngineConfig;
pub use error::{Error, Result};
pub use handle::{Engine, EngineHandle};
pub use request::{Event, FinishReason, MAX_TOP_LOGPROBS, Request, Scored, Usage};
pub use sampling::Sampling;
pub use stats::Stats;
