//! What somebody else said, fit to be shown on a terminal.

use std::fmt::{self, Display};

/// Shown of it.
const MAX_CHARS: usize = 200;

/// A text of a server or a user: control characters, invisible ones and those that turn the direction of writing are escaped, and what is
/// too long is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said(String);

impl Said {
    /// Makes a text, or an error's text, harmless.
    pub fn new(text: impl Display) -> Said {
        let text = text.to_string();
        let mut shown = String::new();
        let mut chars = text.chars();
        for c in chars.by_ref().take(MAX_CHARS) {
            match c {
                // Rust would escape them for its own sake.
                '"' | '\'' => shown.push(c),
                _ => shown.extend(c.escape_debug()),
            }
        }
        if chars.next().is_some() {
            shown.push_str("...");
        }
        Said(shown)
    }
}

impl Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_terminal_is_escaped() {
        let text = "a\u{1b}[2J\r\n\u{7}\u{202e}\u{2066}\u{200b}\u{9b}é 中 it's \"x\"";
        let said = Said::new(text).to_string();
        assert_eq!(
            said,
            r#"a\u{1b}[2J\r\n\u{7}\u{202e}\u{2066}\u{200b}\u{9b}é 中 it's "x""#
        );
    }

    #[test]
    fn long_text_is_cut() {
        let said = Said::new("x".repeat(10_000)).to_string();
        assert_eq!(said.len(), MAX_CHARS + 3);
    }
}
