//! A source as a recipe names it: where its rows are, and how often an epoch shows them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A source of a mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedSource {
    /// A file of rows or a folder of them.
    pub path: PathBuf,
    /// How often an epoch shows it.
    #[serde(default = "once")]
    pub weight: f64,
}

fn once() -> f64 {
    1.0
}
