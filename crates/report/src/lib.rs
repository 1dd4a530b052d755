//! What pages are made of: figures as SVG, one HTML frame, one style sheet; files that need no script and fetch nothing.

pub mod figure;
pub mod frame;
pub mod look;
