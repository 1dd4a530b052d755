//! The frame of a page that a command writes: one file of HTML that is XML too, no script, nothing fetched.

use eval::report::look;

use crate::figure::{self, plain};

/// A whole page: `style` comes behind the project's style sheet and that of pictures, `body` is HTML.
pub fn page(title: &str, style: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>{title}</title>\
         <style>{}{}{style}</style></head><body><h1>{title}</h1>{body}<p class=\"soft\">cyrene {}</p></body></html>\n",
        look::STYLE,
        figure::STYLE,
        env!("CARGO_PKG_VERSION"),
        title = plain(title),
    )
}
