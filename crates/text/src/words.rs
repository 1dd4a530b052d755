//! Cuts text into words as a [`WordPattern`] does, by a hand-written matcher over a table of character classes.
//! The patterns are short and never change, so no regular expression is run; the crates' own engines are the oracle of the tests.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};
use unicode_normalization_alignments::UnicodeNormalization;

use crate::tokenizer::WordPattern;

// Classes of characters, one bit each; the end of a text has none.
const LETTER: u8 = 1;
const MARK: u8 = 1 << 1;
const NUMBER: u8 = 1 << 2;
/// White space, line ends too.
const SPACE: u8 = 1 << 3;
/// U+000A and U+000D.
const LINE_END: u8 = 1 << 4;
/// None of letter, mark, number, space.
const OTHER: u8 = 1 << 5;
/// NFC may change it, or something beside it.
const UNSTABLE: u8 = 1 << 6;

/// Cuts text into words as a [`WordPattern`] does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WordSplitter {
    classes: &'static Classes,
    /// What words are made of.
    letters: u8,
    /// What runs of punctuation are made of.
    others: u8,
}

impl WordSplitter {
    pub fn new(pattern: WordPattern) -> WordSplitter {
        let (letters, others) = match pattern {
            WordPattern::Qwen3_5 => (LETTER | MARK, OTHER),
            WordPattern::Qwen2 => (LETTER, OTHER | MARK),
        };
        WordSplitter {
            classes: &CLASSES,
            letters,
            others,
        }
    }

