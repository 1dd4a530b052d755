//! Lines of a long text, and the white space of the rules (which is not Unicode's alone).

/// White space as the rules have it: Unicode's, and U+001C to U+001F.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// Cuts at every line feed together with one no-break space behind it, strips white space, drops empty lines.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').enumerate().filter_map(|(idx, piece)| {
        let piece = if idx > 0 {
            piece.strip_prefix('\u{a0}').unwrap_or(piece)
        } else {
            piece
        };
        let piece = piece.trim_matches(is_space);
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_exactly_the_listed_characters() {
        let listed = |c: char| {
            matches!(c as u32, 0x9..=0xd | 0x1c..=0x20 | 0x85 | 0xa0 | 0x1680 | 0x2000..=0x200a
                | 0x2028 | 0x2029 | 0x202f | 0x205f | 0x3000)
        };
        for c in (0..=0x10_ffffu32).filter_map(char::from_u32) {
            assert_eq!(is_space(c), listed(c), "U+{:04X}", c as u32);
        }
    }

    #[test]
    fn lines_cut_at_line_feeds_only() {
        let got: Vec<_> =
            lines("\u{a0}a\n\u{a0}\u{a0}b \r\n\n\u{2028}c\u{2028}d\u{200b}\n\u{1f}").collect();
        assert_eq!(got, ["a", "b", "c\u{2028}d\u{200b}"]);
    }
}
