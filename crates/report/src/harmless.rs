//! Text that somebody else wrote, fit for a terminal and a page: what would move the cursor, change colours or turn the direction of the
//! line is shown instead of obeyed.

use std::borrow::Cow;
use std::fmt::Write;

/// Whether a character acts on what shows it: control characters but line feeds and tabs, and those that turn the direction of writing
/// (Unicode's Bidi_Control, UAX 9).
pub fn is_harmful(c: char) -> bool {
    let is_control = c.is_control() && !matches!(c, '\n' | '\t');
    let turns = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    is_control || turns
}

/// The text with such characters spelt out: `\u{1b}`.
pub fn harmless(text: &str) -> Cow<'_, str> {
    spelt(text, |out, c| {
        let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
    })
}

/// JSON with such characters as JSON spells them, `\u001b`: the same document.
pub fn harmless_json(json: &str) -> Cow<'_, str> {
    spelt(json, |out, c| {
        let _ = write!(out, "\\u{:04x}", u32::from(c));
    })
}

fn spelt(text: &str, spell: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_harmful(c) {
            true => spell(&mut out, c),
            false => out.push(c),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_spelt_out_and_all_else_stays() {
        let text =
            "a\u{1b}[2J\r\u{7}\u{9b}\u{7f}\u{202e}\u{2066}\u{200f}\u{61c}\n\té 中 ⟦ \u{200d}";
        assert_eq!(
            harmless(text),
            "a\\u{1b}[2J\\u{d}\\u{7}\\u{9b}\\u{7f}\\u{202e}\\u{2066}\\u{200f}\\u{61c}\n\té 中 ⟦ \u{200d}"
        );
        assert!(matches!(harmless("é 中\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn json_stays_json() {
        let json = "{\"a\": \"\u{9b}x\u{202e}\u{7f}\"}";
        assert_eq!(harmless_json(json), "{\"a\": \"\\u009bx\\u202e\\u007f\"}");
    }
}
