//! The tokens of a vocabulary by id and by spelling, in two flat arrays: a map of texts would be five times as large.

use crate::hash;

/// Tokens by id; ids may have gaps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vocab {
    /// All spellings, one behind the other in the order of ids.
    text: String,
    /// End of each id's spelling in `text`; a gap is empty.
    ends: Vec<u32>,
    n_tokens: usize,
    /// Open addressing by the hash of the spelling: id + 1, or 0. A power of two long, at most half full.
    slots: Vec<u32>,
}

impl Vocab {
    /// Tokens with their ids, in any order; of two tokens with one id the later one wins.
    pub fn new<'t>(tokens: impl Iterator<Item = (&'t str, u32)>) -> Vocab {
        let mut tokens: Vec<(&str, u32)> = tokens.collect();
        if !tokens.is_sorted_by_key(|(_, id)| *id) {
            tokens.sort_by_key(|(_, id)| *id);
        }
        let mut vocab = Vocab {
            text: String::with_capacity(tokens.iter().map(|(token, _)| token.len()).sum()),
            ends: Vec::with_capacity(tokens.len()),
            n_tokens: 0,
            slots: vec![0; (2 * tokens.len()).next_power_of_two()],
        };
        for (idx, (token, id)) in tokens.iter().enumerate() {
            if tokens.get(idx + 1).is_some_and(|(_, next)| next == id) {
                continue;
            }
            vocab.ends.resize(*id as usize, vocab.text.len() as u32);
            vocab.text.push_str(token);
            vocab.ends.push(vocab.text.len() as u32);
            vocab.n_tokens += 1;
            let slot = vocab.slot(token);
            vocab.slots[slot] = id + 1;
        }
        vocab
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        if self.slots.is_empty() {
            return None;
        }
        self.slots[self.slot(token)].checked_sub(1)
    }

    /// The spelling of an id.
    pub fn token(&self, id: u32) -> Option<&str> {
        let end = *self.ends.get(id as usize)?;
        let start = match id {
            0 => 0,
            _ => self.ends[id as usize - 1],
        };
        Some(&self.text[start as usize..end as usize]).filter(|token| !token.is_empty())
    }

    /// Number of tokens, gaps not counted.
    pub fn len(&self) -> usize {
        self.n_tokens
    }

    /// Highest id + 1.
    pub fn n_ids(&self) -> usize {
        self.ends.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        (0..self.ends.len() as u32).filter_map(|id| Some((self.token(id)?, id)))
    }

    /// Where a token stands, or the empty place where it would.
    fn slot(&self, token: &str) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash::of(token.as_bytes()) as usize & mask;
        while let Some(id) = self.slots[slot].checked_sub(1) {
            if self.token(id) == Some(token) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_by_id_and_spelling() {
        let vocab = Vocab::new([("c", 5), ("a", 0), ("bb", 2)].into_iter());
        assert_eq!(
            ["a", "bb", "c", "b"].map(|t| vocab.id(t)),
            [Some(0), Some(2), Some(5), None]
        );
        assert_eq!(vocab.token(2), Some("bb"));
        assert_eq!((vocab.token(1), vocab.token(6)), (None, None));
        assert_eq!((vocab.len(), vocab.n_ids()), (3, 6));
        let all: Vec<_> = vocab.iter().collect();
        assert_eq!(all, [("a", 0), ("bb", 2), ("c", 5)]);
    }

    #[test]
    fn no_token_is_in_an_empty_vocabulary() {
        assert_eq!(Vocab::default().id("a"), None);
    }
}
