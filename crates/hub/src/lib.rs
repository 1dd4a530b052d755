//! Models of the Hugging Face Hub, or of a mirror of it: fetched at a pinned commit, resumable, every file checked by its hash.
//!
//! Nothing else of the program reaches into a network to get something.

mod error;
mod fetch;
mod id;

pub use error::{Error, Result};
pub use fetch::{Fetched, File, Hash, Host, fetch, fetched};
pub use id::{default_folder, is_hub_id};
