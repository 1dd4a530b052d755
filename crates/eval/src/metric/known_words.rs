//! Share of a reply's words that the story holds: a first sign that a model speaks of its story at all.

use std::collections::HashSet;

/// The words of a set of texts.
#[derive(Debug, Default)]
pub struct Vocabulary {
    words: HashSet<String>,
}

impl Vocabulary {
    /// The words that stand in any of the texts.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let words = texts.into_iter().flat_map(words).collect();
        Vocabulary { words }
    }

    /// Known words / words of `text`; `None` for a text without words.
    pub fn share(&self, text: &str) -> Option<f64> {
        let words = words(text);
        let known = words
            .iter()
            .filter(|word| self.words.contains(*word))
            .count();
        (!words.is_empty()).then(|| known as f64 / words.len() as f64)
    }
}

/// Lower-case words of four letters or more in alphabetic scripts; pairs of neighbouring characters in Chinese and Japanese text.
fn words(text: &str) -> Vec<String> {
    let is_cjk = |c: char| matches!(c, '\u{3040}'..='\u{30FF}' | '\u{3400}'..='\u{4DBF}' | '\u{4E00}'..='\u{9FFF}');
    let mut words = Vec::new();
    for run in text.split(|c: char| !c.is_alphanumeric()) {
        let chars: Vec<char> = run.chars().collect();
        if chars.iter().any(|&c| is_cjk(c)) {
            words.extend(chars.windows(2).map(|pair| pair.iter().collect::<String>()));
        } else if chars.len() >= 4 {
            words.push(run.to_lowercase());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_counts_words_and_character_pairs() {
        let vocabulary = Vocabulary::of(["The lantern burns low.", "灯火很低"]);
        assert_eq!(vocabulary.share("A lantern sinks"), Some(0.5));
        assert_eq!(vocabulary.share("灯火"), Some(1.0));
        assert_eq!(vocabulary.share("火灯"), Some(0.0));
        assert_eq!(vocabulary.share("..."), None);
    }
}
