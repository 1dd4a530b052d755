//! tokenizer.json: read without building what only saving needs, and the `tokenizers` pipeline made of it where that is needed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab as VocabMap};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerImpl,
};

use crate::added_tokens::{AddedTokenEntry, AddedTokens};
use crate::bpe_file::{BpeFile, BpeOptions, Merges, Model, Tokens};
use crate::error::{Error, Result};
use crate::tokenizer::{ADDED_TOKENS, WordPattern};

/// The crate's own tokenizer.
pub(crate) type Pipeline = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// The parts of tokenizer.json that matter here.
#[derive(Deserialize)]
pub(crate) struct TokenizerFile {
    #[serde(default)]
    pub added_tokens: Vec<AddedTokenEntry>,
    #[serde(flatten)]
    pub steps: Steps,
    pub model: BpeFile,
}

/// What happens around the model.
#[derive(Clone, Deserialize)]
pub(crate) struct Steps {
    pub normalizer: Option<NormalizerWrapper>,
    pub pre_tokenizer: Option<PreTokenizerWrapper>,
    pub post_processor: Option<PostProcessorWrapper>,
    pub decoder: Option<DecoderWrapper>,
}

impl TokenizerFile {
    /// Reads a file, unpacking it if it is gzip.
    ///
    /// # Errors
    /// A missing file, broken JSON, or a model other than BPE.
    pub fn read(path: &Path) -> Result<TokenizerFile> {
        let bytes = read(path)?;
        let source = match serde_json::from_slice(&bytes) {
            Ok(file) => return Ok(file),
            Err(source) => source,
        };
        // A file of another model fails somewhere inside; its own name for the model says more than that place does.
        let model = serde_json::from_slice::<Value>(&bytes)
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

    /// The Qwen3.5 pipeline around a vocabulary, with its added tokens at the end.
    pub fn qwen3_5(vocab: Tokens, merges: Merges) -> Result<TokenizerFile> {
        let first_added = vocab.len() as u32;
        let added_tokens =
            ADDED_TOKENS
                .iter()
                .zip(first_added..)
                .map(|(&(content, special), id)| AddedTokenEntry {
                    id,
                    token: AddedToken::from(content, special).normalized(false),
                });
        let steps = json!({
            "normalizer": {"type": "NFC"}, "pre_tokenizer": pre_tokenizer(WordPattern::Qwen3_5),
            "post_processor": byte_level(), "decoder": byte_level(),
        });
        Ok(TokenizerFile {
            added_tokens: added_tokens.collect(),
            steps: serde_json::from_value(steps).map_err(wrap)?,
            model: BpeFile {
                vocab,
                merges,
                options: BpeOptions::default(),
            },
        })
    }

    /// Adds the tokens of `added_tokens_decoder` that the file itself lacks, in id order.
    pub fn merge_added_tokens(&mut self, config: &Value, path: &Path) -> Result<()> {
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

/// The crate's tokenizer of the same parts.
///
/// # Errors
/// [`Error::Tokenizer`] if the crate refuses them.
pub(crate) fn pipeline(model: &Model, steps: &Steps, added: &AddedTokens) -> Result<Pipeline> {
    let wrap = |source| Error::Tokenizer { source };
    let vocab: VocabMap = model
        .vocab
        .iter()
        .map(|(token, id)| (token.to_owned(), id))
        .collect();
    let token = |id| model.vocab.token(id).unwrap_or_default().to_owned();
    let merges = model
        .bpe
        .merges()
        .into_iter()
        .map(|(left, right)| (token(left), token(right)));
    let options = &model.options;
    let mut builder = BpeBuilder::new()
        .vocab_and_merges(vocab, merges.collect())
        .fuse_unk(options.fuse_unk)
        .byte_fallback(options.byte_fallback)
        .ignore_merges(options.ignore_merges);
    if let Some(token) = &options.unk_token {
        builder = builder.unk_token(token.clone());
    }
    let mut pipeline: Pipeline = TokenizerImpl::new(builder.build().map_err(wrap)?);
    pipeline
        .with_normalizer(steps.normalizer.clone())
        .map_err(wrap)?
        .with_pre_tokenizer(steps.pre_tokenizer.clone())
        .with_post_processor(steps.post_processor.clone())
        .with_decoder(steps.decoder.clone());
    let added = added.iter().map(|entry| entry.token.clone());
    pipeline.add_tokens(added).map_err(wrap)?;
    Ok(pipeline)
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

impl Steps {
    /// The pattern if the steps are Qwen's: NFC, words by one of the two patterns, bytes, and bytes back.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the crate cannot say what its steps are.
    pub fn qwen_pattern(&self) -> Result<Option<WordPattern>> {
        let normalizer = serde_json::to_value(&self.normalizer).map_err(wrap)?;
        let decoder = serde_json::to_value(&self.decoder).map_err(wrap)?;
        if normalizer != json!({"type": "NFC"}) || decoder["type"] != json!("ByteLevel") {
            return Ok(None);
        }
        let mut words = serde_json::to_value(&self.pre_tokenizer).map_err(wrap)?;
        if let Some(byte_level) = words.pointer_mut("/pretokenizers/1") {
            // Where offsets are trimmed changes no id.
            byte_level["trim_offsets"] = false.into();
        }
        let patterns = [WordPattern::Qwen3_5, WordPattern::Qwen2];
        Ok(patterns.into_iter().find(|&p| words == pre_tokenizer(p)))
    }

    /// Cuts words by another pattern.
    ///
    /// # Errors
    /// [`Error::NoWordPattern`] where words are cut by no regular expression.
    pub fn set_pattern(&mut self, pattern: WordPattern) -> Result<()> {
        let mut words = serde_json::to_value(&self.pre_tokenizer).map_err(wrap)?;
        if !replace_regex(&mut words, pattern.regex()) {
            return Err(Error::NoWordPattern);
        }
        self.pre_tokenizer = serde_json::from_value(words).map_err(wrap)?;
        Ok(())
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

/// `tokenizer.json` of a folder, or `tokenizer.json.gz` if only that is there.
pub(crate) fn file_in(dir: &Path) -> PathBuf {
    let plain = dir.join("tokenizer.json");
    let packed = dir.join("tokenizer.json.gz");
    if !plain.is_file() && packed.is_file() {
        packed
    } else {
        plain
    }
}

/// A file's bytes, unpacked if they are gzip.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let wrap = |source| Error::Read {
        path: path.to_path_buf(),
        source,
    };
    let bytes = fs::read(path).map_err(wrap)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    // The last four bytes of a gzip file say how long its content is; a lie costs only a growing buffer.
    let length = bytes
        .last_chunk::<4>()
        .map_or(0, |n| u32::from_le_bytes(*n) as usize);
    let mut unpacked = Vec::with_capacity(length.min(bytes.len() * 8));
    flate2::read::GzDecoder::new(bytes.as_slice())
        .read_to_end(&mut unpacked)
        .map_err(wrap)?;
    Ok(unpacked)
}

pub(crate) fn wrap(source: serde_json::Error) -> Error {
    Error::Tokenizer {
        source: source.into(),
    }
}
