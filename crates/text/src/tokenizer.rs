//! The byte-level BPE tokenizer: text to ids and back, over the `tokenizers` crate.
//! Its JSON is read here rather than by that crate, which buffers the whole model once more and so takes twice as long to load.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, Model, NormalizerWrapper, OffsetReferential, OffsetType,
    PostProcessorWrapper, PreTokenizer, PreTokenizerWrapper, TokenizerImpl,
};

use crate::bpe_trainer;
use crate::chat_template::ChatTemplate;
use crate::error::{Error, Result};
use crate::words::{WordCache, WordSplitter, is_always_nfc};

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

const TURN_END: &str = "<|im_end|>";
const DOCUMENT_END: &str = "<|endoftext|>";

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

type Pipeline = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A loaded tokenizer; a clone is cheap and shares the vocabulary, and every method may run on many threads at once.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    pipeline: Pipeline,
    /// tokenizer_config.json as read, so that a save hands it on.
    config: Option<Value>,
    turn_end: u32,
    document_end: u32,
    vocab_size: usize,
    /// How to cut words without the pipeline; `None` where its steps are others than Qwen's.
    splitter: Option<WordSplitter>,
    cache: WordCache,
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
            tokenizer_file_in(path)
        } else {
            path.to_path_buf()
        };
        let bytes = read(&path)?;
        let mut file = parse(&path, &bytes)?;
        let config_path = path.with_file_name("tokenizer_config.json");
        let config: Option<Value> = if config_path.is_file() {
            let bytes = read(&config_path)?;
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
        let bytes_only = Self::from_file(TokenizerFile::qwen3_5(byte_vocab(), Vec::new())?, None)?;
        let mut words: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        for text in texts {
            bytes_only.count_words(text, &mut words)?;
        }
        // 2. merges, and the vocabulary they build
        let learned = bpe_trainer::train(&words, vocab_size);
        let spell = |bytes: &[u8]| bytes.iter().map(|&b| char_of(b)).collect::<String>();
        let mut vocab = byte_vocab();
        vocab.extend(learned.tokens.iter().zip(0..).map(|(t, id)| (spell(t), id)));
        let merges = learned
            .merges
            .iter()
            .map(|(left, right)| Merge(spell(left), spell(right)))
            .collect();
        Self::from_file(TokenizerFile::qwen3_5(vocab, merges)?, None)
    }

    /// The same vocabulary with words cut by another pattern.
    ///
    /// # Errors
    /// [`Error::NoWordPattern`] where the tokenizer cuts by no regular expression.
    pub fn with_pattern(self, pattern: WordPattern) -> Result<Self> {
        let current = self.inner.pipeline.get_pre_tokenizer();
        let mut steps = serde_json::to_value(current).map_err(wrap)?;
        if !replace_regex(&mut steps, pattern.regex()) {
            return Err(Error::NoWordPattern);
        }
        let steps: PreTokenizerWrapper = serde_json::from_value(steps).map_err(wrap)?;
        let mut inner = Arc::unwrap_or_clone(self.inner);
        inner.pipeline.with_pre_tokenizer(Some(steps));
        inner.splitter = splitter_for(&inner.pipeline)?;
        Ok(Tokenizer {
            inner: Arc::new(inner),
        })
    }

    /// Ids of `text`; nothing is put in front or behind, and added tokens written in the text become their ids.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the pipeline fails, which no UTF-8 text is known to cause.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.each_word(text, |word_ids| ids.extend_from_slice(word_ids))?;
        Ok(ids)
    }

    /// Number of ids of `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn count(&self, text: &str) -> Result<usize> {
        let mut count = 0;
        self.each_word(text, |word_ids| count += word_ids.len())?;
        Ok(count)
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token (padding of the embedding) give nothing,
    /// and `skip_special` leaves special tokens out (`<think>` is not one).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder of the file fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .pipeline
            .decode(ids, skip_special)
            .map_err(|source| Error::Tokenizer { source })
    }

    /// Id of a token by its exact spelling (`<|im_start|>`), `None` if the vocabulary has none such.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.pipeline.token_to_id(token)
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
        let added = self.inner.pipeline.get_added_vocabulary();
        added.get_added_tokens_decoder().contains_key(&id)
    }

    /// Appends the bytes that `id` stands for: of a special token nothing if `skip_special`, of an id without a token nothing.
    pub fn append_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) {
        let added = self.inner.pipeline.get_added_vocabulary();
        if let Some(token) = added.get_added_tokens_decoder().get(&id) {
            if !(skip_special && token.special) {
                append_spelled(&token.content, out);
            }
        } else if let Some(token) = self.inner.pipeline.id_to_token(id) {
            append_spelled(&token, out);
        }
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into `dir`, each beside its name first and then renamed.
    ///
    /// # Errors
    /// [`Error::Write`] with the path.
    pub fn save(&self, dir: &Path, template: &ChatTemplate) -> Result<()> {
        fs::create_dir_all(dir).map_err(|source| Error::Write {
            path: dir.to_path_buf(),
            source,
        })?;
        let pipeline = serde_json::to_vec(&self.inner.pipeline).map_err(wrap)?;
        write(&dir.join("tokenizer.json"), &pipeline)?;
        let mut config = match &self.inner.config {
            Some(config) => config.clone(),
            None => self.new_config(),
        };
        if let Some(config) = config.as_object_mut() {
            config.insert("chat_template".into(), template.source().into());
        }
        let config = serde_json::to_vec_pretty(&config).map_err(wrap)?;
        write(&dir.join("tokenizer_config.json"), &config)?;
        let template_path = dir.join("chat_template.jinja");
        write(&template_path, template.source().as_bytes())
    }

    /// A config that makes other stacks take tokenizer.json as it is: the class `Qwen2Tokenizer` would put its own word pattern in.
    fn new_config(&self) -> Value {
        let added = self.inner.pipeline.get_added_tokens_decoder();
        let by_id: BTreeMap<u32, &AddedToken> = added.iter().map(|(id, t)| (*id, t)).collect();
        let decoder: serde_json::Map<String, Value> = by_id
            .into_iter()
            .map(|(id, t)| (id.to_string(), json!(t)))
            .collect();
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
        let highest = file.model.vocab.values().max().copied();
        let mut pipeline: Pipeline = TokenizerImpl::new(file.model.build()?);
        pipeline
            .with_normalizer(file.normalizer)
            .map_err(|source| Error::Tokenizer { source })?
            .with_pre_tokenizer(file.pre_tokenizer)
            .with_post_processor(file.post_processor)
            .with_decoder(file.decoder);
        let expected: Vec<(String, u32)> = file
            .added_tokens
            .iter()
            .map(|t| (t.token.content.clone(), t.id))
            .collect();
        pipeline
            .add_tokens(file.added_tokens.into_iter().map(|t| t.token))
            .map_err(|source| Error::Tokenizer { source })?;
        for (token, expected) in &expected {
            let got = pipeline.token_to_id(token).unwrap_or(u32::MAX);
            if got != *expected {
                let token = token.clone();
                return Err(Error::AddedTokenId {
                    token,
                    expected: *expected,
                    got,
                });
            }
        }
        let required = |token: &str| {
            pipeline
                .token_to_id(token)
                .ok_or_else(|| Error::MissingToken {
                    token: token.to_owned(),
                })
        };
        let (turn_end, document_end) = (required(TURN_END)?, required(DOCUMENT_END)?);
        let highest_added = expected.iter().map(|(_, id)| *id).max();
        let vocab_size = highest.max(highest_added).map_or(0, |id| id as usize + 1);
        let splitter = splitter_for(&pipeline)?;
        Ok(Tokenizer {
            inner: Arc::new(Inner {
                pipeline,
                config,
                turn_end,
                document_end,
                vocab_size,
                splitter,
                cache: WordCache::new(),
            }),
        })
    }

    /// Hands over the ids of `text`, word by word.
    fn each_word(&self, text: &str, mut take: impl FnMut(&[u32])) -> Result<()> {
        let Inner {
            pipeline, cache, ..
        } = &*self.inner;
        let Some(splitter) = &self.inner.splitter else {
            take(&self.encode_by_pipeline(text)?);
            return Ok(());
        };
        // Every added token begins with `<`.
        if !text.contains('<') && text.chars().all(is_always_nfc) {
            return cache.each(splitter.words(text), |word| self.encode_word(word), take);
        }
        let added = pipeline.get_added_vocabulary();
        let pieces = added.extract_and_normalize(pipeline.get_normalizer(), text);
        for (piece, _, ids) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            match ids {
                Some(ids) => ids.iter().for_each(|token| take(&[token.id])),
                None => {
                    let words = splitter.words(piece);
                    cache.each(words, |word| self.encode_word(word), &mut take)?;
                }
            }
        }
        Ok(())
    }

    fn encode_word(&self, word: &str) -> Result<Vec<u32>> {
        let spelt: String = word.bytes().map(char_of).collect();
        let tokens = self.inner.pipeline.get_model().tokenize(&spelt);
        let tokens = tokens.map_err(|source| Error::Tokenizer { source })?;
        Ok(tokens.into_iter().map(|token| token.id).collect())
    }

    /// The pipeline as the file describes it: what the quick way must agree with.
    pub(crate) fn encode_by_pipeline(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.pipeline.encode_fast(text, false);
        Ok(encoding
            .map_err(|source| Error::Tokenizer { source })?
            .get_ids()
            .to_vec())
    }

    /// Adds the words of `text`, as bytes, to the counts; added tokens in the text are no words.
    fn count_words(&self, text: &str, words: &mut BTreeMap<Vec<u8>, u64>) -> Result<()> {
        let pipeline = &self.inner.pipeline;
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
                append_spelled(word, &mut bytes);
                *words.entry(bytes).or_default() += 1;
            }
        }
        Ok(())
    }
}

