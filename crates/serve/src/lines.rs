//! Lines of a reply and how expected each was to the model: what the page shades by.

use serde::Serialize;

/// A finished line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Line {
    pub text: String,
    /// exp(-mean log-probability of its tokens), from the model's own distribution.
    pub ppl: f64,
    pub tokens: usize,
}

/// Cuts text into lines as it grows. A token counts for every line that it has a part of, the newline being part of what it ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct LineMeter {
    text: String,
    sum: f64,
    tokens: usize,
}

impl LineMeter {
    /// Adds a token's text and log-probability; gives the lines that it finished. Blank lines are passed over.
    pub fn push(&mut self, piece: &str, logprob: f32) -> Vec<Line> {
        self.count(logprob);
        let mut lines = Vec::new();
        let mut rest = piece;
        while let Some((before, after)) = rest.split_once('\n') {
            self.text.push_str(before);
            lines.extend(self.finish());
            rest = after;
            if !rest.is_empty() {
                self.count(logprob);
            }
        }
        self.text.push_str(rest);
        lines
    }

    /// The line that has not ended in a newline, when no more text comes.
    pub fn finish(&mut self) -> Option<Line> {
        let meter = std::mem::take(self);
        let text = meter.text.trim_end();
        if text.trim().is_empty() {
            return None;
        }
        Some(Line {
            text: text.to_owned(),
            // Text comes from tokens only, so there is at least one.
            ppl: (-meter.sum / meter.tokens.max(1) as f64).exp(),
            tokens: meter.tokens,
        })
    }

    fn count(&mut self, logprob: f32) {
        self.sum += f64::from(logprob);
        self.tokens += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_the_perplexity_of_their_tokens() {
        let mut meter = LineMeter::default();
        let half = 0.5f32.ln();
        let quarter = 0.25f32.ln();
        assert!(meter.push("Hello", half).is_empty());
        let lines = meter.push(" there\n\nNext", quarter);
        assert_eq!(lines.len(), 1);
        assert_eq!(
            (lines[0].text.as_str(), lines[0].tokens),
            ("Hello there", 2)
        );
        // Geometric mean of 1/2 and 1/4 is 8^(-1/2); f32 logarithms carry about 7 digits.
        assert!((lines[0].ppl - 8f64.sqrt()).abs() < 1e-5);
        assert!(meter.push(" line", half).is_empty());
        let last = meter.finish().unwrap();
        assert_eq!((last.text.as_str(), last.tokens), ("Next line", 2));
        assert_eq!(meter.finish(), None);
    }
}
