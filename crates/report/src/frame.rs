//! The frame of every page: one file of HTML that is XML too, no script, nothing fetched.

use crate::look::{self, plain};

/// A whole page: `styles` come behind the project's style sheet, `body` is HTML; the title is its heading too.
pub fn page(title: &str, styles: &[&str], body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>{title}</title>\
         <style>{}{}</style></head><body><h1>{title}</h1>{body}</body></html>\n",
        look::STYLE,
        styles.concat(),
        title = plain(title),
    )
}

/// The last line of a page that says nowhere else which version made it.
pub fn made_by() -> String {
    format!("<p class=\"soft\">cyrene {}</p>", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn title_is_escaped_in_head_and_heading() {
        let page = page("A & <b>", &["p { margin: 0 }"], "<p>x</p>");
        assert_eq!(page.matches("A &amp; &lt;b&gt;").count(), 2);
        assert!(
            page.ends_with("<p>x</p></body></html>\n") && page.contains("p { margin: 0 }</style>")
        );
    }
}
