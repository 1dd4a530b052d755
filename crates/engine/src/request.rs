//! What is asked of the engine and what it answers.

use crate::error::{Error, Result};
use crate::sampling::Sampling;

/// The most alternatives a token can be reported with.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// One reply to generate.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// The prompt.
    pub ids: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most, the stop token included; the context's end may come earlier. 0 only with `prompt_logprobs`.
    pub max_tokens: usize,
    /// No stop id is drawn before this many tokens.
    pub min_tokens: usize,
    /// Ids that end the reply; the one that does is counted but not sent.
    pub stop_ids: Vec<u32>,
    /// How many alternatives to report with each token, 0 to 20.
    pub top_logprobs: usize,
    /// Whether to report how likely each token of the prompt was.
    pub prompt_logprobs: bool,
}

/// A token and how likely it was, before bans, penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The token.
    pub id: u32,
    /// Natural log of the model's own probability of it.
    pub logprob: f32,
    /// The likeliest ids and their log-probabilities, best first; as many as asked for.
    pub top: Vec<(u32, f32)>,
}

/// What comes back: the prompt's scores if asked for, tokens, then exactly one `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt's tokens from the second one on: nothing is said of the first.
    Prompt(Vec<Scored>),
    /// A generated token.
    Token {
        /// The token.
        id: u32,
        /// Natural log of the model's own probability: before bans, penalties and temperature.
        logprob: f32,
        /// The likeliest ids and their log-probabilities, best first; as many as asked for.
        top: Vec<(u32, f32)>,
    },
    /// The reply ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The stop id that came, if one did.
        stop: Option<Scored>,
        /// The seed of the draws: the one asked for, or the fresh one taken.
        seed: u64,
        /// Tokens of the whole request.
        usage: Usage,
    },
    /// The reply broke off.
    Failed(Error),
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was drawn.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// The receiver was dropped, or the engine was shut down.
    Cancelled,
}

/// Tokens of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Prompt tokens taken from a kept state instead of being computed.
    pub n_cached: usize,
    /// Generated tokens, the stop token included.
    pub n_generated: usize,
}

impl Request {
    /// Checks everything that can be checked without the model's weights.
    ///
    /// # Errors
    /// Empty or too long a prompt, an id beyond the vocabulary, a number out of range.
    pub(crate) fn validate(&self, vocab_size: usize, context: usize) -> Result<()> {
        if self.ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let must_generate = usize::from(self.max_tokens > 0);
        if self.ids.len() + must_generate > context {
            return Err(Error::PromptTooLong {
                n_tokens: self.ids.len(),
                context,
            });
        }
        if let Some(position) = self.ids.iter().position(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenId {
                id: self.ids[position],
                position,
                vocab_size,
            });
        }
        if self.max_tokens == 0 && !self.prompt_logprobs {
            return Err(Error::MaxTokens);
        }
        if self.min_tokens > self.max_tokens {
            return Err(Error::MinTokens {
                min_tokens: self.min_tokens,
                max_tokens: self.max_tokens,
            });
        }
        if self.top_logprobs > MAX_TOP_LOGPROBS {
            return Err(Error::TopLogprobs {
                got: self.top_logprobs,
                most: MAX_TOP_LOGPROBS,
            });
        }
        self.sampling.validate()?;
        self.sampling.validate_ids(vocab_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ids: &[u32], expect: Result<()>) {
        let request = Request {
            ids: ids.to_vec(),
            max_tokens: 1,
            ..Request::default()
        };
        assert_eq!(request.validate(10, 4), expect);
    }

    #[test]
    fn prompts_are_checked_before_they_wait() {
        check(&[1, 2, 3], Ok(()));
        check(&[], Err(Error::EmptyPrompt));
        check(
            &[1, 2, 3, 4],
            Err(Error::PromptTooLong {
                n_tokens: 4,
                context: 4,
            }),
        );
        check(
            &[1, 10],
            Err(Error::TokenId {
                id: 10,
                position: 1,
                vocab_size: 10,
            }),
        );
    }
}
