//! Training as policy: which documents in which order at which learning rate, what is measured on the way, and how a run survives a kill.
//!
//! Knows no story and no HTTP, and of a tokenizer only where it lets a document be cut; the arithmetic is `model`'s and `kernel`'s. The loop is [`run()`], in `run.rs`.

pub mod bench;
mod checkpoint;
pub mod data;
mod error;
pub mod from_seed;
mod identity;
pub mod job;
pub mod launch;
pub mod memory;
pub mod metrics;
pub mod needs;
pub mod optimizer;
pub mod progress;
pub mod ranks;
pub mod recipe_table;
mod record;
pub mod rounding;
mod run;
mod run_lock;
pub mod schedule;
mod seed;
pub mod step;
mod tensorboard;
pub mod validate;

pub use checkpoint::{Best, SetAside, last_finite};
pub use error::{Error, Result, lighter};
pub use job::{
    BatchConfig, DataConfig, Job, OptimizerConfig, RunConfig, TunerConfig, ValidationSet,
};
pub use progress::{Progress, Silent, Start, StepReport};
pub use run::{Summary, run, run_among};
pub use run_lock::RunLock;
