//! tokenizer.json: what is read of it, which of its steps work here, and how it is written, byte for byte as the `tokenizers` crate does.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use files::outside;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::added_tokens::{AddedToken, AddedTokenEntry, AddedTokens};
use crate::bpe_file::{BpeFile, BpeOptions, Merges, Model, Tokens};
use crate::error::{Error, Result};
use crate::tokenizer::{ADDED_TOKENS, WordPattern};

/// Longest JSON of a step in a message, in characters.
const STEP_CHARS: usize = 300;

/// The parts of tokenizer.json that matter here.
#[derive(Deserialize)]
pub(crate) struct TokenizerFile {
    #[serde(default)]
    pub added_tokens: Vec<AddedTokenEntry>,
    #[serde(flatten)]
    pub steps: Steps,
    pub model: BpeFile,
}

/// What happens around the model, as the file says it, so that a save hands it on.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Steps {
    normalizer: Value,
    pre_tokenizer: Value,
    /// Puts tokens in front of a text and behind it, which is the chat template's task here.
    post_processor: Value,
    decoder: Value,
}

/// What the steps amount to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pipeline {
    /// Whether texts are brought to NFC.
    pub normalizes: bool,
    /// What cuts them into words.
    pub pattern: WordPattern,
}

/// The file as it is written; the fields stand in the order of the crate.
#[derive(Serialize)]
struct Written<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: &'a [AddedTokenEntry],
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: &'a Value,
    decoder: &'a Value,
    model: &'a Model,
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
    pub fn qwen3_5(vocab: Tokens, merges: Merges) -> TokenizerFile {
        let first_added = vocab.len() as u32;
        let added_tokens =
            ADDED_TOKENS
                .iter()
                .zip(first_added..)
                .map(|(&(content, special), id)| AddedTokenEntry {
                    id,
                    token: AddedToken {
                        content: content.to_owned(),
                        single_word: false,
                        lstrip: false,
                        rstrip: false,
                        normalized: false,
                        special,
                    },
                });
        TokenizerFile {
            added_tokens: added_tokens.collect(),
            steps: Steps {
                normalizer: json!({"type": "NFC"}),
                pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": WordPattern::Qwen3_5.regex()},
                        "behavior": "Isolated",
                        "invert": false,
                    },
                    byte_level(),
                ]}),
                post_processor: byte_level(),
                decoder: byte_level(),
            },
            model: BpeFile {
                vocab,
                merges,
                options: BpeOptions::default(),
            },
        }
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
fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
}

/// The bytes of tokenizer.json.
///
/// # Errors
/// [`Error::ToJson`], which no tokenizer is known to cause.
pub(crate) fn to_json(model: &Model, steps: &Steps, added: &AddedTokens) -> Result<Vec<u8>> {
    let written = Written {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added.entries(),
        normalizer: &steps.normalizer,
        pre_tokenizer: &steps.pre_tokenizer,
        post_processor: &steps.post_processor,
        decoder: &steps.decoder,
        model,
    };
    serde_json::to_vec(&written).map_err(|source| Error::ToJson { source })
}

impl Steps {
    /// What the steps amount to, if they are those of Qwen's folders: NFC or nothing, words by one of the two patterns, bytes, and
    /// bytes back. Steps may stand in sequences within each other.
    ///
    /// # Errors
    /// [`Error::Pipeline`] with the first part that is another.
    pub fn pipeline(&self) -> Result<Pipeline> {
        let refused = |part, step: &Value, known| Error::Pipeline {
            part,
            got: described(step),
            known,
        };
        // 1. text to text
        let normalizers = flat(&self.normalizer, "normalizers");
        if normalizers.iter().any(|step| step["type"] != "NFC") {
            return Err(refused("normalizer", &self.normalizer, "NFC or none"));
        }
        // 2. text to words
        let pattern = match flat(&self.pre_tokenizer, "pretokenizers")[..] {
            [split, bytes] if is_bytes_only(bytes) => pattern_of(split),
            _ => None,
        };
        let known =
            "a Split by Qwen's pattern and a ByteLevel without a pattern or a space in front";
        let pattern =
            pattern.ok_or_else(|| refused("pre_tokenizer", &self.pre_tokenizer, known))?;
        // 3. tokens to text
        match flat(&self.decoder, "decoders")[..] {
            [step] if step["type"] == "ByteLevel" => {}
            _ => return Err(refused("decoder", &self.decoder, "ByteLevel")),
        }
        Ok(Pipeline {
            normalizes: !normalizers.is_empty(),
            pattern,
        })
    }

    /// Cuts words by another pattern.
    pub fn set_pattern(&mut self, pattern: WordPattern) {
        replace_regex(&mut self.pre_tokenizer, pattern.regex());
    }
}

/// The steps of a part in order, those of sequences in their place; none where there is no such part.
fn flat<'s>(step: &'s Value, list: &str) -> Vec<&'s Value> {
    match (step, &step["type"], &step[list]) {
        (Value::Null, ..) => Vec::new(),
        (_, Value::String(kind), Value::Array(steps)) if kind == "Sequence" => {
            steps.iter().flat_map(|step| flat(step, list)).collect()
        }
        _ => vec![step],
    }
}

