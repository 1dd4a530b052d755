//! Everything that can go wrong between strings and token ids.

use std::path::PathBuf;

use crate::conversation::Role;

/// What the functions of this crate give.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `text`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tokenizer that cannot be read.
    #[error("cannot read {path}: {source}; give a folder with tokenizer.json or the file itself")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that cannot be written.
    #[error("cannot write {path}: {source}; check free space and permissions")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tokenizer.json that is none.
    #[error("{path} is not the JSON of a tokenizer: {source}; fetch the file again")]
    Json {
        /// The file or folder.
        path: PathBuf,
        /// Where the JSON breaks off.
        source: serde_json::Error,
    },
    /// A persona.json that cannot be read.
    #[error("cannot read {path}: {source}; check its permissions, or take it away")]
    ReadPersona {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A persona.json that holds something else.
    #[error(
        "{path} is no persona (name, system, greeting and note by language, profile): {source}; mend it, or take it away and give --character"
    )]
    Persona {
        /// The file or folder.
        path: PathBuf,
        /// The key and line at fault.
        source: serde_json::Error,
    },
    /// A tokenizer of another kind than byte-level BPE.
    #[error(
        "{path} holds a `{got}` tokenizer, only byte-level BPE works here; use a Qwen3.5 tokenizer.json"
    )]
    NotBpe {
        /// The file or folder.
        path: PathBuf,
        /// Kind of tokenizer that the file names.
        got: String,
    },
    /// A vocabulary without one of the tokens that conversations are made of.
    #[error(
        "the tokenizer lacks the token `{token}`, which ends turns or documents; use a Qwen3.5 tokenizer"
    )]
    MissingToken {
        /// Its text, such as `<|im_end|>`.
        token: String,
    },
    /// Added tokens that do not follow the vocabulary by their ids.
    #[error(
        "added token `{token}` should have id {expected} but follows the vocabulary at {got}; the files beside each other do not belong together"
    )]
    AddedTokenId {
        /// Its text.
        token: String,
        /// Id that the file gives it.
        expected: u32,
        /// Id that its place gives it.
        got: u32,
    },
    /// A step of the tokenizer that is not Qwen's.
    #[error(
        "the tokenizer's {part} is {got}, and only {known} works here; use the tokenizer.json of a Qwen folder"
    )]
    Pipeline {
        /// Key of tokenizer.json.
        part: &'static str,
        /// Its value there.
        got: String,
        /// The only value that works.
        known: &'static str,
    },
    /// A vocabulary in which a byte has no token.
    #[error(
        "the vocabulary lacks the byte {byte:#04x}, spelled `{spelling}`, and only byte-level BPE with all 256 works here; use the tokenizer.json of a Qwen folder"
    )]
    MissingByte {
        /// The byte.
        byte: u8,
        /// The character that stands for it in byte-level BPE.
        spelling: char,
    },
    /// A BPE that marks where words go on.
    #[error(
        "the tokenizer marks parts of words with `{mark}`, only byte-level BPE works here; use a Qwen3.5 tokenizer.json"
    )]
    SubwordMark {
        /// Prefix or suffix that continues a word.
        mark: String,
    },
    /// A merge of or to a token that there is not.
    #[error(
        "a merge needs the token `{token}`, which the vocabulary lacks; the file is damaged, fetch it again"
    )]
    UnknownMerge {
        /// What the merge takes or gives.
        token: String,
    },
    /// A vocabulary beyond the widths of the tables here.
    #[error(
        "the vocabulary has {n_ids} ids and {n_merges} merges, at most 4194304 and 1048575 work here; use a Qwen3.5 tokenizer.json"
    )]
    VocabTooLarge {
        /// Ids of the vocabulary.
        n_ids: usize,
        /// Merges of it.
        n_merges: usize,
    },
    /// A vocabulary to be learned that has no room for the bytes.
    #[error("a vocabulary of {vocab_size} is too small: 256 byte tokens come first; ask for more")]
    VocabTooSmall {
        /// Tokens that were asked for.
        vocab_size: usize,
    },
    /// A tokenizer that has no JSON form.
    #[error("the tokenizer cannot be put into JSON: {source}; please report it")]
    ToJson {
        /// What serde said.
        source: serde_json::Error,
    },
    /// A folder without a template.
    #[error(
        "no chat template in {path}: neither chat_template.jinja nor `chat_template` in tokenizer_config.json; use the built-in one"
    )]
    NoChatTemplate {
        /// The folder that was looked through.
        path: PathBuf,
    },
    /// A template's file that cannot be read.
    #[error(
        "cannot read {path}: {source}; mend the file, or take it away for the built-in chat template"
    )]
    ReadTemplate {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Several templates, and nobody knows which is meant.
    #[error(
        "{path}: `chat_template` is neither a template nor a list of named ones with one named `default`; write the one that is meant into chat_template.jinja beside it"
    )]
    NamedTemplates {
        /// The file.
        path: PathBuf,
    },
    /// A template that refuses the messages in words of its own.
    #[error("the chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// Text of its `raise_exception`.
        message: String,
    },
    /// A template that cannot be read or run.
    #[error("chat template: {source}")]
    Template {
        /// What minijinja said, with the line.
        source: minijinja::Error,
    },
    /// A template of a size that none has.
    #[error(
        "the chat template has {n_bytes} bytes, and at most {most} are read of one; take it away for the built-in one"
    )]
    TemplateTooLarge {
        /// Bytes of its source.
        n_bytes: usize,
        /// The limit.
        most: usize,
    },
    /// A template in which a namespace could come to hold itself.
    #[error(
        "the chat template uses the namespace `{name}` otherwise than by {{% set NAME = namespace(...) %}} and NAME.attribute, and could put it into itself without end; write it so, or use the built-in template"
    )]
    TemplateNamespace {
        /// Its name.
        name: String,
    },
    /// A template that does not come to an end, or writes more than any chat.
    #[error(
        "the chat template was stopped: it does more than any conversation needs; use the built-in one, or shorten the conversation if it has thousands of messages"
    )]
    TemplateEndless,
    /// A template that breaks what runs it.
    #[error(
        "the chat template asks for what its engine cannot do and broke off; use the built-in one"
    )]
    TemplatePanicked,
    /// The system gives no thread to run a template on.
    #[error(
        "cannot run the chat template: {source}; give the program more memory or threads (ulimit -v, -u)"
    )]
    TemplateThread {
        /// What the system said.
        source: std::io::Error,
    },
    /// A conversation that ends before its answer.
    #[error(
        "the conversation has no answer to train on after message {index}; add the assistant's answer or drop the row"
    )]
    NoFinalAnswer {
        /// Place of the last message, from 0.
        index: usize,
    },
    /// A message of an unknown form.
    #[error("messages[{index}]{}{field}: {problem}", if .field.is_empty() { "" } else { "." })]
    Message {
        /// Place in the list, from 0.
        index: usize,
        /// Key inside the message, empty for the message itself.
        field: String,
        /// What is wrong, and what to do.
        problem: MessageProblem,
    },
    /// A template whose answers have no known end.
    #[error(
        "the chat template ends an answer otherwise than with <|im_end|>, so that none can be continued; use the built-in one"
    )]
    CannotContinue,
    /// A conversation to continue whose last message is no answer.
    #[error(
        "only an answer can be continued, and message {index} is none; end the messages with the assistant's"
    )]
    NothingToContinue {
        /// Place of the message in the list, from 0.
        index: usize,
    },
    /// A piece that no row holds.
    #[error(
        "a piece of {length} tokens does not fit a row of {row_tokens}; split documents before packing"
    )]
    PieceTooLong {
        /// Tokens of the piece.
        length: usize,
        /// Tokens that a row holds.
        row_tokens: usize,
    },
    /// A round whose question alone fills a row.
    #[error(
        "the system message and a question take {prompt_tokens} tokens, so that a row of {row_tokens} has no room for the answer; give rows of more tokens, or shorten the system message or the question"
    )]
    NoRoomForAnswer {
        /// Tokens in front of the answer.
        prompt_tokens: usize,
        /// Tokens that a row holds.
        row_tokens: usize,
    },
    /// Rows too short to cut anything into.
    #[error("a row of {row_tokens} tokens cannot hold any document; give at least {least}")]
    RowTooShort {
        /// Tokens that a row holds.
        row_tokens: usize,
        /// Tokens that a row must hold.
        least: usize,
    },
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
    /// The message is a text, a number or a list.
    #[error("a message must be an object with `role` and `content`, not {got}")]
    NotAnObject {
        /// Kind of JSON value that stands there.
        got: &'static str,
    },
    /// A role that nobody has.
    #[error("must be system, developer, user, assistant or tool, not {got}")]
    Role {
        /// The role as it was given.
        got: String,
    },
    /// Content that is neither text nor parts.
    #[error("must be a text or a list of text parts, not {got}")]
    NotText {
        /// Kind of JSON value that stands there.
        got: &'static str,
    },
    /// A part that is no text.
    #[error(
        "holds a part of type `{kind}`, and only `text` is read here; leave images, sound, video and files out"
    )]
    Part {
        /// Its `type`.
        kind: String,
    },
    /// A key that would change the prompt.
    #[error("is not read here; write what it says into the content, or take it away")]
    Unsupported,
    /// A weight other than 0 and 1.
    #[error(
        "says whether an answer is trained: true, false, 0 or 1, not {got}; no weight between them is read here"
    )]
    Selection {
        /// The value as it was given.
        got: String,
    },
    /// Two keys that say different things of the loss.
    #[error("says the opposite of another key of `loss`, `train` and `weight`; leave one")]
    Contradiction,
    /// Loss on what the user or the system says.
    #[error("would train what the {} says, and only answers are trained here; take it away", .role.name())]
    NotAnAnswer {
        /// Who says it.
        role: Role,
    },
}
