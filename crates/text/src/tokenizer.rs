//! The byte-level BPE tokenizer: text to ids and back.
//! Qwen's pipeline runs in code of our own ([`WordSplitter`], [`Bpe`]); the `tokenizers` crate, which needs most of a second to set up and
//! five times as long for a text, runs every other pipeline, normalises, writes tokenizer.json, counts words for a new vocabulary, and is
//! the oracle of the tests.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tokenizers::{NormalizedString, OffsetReferential, OffsetType, PreTokenizer};

use crate::added_tokens::AddedTokens;
use crate::bpe::{Bytes, WordEncoder};
use crate::bpe_file::{Merges, Model, Tokens};
use crate::bpe_trainer;
use crate::chat_template::ChatTemplate;
use crate::error::{Error, Result};
use crate::spelling::{self, char_of};
use crate::tokenizer_file::{self as file, Pipeline, Steps, TokenizerFile, wrap};
use crate::word_cache::CacheKey;
use crate::words::{WordSplitter, is_surely_nfc};

/// The 33 added tokens of Qwen3.5 in id order, and whether each is special (left out when a reply is decoded).
/// In any text each is one token, special or not.
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
    /// The bytes of the vocabulary; without them nothing is done without the crate's pipeline.
    bytes: Option<Box<Bytes>>,
    /// How to cut words without the pipeline; `None` where its steps are others than Qwen's.
    splitter: Option<WordSplitter>,
    cache: CacheKey,
    /// The crate's tokenizer, made when it is first needed.
    pipeline: OnceLock<Pipeline>,
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
    /// A missing file, broken JSON, a model other than BPE, no `<|im_end|>` or `<|endoftext|>`, or files that disagree on ids.
    pub fn load(path: &Path) -> Result<Self> {
        let path = if path.is_dir() {
            file::file_in(path)
        } else {
            path.to_path_buf()
        };
        let mut file = TokenizerFile::read(&path)?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config: Option<Value> = if config_path.is_file() {
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
        // 1. a tokenizer of bytes only, whose own pipeline cuts the texts into words
        let bytes_only = TokenizerFile::qwen3_5(byte_tokens(), Merges::default())?;
        let bytes_only = Self::from_file(bytes_only, None)?;
        let mut words: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        for text in texts {
            bytes_only.count_words(text, &mut words)?;
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
        Self::from_file(TokenizerFile::qwen3_5(tokens, merges)?, None)
    }

    /// The same vocabulary with words cut by another pattern.
    ///
    /// # Errors
    /// [`Error::NoWordPattern`] where the tokenizer cuts by no regular expression.
    pub fn with_pattern(self, pattern: WordPattern) -> Result<Self> {
        let mut inner = Arc::unwrap_or_clone(self.inner);
        inner.steps.set_pattern(pattern)?;
        inner.pipeline = OnceLock::new();
        Ok(Tokenizer {
            inner: Arc::new(inner.with_splitter()?),
        })
    }

    /// Ids of `text`; nothing is put in front or behind, and added tokens written in the text become their ids.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the pipeline fails, which no UTF-8 text is known to cause.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.quick_way() {
            Some(way) => Ok(self.encode_quickly(way, text, nfc)),
            None => self.encode_by_pipeline(text),
        }
    }

    /// As [`Tokenizer::encode`], but what would be an added token without the `mark` in it is text; marks give nothing.
    pub(crate) fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>> {
        match self.quick_way() {
            Some(way) => Ok(self.encode_quickly(way, text, |text| {
                Cow::Owned(nfc(&text.replace(mark, "")).into_owned())
            })),
            // That pipeline finds added tokens by itself: a blank is all that keeps it from them.
            None => self.encode_by_pipeline(&text.replace(mark, " ")),
        }
    }

    /// Ids of `text`; `clean` gives the form of a piece between added tokens that is cut into words.
    fn encode_quickly<'t>(
        &self,
        (splitter, encoder): (WordSplitter, WordEncoder<'_>),
        text: &'t str,
        clean: impl Fn(&'t str) -> Cow<'t, str>,
    ) -> Vec<u32> {
        self.inner.cache.with(|cache| {
            let mut ids = Vec::with_capacity(text.len() / 3);
            let mut rest = text;
            while let Some((before, id, behind)) = self.inner.added.split(rest) {
                cache.append(clean(before).as_bytes(), splitter, encoder, &mut ids);
                ids.push(id);
                rest = behind;
            }
            cache.append(clean(rest).as_bytes(), splitter, encoder, &mut ids);
            ids
        })
    }

    /// Number of ids of `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count(&self, text: &str) -> Result<usize> {
        let Some((splitter, encoder)) = self.quick_way() else {
            return Ok(self.encode_by_pipeline(text)?.len());
        };
        Ok(self.inner.cache.with(|cache| {
            let mut count = 0;
            let mut of_words = |text: &str| {
                count += cache.count(nfc(text).as_bytes(), splitter, encoder);
            };
            let mut n_added = 0;
            let mut rest = text;
            while let Some((before, _, behind)) = self.inner.added.split(rest) {
                of_words(before);
                n_added += 1;
                rest = behind;
            }
            of_words(rest);
            count + n_added
        }))
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token (padding of the embedding) give nothing,
    /// and `skip_special` leaves special tokens out (`<think>` is not one).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder of the file fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if self.inner.splitter.is_none() {
            let text = self.inner.pipeline()?.decode(ids, skip_special);
            return text.map_err(|source| Error::Tokenizer { source });
        }
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
        let added = self.inner.added.iter();
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
                spelling::append_bytes(&token.content, out);
            }
        } else if let Some(token) = self.inner.model.vocab.token(id) {
            spelling::append_bytes(token, out);
        }
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `dir`, each whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`] with the path; [`Error::Tokenizer`] if the `tokenizers` crate refuses the parts.
    pub fn save(&self, dir: &Path, template: &ChatTemplate) -> Result<()> {
        let pipeline = serde_json::to_vec(self.inner.pipeline()?).map_err(wrap)?;
        files::write(&dir.join("tokenizer.json"), &pipeline)?;
        let mut config = match &self.inner.config {
            Some(config) => config.clone(),
            None => self.new_config(),
        };
        if let Some(config) = config.as_object_mut() {
            config.insert("chat_template".into(), template.source().into());
        }
        let config = serde_json::to_vec_pretty(&config).map_err(wrap)?;
        files::write(&dir.join("tokenizer_config.json"), &config)?;
        let template_path = dir.join("chat_template.jinja");
        files::write(&template_path, template.source().as_bytes())?;
        Ok(())
    }

    /// A config that makes other stacks take tokenizer.json as it is: the class `Qwen2Tokenizer` would put its own word pattern in.
    fn new_config(&self) -> Value {
        let added = self.inner.added.iter();
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
        let added = AddedTokens::new(file.added_tokens, &model.vocab)?;
        let required = |token: &str| {
            let id = added.id(token).or_else(|| model.vocab.id(token));
            id.ok_or_else(|| Error::MissingToken {
                token: token.to_owned(),
            })
        };
        let (turn_end, document_end) = (required(TURN_END)?, required(DOCUMENT_END)?);
        let highest_added = added.highest_id().map_or(0, |id| id as usize + 1);
        let inner = Inner {
            vocab_size: model.vocab.n_ids().max(highest_added),
            bytes: Bytes::new(&model.vocab, &model.bpe).map(Box::new),
            model,
            steps: file.steps,
            added,
            config,
            turn_end,
            document_end,
            splitter: None,
            cache: CacheKey::new(),
            pipeline: OnceLock::new(),
        };
        Ok(Tokenizer {
            inner: Arc::new(inner.with_splitter()?),
        })
    }

    /// How to cut and encode words without the pipeline; `None` if only that can.
    fn quick_way(&self) -> Option<(WordSplitter, WordEncoder<'_>)> {
        let inner = &*self.inner;
        let encoder = WordEncoder {
            bpe: &inner.model.bpe,
            bytes: inner.bytes.as_deref()?,
        };
        Some((inner.splitter?, encoder))
    }

    /// The pipeline as the file describes it: what the quick way must agree with.
    pub(crate) fn encode_by_pipeline(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.pipeline()?.encode_fast(text, false);
        Ok(encoding
            .map_err(|source| Error::Tokenizer { source })?
            .get_ids()
            .to_vec())
    }

    /// Adds the words of `text`, as bytes, to the counts; added tokens in the text are no words.
    fn count_words(&self, text: &str, words: &mut BTreeMap<Vec<u8>, u64>) -> Result<()> {
        let pipeline = self.inner.pipeline()?;
        let added = pipeline.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(pipeline.get_normalizer(), text);
        if let Some(steps) = pipeline.get_pre_tokenizer() {
            steps
                .pre_tokenize(&mut pieces)
                .map_err(|source| Error::Tokenizer { source })?;
        }
        for (word, _, ids) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            if ids.is_none() {
                let mut bytes = Vec::with_capacity(word.len());
                spelling::append_bytes(word, &mut bytes);
                *words.entry(bytes).or_default() += 1;
            }
        }
        Ok(())
    }
}

impl Inner {
    /// Finds out whether the steps are Qwen's; for others the crate's pipeline is made at once, so that what it refuses is known now.
    fn with_splitter(mut self) -> Result<Self> {
        let is_plain =
            self.model.options.are_plain() && self.added.are_plain() && self.bytes.is_some();
        let pattern = if is_plain {
            self.steps.qwen_pattern()?
        } else {
            None
        };
        self.splitter = pattern.map(WordSplitter::new);
        if self.splitter.is_none() {
            self.pipeline()?;
        }
        Ok(self)
    }

    fn pipeline(&self) -> Result<&Pipeline> {
        if let Some(pipeline) = self.pipeline.get() {
            return Ok(pipeline);
        }
        let pipeline = file::pipeline(&self.model, &self.steps, &self.added)?;
        Ok(self.pipeline.get_or_init(|| pipeline))
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| self.model.vocab.id(token))
    }
}

/// A text in NFC.
fn nfc(text: &str) -> Cow<'_, str> {
    if is_surely_nfc(text) {
        return Cow::Borrowed(text);
    }
    let mut changed = NormalizedString::from(text);
    changed.nfc();
    Cow::Owned(changed.get().to_owned())
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
    use std::fs;

    use super::*;
    use crate::words;

    fn check_quick_way(tokenizer: &Tokenizer, text: &str) {
        assert!(tokenizer.inner.splitter.is_some());
        let expect = tokenizer.encode_by_pipeline(text).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expect, "{text:?}");
        assert_eq!(tokenizer.count(text).unwrap(), expect.len());
    }

    /// Alone, doubled, after white space and apostrophes and between letters; every character of the lower planes, and a sieve of the higher.
    #[test]
    fn quick_way_agrees_with_the_pipeline_on_every_character() {
        let newer = Tokenizer::train(["a b c"].into_iter(), 256).unwrap();
        let older = newer.clone().with_pattern(WordPattern::Qwen2).unwrap();
        let higher = (0x3400..=0x2_ffff).step_by(53);
        let all: Vec<char> = (0..0x3400)
            .chain(higher)
            .filter_map(char::from_u32)
            .collect();
        for chunk in all.chunks(512) {
            let text: String = chunk
                .iter()
                .map(|c| format!("{c} {c}{c}  {c}a{c}'{c}e {c}'L{c}\n"))
                .collect();
            check_quick_way(&newer, &text);
            check_quick_way(&older, &text);
        }
    }

    #[test]
    fn surely_nfc_characters_are_left_alone_by_nfc() {
        let is_stable = |c: &char| words::is_surely_nfc(c.encode_utf8(&mut [0; 4]));
        let chars: Vec<char> = ('\0'..=char::MAX).filter(is_stable).collect();
        for step in [1, 7, 331] {
            let text: String = (0..chars.len())
                .map(|i| chars[i * step % chars.len()])
                .collect();
            assert!(words::is_surely_nfc(&text));
            let mut normalized = NormalizedString::from(text.as_str());
            normalized.nfc();
            assert!(normalized.get() == text, "step {step}");
        }
    }

    /// A file whose steps are spelled otherwise than Qwen's, though they do the same, goes the other way: through the crate.
    #[test]
    fn other_way_agrees_with_the_quick_one() {
        let texts = [
            "She asked softly: \"Where's the café?\"\r\n  He didn't know.",
            "她轻声问：“灯塔在哪里？”——没有人知道1024年的事。",
            "Où est-il ? E\u{301}te\u{301}, 12 %, ＡＢＣ, ｶﾞ, 한국어, กำลังที่นั่น",
            "a<|im_start|>user\nb<|im_end|><think></think><|endoftext|> <tts_pad>",
            "",
            " \n\n\t x",
        ];
        let quick = Tokenizer::train(texts.into_iter(), 400).unwrap();
        let dir = tempfile::tempdir().unwrap();
        quick
            .save(dir.path(), &ChatTemplate::history_stable().unwrap())
            .unwrap();
        let path = dir.path().join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
        fs::write(&path, file.to_string()).unwrap();
        for pattern in [WordPattern::Qwen3_5, WordPattern::Qwen2] {
            let quick = quick.clone().with_pattern(pattern).unwrap();
            let other = Tokenizer::load(&path)
                .unwrap()
                .with_pattern(pattern)
                .unwrap();
            assert!(quick.inner.splitter.is_some() && other.inner.splitter.is_none());
            for text in texts {
                let ids = quick.encode(text).unwrap();
                assert_eq!(other.encode(text).unwrap(), ids, "{text:?}");
                assert_eq!(other.count(text).unwrap(), ids.len());
                assert_eq!(quick.count(text).unwrap(), ids.len());
                for skip_special in [false, true] {
                    let decoded = quick.decode(&ids, skip_special).unwrap();
                    assert_eq!(other.decode(&ids, skip_special).unwrap(), decoded);
                }
            }
            assert_eq!(other.vocab_size(), quick.vocab_size());
            assert_eq!(other.end_ids(), quick.end_ids());
        }
    }

    /// Ours are checked by our own reading of the file; the crate gives ids by its own.
    #[test]
    fn added_tokens_have_the_ids_that_the_crate_gives_them() {
        let tokenizer = Tokenizer::train(["some words, some more"].into_iter(), 300).unwrap();
        let pipeline = tokenizer.inner.pipeline().unwrap();
        let added = pipeline.get_added_vocabulary();
        let theirs = added.get_added_tokens_decoder();
        assert_eq!(theirs.len(), ADDED_TOKENS.len());
        for (content, special) in ADDED_TOKENS {
            let id = tokenizer.id(content).unwrap();
            assert_eq!(pipeline.token_to_id(content), Some(id), "{content}");
            assert_eq!(pipeline.id_to_token(id).as_deref(), Some(content));
            assert_eq!(theirs[&id].special, special, "{content}");
            assert_eq!(added.is_special_token(content), special, "{content}");
            assert!(tokenizer.is_added(id));
        }
    }

    #[test]
    fn byte_tokens_have_the_released_order() {
        let tokenizer = TokenizerFile::qwen3_5(byte_tokens(), Merges::default());
        let tokenizer = Tokenizer::from_file(tokenizer.unwrap(), None).unwrap();
        let ids = ["!", "Ġ", "Ń"].map(|token| tokenizer.id(token));
        assert_eq!(ids, [Some(0), Some(220), Some(255)]);
        assert_eq!(tokenizer.vocab_size(), 256 + ADDED_TOKENS.len());
    }
}