/// The parts of tokenizer.json that matter here.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedTokenEntry>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: BpeFile,
}

#[derive(Deserialize)]
struct AddedTokenEntry {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct BpeFile {
    vocab: Vocab,
    merges: Vec<Merge>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// One merge, written `["a", "b"]` or, in older files, `"a b"`.
struct Merge(String, String);

impl TokenizerFile {
    /// The Qwen3.5 pipeline around a vocabulary, with its added tokens at the end.
    fn qwen3_5(vocab: Vocab, merges: Vec<Merge>) -> Result<Self> {
        let byte_level = byte_level();
        let pre_tokenizer = pre_tokenizer(WordPattern::Qwen3_5);
        let first_added = vocab.len() as u32;
        let added_tokens =
            ADDED_TOKENS
                .iter()
                .zip(first_added..)
                .map(|(&(content, special), id)| AddedTokenEntry {
                    id,
                    token: AddedToken::from(content, special).normalized(false),
                });
        Ok(TokenizerFile {
            added_tokens: added_tokens.collect(),
            normalizer: serde_json::from_value(json!({"type": "NFC"})).map_err(wrap)?,
            pre_tokenizer: serde_json::from_value(pre_tokenizer).map_err(wrap)?,
            post_processor: serde_json::from_value(byte_level.clone()).map_err(wrap)?,
            decoder: serde_json::from_value(byte_level).map_err(wrap)?,
            model: BpeFile {
                vocab,
                merges,
                unk_token: None,
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: false,
            },
        })
    }

