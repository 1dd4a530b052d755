//! The source `story`: JSON lines of scenes and texts (docs/story-format.md).

mod documents;
mod read;
mod units;

pub(crate) use documents::StoryDocuments;
pub(crate) use read::read;
pub use read::story_files;
pub(crate) use units::{guard, source_files, split};
