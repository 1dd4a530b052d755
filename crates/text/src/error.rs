//! Everything that can go wrong between strings and token ids.

use std::path::PathBuf;

use crate::conversation::Role;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {source}; give a folder with tokenizer.json or the file itself")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write {path}: {source}; check free space and permissions")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not the JSON of a tokenizer: {source}; fetch the file again")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cannot read {path}: {source}; check its permissions, or take it away")]
    ReadPersona {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is no persona (name, system, greeting and note by language, profile): {source}; mend it, or take it away and give --character"
    )]
    Persona {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error(
        "{path} holds a `{got}` tokenizer, only byte-level BPE works here; use a Qwen3.5 tokenizer.json"
    )]
    NotBpe { path: PathBuf, got: String },
    #[error(
        "the tokenizer lacks the token `{token}`, which ends turns or documents; use a Qwen3.5 tokenizer"
    )]
    MissingToken { token: String },
    #[error(
        "added token `{token}` should have id {expected} but follows the vocabulary at {got}; the files beside each other do not belong together"
    )]
    AddedTokenId {
        token: String,
        expected: u32,
        got: u32,
    },
    #[error(
        "the tokenizer's {part} is {got}, and only {known} works here; use the tokenizer.json of a Qwen folder"
    )]
    Pipeline {
        /// Key of tokenizer.json.
        part: &'static str,
        got: String,
        known: &'static str,
    },
    #[error(
        "the vocabulary lacks the byte {byte:#04x}, spelled `{spelling}`, and only byte-level BPE with all 256 works here; use the tokenizer.json of a Qwen folder"
    )]
    MissingByte { byte: u8, spelling: char },
    #[error(
        "the tokenizer marks parts of words with `{mark}`, only byte-level BPE works here; use a Qwen3.5 tokenizer.json"
    )]
    SubwordMark { mark: String },
    #[error(
        "a merge needs the token `{token}`, which the vocabulary lacks; the file is damaged, fetch it again"
    )]
    UnknownMerge { token: String },
    #[error(
        "the vocabulary has {n_ids} ids and {n_merges} merges, at most 4194304 and 1048575 work here; use a Qwen3.5 tokenizer.json"
    )]
    VocabTooLarge { n_ids: usize, n_merges: usize },
    #[error("a vocabulary of {vocab_size} is too small: 256 byte tokens come first; ask for more")]
    VocabTooSmall { vocab_size: usize },
    #[error("the tokenizer cannot be put into JSON: {source}; please report it")]
    ToJson { source: serde_json::Error },
    #[error(
        "no chat template in {path}: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; use the built-in one"
    )]
    NoChatTemplate { path: PathBuf },
    #[error("the chat template refuses the conversation: {message}")]
    TemplateRaised { message: String },
    #[error("chat template: {source}")]
    Template { source: minijinja::Error },
    #[error(
        "the conversation has no answer to train on after message {index}; add the assistant's answer or drop the row"
    )]
    NoFinalAnswer { index: usize },
    #[error("messages[{index}]{}{field}: {problem}", if .field.is_empty() { "" } else { "." })]
    Message {
        /// Place in the list, from 0.
        index: usize,
        /// Key inside the message, empty for the message itself.
        field: String,
        problem: MessageProblem,
    },
    #[error(
        "the chat template ends an answer otherwise than with <|im_end|>, so that none can be continued; use the built-in one"
    )]
    CannotContinue,
    #[error(
        "only an answer can be continued, and message {index} is none; end the messages with the assistant's"
    )]
    NothingToContinue { index: usize },
    #[error(
        "a piece of {length} tokens does not fit a row of {row_tokens}; split documents before packing"
    )]
    PieceTooLong { length: usize, row_tokens: usize },
    #[error(
        "the system message and a question take {prompt_tokens} tokens, so that a row of {row_tokens} has no room for the answer; give rows of more tokens, or shorten the system message or the question"
    )]
    NoRoomForAnswer {
        prompt_tokens: usize,
        row_tokens: usize,
    },
    #[error("a row of {row_tokens} tokens cannot hold any document; give at least {least}")]
    RowTooShort { row_tokens: usize, least: usize },
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}

/// What is wrong with a part of a message, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageProblem {
    #[error("a message must be an object with `role` and `content`, not {got}")]
    NotAnObject { got: &'static str },
    #[error("must be system, developer, user, assistant or tool, not {got}")]
    Role { got: String },
    #[error("must be a text or a list of text parts, not {got}")]
    NotText { got: &'static str },
    #[error(
        "holds a part of type `{kind}`, and only `text` is read here; leave images, sound, video and files out"
    )]
    Part { kind: String },
    #[error("is not read here; write what it says into the content, or take it away")]
    Unsupported,
    #[error(
        "says whether an answer is trained: true, false, 0 or 1, not {got}; no weight between them is read here"
    )]
    Selection { got: String },
    #[error("says the opposite of another key of `loss`, `train` and `weight`; leave one")]
    Contradiction,
    #[error("would train what the {} says, and only answers are trained here; take it away", .role.name())]
    NotAnAnswer { role: Role },
}