    /// Adds the tokens of `added_tokens_decoder` that the file itself lacks, in id order.
    fn merge_added_tokens(&mut self, config: &Value, path: &Path) -> Result<()> {
        let Some(decoder) = config.get("added_tokens_decoder") else {
            return Ok(());
        };
        let decoder: BTreeMap<u32, AddedToken> =
            serde_json::from_value(decoder.clone()).map_err(|source| Error::Json {
                path: path.to_path_buf(),
                source,
            })?;
        for (id, token) in decoder {
            if !self
                .added_tokens
                .iter()
                .any(|t| t.token.content == token.content)
            {
                self.added_tokens.push(AddedTokenEntry { id, token });
            }
        }
        self.added_tokens.sort_by_key(|t| t.id);
        Ok(())
    }
}

impl BpeFile {
    fn build(self) -> Result<BPE> {
        let merges = self.merges.into_iter().map(|Merge(a, b)| (a, b)).collect();
        let mut builder = BpeBuilder::new()
            .vocab_and_merges(self.vocab, merges)
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        // The words that come twice are in a cache of our own.
        builder = builder.cache_capacity(0);
        if let Some(prefix) = self.continuing_subword_prefix.filter(|p| !p.is_empty()) {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix.filter(|s| !s.is_empty()) {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder
            .build()
            .map_err(|source| Error::Tokenizer { source })
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct MergeVisitor;
        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = Merge;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a merge, [\"a\", \"b\"] or \"a b\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Merge, E> {
                let (left, right) = text
                    .split_once(' ')
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))?;
                Ok(Merge(left.to_owned(), right.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut parts: A,
            ) -> std::result::Result<Merge, A::Error> {
                let missing = |n| <A::Error as serde::de::Error>::invalid_length(n, &"2 parts");
                let left = parts.next_element()?.ok_or_else(|| missing(0))?;
                let right = parts.next_element()?.ok_or_else(|| missing(1))?;
                Ok(Merge(left, right))
            }
        }
        deserializer.deserialize_any(MergeVisitor)
    }
}

fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
}

fn pre_tokenizer(pattern: WordPattern) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern.regex()}, "behavior": "Isolated", "invert": false},
        byte_level(),
    ]})
}

