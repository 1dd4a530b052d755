//! Added tokens: texts that are one token wherever they stand, cut out before anything else is done.
//! Their flags mean what the `tokenizers` crate makes of them, which counted the ids that models were trained on.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::vocab::Vocab;
use crate::words::{is_word_char, nfc};

/// Put into people's texts before a template sets them between tokens of its own: it stands behind each character with which an added
/// token could begin, and keeps it from being one. Two of it are one that was written. Unicode keeps it out of texts that are passed on.
const ESCAPE: char = '\u{fdd0}';

/// Which of the added tokens that a text spells are tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// All: the text is a template's, or whoever wrote it likes them so.
    All,
    /// Those that are not escaped ([`AddedTokens::escape`]): people's texts between a template's own.
    Unescaped,
    /// None: the text is what somebody wrote.
    Nothing,
}

/// What a file says of an added token; the fields stand in the order in which files are written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AddedToken {
    pub content: String,
    /// Is none where a letter, digit or mark stands beside it.
    pub single_word: bool,
    /// Takes the white space in front of it along, which is lost.
    pub lstrip: bool,
    /// Takes the white space behind it along.
    pub rstrip: bool,
    /// Is looked for in the normalized text, between the tokens that are not.
    pub normalized: bool,
    /// Left out when a reply is decoded.
    pub special: bool,
}

impl AddedToken {
    /// The text that the token stands for, where texts are normalized or not.
    fn text(&self, normalizes: bool) -> Cow<'_, str> {
        match self.normalized && normalizes {
            true => nfc(&self.content),
            false => Cow::Borrowed(&self.content),
        }
    }
}

/// One entry of `added_tokens` in tokenizer.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct AddedTokenEntry {
    pub id: u32,
    #[serde(flatten)]
    pub token: AddedToken,
}

/// The added tokens of a tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct AddedTokens {
    /// Ascending by id, each id once.
    entries: Vec<AddedTokenEntry>,
    /// Looked for in the text as it is.
    plain: Patterns,
    /// Looked for in what is left of it, in NFC where the tokenizer normalizes.
    normalized: Patterns,
    normalizes: bool,
}

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece<'t> {
    /// Holds no added token.
    Text(&'t str),
    Token(u32),
}

impl AddedTokens {
    /// `normalizes`: whether texts are brought to NFC.
    ///
    /// # Errors
    /// [`Error::AddedTokenId`] if a token's id is neither that of its text in the vocabulary nor, for a new text, the next free one.
    pub fn new(
        listed: Vec<AddedTokenEntry>,
        vocab: &Vocab,
        normalizes: bool,
    ) -> Result<AddedTokens> {
        let mut next = vocab.len() as u32;
        let mut entries: Vec<AddedTokenEntry> = Vec::with_capacity(listed.len());
        for entry in listed {
            let AddedTokenEntry { id, token } = &entry;
            let before = entries
                .iter()
                .position(|e| e.token.content == token.content);
            let known = before.map(|place| entries[place].id);
            let got = match known.or_else(|| vocab.id(&token.content)) {
                Some(known) => known,
                // A token without text is none.
                None if token.content.is_empty() => u32::MAX,
                None => {
                    next += 1;
                    next - 1
                }
            };
            if got != *id {
                return Err(Error::AddedTokenId {
                    token: token.content.clone(),
                    expected: *id,
                    got,
                });
            }
            match before {
                // What is said last holds.
                Some(place) => entries[place] = entry,
                None if token.content.is_empty() => {}
                None => entries.push(entry),
            }
        }
        entries.sort_by_key(|e| e.id);
        let of = |normalized| {
            let chosen = entries
                .iter()
                .filter(|e| e.token.normalized == normalized)
                .map(|e| Pattern {
                    text: e.token.text(normalizes).into_owned(),
                    entry: e.clone(),
                });
            Patterns::new(chosen.collect())
        };
        Ok(AddedTokens {
            plain: of(false),
            normalized: of(true),
            entries,
            normalizes,
        })
    }

