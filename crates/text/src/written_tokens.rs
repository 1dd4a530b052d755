//! Added tokens that people wrote into texts, where they are text: counted, so that whoever meant the tokens learns that they are none.

use std::collections::BTreeMap;

use crate::conversation::Conversation;
use crate::tokenizer::Tokenizer;

/// How often each added token (`<think>`, `<|im_end|>`, ..) is spelt in what people wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenTokens {
    n: BTreeMap<String, u64>,
}

impl WrittenTokens {
    /// Those of a text.
    pub fn of_text(tokenizer: &Tokenizer, text: &str) -> Self {
        let mut written = WrittenTokens::default();
        written.add(tokenizer, text);
        written
    }

    /// Those of a conversation: its system message, and what everybody says and thinks. The marks of thoughts and of what tools say are the
    /// rules' own.
    pub fn of_conversation(tokenizer: &Tokenizer, conversation: &Conversation) -> Self {
        let mut written = WrittenTokens::default();
        for text in conversation.written() {
            written.add(tokenizer, text);
        }
        written
    }

    fn add(&mut self, tokenizer: &Tokenizer, text: &str) {
        tokenizer.spelt_tokens(text, |token| match self.n.get_mut(token) {
            Some(n) => *n += 1,
            None => drop(self.n.insert(token.to_owned(), 1)),
        });
    }

    /// Adds those of other texts.
    pub fn append(&mut self, others: &WrittenTokens) {
        for (token, n) in others.iter() {
            *self.n.entry(token.to_owned()).or_default() += n;
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.n.is_empty()
    }

    /// Each token and how often it is spelt, in the order of the alphabet.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.n.iter().map(|(token, n)| (token.as_str(), *n))
    }
}