    /// The end of the word that begins at `start`, which must be the start of a character. Alternatives in the pattern's order.
    #[inline]
    pub fn end(&self, text: &[u8], start: usize) -> usize {
        let (class, length) = self.classes.at(text, start);
        let next = start + length;
        // 1. [^\r\n\p{L}\p{N}]?\p{L}+ whose first character is a letter
        if class & LETTER != 0 {
            return self.run(text, next, self.letters);
        }
        // 2. \p{N}
        if class & NUMBER != 0 {
            return next;
        }
        // 3. (?i:'s|'t|'re|'ve|'m|'ll|'d)
        if text[start] == b'\'' {
            let length = contraction(&text[next..]);
            if length > 0 {
                return next + length;
            }
        }
        // 4. [^\r\n\p{L}\p{N}]?\p{L}+ with something else in front, or one mark alone where marks are letters
        let (class_behind, length_behind) = self.classes.at(text, next);
        if class & LINE_END == 0 {
            if class_behind & self.letters != 0 {
                return self.run(text, next + length_behind, self.letters);
            }
            if class & self.letters != 0 {
                return next;
            }
        }
        // 5.  ?[^\s\p{L}\p{N}]+[\r\n]*
        if class & self.others != 0 || (text[start] == b' ' && class_behind & self.others != 0) {
            let end = self.run(text, next, self.others);
            return self.run(text, end, LINE_END);
        }
        self.end_of_space(text, start, next)
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+`: up to the last line end; else all at the end of the text, all but one character before a word.
    fn end_of_space(&self, text: &[u8], start: usize, next: usize) -> usize {
        let mut last = start;
        let mut end = start;
        let mut line_end = None;
        loop {
            let (class, length) = self.classes.at(text, end);
            if class & SPACE == 0 {
                break;
            }
            last = end;
            end += length;
            if class & LINE_END != 0 {
                line_end = Some(end);
            }
        }
        match line_end {
            Some(end) => end,
            None if end == text.len() => end,
            // One character alone is left to `\s+`.
            None => last.max(next),
        }
    }

    /// The end of a run of characters of some classes.
    #[inline]
    fn run(&self, text: &[u8], start: usize, classes: u8) -> usize {
        let mut end = start;
        loop {
            let (class, length) = self.classes.at(text, end);
            if class & classes == 0 {
                return end;
            }
            end += length;
        }
    }

    /// The words of a text in order; joined they are the text.
    #[cfg(test)]
    pub fn words<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        let mut start = 0;
        while start < text.len() {
            let end = self.end(text.as_bytes(), start);
            words.push(&text[start..end]);
            start = end;
        }
        words
    }
}

/// Bytes behind an apostrophe that belong to it: s, t, m, d, re, ve, ll in either case, and the long s, which is an s in another case.
fn contraction(behind: &[u8]) -> usize {
    let at = |place: usize| behind.get(place).map(u8::to_ascii_lowercase);
    match (at(0), at(1)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => 1,
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => 2,
        (Some(0xc5), Some(0xbf)) => 2,
        _ => 0,
    }
}

/// A text in NFC.
pub(crate) fn nfc(text: &str) -> Cow<'_, str> {
    if is_surely_nfc(text) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.nfc().map(|(normalized, _)| normalized).collect())
}

/// Whether `\w` matches a character.
pub(crate) fn is_word_char(c: char) -> bool {
    static RANGES: LazyLock<Vec<(u32, u32)>> = LazyLock::new(|| ranges(r"\w"));
    let place = RANGES.partition_point(|(_, last)| *last < c as u32);
    RANGES
        .get(place)
        .is_some_and(|(first, _)| *first <= c as u32)
}

/// Whether NFC surely leaves a text as it is. It may say no of a text that NFC does not change, but says so of few.
fn is_surely_nfc(text: &str) -> bool {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        // Most texts are ASCII for long stretches.
        if let Some(chunk) = bytes[at..].first_chunk::<8>()
            && u64::from_le_bytes(*chunk) & 0x8080_8080_8080_8080 == 0
        {
            at += 8;
            continue;
        }
        let (class, length) = CLASSES.at(bytes, at);
        if class & UNSTABLE != 0 && !is_thai_mark_in_order(&text[..at + length]) {
            return false;
        }
        at += length;
    }
    true
}

/// Whether the last character is a Thai vowel sign below that no tone mark precedes. NFC sorts the two kinds (combining classes 103
/// and 107) and changes nothing else among Thai characters.
fn is_thai_mark_in_order(text: &str) -> bool {
    let mut backwards = text.chars().rev();
    matches!(backwards.next(), Some('\u{e38}' | '\u{e39}'))
        && !matches!(backwards.next(), Some('\u{e48}'..='\u{e4b}'))
}

/// Ranges in which NFC leaves every text alone whatever the order: each character is a starter that neither decomposes nor composes
/// with what precedes it (or a Thai tone mark, whose one trouble is the vowel sign behind it). Not all such characters, but those that
/// most texts are made of.
/// Source: Unicode Standard Annex 15, §9 (quick check "yes" and combining class 0).
const STABLE: [(u32, u32); 21] = [
    (0, 0x2ff),
    (0x400, 0x482),
    (0x48a, 0x52f),
    (0xe01, 0xe37),
    (0xe3f, 0xe5b),
    (0x1ea0, 0x1ef9),
    (0x2010, 0x2027),
    (0x2030, 0x205e),
    (0x2190, 0x2328),
    (0x2460, 0x27bf),
    (0x3000, 0x3029),
    (0x3030, 0x303f),
    (0x3041, 0x3096),
    (0x309b, 0x30ff),
    (0x3105, 0x312f),
    (0x31f0, 0x31ff),
    (0x3400, 0x4dbf),
    (0x4e00, 0x9fff),
    (0xac00, 0xd7a3),
    (0xff01, 0xffef),
    (0x1f300, 0x1faff),
];

/// Planes 0 and 1 in a table; of what lies above, ranges.
const TABLE_CHARS: usize = 0x2_0000;

#[derive(Debug)]
struct Classes {
    table: Box<[u8]>,
    /// (first, last, class), ascending.
    above: Vec<(u32, u32, u8)>,
}

static CLASSES: LazyLock<Classes> = LazyLock::new(Classes::new);

impl Classes {
    fn new() -> Classes {
        let mut classes = Classes {
            table: vec![OTHER | UNSTABLE; TABLE_CHARS].into_boxed_slice(),
            above: Vec::new(),
        };
        for (name, class) in [
            (r"\p{L}", LETTER),
            (r"\p{M}", MARK),
            (r"\p{N}", NUMBER),
            (r"\s", SPACE),
        ] {
            for (first, last) in ranges(name) {
                let table_end = (last as usize + 1).min(TABLE_CHARS);
                if let Some(part) = classes.table.get_mut(first as usize..table_end) {
                    part.fill(class | UNSTABLE);
                }
                if last as usize >= TABLE_CHARS {
                    classes
                        .above
                        .push((first.max(TABLE_CHARS as u32), last, class));
                }
            }
        }
        for line_end in [b'\r', b'\n'] {
            classes.table[usize::from(line_end)] |= LINE_END;
        }
        for (first, last) in STABLE {
            for class in &mut classes.table[first as usize..=last as usize] {
                *class &= !UNSTABLE;
            }
        }
        classes.above.sort_unstable();
        classes
    }

    /// Class and bytes of the character that begins at a place; none and 0 at the end of the text.
    #[inline(always)]
    fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        match text.get(at) {
            None => (0, 0),
            Some(&byte) if byte < 0x80 => (self.table[usize::from(byte)], 1),
            Some(&byte) => self.of_several_bytes(byte, &text[at + 1..]),
        }
    }

    #[inline]
    fn of_several_bytes(&self, first: u8, behind: &[u8]) -> (u8, usize) {
        let low = |byte: u8| usize::from(byte & 0x3f);
        let first_bits = usize::from(first);
        match (first, behind) {
            (0xc0..=0xdf, [a, ..]) => (self.table[(first_bits & 0x1f) << 6 | low(*a)], 2),
            (0xe0..=0xef, [a, b, ..]) => (
                self.table[(first_bits & 0xf) << 12 | low(*a) << 6 | low(*b)],
                3,
            ),
            (_, [a, b, c, ..]) => {
                let code = (first_bits & 7) << 18 | low(*a) << 12 | low(*b) << 6 | low(*c);
                let class = self.table.get(code).copied();
                (class.unwrap_or_else(|| self.of_high(code as u32)), 4)
            }
            // Cannot be in UTF-8: a character that the text's end cuts off.
            _ => (OTHER, 1),
        }
    }

    fn of_high(&self, code: u32) -> u8 {
        let place = self.above.partition_point(|(_, last, _)| *last < code);
        match self.above.get(place) {
            Some((first, _, class)) if *first <= code => class | UNSTABLE,
            _ => OTHER | UNSTABLE,
        }
    }
}

/// The code points of a class of characters, as the regular expressions know them.
fn ranges(class: &str) -> Vec<(u32, u32)> {
    let parsed = regex_syntax::parse(class);
    match parsed.as_ref().map(|hir| hir.kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            let range =
                |r: &regex_syntax::hir::ClassUnicodeRange| (r.start() as u32, r.end() as u32);
            class.ranges().iter().map(range).collect()
        }
        _ => unreachable!("{class} is a class that the tables of the crate hold"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &[&str]) {
        assert_eq!(WordSplitter::new(WordPattern::Qwen3_5).words(text), expect);
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
    fn contractions_stand_apart_in_either_case() {
        check(
            "it's WE'LL o'ſ 'really",
            &["it", "'s", " WE", "'LL", " o", "'ſ", " '", "really"],
        );
        check("'lx 'r", &["'lx", " '", "r"]);
    }

    #[test]
    fn marks_belong_to_words_in_the_newer_pattern_only() {
        let text = "กำ ที่";
        check(text, &["กำ", " ที่"]);
        let older = WordSplitter::new(WordPattern::Qwen2);
        assert_eq!(older.words(text), ["กำ", " ท", "ี่"]);
    }

    /// Alone they would be too easy: in three orders, so that each has many neighbours.
    #[test]
    fn surely_nfc_characters_are_left_alone_by_nfc() {
        let is_stable = |c: &char| is_surely_nfc(c.encode_utf8(&mut [0; 4]));
        let chars: Vec<char> = ('\0'..=char::MAX).filter(is_stable).collect();
        for step in [1, 7, 331] {
            let text: String = (0..chars.len())
                .map(|i| chars[i * step % chars.len()])
                .collect();
            assert!(is_surely_nfc(&text));
            let mut normalized = tokenizers::NormalizedString::from(text.as_str());
            normalized.nfc();
            assert!(normalized.get() == text, "step {step}");
        }
    }

    /// The crate's tables are those of one version of Unicode; ids depend on it.
    #[test]
    fn every_character_is_normalized_as_the_crate_does() {
        let marks = ["", "\u{301}", "\u{323}\u{308}", "\u{3099}", "\u{11a8}"];
        for mark in marks {
            let text: String = ('\0'..=char::MAX)
                .flat_map(|c| std::iter::once(c).chain(mark.chars()))
                .collect();
            let mut expect = tokenizers::NormalizedString::from(text.as_str());
            expect.nfc();
            assert!(nfc(&text) == expect.get(), "{mark:?}");
        }
    }

    #[test]
    fn word_characters_are_those_of_the_regular_expression() {
        let found: Vec<bool> = [
            'a', 'ß', '9', '_', '\u{301}', '\u{200d}', 'の', '-', ' ', '²',
        ]
        .map(is_word_char)
        .to_vec();
        assert_eq!(found, [[true; 7].as_slice(), &[false; 3]].concat());
    }

    #[test]
    fn thai_marks_out_of_order_are_not_surely_nfc() {
        assert!(is_surely_nfc("กุ่ ก่ ดั"));
        assert!(!is_surely_nfc("กุ่"));
    }
}
