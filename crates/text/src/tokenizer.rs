//! The byte-level BPE tokenizer: text to ids and back.
//! Qwen's pipeline runs in code of our own ([`WordSplitter`], [`Bpe`](crate::bpe::Bpe)), because the `tokenizers` crate needs most of a
//! second to set up and five times as long for a text; that crate is the oracle of the tests (`tests/oracle.rs`).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::added_tokens::{Added, AddedTokens, Piece};
use crate::bpe::{Bytes, WordEncoder};
use crate::bpe_file::{Merges, Model, Tokens};
use crate::bpe_trainer;
use crate::chat_template::ChatTemplate;
use crate::error::{Error, Result};
use crate::spelling::{self, char_of};
use crate::tokenizer_file::{self as file, Steps, TokenizerFile};
use crate::word_cache::CacheKey;
use crate::words::WordSplitter;

/// The 33 added tokens of Qwen3.5 in id order, and whether each is special (left out when a reply is decoded).
/// In a template's text each is one token, special or not; in what people write each is text (docs/conversation.md).
pub const ADDED_TOKENS: [(&str, bool); 33] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|object_ref_start|>", true),
    ("<|object_ref_end|>", true),
    ("<|box_start|>", true),
    ("<|box_end|>", true),
    ("<|quad_start|>", true),
    ("<|quad_end|>", true),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
    ("<|audio_start|>", true),
    ("<|audio_end|>", true),
    ("<tts_pad>", true),
    ("<tts_text_bos>", true),
    ("<tts_text_eod>", true),
    ("<tts_text_bos_single>", true),
    ("<|audio_pad|>", true),
];

/// Ends a turn.
pub(crate) const TURN_END: &str = "<|im_end|>";
const DOCUMENT_END: &str = "<|endoftext|>";

/// Ids that are never drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplingMask {
    /// Single ids, ascending.
    pub banned: Vec<u32>,
    /// Ids from here on stand for nothing: embeddings are often longer than the vocabulary.
    pub vocab_limit: u32,
}

/// Which regular expression cuts a text into the words that BPE works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WordPattern {
    /// Combining marks belong to words: what Qwen3.5 was trained with.
    #[default]
    Qwen3_5,
    /// Combining marks stand apart: what a tokenizer class `Qwen2Tokenizer` does; only for counting as published numbers did.
    Qwen2,
}

impl WordPattern {
    /// The expression that matches one word after another, as tokenizer.json holds it.
    pub fn regex(self) -> &'static str {
        match self {
            WordPattern::Qwen3_5 => {
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            }
            WordPattern::Qwen2 => {
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            }
        }
    }
}

/// A loaded tokenizer; a clone is cheap and shares the vocabulary, and every method may run on many threads at once.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    model: Model,
    steps: Steps,
    added: AddedTokens,
    /// tokenizer_config.json as read, so that a save hands it on.
    config: Option<Value>,
    turn_end: u32,
    document_end: u32,
    vocab_size: usize,
    bytes: Box<Bytes>,
    splitter: WordSplitter,
    cache: CacheKey,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} ids)", self.inner.vocab_size)
    }
}

impl Tokenizer {
    /// Reads a folder holding `tokenizer.json` (or `tokenizer.json.gz`), or one such file.
    /// Added tokens that only `tokenizer_config.json` beside it knows are merged in, as the released files need.
    ///
    /// # Errors
    /// A missing file, broken JSON, a model other than BPE, no `<|im_end|>` or `<|endoftext|>`, files that disagree on ids, a vocabulary
    /// that lacks a byte, or steps around the model that are not those of Qwen's folders ([`Error::Pipeline`]).
    pub fn load(path: &Path) -> Result<Self> {
        let path = if path.is_dir() {
            file::file_in(path)
        } else {
            path.to_path_buf()
        };
        let mut file = TokenizerFile::read(&path)?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config: Option<Value> = if config_path.exists() {
            let bytes = file::read(&config_path)?;
            Some(
                serde_json::from_slice(&bytes).map_err(|source| Error::Json {
                    path: config_path.clone(),
                    source,
                })?,
            )
        } else {
            None
        };
        if let Some(config) = &config {
            file.merge_added_tokens(config, &config_path)?;
        }
        Self::from_file(file, config)
    }

