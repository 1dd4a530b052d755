//! Story sources to scenes, scenes to CPT documents and SFT conversations; the only crate that knows a game's data.
//!
//! The road: [`source`] reads a story, [`rules`] make sentences into rows, [`build`] writes the data sets and their
//! manifest, [`split`] holds scenes out, [`rows`] gives the rows back with their scene and side, [`examples`] makes them
//! (and rows of anybody else's files) into ids to train on, [`mixture`] puts those of several sources together, [`stats`] says what data sets hold, [`peek`] how training sees

//! a row, [`pages`] shows both, [`export`] writes them for other tools. [`import`] makes stories of other forms into plain ones.

pub mod account;
mod build;
mod character;
mod components;
mod counted;
mod dataset;
mod error;
pub mod examples;
pub mod export;
mod fold;
mod foreign;
#[doc(hidden)]
pub mod fuzz;
pub mod import;
mod language;
pub mod manifest;
pub mod mixture;
mod output;
mod packed;
pub mod pages;
pub mod peek;
mod request;
pub mod row_file;
mod row_form;
mod row_notes;
mod row_problems;
pub mod rows;
mod rules;
mod scene;
mod similar;
mod source;
pub mod split;
mod splitter;
mod staged;
pub mod stats;
mod stopwatch;
pub mod survey;
mod task;
mod weighted_source;

pub use build::{build, check_split, make_split, stage, training_texts};
pub use character::Character;
pub use counted::{Counting, Tokenizers, build_counting, build_timing_counts};
pub use error::{Error, Result};
pub use language::{ByLanguage, Language};
pub use manifest::Manifest;
pub use mixture::{MixedExamples, Mixture};
pub use request::{BuildRequest, Progress, SplitRequest};
pub use row_notes::RowNotes;
pub use row_problems::{BadRow, BadRows};
pub use rows::BuiltRow;
pub use rules::{Counter, Counters, TrainingCounter, TrainingCounts, TrainingRow};
pub use source::SourceKind;
pub use source::story::story_sha256;
pub use split::{Side, Split, SplitOptions, SplitReport};
pub use staged::{BuildReport, Staged};
pub use stopwatch::Times;
pub use task::Task;
pub use weighted_source::WeightedSource;
