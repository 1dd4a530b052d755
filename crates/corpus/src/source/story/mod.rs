//! The source `story`: JSON lines of scenes and texts (docs/story-format.md).

mod build;
mod documents;
mod read;
mod units;

pub(crate) use documents::StoryDocuments;
pub(crate) use read::read;
pub use read::story_sha256;
use units::{guard, source_files, split};

use super::Source;

/// JSON lines of scenes and texts.
pub(crate) const SOURCE: Source = Source {
    name: "story",
    build: build::build,
    split: build::make_split,
    check: build::check_split,
};
