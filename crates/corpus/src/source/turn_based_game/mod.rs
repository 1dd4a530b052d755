//! The source `turn-based-game`: tables of numbers and hashes, and a map from hash to text for every language.

mod build;
mod conversations;
mod documents;
mod json;
mod tables;
mod talk;
mod text_map;
mod texts;
mod units;
pub(crate) mod vendor;

pub(crate) use documents::GameDocuments;
pub(crate) use tables::Tables;
pub(crate) use text_map::{TextHash, TextMapFiles};
pub(crate) use texts::Texts;
use units::{Roots, add_map, guard, split, table_files};

use super::Source;

/// Tables of one game, and what its vendor folder holds.
pub(crate) const SOURCE: Source = Source {
    name: "turn-based-game",
    build: build::build,
    split: build::make_split,
    check: build::check_split,
};