    /// Learns a byte-level BPE vocabulary: NFC, the Qwen3.5 word pattern, `vocab_size` tokens of which 256 are the bytes,
    /// then the 33 [`ADDED_TOKENS`], so that [`Tokenizer::vocab_size`] is `vocab_size + 33`, or less when no pair occurs twice any more.
    /// The same texts give the same bytes of tokenizer.json.
    ///
    /// # Errors
    /// [`Error::VocabTooSmall`] below 256.
    pub fn train<'a>(texts: impl Iterator<Item = &'a str>, vocab_size: usize) -> Result<Self> {
        if vocab_size < 256 {
            return Err(Error::VocabTooSmall { vocab_size });
        }
        // 1. a tokenizer of bytes only, which cuts the texts into words
        let bytes_only = TokenizerFile::qwen3_5(byte_tokens(), Merges::default());
        let bytes_only = Self::from_file(bytes_only, None)?;
        let mut words: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        for text in texts {
            bytes_only.count_words(text, &mut words);
        }
        // 2. merges, and the vocabulary they build
        let learned = bpe_trainer::train(&words, vocab_size);
        let spell = |bytes: &[u8]| bytes.iter().map(|&b| char_of(b)).collect::<String>();
        let mut tokens = Tokens::default();
        for (token, id) in learned.tokens.iter().zip(0..) {
            tokens.push(&spell(token), id);
        }
        let mut merges = Merges::default();
        for (left, right) in &learned.merges {
            merges.push(&spell(left), &spell(right));
        }
        Self::from_file(TokenizerFile::qwen3_5(tokens, merges), None)
    }

    /// The same vocabulary with words cut by another pattern.
    pub fn with_pattern(self, pattern: WordPattern) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.inner);
        inner.steps.set_pattern(pattern);
        inner.splitter = WordSplitter::new(pattern);
        Tokenizer {
            inner: Arc::new(inner),
        }
    }

    /// Ids of `text`; nothing is put in front or behind, and added tokens written in the text become their ids: for a whole text with the
    /// marks of its template. What people say goes through [`ChatEncoder`](crate::ChatEncoder) and [`labels`](crate::labels).
    ///
    /// # Errors
    /// None: every text has ids.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.ids(text, Added::All))
    }

    /// Ids of `text` as somebody wrote it: added tokens in it are text, to the letter.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.ids(text, Added::Nothing))
    }

    /// What somebody wrote, in a form that is no added token between a template's own ([`Added::Unescaped`]).
    pub(crate) fn escape(&self, text: &str) -> String {
        self.inner.added.escape(text)
    }

    pub(crate) fn ids(&self, text: &str, added: Added) -> Vec<u32> {
        let (splitter, encoder) = (self.inner.splitter, self.word_encoder());
        self.inner.cache.with(|cache| {
            let mut ids = Vec::with_capacity(text.len() / 3);
            self.inner.added.cut(text, added, |piece| match piece {
                Piece::Text(text) => cache.append(text.as_bytes(), splitter, encoder, &mut ids),
                Piece::Token(id) => ids.push(id),
            });
            ids
        })
    }

    /// Number of ids that [`Tokenizer::encode`] gives for `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count(&self, text: &str) -> Result<usize> {
        Ok(self.n_ids(text, Added::All))
    }

    pub(crate) fn n_ids(&self, text: &str, added: Added) -> usize {
        let (splitter, encoder) = (self.inner.splitter, self.word_encoder());
        self.inner.cache.with(|cache| {
            let mut count = 0;
            self.inner.added.cut(text, added, |piece| match piece {
                Piece::Text(text) => count += cache.count(text.as_bytes(), splitter, encoder),
                Piece::Token(_) => count += 1,
            });
            count
        })
    }

    /// Gives the added tokens that a text spells, in order.
    pub(crate) fn spelt_tokens(&self, text: &str, mut each: impl FnMut(&str)) {
        let added = &self.inner.added;
        added.cut(text, Added::All, |piece| {
            if let Piece::Token(id) = piece
                && let Some(token) = added.get(id)
            {
                each(&token.content);
            }
        });
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token (padding of the embedding) give nothing,
    /// and `skip_special` leaves special tokens out (`<think>` is not one).
    ///
    /// # Errors
    /// None: all ids have a text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for id in ids {
            self.append_bytes(*id, skip_special, &mut bytes);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Id of a token by its exact spelling (`<|im_start|>`), `None` if the vocabulary has none such.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.id(token)
    }

    /// Highest id + 1: what an embedding must at least have.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// Ids that end a generation: `<|im_end|>` and `<|endoftext|>`.
    pub fn end_ids(&self) -> Vec<u32> {
        vec![self.inner.turn_end, self.inner.document_end]
    }

    /// The id that ends a turn and a training document: `<|im_end|>`.
    pub fn eos(&self) -> u32 {
        self.inner.turn_end
    }

    /// Whether `id` is an added token (`<|im_end|>`, `<think>`, ..), which stands for no text of its own.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.added.get(id).is_some()
    }

    /// What a reply may hold: no added token but those that end it, and the marks of a think block only where `thinking` was asked for.
    pub fn sampling_mask(&self, thinking: bool) -> SamplingMask {
        let ends = self.end_ids();
        let added = self.inner.added.entries().iter();
        let banned = added.filter(|e| {
            let is_mark = ["<think>", "</think>"].contains(&e.token.content.as_str());
            !(ends.contains(&e.id) || thinking && is_mark)
        });
        SamplingMask {
            banned: banned.map(|e| e.id).collect(),
            vocab_limit: u32::try_from(self.vocab_size()).unwrap_or(u32::MAX),
        }
    }

    /// Appends the bytes that `id` stands for: of a special token nothing if `skip_special`, of an id without a token nothing.
    pub fn append_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) {
        if let Some(token) = self.inner.added.get(id) {
            if !(skip_special && token.special) {
                spelling::append_bytes(&self.inner.added.text(token), out);
            }
        } else if let Some(token) = self.inner.model.vocab.token(id) {
            spelling::append_bytes(token, out);
        }
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `dir`, each whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`] with the path.
    pub fn save(&self, dir: &Path, template: &ChatTemplate) -> Result<()> {
        let inner = &*self.inner;
        let tokenizer = file::to_json(&inner.model, &inner.steps, &inner.added)?;
        files::write(&dir.join("tokenizer.json"), &tokenizer)?;
        let mut config = match &inner.config {
            Some(config) => config.clone(),
            None => self.new_config(),
        };
        if let Some(config) = config.as_object_mut() {
            config.insert("chat_template".into(), template.source().into());
        }
        let config =
            serde_json::to_vec_pretty(&config).map_err(|source| Error::ToJson { source })?;
        files::write(&dir.join("tokenizer_config.json"), &config)?;
        let template_path = dir.join("chat_template.jinja");
        files::write(&template_path, template.source().as_bytes())?;
        Ok(())
    }

    /// A config that makes other stacks take tokenizer.json as it is: the class `Qwen2Tokenizer` would put its own word pattern in.
    fn new_config(&self) -> Value {
        let added = self.inner.added.entries().iter();
        let decoder: serde_json::Map<String, Value> =
            added.map(|e| (e.id.to_string(), json!(e.token))).collect();
        json!({
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "bos_token": null,
            "clean_up_tokenization_spaces": false,
            "eos_token": TURN_END,
            "errors": "replace",
            "model_max_length": 262_144,
            "pad_token": DOCUMENT_END,
            "split_special_tokens": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": null,
        })
    }

    fn from_file(file: TokenizerFile, config: Option<Value>) -> Result<Self> {
        let model = file.model.build()?;
        // What a foreign tokenizer lacks says more than what is odd about its steps: told first.
        let pipeline = file.steps.pipeline();
        let normalizes = pipeline.as_ref().is_ok_and(|p| p.normalizes);
        let added = AddedTokens::new(file.added_tokens, &model.vocab, normalizes)?;
        let required = |token: &str| {
            let id = added.id(token).or_else(|| model.vocab.id(token));
            id.ok_or_else(|| Error::MissingToken {
                token: token.to_owned(),
            })
        };
        let (turn_end, document_end) = (required(TURN_END)?, required(DOCUMENT_END)?);
        let splitter = WordSplitter::new(pipeline?.pattern);
        let highest_added = added.highest_id().map_or(0, |id| id as usize + 1);
        let inner = Inner {
            vocab_size: model.vocab.n_ids().max(highest_added),
            bytes: Box::new(Bytes::new(&model.vocab, &model.bpe)?),
            model,
            steps: file.steps,
            added,
            config,
            turn_end,
            document_end,
            splitter,
            cache: CacheKey::new(),
        };
        Ok(Tokenizer {
            inner: Arc::new(inner),
        })
    }

    fn word_encoder(&self) -> WordEncoder<'_> {
        let model = &self.inner.model;
        WordEncoder {
            bpe: &model.bpe,
            bytes: &self.inner.bytes,
            whole_words: model.options.ignore_merges.then_some(&model.vocab),
        }
    }

    /// Adds the words of `text`, as bytes, to the counts; added tokens in the text are no words.
    fn count_words(&self, text: &str, words: &mut BTreeMap<Vec<u8>, u64>) {
        self.inner.added.cut(text, Added::All, |piece| {
            let Piece::Text(text) = piece else { return };
            let (text, mut start) = (text.as_bytes(), 0);
            while start < text.len() {
                let end = self.inner.splitter.end(text, start);
                let word = &text[start..end];
                match words.get_mut(word) {
                    Some(count) => *count += 1,
                    None => drop(words.insert(word.to_vec(), 1)),
                }
                start = end;
            }
        });
    }
}

impl Inner {
    fn id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| self.model.vocab.id(token))
    }
}

/// The 256 byte tokens in the released order: by the character that spells the byte.
fn byte_tokens() -> Tokens {
    let mut spellings: Vec<char> = (0..=255).map(char_of).collect();
    spellings.sort_unstable();
    let mut tokens = Tokens::default();
    for (spelling, id) in spellings.into_iter().zip(0..) {
        tokens.push(spelling.encode_utf8(&mut [0; 4]), id);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_tokens_have_the_released_order() {
        let tokenizer = TokenizerFile::qwen3_5(byte_tokens(), Merges::default());
        let tokenizer = Tokenizer::from_file(tokenizer, None).unwrap();
        let ids = ["!", "Ġ", "Ń"].map(|token| tokenizer.id(token));
        assert_eq!(ids, [Some(0), Some(220), Some(255)]);
        assert_eq!(tokenizer.vocab_size(), 256 + ADDED_TOKENS.len());
    }
}
