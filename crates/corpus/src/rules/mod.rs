//! The rules that lead from sentences to records, the same for every source.

pub(crate) mod cleanup;
pub(crate) mod conversation;
pub(crate) mod digits;
pub(crate) mod format;
pub(crate) mod markup;
pub(crate) mod paragraph;
pub(crate) mod split_tokens;

use std::borrow::Cow;

use text::labels::{self, LossScale, SftCounts};
use text::{Conversation, Tokenizer, WrittenTokens};

/// Tokens at which paragraphs and conversations are cut.
pub(crate) const PIECE_TOKENS: usize = 4096;
/// Most tokens a conversation of the main character may have; it is never cut.
pub(crate) const CHARACTER_TOKENS: usize = 8192;
/// User lines of a round that stay: the last ones.
pub(crate) const USER_LINES: usize = 10;

/// Counts the tokens of a text encoded alone, without special tokens.
pub type Counter<'a> = &'a (dyn Fn(&str) -> usize + Sync);

/// Counts a row as training encodes it by default.
pub type TrainingCounter<'a> = &'a (dyn Fn(TrainingRow<'_>) -> text::Result<TrainingCounts> + Sync);

/// A row that training will encode.
#[derive(Debug, Clone, Copy)]
pub enum TrainingRow<'r> {
    /// Text for pre-training.
    Document(&'r str),
    /// Messages for fine-tuning.
    Conversation(&'r Conversation),
}

/// What training makes of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainingCounts {
    /// Tokens of a conversation, template and all; `None` for a document.
    pub conversation: Option<SftCounts>,
    /// Added tokens that its contents spell.
    pub written: WrittenTokens,
}

impl TrainingRow<'_> {
    /// Counts by training's tokenizer.
    ///
    /// # Errors
    /// As [`labels::sft_counts`].
    pub fn counts(self, tokenizer: &Tokenizer) -> text::Result<TrainingCounts> {
        Ok(match self {
            TrainingRow::Document(text) => TrainingCounts {
                conversation: None,
                written: WrittenTokens::of_text(tokenizer, text),
            },
            TrainingRow::Conversation(conversation) => TrainingCounts {
                conversation: Some(labels::sft_counts(
                    tokenizer,
                    conversation,
                    LossScale::default(),
                )?),
                written: WrittenTokens::of_conversation(tokenizer, conversation),
            },
        })
    }
}

/// The two ways in which a build counts.
#[derive(Clone, Copy)]
pub struct Counters<'a> {
    /// Tokens of a sentence, by which the rules cut and drop; added tokens in it count as tokens, as published numbers have it.
    pub rules: Counter<'a>,
    /// What training makes of a row; without it nothing is said of that.
    pub training: Option<TrainingCounter<'a>>,
}

impl<'a> Counters<'a> {
    /// For the rules alone.
    pub fn of_rules(count: Counter<'a>) -> Counters<'a> {
        Counters {
            rules: count,
            training: None,
        }
    }
}

/// A sentence as a record shows it, with its tokens.
#[derive(Debug, Clone)]
pub(crate) struct Shown<'a> {
    pub text: Cow<'a, str>,
    pub tokens: usize,
}

impl<'a> Shown<'a> {
    pub fn new(text: Cow<'a, str>, count: Counter<'_>) -> Shown<'a> {
        let tokens = if text.is_empty() { 0 } else { count(&text) };
        Shown { text, tokens }
    }
}
