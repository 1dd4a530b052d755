//! Between strings and token ids: tokenizer, chat template, loss masks and packing.
//! No tensor and no device is known here, so that counting, training, evaluation and serving all share one reading of a text.

mod added_tokens;
mod bpe;
mod bpe_file;
mod bpe_trainer;
mod chat_encoder;
mod chat_template;
mod conversation;
mod error;
mod example;
#[doc(hidden)]
pub mod fuzz;
mod hash;
pub mod json;
pub mod labels;
pub mod near;
pub mod pack;
mod persona;
pub mod probe;
mod spelling;
mod stream;
mod template_limits;
mod tokenizer;
mod tokenizer_file;
mod vocab;
mod word_cache;
mod words;
mod written_tokens;

pub use chat_encoder::{ChatEncoder, PromptOptions};
pub use chat_template::{ChatTemplate, RenderOptions};
pub use conversation::{Conversation, Message, Role, TurnJoin};
pub use error::{Error, MessageProblem, Result};
pub use example::{Example, IGNORE, Origin, Round};
pub use persona::{Persona, PersonaProfile, ProfileValues};
pub use stream::StreamDecoder;
pub use tokenizer::{ADDED_TOKENS, SamplingMask, Tokenizer, WordPattern};
pub use written_tokens::WrittenTokens;
