//! Added tokens: texts that are one token wherever they stand, cut out before anything else is done.

use serde::Deserialize;
use tokenizers::AddedToken;

use crate::error::{Error, Result};
use crate::vocab::Vocab;

/// One entry of `added_tokens` in tokenizer.json.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AddedTokenEntry {
    pub id: u32,
    #[serde(flatten)]
    pub token: AddedToken,
}

/// The added tokens of a tokenizer, ascending by id.
#[derive(Clone, Debug)]
pub(crate) struct AddedTokens {
    entries: Vec<AddedTokenEntry>,
}

impl AddedTokens {
    /// # Errors
    /// [`Error::AddedTokenId`] if a token's id is neither that of its text in the vocabulary nor, for a new text, the next free one.
    pub fn new(mut entries: Vec<AddedTokenEntry>, vocab: &Vocab) -> Result<AddedTokens> {
        let mut next = vocab.len() as u32;
        for idx in 0..entries.len() {
            let AddedTokenEntry { id, token } = &entries[idx];
            let known = entries[..idx]
                .iter()
                .find(|e| e.token.content == token.content);
            let known = known.map(|e| e.id).or_else(|| vocab.id(&token.content));
            let got = match known {
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
        }
        entries.sort_by_key(|e| e.id);
        Ok(AddedTokens { entries })
    }

    pub fn get(&self, id: u32) -> Option<&AddedToken> {
        let place = self.entries.binary_search_by_key(&id, |e| e.id);
        place.ok().map(|place| &self.entries[place].token)
    }

    pub fn id(&self, content: &str) -> Option<u32> {
        let entry = self.entries.iter().find(|e| e.token.content == content);
        entry.map(|e| e.id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &AddedTokenEntry> {
        self.entries.iter()
    }

    pub fn highest_id(&self) -> Option<u32> {
        self.entries.last().map(|e| e.id)
    }

    /// Whether each is found by its text alone, which begins with `<`; only then may [`AddedTokens::split`] be used.
    pub fn are_plain(&self) -> bool {
        self.entries.iter().all(|AddedTokenEntry { token: t, .. }| {
            t.content.starts_with('<') && !(t.normalized || t.single_word || t.lstrip || t.rstrip)
        })
    }

    /// The text in front of the first added token, the token's id, and the text behind it; of tokens that begin at one place the longest.
    pub fn split<'t>(&self, text: &'t str) -> Option<(&'t str, u32, &'t str)> {
        text.match_indices('<').find_map(|(at, _)| {
            let rest = &text[at..];
            let found = self
                .entries
                .iter()
                .filter(|e| rest.starts_with(&e.token.content));
            let longest = found.max_by_key(|e| e.token.content.len())?;
            Some((
                &text[..at],
                longest.id,
                &rest[longest.token.content.len()..],
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(contents: &[&str]) -> AddedTokens {
        let entry = |(content, id): (&&str, u32)| AddedTokenEntry {
            id,
            token: AddedToken::from(*content, true).normalized(false),
        };
        let entries = contents.iter().zip(0..).map(entry).collect();
        AddedTokens::new(entries, &Vocab::default()).unwrap()
    }

    #[test]
    fn first_and_longest_token_is_cut_out() {
        let tokens = tokens(&["<b>", "<a>", "<a>>"]);
        assert_eq!(tokens.split("x < <a>>y<b>"), Some(("x < ", 2, "y<b>")));
        assert_eq!(tokens.split("<b>"), Some(("", 0, "")));
        assert_eq!(tokens.split("<<a"), None);
    }

    #[test]
    fn plain_tokens_stand_for_themselves() {
        assert!(tokens(&["<a>"]).are_plain());
        assert!(!tokens(&["<a>", "b"]).are_plain());
    }
}
