//! The rules that lead from sentences to records, the same for every source.

pub(crate) mod cleanup;
pub(crate) mod conversation;
pub(crate) mod digits;
pub(crate) mod format;
pub(crate) mod markup;
pub(crate) mod paragraph;
pub(crate) mod split_tokens;

use std::borrow::Cow;

/// Tokens at which paragraphs and conversations are cut.
pub(crate) const PIECE_TOKENS: usize = 4096;
/// Most tokens a conversation of the main character may have; it is never cut.
pub(crate) const CHARACTER_TOKENS: usize = 8192;
/// User lines of a round that stay: the last ones.
pub(crate) const USER_LINES: usize = 10;

/// Counts the tokens of a text encoded alone, without special tokens.
pub type Counter<'a> = &'a (dyn Fn(&str) -> usize + Sync);

/// The two ways in which a build counts.
#[derive(Clone, Copy)]
pub struct Counters<'a> {
    /// Tokens of a sentence, by which the rules cut and drop.
    pub rules: Counter<'a>,
    /// Tokens of a part of a conversation as training encodes it, template and all.
    pub training: Counter<'a>,
}

impl<'a> Counters<'a> {
    /// One way for both.
    pub fn same(count: Counter<'a>) -> Counters<'a> {
        Counters {
            rules: count,
            training: count,
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
