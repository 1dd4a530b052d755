//! The pages of `corpus stats` and `corpus peek`: one file of HTML each, and the pictures of the first as SVG files.

pub mod peek;
pub mod stats;
mod stats_figures;