    pub fn get(&self, id: u32) -> Option<&AddedToken> {
        let place = self.entries.binary_search_by_key(&id, |e| e.id);
        place.ok().map(|place| &self.entries[place].token)
    }

    /// The text that a token of [`AddedTokens::get`] is decoded to.
    pub fn text<'t>(&self, token: &'t AddedToken) -> Cow<'t, str> {
        token.text(self.normalizes)
    }

    pub fn id(&self, content: &str) -> Option<u32> {
        let entry = self.entries.iter().find(|e| e.token.content == content);
        entry.map(|e| e.id)
    }

    /// The entries as a file lists them, ascending by id.
    pub fn entries(&self) -> &[AddedTokenEntry] {
        &self.entries
    }

    pub fn highest_id(&self) -> Option<u32> {
        self.entries.last().map(|e| e.id)
    }

    /// Gives the pieces of a text in order, those between added tokens normalized; `added` says what is one.
    pub fn cut(&self, text: &str, added: Added, mut each: impl FnMut(Piece<'_>)) {
        if added == Added::Nothing {
            return self.give(text, added, &mut each);
        }
        self.plain.cut(text, added, |piece| match piece {
            Piece::Token(_) => each(piece),
            Piece::Text(text) if self.normalized.all.is_empty() => {
                self.give(text, added, &mut each)
            }
            Piece::Text(text) => {
                self.normalized
                    .cut(&self.normal(text), added, |piece| match piece {
                        Piece::Token(_) => each(piece),
                        Piece::Text(text) => self.give(text, added, &mut each),
                    })
            }
        });
    }

    /// A text that holds no added token under [`Added::Unescaped`], wherever it is set, and else says the same.
    pub fn escape(&self, text: &str) -> String {
        // What is looked for in the normalized text must be seen there.
        let text = match self.normalized.all.is_empty() {
            true => Cow::Borrowed(text),
            false => self.normal(text),
        };
        let mut escaped = String::with_capacity(text.len());
        for c in text.chars() {
            escaped.push(c);
            if c == ESCAPE || self.plain.begin_with(c) || self.normalized.begin_with(c) {
                escaped.push(ESCAPE);
            }
        }
        escaped
    }

    /// Gives a text that holds no added token, normalized and no longer escaped.
    fn give(&self, text: &str, added: Added, each: &mut impl FnMut(Piece<'_>)) {
        let text = match added {
            Added::Unescaped => unescape(text),
            Added::All | Added::Nothing => Cow::Borrowed(text),
        };
        each(Piece::Text(&self.normal(&text)));
    }

    /// A text in the form that words are cut from.
    fn normal<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self.normalizes {
            true => nfc(text),
            false => Cow::Borrowed(text),
        }
    }
}

/// The text of which [`AddedTokens::escape`] made this one.
pub(crate) fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains(ESCAPE) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        // Alone it goes; of two one stays.
        if c != ESCAPE || chars.next_if_eq(&ESCAPE).is_some() {
            plain.push(c);
        }
    }
    Cow::Owned(plain)
}

/// Texts that are looked for together.
#[derive(Clone, Debug)]
struct Patterns {
    all: Vec<Pattern>,
    starts: Starts,
}

#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    entry: AddedTokenEntry,
}

/// How any of the texts begins.
#[derive(Clone, Debug)]
enum Starts {
    /// All alike, as Qwen's do: the standard library finds these fastest.
    With(char),
    /// By first byte.
    Any(Box<[bool; 256]>),
}

impl Patterns {
    fn new(all: Vec<Pattern>) -> Patterns {
        let mut firsts = all.iter().filter_map(|p| p.text.chars().next());
        let starts = match firsts.next() {
            Some(first) if firsts.all(|c| c == first) => Starts::With(first),
            _ => {
                let mut starts = Box::new([false; 256]);
                for first in all.iter().filter_map(|p| p.text.as_bytes().first()) {
                    starts[usize::from(*first)] = true;
                }
                Starts::Any(starts)
            }
        };
        Patterns { all, starts }
    }

