//! What `corpus stats` and `corpus peek` show: a page of HTML each, the pictures of the first as SVG files, and the same for a terminal.

pub mod peek;
pub mod peek_text;
pub mod stats;
mod stats_figures;
pub mod stats_text;
