//! How a model's files come from the Hub or a mirror of it: one repository, one commit, every file held against its published hash.
//!
//! A server is believed nothing. Names, hashes and sizes become [`FileName`], [`Commit`], [`Sha256`], [`GitBlobId`] and [`Snapshot`], none
//! of which can be made without being checked; what it says otherwise is shown as [`Said`] and used for nothing.
//! `tests/hostile.rs` lies in each way that is known.

mod answer;
mod client;
mod download;
mod endpoint;
mod error;
mod fetch;
pub mod fuzz;
mod hash;
mod name;
mod retry;
mod said;
mod snapshot;

pub use endpoint::Endpoint;
pub use error::{Error, Result};
pub use fetch::{Hub, Progress};
pub use hash::{Commit, GitBlobId, Hash, Sha256};
pub use name::{FileName, HubId, Revision, default_folder, is_hub_id};
pub use said::Said;
pub use snapshot::{File, MAX_BYTES, MAX_FILES, Snapshot};