fn pattern_of(split: &Value) -> Option<WordPattern> {
    if split["type"] != "Split" || split["behavior"] != "Isolated" || split["invert"] == true {
        return None;
    }
    let patterns = [WordPattern::Qwen3_5, WordPattern::Qwen2];
    patterns
        .into_iter()
        .find(|p| split["pattern"]["Regex"] == p.regex())
}

/// Whether a step only spells bytes. Where offsets are trimmed changes no id.
fn is_bytes_only(step: &Value) -> bool {
    step["type"] == "ByteLevel" && step["add_prefix_space"] == false && step["use_regex"] == false
}

/// A step as a message names it.
fn described(step: &Value) -> String {
    if step.is_null() {
        return "missing".to_owned();
    }
    let text = step.to_string();
    match text.char_indices().nth(STEP_CHARS) {
        None => format!("`{text}`"),
        Some((end, _)) => format!("`{}..`", &text[..end]),
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
    if !plain.exists() && packed.exists() {
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
    let bytes = outside::read(path, outside::MOST_DATA_BYTES).map_err(wrap)?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    // The last four bytes of a gzip file say how long its content is; a lie costs only a growing buffer.
    let length = bytes
        .last_chunk::<4>()
        .map_or(0, |n| u32::from_le_bytes(*n) as usize);
    let mut unpacked = Vec::with_capacity(length.min(bytes.len() * 8));
    let decoder = flate2::read::GzDecoder::new(bytes.as_slice());
    outside::Bounded::unpacking(decoder, bytes.len() as u64)
        .read_to_end(&mut unpacked)
        .map_err(wrap)?;
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Steps {
        TokenizerFile::qwen3_5(Tokens::default(), Merges::default()).steps
    }

    fn check(steps: &Steps, normalizes: bool, pattern: WordPattern) {
        let expect = Pipeline {
            normalizes,
            pattern,
        };
        assert_eq!(steps.pipeline().unwrap(), expect);
    }

    fn check_refused(steps: &Steps, part: &str, name: &str) {
        let error = steps.pipeline().unwrap_err();
        assert!(matches!(&error, Error::Pipeline { part: got, .. } if *got == part));
        let text = error.to_string();
        assert!(text.contains(name) && text.len() < 700, "{text}");
    }

    #[test]
    fn qwen_steps_are_known_however_they_are_nested() {
        let mut steps = steps();
        check(&steps, true, WordPattern::Qwen3_5);
        steps.set_pattern(WordPattern::Qwen2);
        check(&steps, true, WordPattern::Qwen2);
        steps.normalizer = json!({"type": "Sequence", "normalizers": [steps.normalizer]});
        steps.decoder = json!({"type": "Sequence", "decoders": [steps.decoder]});
        let inner = steps.pre_tokenizer.clone();
        steps.pre_tokenizer = json!({"type": "Sequence", "pretokenizers": [inner]});
        check(&steps, true, WordPattern::Qwen2);
        steps.normalizer = json!({"type": "Sequence", "normalizers": []});
        check(&steps, false, WordPattern::Qwen2);
        steps.normalizer = Value::Null;
        check(&steps, false, WordPattern::Qwen2);
    }

    #[test]
    fn where_offsets_are_trimmed_does_not_matter() {
        let mut steps = steps();
        let bytes = &mut steps.pre_tokenizer["pretokenizers"][1];
        bytes["trim_offsets"] = true.into();
        check(&steps, true, WordPattern::Qwen3_5);
    }

    #[test]
    fn other_normalizers_are_refused_by_name() {
        for name in ["NFKC", "Lowercase", "BertNormalizer"] {
            let normalizer = json!({"type": name});
            let mut steps = steps();
            steps.normalizer =
                json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, normalizer]});
            check_refused(&steps, "normalizer", name);
            steps.normalizer = normalizer;
            check_refused(&steps, "normalizer", name);
        }
    }

    #[test]
    fn other_words_are_refused_by_name() {
        let with = |change: fn(&mut Value)| {
            let mut steps = steps();
            change(&mut steps.pre_tokenizer);
            steps
        };
        let check = |change, name| check_refused(&with(change), "pre_tokenizer", name);
        check(|step| *step = Value::Null, "is missing");
        check(|step| *step = json!({"type": "Metaspace"}), "Metaspace");
        check(|step| *step = byte_level(), "ByteLevel");
        for (key, value, name) in [
            ("pattern", json!({"Regex": "\\w+"}), "\\w+"),
            ("pattern", json!({"String": " "}), "String"),
            ("behavior", json!("Removed"), "Removed"),
            ("invert", json!(true), "Split"),
            ("type", json!("Digits"), "Digits"),
        ] {
            let mut steps = steps();
            steps.pre_tokenizer["pretokenizers"][0][key] = value;
            check_refused(&steps, "pre_tokenizer", name);
        }
        for key in ["use_regex", "add_prefix_space"] {
            let mut steps = steps();
            steps.pre_tokenizer["pretokenizers"][1][key] = true.into();
            check_refused(&steps, "pre_tokenizer", "ByteLevel");
        }
    }

    #[test]
    fn other_decoders_are_refused_by_name() {
        let mut steps = steps();
        steps.decoder = json!({"type": "WordPiece"});
        check_refused(&steps, "decoder", "WordPiece");
        steps.decoder = Value::Null;
        check_refused(&steps, "decoder", "missing");
    }
}