    /// Whether any of the texts begins so; it may say yes where only the first byte is the same.
    fn begin_with(&self, c: char) -> bool {
        match &self.starts {
            Starts::With(first) => *first == c,
            Starts::Any(starts) => {
                let first = c.encode_utf8(&mut [0; 4]).as_bytes()[0];
                starts[usize::from(first)]
            }
        }
    }

    fn cut<'t>(&self, text: &'t str, added: Added, mut each: impl FnMut(Piece<'t>)) {
        let (mut done, mut from) = (0, 0);
        while let Some((at, pattern)) = self.next(text, from) {
            from = at + pattern.text.len();
            // An escape within a longer token has kept it from being found.
            if added == Added::Unescaped && is_escaped(&text[from..]) {
                continue;
            }
            let AddedTokenEntry { id, token } = &pattern.entry;
            if token.single_word && !stands_alone(text, at, from) {
                continue;
            }
            let start = match token.lstrip {
                true => text[..at].trim_end().len().max(done),
                false => at,
            };
            let end = match token.rstrip {
                true => text.len() - text[from..].trim_start().len(),
                false => from,
            };
            if done < start {
                each(Piece::Text(&text[done..start]));
            }
            each(Piece::Token(*id));
            done = end;
        }
        if done < text.len() {
            each(Piece::Text(&text[done..]));
        }
    }

    /// The first place behind `from` where one of the texts stands, and the longest of those there.
    fn next(&self, text: &str, from: usize) -> Option<(usize, &Pattern)> {
        let longest = |at: usize| {
            let rest = &text.as_bytes()[at..];
            let found = self
                .all
                .iter()
                .filter(|p| rest.starts_with(p.text.as_bytes()));
            let longest = found.max_by_key(|p| p.text.len())?;
            Some((at, longest))
        };
        match &self.starts {
            Starts::With(first) => text[from..]
                .match_indices(*first)
                .find_map(|(at, _)| longest(from + at)),
            Starts::Any(starts) => (from..text.len())
                .filter(|at| starts[usize::from(text.as_bytes()[*at])])
                .find_map(longest),
        }
    }
}

