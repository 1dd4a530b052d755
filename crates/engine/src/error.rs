//! What can go wrong between a request and its tokens.

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `engine`. Cloneable, because one failed step can end several sequences.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("the prompt has no tokens; send at least one")]
    EmptyPrompt,
    #[error(
        "token {id} at position {position} is beyond the vocabulary of {vocab_size}; was the prompt made with another tokenizer?"
    )]
    TokenId {
        id: u32,
        position: usize,
        vocab_size: usize,
    },
    #[error(
        "the prompt has {n_tokens} tokens and the context holds {context}, of which one must stay free; shorten the prompt or raise the context"
    )]
    PromptTooLong { n_tokens: usize, context: usize },
    #[error("`{field}` must be {expected}, got {value}")]
    Sampling {
        field: &'static str,
        value: f32,
        expected: String,
    },
    #[error("`top_logprobs` must be at most {most}, got {got}")]
    TopLogprobs { got: usize, most: usize },
    #[error("`max_tokens` must be at least 1")]
    MaxTokens,
    #[error("{waiting} requests are waiting already; try again in a moment")]
    QueueFull { waiting: usize },
    #[error("the engine has stopped; restart the server")]
    Stopped,
    #[error("the model gave a logit that is no number for token {id}; the weights may be damaged")]
    NotFinite { id: u32 },
    #[error("every token is banned; allow at least one")]
    NoCandidates,
    #[error("the reader took no token for {stalled_s} s; read the stream or cancel it")]
    Stalled { stalled_s: u64 },
    #[error("the engine's thread could not start ({reason}); close other programs and try again")]
    Thread { reason: String },
    #[error("the model failed: {reason}")]
    Model { reason: String },
}