/// A splitter that does what the pipeline's own steps do, if those are Qwen's: NFC, one of the two patterns, bytes, and added tokens
/// that stand for themselves.
fn splitter_for(pipeline: &Pipeline) -> Result<Option<WordSplitter>> {
    let added = pipeline.get_added_vocabulary().get_added_tokens_decoder();
    let is_plain = |t: &AddedToken| {
        t.content.starts_with('<') && !(t.normalized || t.single_word || t.lstrip || t.rstrip)
    };
    let normalizer = serde_json::to_value(pipeline.get_normalizer()).map_err(wrap)?;
    if normalizer != json!({"type": "NFC"}) || !added.values().all(is_plain) {
        return Ok(None);
    }
    let mut steps = serde_json::to_value(pipeline.get_pre_tokenizer()).map_err(wrap)?;
    if let Some(byte_level) = steps.pointer_mut("/pretokenizers/1") {
        // Where offsets are trimmed changes no id.
        byte_level["trim_offsets"] = false.into();
    }
    let pattern = [WordPattern::Qwen3_5, WordPattern::Qwen2]
        .into_iter()
        .find(|&p| steps == pre_tokenizer(p));
    Ok(pattern.and_then(WordSplitter::new))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<TokenizerFile> {
    let source = match serde_json::from_slice(bytes) {
        Ok(file) => return Ok(file),
        Err(source) => source,
    };
    // A file of another model fails somewhere inside; its own name for the model says more than that place does.
    let model = serde_json::from_slice::<Value>(bytes)
        .ok()
        .and_then(|v| v.get("model").and_then(|m| m.get("type")).cloned());
    let path = path.to_path_buf();
    match model.as_ref().and_then(Value::as_str) {
        Some(got) if got != "BPE" => Err(Error::NotBpe {
            path,
            got: got.to_owned(),
        }),
        _ => Err(Error::Json { path, source }),
    }
}

fn tokenizer_file_in(dir: &Path) -> PathBuf {
    let plain = dir.join("tokenizer.json");
    let packed = dir.join("tokenizer.json.gz");
    if !plain.is_file() && packed.is_file() {
        packed
    } else {
        plain
    }
}

/// A file's bytes, unpacked if they are gzip.
fn read(path: &Path) -> Result<Vec<u8>> {
    let wrap = |source| Error::Read {
        path: path.to_path_buf(),
        source,
    };
    let bytes = fs::read(path).map_err(wrap)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::with_capacity(bytes.len() * 3);
    flate2::read::GzDecoder::new(bytes.as_slice())
        .read_to_end(&mut unpacked)
        .map_err(wrap)?;
    Ok(unpacked)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let wrap = |source| Error::Write {
        path: path.to_path_buf(),
        source,
    };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    let mut file = fs::File::create(&beside).map_err(wrap)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path))
        .map_err(wrap)
}

