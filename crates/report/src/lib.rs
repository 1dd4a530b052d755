//! What pages are made of: figures as SVG, one HTML frame, one style sheet; files that need no script and fetch nothing. And what of a text
//! may be shown as it is.

pub mod figure;
pub mod frame;
pub mod harmless;
pub mod look;
