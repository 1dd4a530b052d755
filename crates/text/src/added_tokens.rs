//! Added tokens: texts that are one token wherever they stand, cut out before anything else is done.
//! Their flags mean what the `tokenizers` crate makes of them, which counted the ids that models were trained on.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::vocab::Vocab;
use crate::words::{is_word_char, nfc};

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

    /// Gives the pieces of a text in order, those between added tokens normalized. Where a `mark` is given, a text that it stands in
    /// is no added token, and no piece holds it any more.
    pub fn cut(&self, text: &str, mark: Option<char>, mut each: impl FnMut(Piece<'_>)) {
        self.plain.cut(text, |piece| match piece {
            Piece::Token(_) => each(piece),
            Piece::Text(text) if self.normalized.all.is_empty() => self.give(text, mark, &mut each),
            Piece::Text(text) => {
                let text = match self.normalizes {
                    true => nfc(text),
                    false => text.into(),
                };
                self.normalized.cut(&text, |piece| match piece {
                    Piece::Token(_) => each(piece),
                    Piece::Text(text) => self.give(text, mark, &mut each),
                });
            }
        });
    }

    /// Gives a text that holds no added token, normalized and without marks.
    fn give(&self, text: &str, mark: Option<char>, each: &mut impl FnMut(Piece<'_>)) {
        let unmarked = mark.map(|mark| text.replace(mark, ""));
        let text = unmarked.as_deref().unwrap_or(text);
        match self.normalizes {
            true => each(Piece::Text(&nfc(text))),
            false => each(Piece::Text(text)),
        }
    }
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

    fn cut<'t>(&self, text: &'t str, mut each: impl FnMut(Piece<'t>)) {
        let (mut done, mut from) = (0, 0);
        while let Some((at, pattern)) = self.next(text, from) {
            from = at + pattern.text.len();
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
        tokens.cut(text, None, |piece| got.push(format!("{piece:?}")));
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
}
