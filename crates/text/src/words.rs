//! The quick way from text to ids: words by a linear-time regular expression, and the ids of words already met from a cache.
//! The `tokenizers` pipeline tracks where each character came from, which nobody here asks for and which makes it some five times slower.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use regex::Regex;

use crate::tokenizer::WordPattern;

/// What both patterns end in; the `regex` crate has no look-ahead, so [`Words::next`] does what `\s+(?!\S)` says.
const LAST_ALTERNATIVES: &str = r"|\s+(?!\S)|\s+";

/// Cuts text into words as a [`WordPattern`] does.
#[derive(Clone, Debug)]
pub(crate) struct WordSplitter {
    regex: Regex,
}

impl WordSplitter {
    /// `None` if the pattern is not of the form that can do without look-ahead.
    pub fn new(pattern: WordPattern) -> Option<Self> {
        let head = pattern.regex().strip_suffix(LAST_ALTERNATIVES)?;
        let regex = Regex::new(&format!(r"\A(?:{head}|\s+)")).ok()?;
        Some(WordSplitter { regex })
    }

    pub fn words<'a>(&'a self, text: &'a str) -> Words<'a> {
        Words {
            regex: &self.regex,
            text,
            start: 0,
        }
    }
}

/// The words of a text in order; joined they are the text.
pub(crate) struct Words<'a> {
    regex: &'a Regex,
    text: &'a str,
    start: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = self
            .text
            .get(self.start..)
            .filter(|rest| !rest.is_empty())?;
        let end = match self.regex.find(rest) {
            Some(found) => self.without_last_space(rest, found.end()),
            // Cannot be: every character is in some alternative.
            None => rest.len(),
        };
        self.start += end;
        Some(&rest[..end])
    }
}

impl Words<'_> {
    /// White space before a word leaves its last character to that word. A run with line feeds was matched by an earlier
    /// alternative up to the last of them, so it ends in one and is left alone.
    fn without_last_space(&self, rest: &str, end: usize) -> usize {
        let word = &rest[..end];
        let Some(last) = word.chars().next_back() else {
            return end;
        };
        let is_blank = last.is_whitespace() && last != '\n' && last != '\r';
        if is_blank && end < rest.len() && end > last.len_utf8() {
            end - last.len_utf8()
        } else {
            end
        }
    }
}

/// Whether NFC leaves a text of such characters alone whatever their order: each is a starter that neither decomposes
/// nor composes with what precedes it. Not all such characters, but those that most texts are made of.
/// Source: Unicode Standard Annex 15, §9 (quick check "yes" and combining class 0).
pub(crate) fn is_always_nfc(c: char) -> bool {
    matches!(c as u32,
        0..=0x2ff | 0x400..=0x482 | 0x48a..=0x52f
        | 0x2010..=0x2027 | 0x2030..=0x205e
        | 0x2600..=0x27bf
        | 0x3001..=0x3029 | 0x3041..=0x3096 | 0x309d..=0x30ff
        | 0x4e00..=0x9fff | 0xac00..=0xd7a3
        | 0xff01..=0xffef | 0x1f300..=0x1faff)
}

/// Words kept per thread and vocabulary; beyond this new words are worked out each time.
const CACHE_WORDS: usize = 1 << 16;
/// Longer words hardly come twice.
const CACHE_WORD_BYTES: usize = 64;

type IdsByWord = HashMap<Box<str>, Box<[u32]>>;

thread_local! {
    static CACHE: RefCell<HashMap<u64, IdsByWord>> = RefCell::default();
}

/// A handle to the ids of words met before, in the thread that asks; `key` tells vocabularies apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordCache {
    key: u64,
}

impl WordCache {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        WordCache {
            key: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Hands the ids of each word to `take`, working out those not met before by `encode`.
    ///
    /// # Errors
    /// The first error of `encode`.
    pub fn each<'a, E>(
        self,
        words: impl Iterator<Item = &'a str>,
        encode: impl Fn(&str) -> Result<Vec<u32>, E>,
        mut take: impl FnMut(&[u32]),
    ) -> Result<(), E> {
        CACHE.with_borrow_mut(|caches| {
            let cache = caches.entry(self.key).or_default();
            for word in words {
                if let Some(ids) = cache.get(word) {
                    take(ids);
                    continue;
                }
                let ids = encode(word)?;
                take(&ids);
                if word.len() <= CACHE_WORD_BYTES && cache.len() < CACHE_WORDS {
                    cache.insert(word.into(), ids.into());
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[&str]) {
        let splitter = WordSplitter::new(WordPattern::Qwen3_5).unwrap();
        assert_eq!(splitter.words(text).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn last_space_goes_to_the_next_word() {
        check("a   b", &["a", "  ", " b"]);
        check("a  1", &["a", " ", " ", "1"]);
    }

    #[test]
    fn trailing_space_stays_whole() {
        check("a   ", &["a", "   "]);
    }

    #[test]
    fn line_feeds_end_their_run() {
        check("a \n\n  b", &["a", " \n\n", " ", " b"]);
        check("?\n\n x", &["?\n\n", " x"]);
    }

    #[test]
    fn marks_belong_to_words_in_the_newer_pattern_only() {
        let text = "กำ ที่";
        check(text, &["กำ", " ที่"]);
        let older = WordSplitter::new(WordPattern::Qwen2).unwrap();
        assert_eq!(older.words(text).collect::<Vec<_>>(), ["กำ", " ท", "ี่"]);
    }
}
