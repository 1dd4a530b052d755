//! What can go wrong between a request and its tokens.

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `engine`. Cloneable, because one failed step can end several sequences.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A prompt without ids.
    #[error("the prompt has no tokens; send at least one")]
    EmptyPrompt,
    /// An id of the prompt that the model does not have.
    #[error(
        "token {id} at position {position} is beyond the vocabulary of {vocab_size}; was the prompt made with another tokenizer?"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Its place in the prompt.
        position: usize,
        /// Ids from here on are not known.
        vocab_size: usize,
    },
    /// A prompt that leaves no room for a reply.
    #[error(
        "the prompt has {n_tokens} tokens and the context holds {context}, of which one must stay free; shorten the prompt or raise the context"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        n_tokens: usize,
        /// Tokens of prompt and reply together.
        context: usize,
    },
    /// A sampling value out of range.
    #[error("`{field}` must be {expected}, got {value}")]
    Sampling {
        /// Its name in requests.
        field: &'static str,
        /// What was asked for.
        value: f32,
        /// The range.
        expected: String,
    },
    /// An id in a sampling field that the model does not have.
    #[error(
        "`{field}` names token {id}, which is beyond the vocabulary of {vocab_size}; take ids of this model's tokenizer"
    )]
    UnknownId {
        /// The field's name in requests.
        field: &'static str,
        /// The id.
        id: u32,
        /// Ids from here on are not known.
        vocab_size: usize,
    },
    /// More alternatives than are reported.
    #[error("`top_logprobs` must be at most {most}, got {got}")]
    TopLogprobs {
        /// What was asked for.
        got: usize,
        /// The most.
        most: usize,
    },
    /// A reply without tokens.
    #[error(
        "`max_tokens` must be at least 1 where no log-probabilities of the prompt are asked for"
    )]
    MaxTokens,
    /// A least length beyond the greatest.
    #[error("`min_tokens` must be at most `max_tokens`, which is {max_tokens}, got {min_tokens}")]
    MinTokens {
        /// The least length.
        min_tokens: usize,
        /// The greatest length.
        max_tokens: usize,
    },
    /// Too many wait already.
    #[error("{waiting} requests are waiting already; try again in a moment")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// The engine's thread is gone.
    #[error("the engine has stopped; restart the server")]
    Stopped,
    /// The model's arithmetic broke down.
    #[error("the model gave a logit that is no number for token {id}; the weights may be damaged")]
    NotFinite {
        /// The token.
        id: u32,
    },
    /// Bans and allowed ids leave nothing.
    #[error("no token may be drawn here: bans and allowed ids leave none; allow at least one")]
    NoCandidates,
    /// A reader that does not read.
    #[error("the reader took no token for {stalled_s} s; read the stream or cancel it")]
    Stalled {
        /// Seconds.
        stalled_s: u64,
    },
    /// The system gave no thread.
    #[error("the engine's thread could not start ({reason}); close other programs and try again")]
    Thread {
        /// What the system said.
        reason: String,
    },
    /// The model failed in a step.
    #[error("the model failed: {reason}")]
    Model {
        /// What it said.
        reason: String,
    },
}