fn wrap(source: serde_json::Error) -> Error {
    Error::Tokenizer {
        source: source.into(),
    }
}

/// Puts `regex` in the place of the first `{"Regex": ..}`; false if there is none.
fn replace_regex(steps: &mut Value, regex: &str) -> bool {
    match steps {
        Value::Object(map) => {
            if let Some(place) = map.get_mut("Regex") {
                *place = regex.into();
                return true;
            }
            map.values_mut().any(|v| replace_regex(v, regex))
        }
        Value::Array(items) => items.iter_mut().any(|v| replace_regex(v, regex)),
        _ => false,
    }
}

/// The 256 byte tokens in the released order: by the character that spells the byte.
fn byte_vocab() -> Vocab {
    let mut spellings: Vec<char> = (0..=255).map(char_of).collect();
    spellings.sort_unstable();
    spellings
        .into_iter()
        .zip(0..)
        .map(|(c, id)| (c.to_string(), id))
        .collect()
}

/// How byte-level BPE spells a byte: printable Latin-1 as itself, the 68 others as U+0100 and on, in byte order (GPT-2's table).
pub(crate) fn char_of(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as char,
        0..=0x20 => char_from(0x100 + u32::from(byte)),
        0x7f..=0xa0 => char_from(0x121 + u32::from(byte - 0x7f)),
        0xad => '\u{143}',
    }
}

fn char_from(code: u32) -> char {
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn byte_of(spelling: char) -> Option<u8> {
    let code = spelling as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Bytes of a token; one with a character that spells no byte stands for itself (added tokens with spaces).
fn append_spelled(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for spelling in token.chars() {
        match byte_of(spelling) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_spellings_are_one_to_one() {
        let bytes: Vec<Option<u8>> = (0..=255).map(|b| byte_of(char_of(b))).collect();
        assert_eq!(bytes, (0..=255).map(Some).collect::<Vec<_>>());
    }

    fn check_quick_way(tokenizer: &Tokenizer, text: &str) {
        assert!(tokenizer.inner.splitter.is_some());
        let expect = tokenizer.encode_by_pipeline(text).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expect, "{text:?}");
        assert_eq!(tokenizer.count(text).unwrap(), expect.len());
    }

    /// Alone, doubled, after white space and between letters; every character of the lower planes, and a sieve of the higher.
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
                .map(|c| format!("{c} {c}{c}  {c}a{c}\n"))
                .collect();
            check_quick_way(&newer, &text);
            check_quick_way(&older, &text);
        }
    }

    #[test]
    fn always_nfc_characters_are_left_alone_by_nfc() {
        let tokenizer = Tokenizer::train(["a"].into_iter(), 256).unwrap();
        let chars: Vec<char> = ('\0'..=char::MAX).filter(|&c| is_always_nfc(c)).collect();
        for step in [1, 7, 331] {
            let text: String = (0..chars.len())
                .map(|i| chars[i * step % chars.len()])
                .filter(|&c| c != '<')
                .collect();
            check_quick_way(&tokenizer, &text);
        }
    }

    #[test]
    fn byte_vocab_has_the_released_order() {
        let vocab = byte_vocab();
        assert_eq!(vocab.len(), 256);
        assert_eq!((vocab["!"], vocab["Ġ"], vocab["Ń"]), (0, 220, 255));
    }
}
