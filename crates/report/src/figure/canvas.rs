//! The few SVG elements that the pictures are made of, and how wide a text is about.

use std::fmt::Write;

use super::Figure;
use crate::look::plain;

/// Elements written one after another; lengths are in the picture's units.
#[derive(Default)]
pub(super) struct Canvas(String);

/// Where a text stands around its point.
#[derive(Debug, Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    /// A rectangle with a text that a pointer resting on it shows.
    pub fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64, tip: &str) {
        let _ = write!(
            self.0,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"><title>{}</title></rect>",
            plain(tip)
        );
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = write!(
            self.0,
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    /// A text with its base line at `y`; `class` is empty, `soft`, `on-dark` or `on-light`.
    pub fn text(&mut self, class: &str, anchor: Anchor, x: f64, y: f64, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let class = if class.is_empty() {
            String::new()
        } else {
            format!(" class=\"{class}\"")
        };
        let _ = write!(
            self.0,
            "<text{class} x=\"{x:.1}\" y=\"{y:.1}\"{anchor}>{}</text>",
            plain(text)
        );
    }

    /// Names beside their colours, in lines as wide as the picture; gives the height taken.
    pub fn legend(&mut self, names: &[&str], colour: impl Fn(usize) -> String, top: f64) -> f64 {
        let (mut x, mut y) = (8.0, top);
        for (idx, name) in names.iter().enumerate() {
            let name = fit(name, 180.0);
            let width = 18.0 + width(&name) + 12.0;
            if x + width > super::WIDTH && x > 8.0 {
                (x, y) = (8.0, y + 18.0);
            }
            self.rect(&colour(idx), x, y + 3.0, 12.0, 12.0, &name);
            self.text("", Anchor::Start, x + 17.0, y + 13.0, &name);
            x += width;
        }
        if names.is_empty() {
            0.0
        } else {
            y + 20.0 - top
        }
    }

    pub fn finish(self, name: &str, title: &str, description: String, height: f64) -> Figure {
        Figure {
            name: name.to_owned(),
            title: title.to_owned(),
            description,
            height,
            body: self.0,
        }
    }
}

/// About how wide a text of 12 units' size is, on the safe side for Latin letters.
pub(super) fn width(text: &str) -> f64 {
    text.chars().map(advance).sum()
}

/// The text, or its beginning and an ellipsis, in at most `most` units.
pub(super) fn fit(text: &str, most: f64) -> String {
    if width(text) <= most {
        return text.to_owned();
    }
    let mut left = most - advance('…');
    let kept = text.chars().take_while(|c| {
        left -= advance(*c);
        left >= 0.0
    });
    kept.chain(['…']).collect()
}

fn advance(c: char) -> f64 {
    match c {
        // Thai vowels and tones above and below, combining accents
        '\u{300}'..='\u{36f}' | '\u{e31}' | '\u{e34}'..='\u{e3a}' | '\u{e47}'..='\u{e4e}' => 0.0,
        '\u{1100}'..='\u{11ff}'
        | '\u{2e80}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7af}'
        | '\u{f900}'..='\u{faff}'
        | '\u{ff00}'..='\u{ff60}' => 12.2,
        'm' | 'w' | 'M' | 'W' | '…' | '%' | '@' => 10.8,
        'A'..='Z' | '\u{400}'..='\u{4ff}' => 8.2,
        'i' | 'j' | 'l' | '.' | ',' | ':' | '\'' | '|' | ' ' => 3.8,
        _ => 7.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_with_an_ellipsis() {
        assert_eq!(fit("Ada", 40.0), "Ada");
        assert_eq!(fit("一二三四五六", 48.0), "一二三…");
        assert!(width(&fit("The Lady of the Lake", 60.0)) <= 60.0);
    }
}