/// Whether an escape of what stands before begins this text; what people wrote in front of it comes in twos.
fn is_escaped(behind: &str) -> bool {
    let n = behind.chars().take_while(|c| *c == ESCAPE).count();
    n % 2 == 1
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let before = text[..start].chars().next_back();
    let behind = text[end..].chars().next();
    !before.is_some_and(is_word_char) && !behind.is_some_and(is_word_char)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &str) -> AddedToken {
        AddedToken {
            content: content.to_owned(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        }
    }

    fn check(tokens: Vec<AddedToken>, text: &str, expect: &[Piece<'_>]) {
        let entries = tokens.into_iter().zip(0..);
        let entries = entries.map(|(token, id)| AddedTokenEntry { id, token });
        let tokens = AddedTokens::new(entries.collect(), &Vocab::default(), true).unwrap();
        let mut got = Vec::new();
        tokens.cut(text, Added::All, |piece| got.push(format!("{piece:?}")));
        let expect: Vec<String> = expect.iter().map(|piece| format!("{piece:?}")).collect();
        assert_eq!(got, expect, "{text:?}");
    }

    use Piece::{Text, Token};

    #[test]
    fn first_and_longest_token_is_cut_out() {
        let tokens = || ["<b>", "<a>", "<a>>"].map(token).to_vec();
        check(
            tokens(),
            "x < <a>>y<b>",
            &[Text("x < "), Token(2), Text("y"), Token(0)],
        );
        check(tokens(), "<b>", &[Token(0)]);
        check(tokens(), "<<a", &[Text("<<a")]);
        check(tokens(), "", &[]);
    }

    #[test]
    fn tokens_may_begin_with_any_letter() {
        let tokens = ["<a>", "b", "é"].map(token).to_vec();
        check(
            tokens,
            "<a>xbè<é",
            &[Token(0), Text("x"), Token(1), Text("è<"), Token(2)],
        );
    }

    #[test]
    fn white_space_beside_a_token_goes_with_it_where_it_says_so() {
        let (mut left, mut right) = (token("<l>"), token("<r>"));
        (left.lstrip, right.rstrip) = (true, true);
        check(
            vec![left, right],
            "a \n<l> b <r> \t<l> c",
            &[
                Text("a"),
                Token(0),
                Text(" b "),
                Token(1),
                Token(0),
                Text(" c"),
            ],
        );
    }

    #[test]
    fn a_single_word_is_none_within_a_word() {
        let mut word = token("cat");
        word.single_word = true;
        check(
            vec![word],
            "cat concat cats (cat)",
            &[Token(0), Text(" concat cats ("), Token(0), Text(")")],
        );
    }

    #[test]
    fn normalized_tokens_are_found_in_either_form() {
        let mut word = token("<e\u{301}>");
        word.normalized = true;
        let tokens = vec![word, token("<e>")];
        check(
            tokens,
            "a<é><e>e\u{301}<e\u{301}>",
            &[Text("a"), Token(0), Token(1), Text("é"), Token(0)],
        );
    }

    #[test]
    fn what_is_said_last_of_a_token_holds() {
        let mut later = token("<a>");
        later.lstrip = true;
        let entries = [token("<a>"), later].map(|token| AddedTokenEntry { id: 0, token });
        let tokens = AddedTokens::new(entries.to_vec(), &Vocab::default(), true).unwrap();
        assert_eq!(tokens.entries().len(), 1);
        assert!(tokens.get(0).unwrap().lstrip);
    }

    /// What is left of a text as people's, alone and between the tokens of a template.
    fn check_escaped(tokens: Vec<AddedToken>, written: &str, expect: &str) {
        let entries = tokens.into_iter().zip(0..);
        let entries = entries.map(|(token, id)| AddedTokenEntry { id, token });
        let tokens = AddedTokens::new(entries.collect(), &Vocab::default(), true).unwrap();
        let first = tokens.entries()[0].token.content.clone();
        let text = format!("{first}{}{first}", tokens.escape(written));
        let mut got = Vec::new();
        tokens.cut(&text, Added::Unescaped, |piece| {
            got.push(format!("{piece:?}"))
        });
        let token = format!("{:?}", Token(0));
        let between = format!("{:?}", Text(expect));
        assert_eq!(got, [token.clone(), between.clone(), token], "{written:?}");
        let mut alone = Vec::new();
        tokens.cut(written, Added::Nothing, |piece| {
            alone.push(format!("{piece:?}"))
        });
        assert_eq!(alone, [between], "{written:?}");
    }

    #[test]
    fn what_people_write_is_no_token_to_the_letter() {
        let tokens = || ["<b>", "<a>", "<a>>", "<"].map(token).to_vec();
        for written in [
            "<a>",
            "x<a>>y<b><",
            "<<a>",
            "<",
            "\u{fdd0}",
            "<\u{fdd0}a>",
            "<\u{fdd0}\u{fdd0}a>\u{fdd0}<",
            "no token",
        ] {
            check_escaped(tokens(), written, written);
        }
        check_escaped(tokens(), "<e\u{301}<a>", "<é<a>");
    }

    #[test]
    fn escapes_hold_for_tokens_of_every_kind() {
        let (mut normalized, mut left, mut single) = (token("é"), token("cat"), token("\n"));
        normalized.normalized = true;
        (left.lstrip, left.rstrip) = (true, true);
        single.single_word = true;
        let tokens = || {
            vec![
                token("<a>"),
                normalized.clone(),
                left.clone(),
                single.clone(),
            ]
        };
        check_escaped(tokens(), "x e\u{301}é y", "x éé y");
        check_escaped(tokens(), "x \n cat \n y", "x \n cat \n y");
    }
}
